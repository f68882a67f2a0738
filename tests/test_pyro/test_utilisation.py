"""Latent utilisation against closed forms, quadrature, and a NumPy estimate of the same bounds."""

from __future__ import annotations

import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import poutine
from reference import utilisation as oracle
from test_pyro.models import family, shaken

from pyro_vae_ext.diagnostics import _utilisation, latent_utilisation
from pyro_vae_ext.guides import AutoPosterior

ROWS, NOISE = 12, 0.5
QUIET = {"progress_bar": False}
# The last dimension is idle; rows are in order, as those of a sorted data set.
SLOPE = np.array([[1.5, 0.0, 0.0], [0.0, 0.4, 0.0]])
SCALE = np.array([0.3, 0.8, 1.0])
WEIGHT = np.array([[1.0, 0.2, 0.0], [0.3, -0.7, 0.0]])
DATA = np.sort(np.random.default_rng(7).normal(size=(ROWS, 2)), 0)
MEAN = DATA @ SLOPE


def tensor(value) -> torch.Tensor:
    return torch.as_tensor(np.asarray(value), dtype=torch.get_default_dtype())


def pair(mean=MEAN, scale=SCALE, data=DATA, weight=WEIGHT):
    """The linear-Gaussian pair of the oracle."""
    mean, scale, data, weight = map(tensor, (mean, scale, data, weight))

    def model() -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(mean.shape[-1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, NOISE).to_event(1), obs=data)

    def guide() -> None:
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(mean, scale).to_event(1))

    return model, guide


def every_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw after draw, each shift in turn: the swap test takes each other row equally often."""

    def shifts(seed: int, num_draws: int, num_contrasts: int, num_rows: int) -> np.ndarray:
        steps = np.arange(num_draws)[:, None] + np.arange(min(num_contrasts, num_rows - 1))
        return 1 + steps % (num_rows - 1)

    monkeypatch.setattr(_utilisation, "other_rows", shifts)


def error_over_rows(rows: np.ndarray) -> np.ndarray:
    return rows.std(0, ddof=1) / np.sqrt(len(rows))


@pytest.mark.parametrize("case", CASES["diagnostics"]["latent_utilisation"])
def test_report(case: dict) -> None:
    """Every quantity is there, in one tidy table, whatever the chunks."""
    found = latent_utilisation(*pair(), **case)
    table = found.table
    assert list(table) == ["quantity", "site", "dimension", "estimate", "standard_error"]
    assert list(table["quantity"]) == (
        ["kl"] * 4
        + ["variance"] * 3
        + ["log_likelihood", "log_likelihood_swapped", "swap_drop", "mi_lower", "mi_upper"]
    )
    assert list(table["dimension"]) == [0, 1, 2, "all", 0, 1, 2] + ["all"] * 5
    assert list(table["site"]) == ["z"] * 7 + ["x"] * 3 + ["z"] * 2
    assert np.isfinite(table["estimate"]).all() and np.isfinite(table["standard_error"]).all()
    np.testing.assert_array_equal(table["estimate"][:3], found.kl["z"].estimate)
    np.testing.assert_array_equal(table["estimate"][4:7], found.variance["z"].estimate)
    assert tuple(table.iloc[9][["estimate", "standard_error"]]) == found.swap_drop
    assert found.num_rows == ROWS
    assert found.num_contrasts == min(case["num_contrasts"], ROWS - 1)
    assert found.count == found.active["z"].sum()


def test_linear_gaussian(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divergences, swap test and active units in closed form given the data."""
    every_shift(monkeypatch)
    found = latent_utilisation(*pair(), num_samples=8_800, num_contrasts=1, chunk_size=800, **QUIET)
    kl = oracle.kl(MEAN, SCALE)
    np.testing.assert_allclose(found.kl["z"].estimate, kl.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.kl["z"].standard_error, error_over_rows(kl), atol=1e-12)
    assert abs(found.kl["z"].estimate[2]) < 1e-12
    table = oracle.log_likelihoods(DATA, MEAN, SCALE, WEIGHT, NOISE)
    own, swapped = np.diag(table), oracle.others(table)
    # The standard deviation of one draw is below 6 nats in each of them.
    close = {"rtol": 0, "atol": 4 * 6 / np.sqrt(8_800 * ROWS)}
    np.testing.assert_allclose(found.kl_total.estimate, kl.sum(1).mean(), **close)
    np.testing.assert_allclose(found.log_likelihood.estimate, own.mean(), **close)
    np.testing.assert_allclose(found.log_likelihood_swapped.estimate, swapped.mean(), **close)
    np.testing.assert_allclose(found.swap_drop.estimate, (own - swapped).mean(), **close)
    for name, rows in (("log_likelihood", own), ("swap_drop", own - swapped)):
        error = getattr(found, name).standard_error
        np.testing.assert_allclose(error, error_over_rows(rows), rtol=0.05)
    np.testing.assert_allclose(found.variance["z"].estimate, MEAN.var(0, ddof=1), atol=0.03)
    products = (MEAN - MEAN.mean(0)) ** 2 * ROWS / (ROWS - 1)
    np.testing.assert_allclose(
        found.variance["z"].standard_error, error_over_rows(products), atol=0.02
    )
    assert found.count == 2 and found.active["z"].tolist() == [True, True, False]


