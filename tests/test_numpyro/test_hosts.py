"""Our families under the host's objectives, and our objective with the host's guides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import block
from numpyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
    init_to_value,
)
from reference import conjugate as oracle
from test_numpyro import models
from test_numpyro.models import family, module_params, normal, shaken, z_score

from numpyro_vae_ext.elbos import ImportanceWeightedELBO

KEY = jax.random.key(6)
X = np.array([0.8, -0.4, 1.1])


def values_and_gradients(
    name: str, amortised: bool, elbo: Any, keys: jax.Array
) -> tuple[np.ndarray, float]:
    """Loss and gradient of a family under an objective, one row a key, and the log-evidence."""
    x = 0.7 * normal(3, 2)
    posterior = shaken(family(name, latent_dim=2, context_dim=2 if amortised else None), 0.1)
    params = module_params(posterior=posterior)
    if amortised:
        model, guide = models.conjugate, models.amortised(posterior)
        truth = oracle.log_evidence(np.asarray(x), 0.0).sum()
    else:
        model, guide = models.one_latent, models.one_posterior(posterior)
        truth = oracle.global_log_evidence(np.asarray(x), 0.0)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        return elbo.loss(key, params, model, guide, x)

    found = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(params, keys)
    rows = [np.asarray(v).reshape(len(keys), -1) for v in jax.tree.leaves(found)]
    return np.concatenate(rows, 1), truth


@cache
def ours(name: str, amortised: bool, particles: int) -> tuple[np.ndarray, float]:
    """Those of our objective, which several objectives of the host have the mean of."""
    elbo, keys = ImportanceWeightedELBO(particles), jax.random.split(KEY, 3000)
    return values_and_gradients(name, amortised, elbo, keys[1500:])


@pytest.mark.parametrize(
    ("name", "amortised"),
    [
        ("MeanField", True),
        ("MeanField", False),
        ("IAF", True),
        ("IAF", False),
        ("Auxiliary", True),
        ("VGP", False),
    ],
)
@pytest.mark.parametrize(
    ("host", "particles"),
    [
        (Trace_ELBO(), 1),
        (Trace_ELBO(num_particles=3), 1),
        (TraceMeanField_ELBO(), 1),
        (TraceGraph_ELBO(), 1),
        (RenyiELBO(alpha=0, num_particles=4), 4),
    ],
    ids=["Trace", "Trace-3", "TraceMeanField", "TraceGraph", "Renyi"],
)
def test_families_under_the_hosts_objectives(
    host: Any, particles: int, name: str, amortised: bool
) -> None:
    """The host's bound is ours: below the evidence and of the same mean, with the same gradient."""
    keys = jax.random.split(KEY, 3000)
    found, truth = values_and_gradients(name, amortised, host, keys[:1500])
    expected, _ = ours(name, amortised, particles)
    assert z_score(-found[:, 0], truth) < 4
    error = np.sqrt((found.var(0) + expected.var(0)) / 1500)
    moving = error > 1e-9
    scores = (found - expected).mean(0)[moving] / error[moving]
    assert moving.sum() > 4 and np.abs(scores).max() < 4.5


def test_families_under_enumeration() -> None:
    """The host's enumeration needs funsor, which it does not install by itself."""
    pytest.importorskip("funsor")
    from numpyro.infer import TraceEnum_ELBO

    x = 0.7 * normal(3, 2)
    posterior = shaken(family("IAF", latent_dim=2, context_dim=2), 0.1)
    params = module_params(posterior=posterior)
    args = (params, models.conjugate, models.amortised(posterior), x)
    keys = jax.random.split(KEY, 1000)
    found = jax.vmap(lambda key: TraceEnum_ELBO().loss(key, *args))(keys)
    assert z_score(-np.asarray(found), oracle.log_evidence(np.asarray(x), 0.0).sum()) < 4


def rows(x: jax.Array, batch_size: int | None = None) -> None:
    """A latent for every row."""
    with numpyro.plate("data", 3, subsample_size=batch_size):
        batch = numpyro.subsample(x, event_dim=0)
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=batch)


def shared(x: jax.Array) -> None:
    """Two latents for all rows, of which one is positive: log w and v are N(0, 1)."""
    w = numpyro.sample("w", dist.LogNormal(0.0, 1.0))
    v = numpyro.sample("v", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 3):
        numpyro.sample("x", dist.Normal(jnp.log(w) + v, 1.0), obs=x)


