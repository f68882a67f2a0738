"""Latent utilisation against closed forms, quadrature, and a NumPy estimate of the same bounds."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import CASES
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from reference import utilisation as oracle
from test_numpyro.models import family, module_params, shaken

from numpyro_vae_ext.diagnostics import _utilisation, latent_utilisation
from numpyro_vae_ext.guides import AutoPosterior

KEY = jax.random.key(8)
ROWS, NOISE = 12, 0.5
QUIET: dict[str, Any] = {"params": {}, "progress_bar": False}
# The last dimension is idle; rows are in order, as those of a sorted data set.
SLOPE = np.array([[1.5, 0.0, 0.0], [0.0, 0.4, 0.0]])
SCALE = np.array([0.3, 0.8, 1.0])
WEIGHT = np.array([[1.0, 0.2, 0.0], [0.3, -0.7, 0.0]])
DATA = np.sort(np.random.default_rng(7).normal(size=(ROWS, 2)), 0)
MEAN = DATA @ SLOPE


def pair(mean=MEAN, scale=SCALE, data=DATA, weight=WEIGHT):
    """The linear-Gaussian pair of the oracle."""
    mean, scale, data, weight = map(jnp.asarray, (mean, scale, data, weight))

    def model() -> None:
        with numpyro.plate("data", len(data)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(mean.shape[-1]), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z @ weight.T, NOISE).to_event(1), obs=data)

    def guide() -> None:
        with numpyro.plate("data", len(data)):
            numpyro.sample("z", dist.Normal(mean, scale).to_event(1))

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
    found = latent_utilisation(KEY, *pair(), params={}, **case)
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
    options = {"num_samples": 8_800, "num_contrasts": 1, "chunk_size": 800}
    found = latent_utilisation(KEY, *pair(), **options, **QUIET)
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
    options = {"num_samples": 1_500, "num_contrasts": num_contrasts, **QUIET}
    found = latent_utilisation(KEY, *pair(), **options)
    size = min(num_contrasts, ROWS - 1)
    truth = oracle.bounds(MEAN, SCALE, size, 20_000)
    for name in ("mi_lower", "mi_upper"):
        expected, error = truth[name]
        # Our draws are nearly as many: their error is no larger.
        assert abs(getattr(found, name).estimate - expected) < 4 * np.sqrt(2) * error, name
    value, error = truth["information"]
    assert found.mi_lower.estimate <= np.log(size + 1)
    if size < ROWS - 1:
        assert found.mi_lower.estimate < value - 4 * error < value + 4 * error
        assert found.mi_upper.estimate > value + 4 * error
    else:
        assert abs(found.mi_lower.estimate - value) < 4 * np.sqrt(2) * error
        assert found.mi_upper.estimate > value - 4 * error


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
    found = latent_utilisation(KEY, *pair(zeros, np.ones(3), weight=0 * WEIGHT), **QUIET)
    assert found.count == 0
    assert found.swap_drop == (0.0, 0.0)
    for estimate in (found.kl["z"].estimate, found.mi_lower.estimate, found.mi_upper.estimate):
        np.testing.assert_allclose(estimate, 0.0, atol=1e-5)


def test_latents_of_all_rows_stay() -> None:
    """Given the one of all rows, the guide knows nothing of a row; across its draws it would."""
    data = jnp.asarray(DATA[:, 0])

    def model() -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", dist.Normal(w, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide() -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", ROWS):
            numpyro.sample("z", dist.Normal(w, 1.0))

    found = latent_utilisation(KEY, model, guide, num_samples=10, num_contrasts=4, **QUIET)
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
    x = jnp.asarray(3.0 * DATA[:, :1])
    posterior = shaken(family("IAF", latent_dim=1, context_dim=1, hidden_dims=(6,)), 0.2)

    def model() -> None:
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        post = nnx_module("posterior", posterior)
        with numpyro.plate("data", ROWS):
            post("z", x)

    grid = np.linspace(-15, 15, 3_001)
    log_q = posterior.log_prob(jnp.broadcast_to(grid[:, None, None], (len(grid), ROWS, 1)), x)
    truth = quadrature(np.asarray(log_q, np.float64).T, grid)
    assert truth["information"] > 0.1, "nothing to find"
    options = {"num_samples": 2_000, "chunk_size": 2_000, **QUIET}
    options["params"] = module_params(posterior=posterior)
    found = latent_utilisation(KEY, model, guide, num_contrasts=ROWS - 1, **options)
    assert found.marginal == ("z",)
    assert list(found.table["quantity"][:2]) == ["kl_marginal", "kl"]
    close = {"rtol": 0.02, "atol": 0.02}
    np.testing.assert_allclose(found.kl_total.estimate, truth["kl"], **close)
    np.testing.assert_allclose(found.kl["z"].estimate, [truth["kl_marginal"]], **close)
    np.testing.assert_allclose(found.mi_lower.estimate, truth["information"], **close)
    assert found.mi_upper.estimate > truth["information"]
    found = latent_utilisation(KEY, model, guide, num_contrasts=1, **options)
    np.testing.assert_allclose(found.mi_lower.estimate, truth["one_contrast"], **close)


def hierarchical(side: float, slope: float, rows: int, copies: int):
    """a ~ N(0, 1), z ~ N(slope x + a, side^2): q(z | x) is N(slope x, 1 + side^2).

    The data are there several times over, so that one run averages as many.
    """
    data = np.linspace(-1.5, 1.5, rows)
    x = jnp.asarray(np.repeat(data, copies))

    def model() -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            z = numpyro.sample("z", dist.Normal(slope * x + a, side))
            scale = (1 + side**-2) ** -0.5
            reverse = dist.Normal((z - slope * x) * scale**2 / side**2, scale)
            numpyro.factor("reverse", -reverse.log_prob(a))

    grid = np.linspace(-8, 8, 1_601)
    log_q = oracle.normal_log_prob(grid[:, None], slope * data[:, None, None], np.sqrt(1 + side**2))
    return model, guide, quadrature(log_q, grid)


@pytest.mark.parametrize("num_contrasts", [1, 7])
def test_auxiliary_guide(num_contrasts: int) -> None:
    """With few draws of the auxiliaries the bounds are wide, and on their own sides."""
    model, guide, truth = hierarchical(0.6, 1.5, 8, 250)
    options = {"num_samples": 4, "num_contrasts": num_contrasts, **QUIET}
    found = latent_utilisation(KEY, model, guide, **options)
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
    found = latent_utilisation(KEY, model, guide, **options)
    for value, error in (found.mi_lower, found.mi_upper):
        assert abs(value - truth["information"]) < 4 * error + 0.01
    assert found.marginal == ("z",)


def test_marginal_divergence_has_no_bias() -> None:
    """With few draws as well: their moments alone would give a twelfth of a nat too much."""
    model, guide, truth = hierarchical(0.6, 1.0, 8, 250)
    found = latent_utilisation(KEY, model, guide, num_samples=12, num_contrasts=1, **QUIET)
    (value,), (error,) = found.kl["z"]
    assert abs(value - truth["kl_marginal"]) < 4 * error < 0.1


def test_auxiliary_family() -> None:
    x = jnp.asarray(DATA)
    posterior = family("Auxiliary", latent_dim=2, context_dim=2, hidden_dims=(5,))
    posterior = shaken(posterior, 0.3)

    def guide() -> None:
        post = nnx_module("posterior", posterior)
        with numpyro.plate("data", ROWS):
            post("z", x)

    model, _ = pair(MEAN[:, :2], weight=WEIGHT[:, :2])
    options = {**QUIET, "params": module_params(posterior=posterior)}
    found = latent_utilisation(KEY, model, guide, num_samples=50, chunk_size=30, **options)
    assert found.latent == ("z",) and found.marginal == ("z",)
    assert np.isfinite(found.table["estimate"]).all()


def test_a_point_mass_carries_its_auxiliary() -> None:
    """z = exp(u), u ~ N(m(x), t^2): information and divergence are those of u."""
    mean, scale = jnp.asarray(MEAN[:, 0]), 0.6
    data = jnp.asarray(DATA[:, 0])

    def model() -> None:
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", dist.LogNormal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=data)

    def guide() -> None:
        with numpyro.plate("data", ROWS):
            u = numpyro.sample("u", dist.Normal(mean, scale), infer={"is_auxiliary": True})
            numpyro.sample("z", dist.Delta(jnp.exp(u), log_density=-u))

    found = latent_utilisation(KEY, model, guide, num_samples=1_500, num_contrasts=20, **QUIET)
    value, error = oracle.bounds(MEAN[:, :1], np.full(1, scale), ROWS - 1, 20_000)["information"]
    assert abs(found.mi_lower.estimate - value) < 4 * np.sqrt(2) * error
    kl = oracle.kl(MEAN[:, 0], np.array(scale)).mean()
    np.testing.assert_allclose(found.kl_total.estimate, kl, atol=4 * 2 / np.sqrt(1_500 * ROWS))


def nested(small: float = 1e-5):
    """Two plates around the data, two latents of a row, one of all rows, one of a column."""
    rng = np.random.default_rng(3)
    x, first, second = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    data, first_, second_ = map(jnp.asarray, (x, first, second))

    def model() -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("features", 2, dim=-1):
            v = numpyro.sample("v", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 3, dim=-2), numpyro.plate("columns", 4, dim=-1):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            numpyro.sample("x", dist.Normal(a - 2 * b + w + v.sum(), 1.0), obs=data)

    def guide() -> None:
        numpyro.sample("w", dist.Normal(0.3, small))
        with numpyro.plate("features", 2, dim=-1):
            numpyro.sample("v", dist.Normal(jnp.array([0.1, -0.2]), small))
        with numpyro.plate("rows", 3, dim=-2), numpyro.plate("columns", 4, dim=-1):
            a = numpyro.sample("a", dist.Normal(first_, small))
            numpyro.sample("b", dist.Normal(second_ + 0.5 * a, 0.7 * small))

    a, b = first.reshape(-1), (second + 0.5 * first).reshape(-1)
    loc = a - 2 * b + 0.3 + 0.1 - 0.2
    table = -0.5 * (x.reshape(-1)[:, None] - loc) ** 2 - 0.5 * np.log(2 * np.pi)
    return model, guide, table, a, b


def test_latents_move_together(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two plates; what lies outside of them stays; exact up to the guide's small noise."""
    every_shift(monkeypatch)
    model, guide, table, a, b = nested()
    found = latent_utilisation(KEY, model, guide, num_samples=22, num_contrasts=11, **QUIET)
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
    data = jnp.asarray(DATA)

    def program(observed: bool) -> None:
        with numpyro.plate("data", ROWS, dim=-2):
            with numpyro.plate("time", 3, dim=-1):
                z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            if observed:
                law = dist.Normal(z.sum(-2, keepdims=True), 1.0).to_event(1)
                numpyro.sample("x", law, obs=data[:, None])

    found = latent_utilisation(KEY, lambda: program(True), lambda: program(False), **QUIET)
    assert found.num_rows == ROWS and found.kl["z"].estimate.shape == (6,)
    np.testing.assert_allclose(found.mi_upper.estimate, 0.0, atol=1e-5)