@pytest.mark.parametrize("num_contrasts", [3, 50])
def test_bounds_are_those_of_numpy(num_contrasts: int) -> None:
    """The same estimator in NumPy, at 4 standard errors; the information lies between."""
    found = latent_utilisation(*pair(), num_samples=1_500, num_contrasts=num_contrasts, **QUIET)
    size = min(num_contrasts, ROWS - 1)
    truth = oracle.bounds(MEAN, SCALE, size, 20_000)
    for name in ("mi_lower", "mi_upper"):
        expected, error = truth[name]
        # Our draws are nearly as many: their error is no larger.
        assert abs(getattr(found, name).estimate - expected) < 4 * np.sqrt(2) * error, name
    value, error = truth["information"]
    assert found.mi_lower.estimate < value + 4 * error
    assert found.mi_upper.estimate > value - 4 * error
    assert found.mi_lower.estimate <= np.log(size + 1)
    if size < ROWS - 1:
        assert found.mi_lower.estimate < value - 4 * error < value + 4 * error
        assert found.mi_upper.estimate > value + 4 * error
    else:
        assert abs(found.mi_lower.estimate - value) < 4 * np.sqrt(2) * error


def test_other_rows_are_any_others() -> None:
    shifts = _utilisation.other_rows(0, 4_000, 3, 6)
    assert shifts.shape == (4_000, 3) and all(len(set(row)) == 3 for row in shifts)
    frequency = np.bincount(shifts.reshape(-1), minlength=6) / 4_000
    np.testing.assert_allclose(frequency, [0] + [0.6] * 5, atol=4 * np.sqrt(0.24 / 4_000))
    assert sorted(_utilisation.other_rows(0, 1, 50, 4)[0]) == [1, 2, 3]
    present = np.array([True, False, True, True])
    orders = {tuple(_utilisation.row_order(seed, present)) for seed in range(100)}
    assert len(orders) == 6 and {tuple(sorted(order)) for order in orders} == {(0, 2, 3)}


def test_collapsed_guide() -> None:
    """A posterior that is the prior, a decoder that does not listen: nothing at all."""
    zeros = np.zeros((ROWS, 3))
    found = latent_utilisation(*pair(zeros, np.ones(3), weight=0 * WEIGHT), **QUIET)
    assert found.count == 0
    assert found.swap_drop == (0.0, 0.0)
    for estimate in (found.kl["z"].estimate, found.mi_lower.estimate, found.mi_upper.estimate):
        np.testing.assert_allclose(estimate, 0.0, atol=1e-6)


def test_latents_of_all_rows_stay() -> None:
    """Given the one of all rows, the guide knows nothing of a row; across its draws it would."""
    data = tensor(DATA[:, 0])

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS):
            pyro.sample("z", dist.Normal(w, 1.0))

    found = latent_utilisation(model, guide, num_samples=10, num_contrasts=4, **QUIET)
    assert found.latent == ("z",)
    for estimate in (found.kl_total, found.kl["z"], found.mi_lower, found.mi_upper):
        np.testing.assert_allclose(estimate, np.zeros_like(estimate), atol=1e-5)


