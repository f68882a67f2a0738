"""Pareto-smoothed importance sampling, one text in both packages: tested once, by its path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "numpyro_vae_ext"


def load(file: str) -> ModuleType:
    """The module alone: its package needs a backend."""
    name = f"alone_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, PACKAGE / file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # Dataclasses look their module up.
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load("_psis.py")


@pytest.fixture(scope="module")
def report(module: ModuleType) -> Callable[..., Any]:
    """What ``diagnostics.importance`` returns for given log-weights."""
    file = load("diagnostics/_importance.py")

    def make(log_weights: np.ndarray, plates: tuple[str, ...] = ("data",)) -> Any:
        size = len(log_weights)
        return file.report(
            log_weights,
            *module.psis(log_weights),
            threshold=module.threshold(size),
            tail_length=module.tail_length(size),
            plates=plates,
        )

    return make


def pareto(khat: float, size: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights of a Pareto distribution with that shape."""
    return khat * np.random.default_rng(seed).standard_exponential(size)


def normal(variance: float, size: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Ratios of N(0, 1) to a guide N(0, variance)."""
    z = np.sqrt(variance) * np.random.default_rng(seed).standard_normal(size)
    return 0.5 * z**2 * (1 / variance - 1) + 0.5 * np.log(variance)


@pytest.mark.parametrize("shape", [0.1, 0.3, 0.5, 0.7, 1.0, 2.0])
def test_shape_of_exact_pareto_weights(module: ModuleType, shape: float) -> None:
    """The prior of 10 draws at 1/2 among M is known, and taken out of the mean."""
    num_samples, repeats = 20_000, 60
    found = module.psis(pareto(shape, (num_samples, repeats))).khat
    count = module.tail_length(num_samples)
    expected = (count * shape + 10 * 0.5) / (count + 10)
    # The likeliest shape has a variance of about (1 + k)^2 / M; a constant of the estimator, k / M.
    error = (1 + shape) / np.sqrt(count * repeats)
    assert abs(found.mean() - expected) < 4 * error
    assert 0.6 < found.std(ddof=1) * np.sqrt(count) / (1 + shape) < 1.4


@pytest.mark.parametrize("shape", [0.1, 0.4, 0.5, 0.6])
def test_shape_of_a_normal_guide(module: ModuleType, shape: float) -> None:
    """A guide N(0, s^2) of N(0, 1) has k = 1 - s^2."""
    found = module.psis(normal(1 - shape, (20_000, 20))).khat
    assert abs(found.mean() - shape) < 0.1


@pytest.mark.parametrize("correlation", [0.3, 0.5])
def test_shape_of_a_factorised_guide(module: ModuleType, correlation: float) -> None:
    """In general k = 1 - the smallest eigenvalue of Sq^1/2 Sp^-1 Sq^1/2.

    The factorised Normal with the least KL divergence from one of correlation r has variances
    1 - r^2, and so k = r.
    """
    target = np.array([[1.0, correlation], [correlation, 1.0]])
    variance = 1 / np.diag(np.linalg.inv(target))
    root = np.diag(np.sqrt(variance))
    product = root @ np.linalg.inv(target) @ root
    assert 1 - np.linalg.eigvalsh(product)[0] == pytest.approx(correlation)
    z = np.random.default_rng(0).standard_normal((20_000, 20, 2)) @ root
    squares = np.einsum("sbi,ij,sbj->sb", z, np.linalg.inv(target), z)
    found = module.psis(0.5 * ((z**2 / variance).sum(-1) - squares)).khat
    assert abs(found.mean() - correlation) < 0.1


def test_smoothed_weights_are_quantiles_below_the_largest(module: ModuleType) -> None:
    raw = pareto(0.6, (1_000, 3)) - 1_000.0
    smoothed, khat = module.psis(raw)
    count = module.tail_length(1_000)
    assert khat.shape == (3,)
    for column in range(3):
        order = np.argsort(raw[:, column])
        body, tail = order[:-count], order[-count:]
        assert np.array_equal(smoothed[body, column], raw[body, column])
        # The order of the draws and the constant are kept.
        assert np.all(np.diff(smoothed[tail, column]) >= 0)
        assert np.all(smoothed[:, column] <= raw[:, column].max())
        # Log-gaps of weights of shape k are its quantiles' once the cutoff is left out.
        cutoff = raw[body[-1], column]
        exceedances = np.exp(smoothed[tail, column] - cutoff) - 1
        k = khat[column]
        scale = exceedances[0] * k / np.expm1(-k * np.log1p(-0.5 / count))
        probabilities = (np.arange(count) + 0.5) / count
        expected = scale * np.expm1(-k * np.log1p(-probabilities)) / k
        largest = np.exp(raw[:, column].max() - cutoff) - 1
        assert np.allclose(exceedances, np.minimum(expected, largest), rtol=1e-9)


@pytest.mark.parametrize("size", [60, 900, 4_900])
def test_agrees_with_arviz(module: ModuleType, size: int) -> None:
    """ArviZ normalises the weights; from 1.0 on it takes them with the other sign.

    The sizes are those whose tail is a whole number: one of the two rounds it up, the other down.
    """
    arviz = pytest.importorskip("arviz")
    raw = np.concatenate([pareto(0.7, (size, 4)), normal(0.6, (size, 4))], axis=1)
    raw[:3, 0] = -np.inf
    smoothed, khat = module.psis(raw)
    if int(arviz.__version__.split(".")[0]) < 1:
        expected, shapes = arviz.psislw(raw.T.copy())
    else:
        from arviz_stats.base import array_stats

        expected, shapes = array_stats.psislw(-raw.T.copy())
    assert np.allclose(khat, shapes, rtol=0, atol=1e-10)
    normalised = smoothed - np.log(np.exp(smoothed).sum(axis=0))
    assert np.allclose(normalised, expected.T, rtol=0, atol=1e-10)


def test_batches_are_columns(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pareto(0.4, (300, 2, 5))
    raw[:, 1, 2] = np.round(raw[:, 1, 2], 1)  # ties: a tail of another length
    monkeypatch.setattr(module, "MOST_NUMBERS", 4 * (300 + module.tail_length(300) * 37))
    smoothed, khat = module.psis(raw)
    assert khat.shape == (2, 5)
    for place in np.ndindex(2, 5):
        one, k = module.psis(raw[:, *place])
        assert k.shape == ()
        assert np.allclose(khat[place], k, rtol=1e-12)
        assert np.allclose(smoothed[:, *place], one, rtol=0, atol=1e-12)


def test_constant_of_the_weights_is_kept(module: ModuleType) -> None:
    raw = pareto(0.5, (500,))
    smoothed, khat = module.psis(raw)
    for constant in (-5e4, 3e3):
        moved, k = module.psis(raw + constant)
        assert np.allclose(moved - constant, smoothed, rtol=0, atol=1e-9)
        assert np.allclose(k, khat, rtol=0, atol=1e-7)
    # At k = 1/2 the mean of exp(log w) is 1 / (1 - k).
    many = module.psis(pareto(0.5, (5_000, 50))).log_weights
    assert abs(np.exp(many).mean() - 2) < 0.05


def test_nearly_equal_weights(module: ModuleType) -> None:
    """Ratios within 1e-12 of one another have the shape of their differences."""
    noise = np.random.default_rng(0).standard_exponential(2_000)
    khat = module.psis(1e-12 * noise).khat
    assert abs(khat - module.psis(1e-3 * noise).khat) < 2e-2
    # At -1000 nats that is rounding; in single precision more is.
    assert module.psis(1e-12 * noise - 1_000.0).khat == -np.inf
    assert np.isfinite(module.psis(1e-5 * noise - 1_000.0).khat)
    assert module.psis((1e-5 * noise - 1_000.0).astype(np.float32)).khat == -np.inf
    # A single draw that stands out is rounding too, or says that nothing is known.
    for above, khat in ((1e-3, -np.inf), (1.0, np.inf)):
        assert module.psis(above * (np.arange(500) == 7)).khat == khat
    assert module.psis(np.arange(40) * 1e-16).khat == -np.inf


@pytest.mark.parametrize(("size", "khat"), [(1, np.inf), (2, -np.inf), (1_000, -np.inf)])
def test_constant_weights_have_no_tail(module: ModuleType, size: int, khat: float) -> None:
    smoothed, found = module.psis(np.full((size, 2), -7.0))
    assert np.array_equal(smoothed, np.full((size, 2), -7.0))
    assert np.array_equal(found, np.full(2, khat))


def test_finitely_many_values_have_no_tail(module: ModuleType) -> None:
    """Discrete latents: the largest weight is that of a quarter of the draws."""
    raw = np.repeat([0.3, -1.0, -1.0, -np.inf], 100)
    smoothed, khat = module.psis(raw)
    assert khat == -np.inf
    assert np.array_equal(smoothed, raw)


@pytest.mark.parametrize("size", [5, 20, 21, 99])
def test_few_draws(module: ModuleType, size: int) -> None:
    """Below 21 draws fewer than five stand out of the tail, and nothing is known."""
    raw = pareto(0.5, (size, 3))
    smoothed, khat = module.psis(raw)
    assert np.all(np.isfinite(khat)) == (size > 20)
    if size < 21:
        assert np.all(khat == np.inf)
        assert np.array_equal(smoothed, raw)
    assert module.threshold(99) < 0.5 < module.threshold(101)


def test_weights_of_zero(module: ModuleType) -> None:
    raw = pareto(0.5, (1_000, 3))
    raw[100:, 0] = -np.inf  # fewer draws than the tail has
    raw[4:, 1] = -np.inf
    raw[:, 2] = -np.inf
    smoothed, khat = module.psis(raw)
    assert np.array_equal(np.isinf(khat), [False, True, True])
    assert np.array_equal(smoothed == -np.inf, raw == -np.inf)
    # The zeros count as draws below the cutoff: as if they were merely tiny.
    tiny = np.where(np.isinf(raw[:, 0]), -800.0, raw[:, 0])
    assert module.psis(tiny).khat == khat[0]


@pytest.mark.parametrize("spread", [10.0, 300.0])
def test_hopeless_weights_are_finite(module: ModuleType, spread: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        smoothed, khat = module.psis(pareto(spread, (2_000, 3)))
    assert np.all(khat > 1)
    assert np.all(np.isfinite(smoothed))


def test_threshold(module: ModuleType) -> None:
    assert module.threshold(100) == pytest.approx(0.5)
    assert module.threshold(1_000) == pytest.approx(2 / 3)
    assert module.threshold(10_000) == pytest.approx(0.7)
    assert module.threshold(1) < 0


def test_wrong_weights(module: ModuleType) -> None:
    raw = np.zeros((6, 2))
    raw[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"got nan at \(4, 1\), and 1 of 12 in all\. Check the"):
        module.psis(raw)
    raw[2] = np.inf
    with pytest.raises(ValueError, match=r"got inf at \(2, 0\), and 3 of 12 in all\."):
        module.psis(raw)
    for shape in ((), (0,), (0, 3)):
        with pytest.raises(ValueError, match="at least one draw"):
            module.psis(np.zeros(shape))


def test_report_of_known_weights(report: Callable[..., Any]) -> None:
    """The formulas written out, with a constant that would overflow."""
    raw = normal(0.9, (2_000, 3)) + 900.0
    found = report(raw)
    for log_weights, evidence, error in (
        (raw, found.log_evidence, found.log_evidence_error),
        (found.smoothed_log_weights, found.smoothed, found.smoothed_error),
    ):
        weights = np.exp(log_weights - 900.0)
        mean = weights.mean(axis=0)
        assert np.allclose(evidence, np.log(mean) + 900.0, rtol=1e-12)
        deviation = weights.std(axis=0, ddof=1) / np.sqrt(2_000)
        assert np.allclose(error, deviation / mean, rtol=1e-9)
    normalised = weights / weights.sum(axis=0)
    assert np.allclose(found.ess, 1 / (normalised**2).sum(axis=0), rtol=1e-9)
    assert np.allclose(found.elbo, raw.mean(axis=0))
    assert np.allclose(found.elbo_error, raw.std(axis=0, ddof=1) / np.sqrt(2_000))
    assert found.good.dtype == bool
    assert np.array_equal(found.log_weights, raw)


@pytest.mark.parametrize("shape", [0.2, 0.4, 0.6])
def test_standard_errors_are_the_spread(report: Callable[..., Any], shape: float) -> None:
    """Over 400 repeats; the bias, which they leave out, is small where k-hat is."""
    found = report(normal(1 - shape, (1_000, 400)))
    ratio = found.smoothed_error[found.good].mean() / found.smoothed.std()
    assert 0.8 < ratio < 1.1
    assert 0.85 < found.khat_error.mean() / found.khat.std() < 1.15
    assert abs(found.smoothed.mean()) < 0.5 * found.smoothed.std() + 1e-3


def test_errors_are_left_out_where_there_is_no_variance(report: Callable[..., Any]) -> None:
    found = report(normal(0.4, (1_000, 200)))
    assert 0 < found.good.sum() < 200
    assert np.array_equal(np.isnan(found.smoothed_error), ~found.good)
    assert np.array_equal(np.isnan(found.log_evidence_error), found.khat >= 0.5)
    assert np.array_equal(found.good, found.khat < 2 / 3)
    # Where there is a variance, both estimates are one number up to their errors.
    sound = found.khat < 0.5
    gap = np.abs(found.smoothed - found.log_evidence)[sound]
    assert np.all(gap < found.log_evidence_error[sound])
    assert np.any(gap > 0)


def test_report_without_a_tail(report: Callable[..., Any]) -> None:
    """Equal weights, weights of 0 alone, and one draw."""
    found = report(np.stack([np.full(100, -2.0), np.full(100, -np.inf)], axis=1))
    assert found.khat.tolist() == [-np.inf, np.inf]
    assert found.good.tolist() == [True, False]
    assert found.ess.tolist() == [100.0, 0.0]
    assert found.smoothed.tolist() == [-2.0, -np.inf]
    assert found.smoothed_error[0] == found.khat_error[0] == 0.0
    assert np.isnan(found.smoothed_error[1])
    one = report(np.array([-3.0]), ())
    assert (one.smoothed, one.ess, bool(one.good)) == (-3.0, 1.0, False)


def test_report_as_a_table(report: Callable[..., Any]) -> None:
    pytest.importorskip("pandas")
    raw = normal(0.8, (100, 2, 3))
    found = report(raw, ("rows", "columns"))
    table = found.table.set_index(["rows", "columns"])
    assert len(table) == 6
    for name in ("khat", "khat_error", "ess", "elbo", "elbo_error", "smoothed", "smoothed_error"):
        assert table.loc[(1, 2), name] == getattr(found, name)[1, 2]
    assert table["good"].dtype == bool
    assert len(report(raw[:, 0, 0], ()).table) == 1


def test_report_in_a_line(report: Callable[..., Any]) -> None:
    raw = normal(0.5, (100, 1), seed=1)
    found = report(raw)
    shown = f"k-hat {found.khat[0]:.2f} in the middle and {found.khat[0]:.2f} at worst"
    assert repr(found) == (
        f"Importance(100 draws, 1 rows, {shown}, {int(found.good[0])} rows good, log evidence "
        f"{found.smoothed[0]:.2f} in all)"
    )
    assert repr(report(raw[:, 0], ())).startswith(
        f"Importance(100 draws, k-hat {found.khat[0]:.2f}"
    )
    assert repr(report(raw[:, :0])) == "Importance(100 draws, no rows)"


def test_report_as_a_plot(report: Callable[..., Any]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    raw = normal(0.4, (1_000, 12))
    raw[:, 3] = 0.0
    found = report(raw)
    axes = found.plot()
    assert axes.get_xlabel() == "data"
    drawn = {container.get_label(): container[0].get_data() for container in axes.containers}
    shown = np.isfinite(found.khat)
    for wanted, label in ((True, "good"), (False, "too large")):
        rows = np.flatnonzero(shown & (found.good == wanted))
        places, heights = drawn[f"{label} ({int((found.good == wanted).sum())})"]
        assert np.array_equal(places, rows)
        assert np.array_equal(heights, found.khat[rows])
    assert "1 without a tail to fit" in axes.get_title()
    joint = report(raw[:, 0], ())
    _, ours = pyplot.subplots()
    assert joint.plot(ours) is ours
    before, after = (line.get_ydata() for line in ours.lines)
    assert np.array_equal(before, np.sort(joint.log_weights)[::-1] - joint.smoothed)
    assert np.array_equal(after, np.sort(joint.smoothed_log_weights)[::-1] - joint.smoothed)
    assert np.all(np.diff(before) <= 0)
    pyplot.close("all")


@pytest.mark.parametrize(("library", "extra"), [("pandas", "arviz"), ("matplotlib", "examples")])
def test_report_names_the_extra(
    report: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, library: str, extra: str
) -> None:
    found = report(normal(0.8, (50, 2)))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"Install vae-ext\[{extra}\]"):
        _ = found.table if library == "pandas" else found.plot()


def test_resampled_places() -> None:
    """Each place as often as its weight says, up to one, in random order."""
    resampled = load("diagnostics/_groups.py").resampled
    weights = np.random.default_rng(0).dirichlet(np.ones(30))
    weights[4] = 0.0
    places = resampled(np.log(weights, where=weights > 0, out=np.full(30, -np.inf)), 500, 1)
    expected = 500 * weights / weights.sum()
    assert np.all(np.abs(np.bincount(places, minlength=30) - expected) < 1)
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.2
    with pytest.raises(ValueError, match="Expected a weight above 0 under num_importance > 1"):
        resampled(np.full(3, -np.inf), 5, 1)