def test_masked_rows_do_not_count(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those without the masked rows; scales are left out."""
    every_shift(monkeypatch)
    keep = np.ones(ROWS, bool)
    keep[[0, 4, 5]] = False
    tiny = np.full(3, 1e-5)
    options = {"num_samples": 16, "num_contrasts": 8, **QUIET}
    masked = [
        handlers.scale(handlers.mask(program, mask=keep), scale)
        for program, scale in zip(pair(scale=tiny), (2.0, 0.5), strict=True)
    ]
    found = latent_utilisation(KEY, *masked, **options)
    expected = latent_utilisation(KEY, *pair(MEAN[keep], tiny, DATA[keep]), **options)
    assert found.num_rows == 9
    close = {"rtol": 1e-3, "atol": 1e-3}
    for name in ("log_likelihood", "log_likelihood_swapped", "swap_drop", "mi_lower"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), **close)
    np.testing.assert_allclose(found.kl["z"].estimate, expected.kl["z"].estimate, rtol=1e-12)

    part = np.ones((ROWS, 3), bool)
    part[2, 1] = False

    def guide() -> None:
        with numpyro.plate("data", ROWS):
            numpyro.sample("z", dist.Normal(jnp.asarray(MEAN), 1.0).mask(part).to_event(1))

    with pytest.raises(ValueError, match="Expected a mask of whole rows at latent site 'z'; got"):
        latent_utilisation(KEY, pair()[0], guide, **options)


def test_chunks_change_nothing(exact: None) -> None:
    """With auxiliary sites as well, whose draws come in chunks of their own."""
    for programs in (pair(), hierarchical(0.5, 1.0, 4, 2)[:2]):
        tables = []
        for chunk_size in (9, 4):
            found = latent_utilisation(
                KEY, *programs, num_samples=9, num_contrasts=3, chunk_size=chunk_size, **QUIET
            )
            tables.append(found.table[["estimate", "standard_error"]].to_numpy())
        np.testing.assert_allclose(tables[1], tables[0], rtol=1e-9, atol=1e-12)


def test_float32() -> None:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        arrays = [array.astype(np.float32) for array in (MEAN, SCALE, DATA, WEIGHT)]
        found = latent_utilisation(KEY, *pair(*arrays), num_contrasts=20, **QUIET)
    finally:
        jax.config.update("jax_enable_x64", before)
    kl = oracle.kl(MEAN, SCALE).mean(0)
    np.testing.assert_allclose(found.kl["z"].estimate, kl, rtol=1e-5, atol=1e-6)
    assert 0 < found.mi_lower.estimate < found.mi_upper.estimate


def test_discrete_latents() -> None:
    """Bits split over dimensions; an index has no divergence per dimension of its vector."""
    x = jnp.asarray(DATA[:, 0])

    def model() -> None:
        with numpyro.plate("data", ROWS):
            b = numpyro.sample("b", dist.Bernoulli(jnp.full((2,), 0.3)).to_event(1))
            numpyro.sample("x", dist.Normal(1.0 * b.sum(-1), 1.0), obs=x)

    def guide() -> None:
        with numpyro.plate("data", ROWS):
            probs = jnp.stack([jax.nn.sigmoid(x), jnp.full_like(x, 0.3)], -1)
            numpyro.sample("b", dist.Bernoulli(probs).to_event(1))

    found = latent_utilisation(KEY, model, guide, num_samples=4_000, num_contrasts=2, **QUIET)
    p = 1 / (1 + np.exp(-DATA[:, 0]))
    kl = p * np.log(p / 0.3) + (1 - p) * np.log((1 - p) / 0.7)
    # The host has no closed form for bits: the mean of log-ratios.
    np.testing.assert_allclose(found.kl["b"].estimate, [kl.mean(), 0.0], atol=0.02)
    assert found.mi_lower.estimate > 0


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    flipped = pair(MEAN[:, ::-1].copy(), SCALE[::-1].copy(), DATA, WEIGHT[:, ::-1].copy())
    found = latent_utilisation(KEY, *flipped, **QUIET)
    ax = found.plot()
    heights = [bar.get_height() for bar in ax.patches]
    kl = found.kl["z"].estimate
    np.testing.assert_allclose(heights, np.sort(kl)[::-1])
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == [str(d) for d in np.argsort(-kl)]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["active (2)", "idle (1)"]
    assert f"{found.swap_drop.estimate:.2f}" in ax.get_title()
    _, own = pyplot.subplots()
    assert found.plot(own) is own
    pyplot.close("all")


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        latent_utilisation(
            KEY, *pair(), params={}, num_samples=4, num_contrasts=2, progress_bar=shown
        )
        assert ("utilisation: 100%" in capsys.readouterr().err) == shown


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = latent_utilisation(KEY, *pair(), **QUIET)
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
        latent_utilisation(KEY, *pair(), params={}, **arguments)


def test_rows_are_needed() -> None:
    one = pair(MEAN[:1], data=DATA[:1])
    with pytest.raises(ValueError, match=r"a data plate of at least 2 rows; got \{'z': 1\}"):
        latent_utilisation(KEY, *one, **QUIET)
    none = [handlers.mask(program, mask=np.zeros(ROWS, bool)) for program in pair()]
    with pytest.raises(ValueError, match=r"a data plate of at least 2 rows; got \{'z': 0\}"):
        latent_utilisation(KEY, *none, **QUIET)

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", ROWS):
            numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.asarray(DATA[:, 0]))

    def guide() -> None:
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"a data plate of at least 2 rows; got \{\}"):
        latent_utilisation(KEY, model, guide, **QUIET)
    model, _ = pair()
    joint = AutoPosterior(model)
    svi = numpyro.infer.SVI(model, joint, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO())
    params = svi.get_params(svi.init(KEY))
    with pytest.raises(ValueError, match="Expected one log-density per row of plate 'data'"):
        latent_utilisation(KEY, model, joint, params=params, progress_bar=False)


def test_bottom_up_guide_of_a_top_down_model() -> None:
    """A closed form would miss that a later draw of the guide shapes the model's density."""

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            top = numpyro.sample("top", dist.Normal(0.0, 1.0))
            low = numpyro.sample("low", dist.Normal(2.0 * top, 0.5))
            numpyro.sample("x", dist.Normal(low, 1.0), obs=x)

    def guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            low = numpyro.sample("low", dist.Normal(0.5 * x, 0.8))
            numpyro.sample("top", dist.Normal(0.4 * low, 0.3))

    key, x = jax.random.key(0), jnp.linspace(-2.0, 2.0, 20)
    found = latent_utilisation(
        key, model, guide, x, params={}, num_samples=200, num_contrasts=2, progress_bar=False
    )
    parts = sum(float(found.kl[name].estimate.sum()) for name in ("top", "low"))
    # In closed form: entropies of the guide, and second moments of `top` and of `low - 2 top`.
    square = float((x**2).mean()) / 4 + 0.64
    exact = -np.log(0.8 * 0.3) - 1.0 + 0.5 * (0.09 + 0.16 * square)
    exact += np.log(0.5) + 2.0 * (0.04 * square + 0.36)
    assert abs(parts - exact) < 5 * found.kl_total.standard_error