def quadrature(log_densities: np.ndarray, grid: np.ndarray) -> dict[str, float]:
    """Information, lower bound with one other row, and divergences of a number from N(0, 1)."""
    step = grid[1] - grid[0]
    density = np.exp(log_densities)
    np.testing.assert_allclose(density.sum(1) * step, 1.0, atol=1e-4)
    log_p = -0.5 * grid**2 - 0.5 * np.log(2 * np.pi)
    mean = (density * grid).sum(1) * step
    variance = (density * (grid - mean[:, None]) ** 2).sum(1) * step
    return {
        "information": oracle.information(log_densities, step),
        "one_contrast": oracle.one_contrast(log_densities, step),
        "kl": float((density * (log_densities - log_p)).sum(1).mean() * step),
        "kl_marginal": float((0.5 * (variance + mean**2 - 1 - np.log(variance))).mean()),
    }


def test_iaf_guide() -> None:
    """A flow in one dimension: divergences and information by quadrature."""
    x = tensor(3.0 * DATA[:, :1])
    posterior = shaken(family("IAF", latent_dim=1, context_dim=1, hidden_dims=(6,)), 0.2)

    def model() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            posterior("z", x)

    grid = np.linspace(-15, 15, 3_001)
    with torch.no_grad():
        log_q = posterior.log_prob(tensor(grid)[:, None, None].expand(-1, ROWS, 1), x)
    truth = quadrature(log_q.cpu().double().numpy().T, grid)
    assert truth["information"] > 0.1, "nothing to find"
    options = {"num_samples": 2_000, "chunk_size": 2_000, **QUIET}
    found = latent_utilisation(model, guide, num_contrasts=ROWS - 1, **options)
    assert found.marginal == ("z",)
    assert list(found.table["quantity"][:2]) == ["kl_marginal", "kl"]
    close = {"rtol": 0.02, "atol": 0.02}
    np.testing.assert_allclose(found.kl_total.estimate, truth["kl"], **close)
    np.testing.assert_allclose(found.kl["z"].estimate, [truth["kl_marginal"]], **close)
    np.testing.assert_allclose(found.mi_lower.estimate, truth["information"], **close)
    assert found.mi_upper.estimate > truth["information"]
    found = latent_utilisation(model, guide, num_contrasts=1, **options)
    np.testing.assert_allclose(found.mi_lower.estimate, truth["one_contrast"], **close)


def hierarchical(side: float, slope: float, rows: int, copies: int):
    """a ~ N(0, 1), z ~ N(slope x + a, side^2): q(z | x) is N(slope x, 1 + side^2).

    The data are there several times over, so that one run averages as many.
    """
    data = np.linspace(-1.5, 1.5, rows)
    x = tensor(np.repeat(data, copies))

    def model() -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            z = pyro.sample("z", dist.Normal(slope * x + a, side))
            scale = (1 + side**-2) ** -0.5
            reverse = dist.Normal((z - slope * x) * scale**2 / side**2, scale)
            pyro.factor("reverse", -reverse.log_prob(a), has_rsample=True)

    grid = np.linspace(-8, 8, 1_601)
    log_q = oracle.normal_log_prob(grid[:, None], slope * data[:, None, None], np.sqrt(1 + side**2))
    return model, guide, quadrature(log_q, grid)


@pytest.mark.parametrize("num_contrasts", [1, 7])
def test_auxiliary_guide(num_contrasts: int) -> None:
    """With few draws of the auxiliaries the bounds are wide, and on their own sides."""
    model, guide, truth = hierarchical(0.6, 1.5, 8, 250)
    options = {"num_samples": 4, "num_contrasts": num_contrasts, **QUIET}
    found = latent_utilisation(model, guide, **options)
    mean = 1.5 * np.repeat(np.linspace(-1.5, 1.5, 8), 250)
    expected = oracle.auxiliary_bounds(mean, 0.6, 4, num_contrasts, 10_000)
    for name, sign in (("mi_lower", -1), ("mi_upper", 1)):
        value, error = getattr(found, name)
        assert sign * (value - truth["information"]) > 4 * error, name
        assert abs(value - expected[name][0]) < 4 * np.hypot(error, expected[name][1]), name
    # The reverse model is exact here, so that the whole divergence is that of z.
    value, error = found.kl_total
    assert abs(value - truth["kl"]) < 4 * error


def test_auxiliary_guide_with_many_draws() -> None:
    """The bounds close in on those of the density itself."""
    model, guide, truth = hierarchical(0.5, 1.5, 8, 15)
    options = {"num_samples": 200, "num_contrasts": 40, "chunk_size": 150, **QUIET}
    found = latent_utilisation(model, guide, **options)
    for value, error in (found.mi_lower, found.mi_upper):
        assert abs(value - truth["information"]) < 4 * error + 0.01
    assert found.marginal == ("z",)