def surrogate(*_: jax.Array) -> None:
    numpyro.sample("w", dist.LogNormal(0.0, 1.0))
    numpyro.sample("v", dist.Normal(0.0, 1.0))


def evidence(model: Any) -> Any:
    if model is rows:
        return oracle.log_evidence(X[:, None], 0.0)
    covariance = np.eye(3) + 2.0
    log_det = np.linalg.slogdet(covariance)[1]
    return -0.5 * (X @ np.linalg.solve(covariance, X) + log_det + 3 * np.log(2 * np.pi))


OPTIONS = {
    "init_loc_fn": init_to_value(values={"w": 1.3, "v": 0.2, "z": jnp.array([0.4, -0.2, 0.5])})
}
WIDE = {**OPTIONS, "init_scale": 0.95}


def parts(second: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    def build(model: Any) -> Any:
        guide = autoguide.AutoGuideList(model)
        guide.append(autoguide.AutoNormal(block(model, hide=["v"]), **WIDE))
        guide.append(second(block(model, hide=["w"]), prefix="second", **kwargs))
        return guide

    return build


# name -> (build, model)
GUIDES: dict[str, tuple[Callable[..., Any], Any]] = {
    "AutoNormal-rows": (lambda m: autoguide.AutoNormal(m, **WIDE), rows),
    "AutoNormal": (lambda m: autoguide.AutoNormal(m, **WIDE), shared),
    "AutoDiagonalNormal": (lambda m: autoguide.AutoDiagonalNormal(m, **WIDE), shared),
    "AutoMultivariateNormal": (lambda m: autoguide.AutoMultivariateNormal(m, **WIDE), shared),
    "AutoLowRankMultivariateNormal": (
        lambda m: autoguide.AutoLowRankMultivariateNormal(m, **WIDE),
        shared,
    ),
    "AutoBatchedMultivariateNormal": (
        lambda m: autoguide.AutoBatchedMultivariateNormal(m, batch_ndim=1, **WIDE),
        rows,
    ),
    "AutoBatchedLowRankMultivariateNormal": (
        lambda m: autoguide.AutoBatchedLowRankMultivariateNormal(m, batch_ndim=1, rank=1, **WIDE),
        rows,
    ),
    "AutoIAFNormal": (
        lambda m: autoguide.AutoIAFNormal(m, num_flows=1, hidden_dims=[4], **OPTIONS),
        shared,
    ),
    "AutoDAIS": (lambda m: autoguide.AutoDAIS(m, K=2, **WIDE), shared),
    "AutoSemiDAIS": (lambda m: autoguide.AutoSemiDAIS(m, m, K=2, init_scale=0.95), rows),
    "AutoSurrogateLikelihoodDAIS": (
        lambda m: autoguide.AutoSurrogateLikelihoodDAIS(m, surrogate, K=2, **WIDE),
        shared,
    ),
    "AutoGuideList": (parts(autoguide.AutoDiagonalNormal, **WIDE), shared),
}


def started(build: Callable[..., Any], model: Any) -> tuple[Any, Any, Any, Any]:
    """A guide set up by the host, its unconstrained parameters, and the map to the others."""
    guide = build(model)
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    state = svi.init(KEY, jnp.asarray(X))
    return guide, svi.optim.get_params(state.optim_state), svi.constrain_fn, svi


@pytest.mark.parametrize("name", GUIDES)
def test_host_guides(exact: None, name: str) -> None:
    """E[w] = p(x), and the gradients of all estimators agree on average."""
    build, model = GUIDES[name]
    guide, free, constrain, _ = started(build, model)
    x, truth = jnp.asarray(X), evidence(model)
    many = ImportanceWeightedELBO(20_000)
    weights = jax.jit(lambda p: many.log_weights(KEY, constrain(p), model, guide, x))(free)
    assert weights.shape[1:] in ((), np.shape(truth))
    truth = truth if weights.ndim > 1 else np.sum(truth)
    assert np.abs(z_score(np.exp(np.asarray(weights) - truth), 1.0)).max() < 4

    def gradient(key: jax.Array, which: str, particles: int) -> jax.Array:
        elbo = ImportanceWeightedELBO(particles, gradient=which)
        loss = jax.grad(lambda p: elbo.loss(key, constrain(p), model, guide, x))
        return jnp.concatenate([v.ravel() for v in jax.tree.leaves(loss(free))])

    estimators = (("reparam", 3), ("dreg", 3), ("reparam", 1), ("stl", 1))

    @jax.jit
    def all_gradients(keys: jax.Array) -> list[jax.Array]:
        return [jax.vmap(lambda k, e=e: gradient(k, *e))(keys) for e in estimators]

    found = [np.asarray(v) for v in all_gradients(jax.random.split(KEY, 3000))]
    for plain, other in ((found[0], found[1]), (found[2], found[3])):
        paired = other - plain  # the same noise
        moving = paired.std(0) > 1e-9
        if moving.any():
            assert np.abs(z_score(paired[:, moving], 0.0)).max() < 4.5
        np.testing.assert_allclose(paired[:, ~moving].mean(0), 0.0, atol=1e-9)


POINTS = {
    "AutoDelta": lambda m: autoguide.AutoDelta(m, **OPTIONS),
    "AutoLaplaceApproximation": lambda m: autoguide.AutoLaplaceApproximation(m, **OPTIONS),
    "AutoGuideList": parts(autoguide.AutoDelta, **OPTIONS),
}


@pytest.mark.parametrize("name", POINTS)
def test_points_are_map_estimates(exact: None, name: str) -> None:
    """With one particle the loss and its gradient are the host's; with more there is no bound."""
    guide, free, constrain, _ = started(POINTS[name], shared)
    x = jnp.asarray(X)

    def both(elbo: Any) -> Any:
        loss = jax.value_and_grad(lambda p: elbo.loss(KEY, constrain(p), shared, guide, x))
        return jax.tree.leaves(jax.jit(loss)(free))

    expected = both(Trace_ELBO())
    estimators = ("reparam",) if name == "AutoGuideList" else ("reparam", "stl", "dreg")
    for gradient in estimators:
        found = both(ImportanceWeightedELBO(gradient=gradient))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match="Expected a guide with a density at every latent"):
            both(ImportanceWeightedELBO(3, gradient=gradient))


