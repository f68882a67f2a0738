"""Deterministic sites, pointwise log-likelihoods and predictions in ArviZ objects."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import mask, reparam
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam
from scipy import stats

from numpyro_vae_ext.diagnostics import to_arviz

arviz = pytest.importorskip("arviz")

KEY = jax.random.key(4)
SIGMA = jnp.array([1.0, 0.5, 2.0, 1.5])
DATA = jnp.array([1.0, -0.5, 2.0, 0.3])
export = partial(to_arviz, KEY, params={}, progress_bar=False)


@reparam(config={"theta": LocScaleReparam(0.0)})
def schools(sigma: jax.Array, y: jax.Array | None = None) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 0.2))
    numpyro.deterministic("log_tau", jnp.log(tau))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.deterministic("ratio", theta / sigma)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_guide(sigma: jax.Array, y: jax.Array | None = None) -> None:
    """The prior, which has weights of light tails here."""
    numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("tau", dist.LogNormal(0.0, 0.2))
    with numpyro.plate("school", len(SIGMA)):
        numpyro.sample("theta_decentered", dist.Normal(0.0, 1.0))


def line(x: jax.Array, y: jax.Array | None = None) -> None:
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        mean = numpyro.deterministic("mean", slope * x)
        numpyro.sample("y", dist.Normal(mean, 0.1), obs=y)


def line_guide(x: jax.Array, y: jax.Array | None = None) -> None:
    numpyro.sample("slope", dist.Normal(1.0, 0.3))


def autoencoder(x: jax.Array) -> None:
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 10.0))
        numpyro.sample("x", dist.Normal(z, 0.1), obs=x)


def encoder(x: jax.Array) -> None:
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(x, 0.1))


def shapes(group: Any) -> dict[str, tuple[str, ...]]:
    return {name: tuple(variable.dims) for name, variable in group.data_vars.items()}


def groups(found: Any) -> set[str]:
    return set(getattr(found, "children", None) or found.groups())


def test_names_are_those_of_a_chain_of_the_host() -> None:
    found = export(schools, schools_guide, SIGMA, DATA, num_samples=40, num_chains=2)
    posterior = found["posterior"]
    chain = MCMC(NUTS(schools), num_warmup=2, num_samples=2, progress_bar=False)
    chain.run(KEY, SIGMA, DATA)
    assert shapes(posterior) == shapes(arviz.from_numpyro(chain)["posterior"])
    assert set(posterior.data_vars) == {
        "mu",
        "tau",
        "log_tau",
        "ratio",
        "theta",
        "theta_decentered",
    }
    moved = posterior["mu"] + posterior["tau"] * posterior["theta_decentered"]
    np.testing.assert_allclose(posterior["theta"], moved, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(posterior["log_tau"], np.log(posterior["tau"]), atol=1e-6)
    np.testing.assert_allclose(posterior["ratio"], posterior["theta"] / SIGMA, rtol=1e-5)
    assert set(found["observed_data"].data_vars) == {"y"}
    assert "log_likelihood" not in groups(found)
    assert "predictions" not in groups(found)


def test_log_likelihood_of_rows_gives_loo() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = export(
            schools, schools_guide, SIGMA, DATA, num_samples=500, num_chains=2, log_likelihood=True
        )
    pointwise, theta = found["log_likelihood"]["y"], found["posterior"]["theta"]
    assert shapes(found["log_likelihood"]) == {"y": ("chain", "draw", "school")}
    expected = stats.norm.logpdf(np.asarray(DATA), np.asarray(theta), np.asarray(SIGMA))
    np.testing.assert_allclose(pointwise, expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = arviz.loo(found, pointwise=True)
    rows = np.asarray(result.elpd_i if hasattr(result, "elpd_i") else result.loo_i)
    # The harmonic mean of the likelihoods, its largest terms smoothed: less so at wide likelihoods.
    harmonic = -np.log(np.exp(-expected).mean((0, 1)))
    assert rows.shape == (4,)
    np.testing.assert_allclose(rows[2:], harmonic[2:], atol=0.3)


def test_log_likelihood_leaves_events_masks_and_factors_out() -> None:
    keep = jnp.array([True, False, True])

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("nothing", 0.0 * z)
        with numpyro.plate("rows", 3), mask(mask=keep):
            numpyro.sample("x", dist.Normal(z, jnp.ones(2)).to_event(1), obs=jnp.ones((3, 2)))
        numpyro.sample("total", dist.Poisson(jnp.exp(z)), obs=jnp.array(2.0))

    def guide() -> None:
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    # Six draws say nothing of their tail.
    with pytest.warns(UserWarning, match=r"got inf\. Leave-one-out estimates"):
        found = export(model, guide, num_samples=3, num_chains=2, log_likelihood=True)
    dims = {"x": ("chain", "draw", "rows"), "total": ("chain", "draw")}
    assert shapes(found["log_likelihood"]) == dims
    z = np.asarray(found["posterior"]["z"])
    rows = 2 * stats.norm.logpdf(1.0, z, 1.0)[..., None] * np.asarray(keep)
    np.testing.assert_allclose(found["log_likelihood"]["x"], rows, rtol=1e-5)
    total = stats.poisson.logpmf(2, np.exp(z))
    np.testing.assert_allclose(found["log_likelihood"]["total"], total, rtol=1e-4)


def test_warns_where_the_weights_forbid_it() -> None:
    def narrow(x: jax.Array, width: float = 0.02) -> None:
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(x, jnp.array([0.1, width, width])))

    x, options = jnp.zeros(3), {"num_samples": 500, "num_chains": 1, "log_likelihood": True}
    with pytest.warns(UserWarning, match=r"below 0\.63 .*; got .* in 2 of 3 rows\. .*az\.loo"):
        export(autoencoder, narrow, x, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(autoencoder, encoder, x, **options)
        export(autoencoder, narrow, x, **{**options, "log_likelihood": False})


@pytest.mark.parametrize("chunk_size", [100, 7])
def test_predictions_go_with_the_draws(chunk_size: int) -> None:
    """New rows, another number of them, at the values of each draw; coordinates of their own."""
    x, new = jnp.array([1.0, 2.0]), jnp.array([-1.0, 0.5, 4.0])
    options = {
        "num_samples": 30,
        "num_chains": 2,
        "chunk_size": chunk_size,
        "coords": {"rows": ["a", "b"]},
        "pred_coords": {"rows": ["c", "d", "e"]},
    }
    found = export(line, line_guide, x, 1.1 * x, predictions=(new,), **options)
    predictions, slope = found["predictions"], found["posterior"]["slope"]
    assert shapes(predictions) == dict.fromkeys(("y", "mean"), ("chain", "draw", "rows"))
    assert list(predictions.coords["rows"].values) == ["c", "d", "e"]
    assert list(found["posterior"].coords["rows"].values) == ["a", "b"]
    mean = np.asarray(slope)[..., None] * np.asarray(new)
    np.testing.assert_allclose(predictions["mean"], mean, rtol=1e-5)
    noise = (np.asarray(predictions["y"]) - mean) / 0.1
    assert abs(noise.mean()) < 4 / np.sqrt(180) and abs(noise.std() - 1) < 0.25
    assert len(np.unique(noise)) == 180
    by_name = export(line, line_guide, x, 1.1 * x, predictions={"x": new}, **options)
    np.testing.assert_array_equal(by_name["predictions"]["y"], predictions["y"])
    np.testing.assert_array_equal(by_name["posterior"]["slope"], slope)


def test_predictions_encode_the_new_rows() -> None:
    """As many new rows as old ones: their latents are those of the new."""
    x, new = jnp.array([0.0, 1.0]), jnp.array([50.0, -50.0])
    found = export(
        autoencoder, encoder, x, predictions=(new,), num_samples=50, num_chains=1, pred_dims={}
    )
    np.testing.assert_allclose(found["posterior"]["z"].mean(("chain", "draw")), x, atol=0.2)
    np.testing.assert_allclose(found["predictions"]["x"].mean(("chain", "draw")), new, atol=0.2)
    named = export(
        autoencoder,
        encoder,
        x,
        predictions=(new,),
        num_samples=5,
        num_chains=1,
        pred_dims={"x": ["image"]},
    )
    assert shapes(named["predictions"]) == {"x": ("chain", "draw", "image")}
    assert shapes(named["observed_data"]) == {"x": ("rows",)}


def test_predictions_of_rows_that_the_guide_has_not() -> None:
    text = (
        r"Expected site 'theta_decentered' to be drawn for the new arguments; got shape \(4,\) "
        r"from the guide and \(2,\) in the model\. Use a guide that takes the new rows"
    )
    with pytest.raises(ValueError, match=text):
        export(schools, schools_guide, SIGMA, DATA, predictions=(SIGMA[:2],), num_samples=3)


def test_predictions_are_arguments() -> None:
    with pytest.raises(TypeError, match=r"Expected predictions to be a tuple .* Pass \(x_new,\)"):
        export(line, line_guide, SIGMA, DATA, predictions=SIGMA)


def test_dimensions_of_deterministic_sites() -> None:
    """Plates where the value has them; nothing says what its event is."""

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
        numpyro.deterministic("first", z[..., 0])
        numpyro.deterministic("pair", z[..., :2])
        numpyro.deterministic("grid", jnp.arange(6.0))
        with numpyro.plate("columns", 3, dim=-1), numpyro.plate("rows", 2, dim=-2):
            numpyro.deterministic("constant", jnp.asarray(2.0))
            numpyro.deterministic("table", jnp.arange(6.0).reshape(2, 3))
            numpyro.deterministic("vectors", jnp.zeros((2, 1, 5)))
            numpyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=jnp.zeros((2, 3)))

    def guide() -> None:
        numpyro.sample("z", dist.Normal(jnp.zeros(4), 1.0).to_event(1))

    found = export(model, guide, num_samples=6, num_chains=1)["posterior"]
    draws = ("chain", "draw")
    assert shapes(found) == {
        "z": (*draws, "z_dim_0"),
        "first": draws,
        "pair": (*draws, "pair_dim_0"),
        "grid": (*draws, "grid_dim_0"),
        "constant": draws,
        "table": (*draws, "rows", "columns"),
        "vectors": (*draws, "rows", "columns", "vectors_dim_0"),
    }
    assert found["vectors"].shape == (1, 6, 2, 3, 5)
    np.testing.assert_array_equal(found["grid"][0, 3], np.arange(6.0))
    np.testing.assert_array_equal(found["first"], found["z"][..., 0])
    np.testing.assert_array_equal(found["table"][0, 5], np.arange(6.0).reshape(2, 3))


def test_resampled_draws_are_the_posterior() -> None:
    """A guide that is too wide and off the mark; then leave-one-out is that of the posterior."""
    y = jnp.array([1.5, 0.4, 1.1, -0.3])

    def model(y: jax.Array) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.deterministic("square", z**2)
        with numpyro.plate("rows", 4):
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: jax.Array) -> None:
        numpyro.sample("z", dist.Normal(0.2, 0.8))

    data = np.asarray(y)
    truth, spread = data.sum() / 5, 5**-0.5
    errors = []
    for number in (1, 20):
        found = export(
            model,
            guide,
            y,
            num_samples=1_000,
            num_chains=2,
            num_importance=number,
            log_likelihood=True,
            predictions=(y,),
            chunk_size=10_000,
        )
        draws = np.asarray(found["posterior"]["z"])
        errors.append(abs(draws.mean() - truth) / spread + abs(np.log(draws.std() / spread)))
        assert ("sample_stats" in groups(found)) == (number == 1)
        np.testing.assert_allclose(found["posterior"]["square"], draws**2, rtol=1e-5)
        likelihood = stats.norm.logpdf(data, draws[..., None], 1.0)
        np.testing.assert_allclose(found["log_likelihood"]["y"], likelihood, rtol=1e-4, atol=1e-5)
        for group in ("predictions", "posterior_predictive"):
            noise = np.asarray(found[group]["y"]) - draws[..., None]
            assert abs(noise.std() - 1) < 0.05
    assert errors[0] > 0.5 and errors[1] < 0.06
    # Both chains are of one law, in no order.
    assert abs(draws[0].mean() - draws[1].mean()) < 4 * spread * np.sqrt(2 / 1_000)
    assert abs(np.corrcoef(draws[0, 1:], draws[0, :-1])[0, 1]) < 0.15
    others = data.sum() - data
    exact = stats.norm.logpdf(data, others / 4, np.sqrt(1 + 1 / 4))
    result = arviz.loo(found)
    estimate = result.elpd if hasattr(result, "elpd") else result.elpd_loo
    assert abs(estimate - exact.sum()) < 0.1


def test_rows_are_not_resampled() -> None:
    text = (
        "Expected one weight for all rows under num_importance > 1; got one per row of plate 'rows'"
    )
    with pytest.raises(ValueError, match=text):
        export(autoencoder, encoder, jnp.zeros(2), num_importance=2)
    with pytest.raises(ValueError, match="Expected num_importance >= 1; got 0."):
        export(autoencoder, encoder, jnp.zeros(2), num_importance=0)