def test_marginal_divergence_has_no_bias() -> None:
    """With few draws as well: their moments alone would give a twelfth of a nat too much."""
    model, guide, truth = hierarchical(0.6, 1.0, 8, 250)
    found = latent_utilisation(model, guide, num_samples=12, num_contrasts=1, **QUIET)
    (value,), (error,) = found.kl["z"]
    assert abs(value - truth["kl_marginal"]) < 4 * error < 0.1


@pytest.mark.parametrize("name", ["Auxiliary", "VGP"])
def test_hierarchical_families(name: str) -> None:
    x = tensor(DATA)
    posterior = shaken(family(name, latent_dim=2, context_dim=2, hidden_dims=(5,)), 0.3)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            posterior("z", x)

    model, _ = pair(MEAN[:, :2], weight=WEIGHT[:, :2])
    found = latent_utilisation(model, guide, num_samples=50, chunk_size=30, **QUIET)
    assert found.latent == ("z",) and found.marginal == ("z",)
    assert np.isfinite(found.table["estimate"]).all()


def test_a_point_mass_carries_its_auxiliary() -> None:
    """z = exp(u), u ~ N(m(x), t^2): information and divergence are those of u."""
    mean, scale = tensor(MEAN[:, 0]), 0.6
    data = tensor(DATA[:, 0])

    def model() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            u = pyro.sample("u", dist.Normal(mean, scale), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    found = latent_utilisation(model, guide, num_samples=1_500, num_contrasts=20, **QUIET)
    value, error = oracle.bounds(MEAN[:, :1], np.full(1, scale), ROWS - 1, 20_000)["information"]
    assert abs(found.mi_lower.estimate - value) < 4 * np.sqrt(2) * error
    kl = oracle.kl(MEAN[:, 0], np.array(scale)).mean()
    np.testing.assert_allclose(found.kl_total.estimate, kl, atol=4 * 2 / np.sqrt(1_500 * ROWS))


def nested(small: float = 1e-5):
    """Two plates around the data, two latents of a row, one of all rows, one of a column."""
    rng = np.random.default_rng(3)
    x, first, second = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    data, first_, second_ = tensor(x), tensor(first), tensor(second)
    columns = tensor([0.1, -0.2])

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("features", 2, dim=-1):
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
        shift = w + v.sum(-1, keepdim=True)
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(a - 2 * b + shift, 1.0), obs=data)

    def guide() -> None:
        pyro.sample("w", dist.Normal(tensor(0.3), small))
        with pyro.plate("features", 2, dim=-1):
            pyro.sample("v", dist.Normal(columns, small))
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            a = pyro.sample("a", dist.Normal(first_, small))
            pyro.sample("b", dist.Normal(second_ + 0.5 * a, 0.7 * small))

    a, b = first.reshape(-1), (second + 0.5 * first).reshape(-1)
    loc = a - 2 * b + 0.3 + 0.1 - 0.2
    table = -0.5 * (x.reshape(-1)[:, None] - loc) ** 2 - 0.5 * np.log(2 * np.pi)
    return model, guide, table, a, b