def test_block_neural_flow_has_no_path_derivative() -> None:
    guide, free, constrain, _ = started(
        lambda m: autoguide.AutoBNAFNormal(m, hidden_factors=[2], **OPTIONS), shared
    )
    args = (constrain(free), shared, guide, jnp.asarray(X))
    loss = jax.jit(lambda: ImportanceWeightedELBO(500).loss(KEY, *args))
    assert loss() > -evidence(shared) - 0.1
    for gradient in ("stl", "dreg"):
        with pytest.raises(ValueError, match="any value under path gradients; got site '_auto_l"):
            ImportanceWeightedELBO(3, gradient=gradient).loss(KEY, *args)


def test_auto_normal_with_a_subsample() -> None:
    """Local latents of the host's guide: one weight a row, whatever the batch."""
    x = jnp.asarray(X)
    guide = autoguide.AutoNormal(rows, **WIDE)
    svi = SVI(rows, guide, optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(KEY, x))
    elbo = ImportanceWeightedELBO(5)
    draws = []
    for size in (None, 2):

        def loss(key: jax.Array, size: int | None = size) -> jax.Array:
            return elbo.loss(key, params, rows, guide_of(size), x, size)

        def guide_of(size: int | None) -> Any:
            plate = numpyro.plate
            guide.create_plates = lambda *a: plate("data", 3, subsample_size=size)
            return guide

        draws.append(-np.asarray(jax.jit(jax.vmap(loss))(jax.random.split(KEY, 2000))))
        assert z_score(draws[-1], evidence(rows).sum()) < 4
    error = np.hypot(*(d.std() / np.sqrt(len(d)) for d in draws))
    assert abs(draws[0].mean() - draws[1].mean()) < 4 * error


def test_joint_guides_refuse_a_subsample() -> None:
    x = jnp.asarray(X)
    guide = autoguide.AutoDiagonalNormal(rows)
    svi = SVI(rows, guide, optax.sgd(0.1), ImportanceWeightedELBO(3))
    with pytest.raises(ValueError, match="does not support local latent variables"):
        svi.init(KEY, x, 2)
    guide = autoguide.AutoDiagonalNormal(rows)
    with numpyro.handlers.seed(rng_seed=0):
        guide(x)
    params = {"auto_loc": jnp.zeros(3), "auto_scale": jnp.ones(3)}
    # Set up on the full data instead, its values do not fit the batch.
    with pytest.raises(ValueError, match="Incompatible shapes"):
        ImportanceWeightedELBO(3).loss(KEY, params, rows, guide, x, 2)
