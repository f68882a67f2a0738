"""Pareto-smoothed importance sampling, one text in both packages: tested once, by its path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_psis", ROOT / "numpyro_vae_ext" / "_psis.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules["_psis"] = found
    spec.loader.exec_module(found)
    del sys.modules["_psis"]
    return found


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


@pytest.mark.parametrize("size", [60, 1_000, 5_000])
def test_agrees_with_arviz(module: ModuleType, size: int) -> None:
    """ArviZ normalises the weights; from 1.0 on it takes them with the other sign."""
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
    assert np.isfinite(module.psis(1e-200 * noise).khat)


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