def test_latents_move_together(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two plates; what lies outside of them stays; exact up to the guide's small noise."""
    every_shift(monkeypatch)
    model, guide, table, a, b = nested()
    found = latent_utilisation(model, guide, num_samples=22, num_contrasts=11, **QUIET)
    assert found.latent == ("a", "b") and found.observed == ("x",) and found.num_rows == 12
    close = {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(found.log_likelihood.estimate, np.diag(table).mean(), **close)
    swapped = oracle.others(table)
    np.testing.assert_allclose(found.log_likelihood_swapped.estimate, swapped.mean(), **close)
    drop = np.diag(table) - swapped
    np.testing.assert_allclose(found.swap_drop.standard_error, error_over_rows(drop), **close)
    # A sharp guide tells all rows apart.
    np.testing.assert_allclose(found.mi_lower.estimate, np.log(12), atol=1e-9)
    assert set(found.kl) == {"a", "b"} and found.marginal == ()
    expected = [oracle.kl(a, np.array(1e-5)).mean(), oracle.kl(b - a, np.array(0.7e-5)).mean()]
    np.testing.assert_allclose(found.kl["a"].estimate, expected[:1], rtol=1e-4)
    np.testing.assert_allclose(found.kl["b"].estimate, expected[1:], rtol=1e-4)
    np.testing.assert_allclose(found.kl_total.estimate, sum(expected), atol=1.0)
    np.testing.assert_allclose(found.variance["b"].estimate, [b.var(ddof=1)], rtol=1e-3)
    assert found.table.query("dimension == 'all'")["site"].tolist() == [
        "a, b", "x", "x", "x", "a, b", "a, b",
    ]  # fmt: skip


def test_a_plate_inside_of_a_row_is_part_of_it() -> None:
    """Latents in (data, time), data in data alone: a row has time times event dimensions."""
    data = tensor(DATA)

    def program(observed: bool) -> None:
        with pyro.plate("data", ROWS, dim=-2):
            with pyro.plate("time", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            if observed:
                pyro.sample("x", dist.Normal(z.sum(-2, True), 1.0).to_event(1), obs=data[:, None])

    found = latent_utilisation(lambda: program(True), lambda: program(False), **QUIET)
    assert found.num_rows == ROWS and found.kl["z"].estimate.shape == (6,)
    np.testing.assert_allclose(found.mi_upper.estimate, 0.0, atol=1e-6)


def test_masked_rows_do_not_count(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those without the masked rows; scales are left out."""
    every_shift(monkeypatch)
    keep = np.ones(ROWS, bool)
    keep[[0, 4, 5]] = False
    tiny = np.full(3, 1e-5)
    options = {"num_samples": 16, "num_contrasts": 8, **QUIET}
    masked = [
        poutine.scale(poutine.mask(program, mask=torch.as_tensor(keep)), scale)
        for program, scale in zip(pair(scale=tiny), (2.0, 0.5), strict=True)
    ]
    found = latent_utilisation(*masked, **options)
    expected = latent_utilisation(*pair(MEAN[keep], tiny, DATA[keep]), **options)
    assert found.num_rows == 9
    close = {"rtol": 1e-3, "atol": 1e-3}
    for name in ("log_likelihood", "log_likelihood_swapped", "swap_drop", "mi_lower"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), **close)
    np.testing.assert_allclose(found.kl["z"].estimate, expected.kl["z"].estimate, rtol=1e-12)

    mean = tensor(MEAN)
    part = torch.ones(ROWS, 3, dtype=torch.bool)
    part[2, 1] = False

    def guide() -> None:
        with pyro.plate("data", ROWS):
            pyro.sample("z", dist.Normal(mean, 1.0).mask(part).to_event(1))

    with pytest.raises(ValueError, match="Expected a mask of whole rows at latent site 'z'; got"):
        latent_utilisation(pair()[0], guide, **options)


def test_chunks_change_nothing(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, taken = torch.randn(50, ROWS, 3), -1

    def draw(shape, **kwargs) -> torch.Tensor:
        nonlocal taken
        if len(shape) == 2 or taken < 0:
            # The looks at plates and sites, before the draws.
            taken = max(taken, 0) if len(shape) == 3 else taken
            return torch.zeros(shape)
        taken += shape[0]
        return noise[taken - shape[0] : taken]

    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", draw)
    tables = []
    for chunk_size in (50, 7, 1):
        taken = -1
        torch.manual_seed(0)
        found = latent_utilisation(
            *pair(), num_samples=50, num_contrasts=4, chunk_size=chunk_size, **QUIET
        )
        tables.append(found.table[["estimate", "standard_error"]].to_numpy())
        assert taken == 50
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(tables[2], tables[0], rtol=1e-9, atol=1e-12)


def test_float32() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        found = latent_utilisation(*pair(), num_contrasts=20, **QUIET)
    finally:
        torch.set_default_dtype(before)
    kl = oracle.kl(MEAN, SCALE).mean(0)
    np.testing.assert_allclose(found.kl["z"].estimate, kl, rtol=1e-5, atol=1e-6)
    assert 0 < found.mi_lower.estimate < found.mi_upper.estimate


def test_discrete_latents() -> None:
    """Bits split over dimensions; a one-hot vector has no divergence per dimension."""
    x = tensor(DATA[:, 0])

    def model() -> None:
        with pyro.plate("data", ROWS):
            b = pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.3)).to_event(1))
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(b.sum(-1) + k[..., 0], 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            probs = torch.stack([torch.sigmoid(x), torch.full_like(x, 0.3)], -1)
            pyro.sample("b", dist.Bernoulli(probs).to_event(1))
            pyro.sample("k", dist.OneHotCategorical(torch.ones(ROWS, 3) / 3))

    found = latent_utilisation(model, guide, **QUIET)
    p = 1 / (1 + np.exp(-DATA[:, 0]))
    kl = p * np.log(p / 0.3) + (1 - p) * np.log((1 - p) / 0.7)
    np.testing.assert_allclose(found.kl["b"].estimate, [kl.mean(), 0.0], atol=1e-6)
    assert set(found.kl) == {"b"} and set(found.variance) == {"b", "k"}
    assert found.mi_lower.estimate > 0


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    flipped = pair(MEAN[:, ::-1].copy(), SCALE[::-1].copy(), DATA, WEIGHT[:, ::-1].copy())
    found = latent_utilisation(*flipped, **QUIET)
    ax = found.plot()
    heights = [bar.get_height() for bar in ax.patches]
    kl = found.kl["z"].estimate
    np.testing.assert_allclose(heights, np.sort(kl)[::-1])
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == [str(d) for d in np.argsort(-kl)]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["active (2)", "idle (1)"]
    idle = [bar.get_facecolor() for bar in ax.patches][-1]
    assert idle not in [bar.get_facecolor() for bar in ax.patches][:-1]
    assert f"{found.swap_drop.estimate:.2f}" in ax.get_title()
    _, own = pyplot.subplots()
    assert found.plot(own) is own
    pyplot.close("all")


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        latent_utilisation(*pair(), num_samples=4, num_contrasts=2, progress_bar=shown)
        assert ("utilisation: 100%" in capsys.readouterr().err) == shown


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = latent_utilisation(*pair(), **QUIET)
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Expected pandas .* Install vae-ext\[arviz\]"):
        _ = found.table
    with pytest.raises(ImportError, match=r"Expected Matplotlib .* Install vae-ext\[examples\]"):
        found.plot()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_samples": 3}, "Expected num_samples >= 4; got 3."),
        ({"num_contrasts": 0}, "Expected num_contrasts >= 1; got 0."),
        ({"chunk_size": 0}, "Expected chunk_size >= 1; got 0."),
    ],
)
def test_bad_numbers(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        latent_utilisation(*pair(), **arguments)


def test_rows_are_needed() -> None:
    one = pair(MEAN[:1], data=DATA[:1])
    with pytest.raises(ValueError, match=r"a data plate of at least 2 rows; got \{'z': 1\}"):
        latent_utilisation(*one)
    none = [poutine.mask(program, mask=torch.zeros(ROWS, dtype=torch.bool)) for program in pair()]
    with pytest.raises(ValueError, match=r"a data plate of at least 2 rows; got \{'z': 0\}"):
        latent_utilisation(*none, **QUIET)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS):
            pyro.sample("x", dist.Normal(z, 1.0), obs=tensor(DATA[:, 0]))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"a data plate of at least 2 rows; got \{\}"):
        latent_utilisation(model, guide)
    model, _ = pair()
    joint = AutoPosterior(model)
    with pytest.raises(ValueError, match="Expected one log-density per row of plate 'data'"):
        latent_utilisation(model, joint)


def test_bottom_up_guide_of_a_top_down_model() -> None:
    """A closed form would miss that a later draw of the guide shapes the model's density."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(torch.zeros(len(x)), 1.0))
            low = pyro.sample("low", dist.Normal(2.0 * top, 0.5))
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            low = pyro.sample("low", dist.Normal(0.5 * x, 0.8))
            pyro.sample("top", dist.Normal(0.4 * low, 0.3))

    pyro.set_rng_seed(0)
    x = torch.linspace(-2.0, 2.0, 20)
    found = latent_utilisation(model, guide, x, num_samples=200, progress_bar=False)
    parts = sum(float(found.kl[name].estimate.sum()) for name in ("top", "low"))
    # In closed form: entropies of the guide, and second moments of `top` and of `low - 2 top`.
    square = float((x**2).mean()) / 4 + 0.64
    exact = -np.log(0.8 * 0.3) - 1.0 + 0.5 * (0.09 + 0.16 * square)
    exact += np.log(0.5) + 2.0 * (0.04 * square + 0.36)
    assert abs(parts - exact) < 5 * found.kl_total.standard_error
