"""Latents under a mask in guides made from a model: the evidence is that of what counts."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from reference import masks as oracle
from test_numpyro.models import largest, shaken, z_score

from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import IAF, AutoAmortized, AutoPosterior, MeanField
from numpyro_vae_ext.training import pathfinder

KEY = random.key(3)
X, COUNTS = jnp.asarray(oracle.X), jnp.asarray(oracle.COUNTS)
SmallIAF = partial(IAF, hidden_dims=(5,))
# Normal in unconstrained space, which has a number less than the simplex.
SIMPLEX = dist.TransformedDistribution(
    dist.Normal(jnp.zeros(2), 1.0).to_event(1), dist.transforms.StickBreakingTransform()
)


def partly_observed() -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 4):
        numpyro.sample("x", dist.Normal(mu, 1.0), obs=X, obs_mask=COUNTS)


def masked_rows() -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 4), handlers.mask(mask=COUNTS):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=X)


def masked_entries() -> None:
    """A mask inside of an event, whose support is the positive line."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    z = numpyro.sample("z", dist.LogNormal(mu, 1.0).expand([4]).mask(COUNTS).to_event(1))
    numpyro.sample("x", dist.Normal(jnp.log(z), 1.0).mask(COUNTS).to_event(1), obs=X)


MODELS = {f.__name__: f for f in (partly_observed, masked_rows, masked_entries)}
SECOND = {"partly_observed": "x_unobserved", "masked_rows": "z", "masked_entries": "z"}


def at(kind: str, family: Any, wider: float = 1.0) -> tuple[Any, Any]:
    """A guide that starts at the posterior, and its parameters, the family's all 0."""
    loc, covariance = oracle.posterior(kind)
    sites = {"mu": (), SECOND[kind]: (4,)}
    tril = wider * np.linalg.cholesky(covariance)
    start = SimpleNamespace(loc=loc, scale_tril=tril, sites=sites)
    guide = AutoPosterior(MODELS[kind], family, start=start)
    params = started(MODELS[kind], guide)
    name = "auto_family$params"
    return guide, params | {name: jax.tree.map(jnp.zeros_like, params[name])}


def started(model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
    """The first parameters; the arguments are known to the compiler, and can be looked at."""
    svi = SVI(model, guide, optax.adam(0.1), Trace_ELBO())
    return jax.jit(lambda key: svi.get_params(svi.init(key, *args, **kwargs)))(KEY)


def weights(model: Any, guide: Any, params: Any, *args: Any) -> np.ndarray:
    elbo = ImportanceWeightedELBO(5000)
    run = jax.jit(lambda key, *args: elbo.log_weights(key, params, model, guide, *args))
    return np.asarray(run(KEY, *args))


@pytest.mark.parametrize(
    ("kind", "family"), [("partly_observed", SmallIAF), ("masked_entries", MeanField)]
)
def test_every_weight_is_the_evidence_at_the_posterior(exact: None, kind: str, family: Any) -> None:
    """Path gradients are 0 draw by draw, and the host's objectives say the same."""
    guide, params = at(kind, family)
    model, truth = MODELS[kind], oracle.evidence(kind)

    @jax.jit
    def found(params: Any) -> Any:
        elbos = [ImportanceWeightedELBO(3, gradient=gradient) for gradient in ("stl", "dreg")]
        slopes = [jax.grad(lambda p, e=e: e.loss(KEY, p, model, guide))(params) for e in elbos]
        hosts = [e.loss(KEY, params, model, guide) for e in (Trace_ELBO(), TraceMeanField_ELBO())]
        return elbos[0].log_weights(KEY, params, model, guide), hosts, slopes

    log_weights, hosts, slopes = found(params)
    np.testing.assert_allclose(log_weights, truth, atol=1e-9)
    np.testing.assert_allclose(hosts, -truth, atol=1e-9)
    assert largest(slopes) < 1e-8


@pytest.mark.parametrize("kind", ["masked_rows"])
def test_mean_weight_and_gradient_off_the_posterior(exact: None, kind: str) -> None:
    """The evidence by any guide; the gradient of the plain ELBO in closed form."""
    guide, params = at(kind, SmallIAF, wider=1.2)
    model, name = MODELS[kind], "auto_family$params"
    moved = params | {name: shaken(params[name], 0.1)}
    found = weights(model, guide, moved)
    assert np.std(found) > 0.1
    assert abs(z_score(jnp.exp(found), np.exp(oracle.evidence(kind)))) < 4
    # With the target N(0, I) and the guide N(l, s^2): the derivatives are l and s^2 - 1.
    guide, params = at(kind, SmallIAF)
    loc, log_scale = jnp.array([0.5, -0.3, 0.2, 0.1, -0.4]), jnp.array([0.2, -0.3, 0.1, 0.3, -0.1])
    params = params | {"auto_step_loc": loc, "auto_step_log_scale": log_scale}
    slopes = jax.vmap(jax.grad(lambda p, key: Trace_ELBO().loss(key, p, model, guide)), (None, 0))
    slopes = jax.jit(slopes)(params, random.split(KEY, 4000))
    exact_slopes = {"auto_step_loc": loc, "auto_step_log_scale": jnp.exp(2 * log_scale) - 1}
    for key, truth in exact_slopes.items():
        error = slopes[key].std(0) / np.sqrt(4000)
        assert (jnp.abs(slopes[key].mean(0) - truth) < 4 * error).all()


@pytest.mark.parametrize("kind", ["partly_observed", "masked_entries"])
def test_pathfinder_and_draws(exact: None, kind: str) -> None:
    """What the data left open has the right posterior; what is masked out does not count."""
    start = pathfinder(KEY, MODELS[kind], num_paths=2, num_samples=50, progress_bar=False)
    np.testing.assert_allclose(start.log_evidence, oracle.evidence(kind), atol=1e-3)
    guide = AutoPosterior(MODELS[kind], MeanField, start=start)
    params = started(MODELS[kind], guide)
    draws = guide.sample_posterior(KEY, params, sample_shape=(20_000,))
    second = draws[SECOND[kind]] if kind != "masked_entries" else jnp.log(draws["z"])
    values = jnp.concatenate([draws["mu"][:, None], second], 1)
    counts = np.concatenate([[True], oracle.free(kind)])
    loc, covariance = oracle.posterior(kind)
    np.testing.assert_allclose(values.mean(0)[counts], loc[counts], atol=0.03)
    np.testing.assert_allclose(
        jnp.cov(values.T)[counts][:, counts], covariance[counts][:, counts], atol=0.04
    )
    if kind == "partly_observed":
        np.testing.assert_allclose(draws["x"][:, COUNTS], jnp.broadcast_to(X[COUNTS], (20_000, 3)))


# --- rows with an encoder -------------------------------------------------------------------------


def rows_of(x: jax.Array, counts: jax.Array) -> None:
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=counts)


def masked(x: jax.Array, counts: jax.Array, batch_size: int | None = None) -> None:
    with numpyro.plate("data", len(x), subsample_size=batch_size) as index:
        with handlers.mask(mask=counts[index]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            p = numpyro.sample("p", SIMPLEX)
            numpyro.sample("x", dist.Normal(z[:, 0] + 0 * p[:, 0], 1.0), obs=x[index])


def encode(x: jax.Array, counts: jax.Array, batch_size: int | None = None) -> jax.Array:
    return jnp.where(counts, x, 0.0)[:, None]


def test_evidence_of_rows(exact: None) -> None:
    """Row by row; the mask may be another one at every call."""
    guide = AutoAmortized(rows_of, encode, family=MeanField)
    params = started(rows_of, guide, X, COUNTS)
    for counts in (COUNTS, ~COUNTS):
        found = np.exp(weights(rows_of, guide, params, X, counts))
        truth = np.exp(np.where(counts, dist.Normal(0.0, np.sqrt(2.0)).log_prob(X), 0.0))
        assert (np.abs(found.mean(0) - truth) < 4 * found.std(0) / np.sqrt(len(found))).all()


def test_mask_of_a_subsample(exact: None) -> None:
    """The guide masks the rows that the model draws, and by the mask of the call."""
    x, counts = jnp.zeros(6), jnp.array([jnp.arange(6) % 3 == 0, jnp.arange(6) % 3 > 0] * 2)
    guide = AutoAmortized(masked, encode, family=MeanField)
    params = started(masked, guide, x, counts[0], batch_size=2)
    elbo = ImportanceWeightedELBO(2000)

    def log_weights(key: jax.Array, counts: jax.Array) -> jax.Array:
        return elbo.log_weights(key, params, masked, guide, x, counts, batch_size=2)

    found = np.exp(jax.jit(jax.vmap(log_weights))(random.split(KEY, 4), counts))
    error = 4 * found.std(1) / np.sqrt(2000)
    truth = np.array([1.0, 1 / np.sqrt(4 * np.pi)])
    seen = np.abs(found.mean(1)[..., None] - truth) < error[..., None]
    assert seen.any(-1).all()
    assert seen.any((0, 1)).all()


# --- what is refused ------------------------------------------------------------------------------


def read() -> None:
    """A flat prior, which is no density."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=0.3)


def read_below() -> None:
    with numpyro.plate("data", 4):
        with handlers.mask(mask=COUNTS):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("w", dist.Normal(z.mean(), 1.0))


def transformed() -> None:
    base = dist.Normal(0.0, 1.0).expand([4]).mask(COUNTS)
    numpyro.sample("z", dist.TransformedDistribution(base, dist.transforms.ExpTransform()))


READS = (
    "Expected latent sites without a mask under {}; got site 'z' with one, and site '{}', whose "
    "density reads what is masked out. Mask site '{}' there as well, or write the guide by hand."
)
ERRORS = {
    "observed": (read, READS.format("{}", "x", "x")),
    "latent": (read_below, READS.format("{}", "w", "w")),
    "hidden": (handlers.block(read, hide=["x"]), READS.format("{}", "x", "x")),
    "transformed": (
        transformed,
        "Expected latent sites without a mask under {}; got site 'z' with one inside of a "
        "transformed distribution. Mask whole events of the site, or write the guide by hand.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    model, text = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(text.format('AutoPosterior'))}"):
        handlers.seed(AutoPosterior(model), 0)()
    with pytest.raises(ValueError, match=f"^{re.escape(text.format('pathfinder'))}"):
        pathfinder(KEY, model, progress_bar=False)


def test_first_call_under_jit() -> None:
    """Nothing can read what `obs_mask` puts aside; of another mask it is not seen."""

    def init(model: Any) -> Any:
        svi = SVI(
            model, AutoAmortized(model, encode, family=MeanField), optax.adam(0.1), Trace_ELBO()
        )
        return jax.jit(svi.init)(KEY, X, COUNTS)

    init(rows_of)
    text = (
        "Expected latent sites without a mask under AutoAmortized; got site 'z' with one, and its "
        "first call under jit, where it is not seen whether anything reads what is masked out. "
        "Call it once outside of jit."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        init(masked)
