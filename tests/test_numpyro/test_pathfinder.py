"""Pathfinder: closed forms, hard densities, several modes, what it refuses."""

from __future__ import annotations

import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import CASES
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import potential_energy

from numpyro_vae_ext._flat import flat_model
from numpyro_vae_ext.guides import AutoPosterior, MeanField
from numpyro_vae_ext.training import PathfinderResult, pathfinder

KEY = random.key(0)


def run(model, *args, **options):
    return pathfinder(KEY, model, *args, progress_bar=False, **options)


def regression(x, y):
    """A scale on the positive line next to a slope."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.HalfNormal(10.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


def data(rows: int = 20):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 2))
    return jnp.asarray(x), jnp.asarray(x @ [1.0, -2.0] + 0.3 * rng.normal(size=rows))


@pytest.mark.usefixtures("exact")
def test_normal_is_found() -> None:
    """A Normal over four decades: its evidence, its mean and its covariance."""
    scales = np.logspace(-2, 2, 12)
    tril = np.linalg.cholesky(0.9 + 0.1 * np.eye(12)) * scales[:, None]

    def model(loc):
        numpyro.factor("constant", 2.5)
        numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    found = run(model, jnp.asarray(3 * scales), num_paths=3, num_samples=200)
    assert found.converged.all() and found.reasons == ("converged",) * 3
    np.testing.assert_allclose(found.elbo, 2.5, atol=1e-3)
    np.testing.assert_allclose(found.log_evidence, 2.5, atol=1e-3)
    np.testing.assert_allclose(found.loc / scales, 3, atol=1e-5)
    np.testing.assert_allclose(
        found.scale_tril / scales[:, None], tril / scales[:, None], atol=1e-5
    )
    assert found.sites == {"z": (12,)}


@pytest.mark.parametrize("case", CASES["training"]["pathfinder"])
def test_result(case: dict) -> None:
    """Shapes, supports and what belongs together; the same from the same key."""
    x, y = data()
    found = run(regression, x, y, **case)
    paths, draws = case["num_paths"], case.get("num_samples", 1000)
    assert found.sites == {"slope": (2,), "scale": ()}
    assert found.draws["slope"].shape == (paths, draws, 2)
    assert found.draws["scale"].shape == (paths, draws)
    assert found.resampled["slope"].shape == (draws, 2)
    assert (found.resampled["scale"] > 0).all()
    for name in ("elbos", "converged", "num_iterations", "khats", "reasons", "low_ranks"):
        assert len(getattr(found, name)) == paths, name
    best = int(np.argmax(found.elbos))
    assert found.elbo == found.elbos[best]
    np.testing.assert_array_equal(found.loc, found.locs[best])
    np.testing.assert_array_equal(found.scale_tril, found.scale_trils[best])
    assert found.log_weights.shape == (paths, draws)
    # A bound, and close to what it bounds: no other latent is near a Normal's.
    assert found.log_evidence - 0.3 < found.elbo < found.log_evidence + 0.05
    loc, alpha, beta, gamma = found.low_ranks[best]
    assert (loc.shape, alpha.shape) == ((3,), (3,)) and beta.shape[1] == len(gamma)
    again = run(regression, x, y, **case)
    assert again.reasons == found.reasons
    np.testing.assert_array_equal(again.resampled["slope"], found.resampled["slope"])


@pytest.mark.parametrize("case", CASES["training"]["PathfinderResult"])
def test_starts_a_guide(case: dict) -> None:
    """The guide draws from the best Normal before any training."""
    x, y = data()
    found = run(regression, x, y, **case)
    assert isinstance(found, PathfinderResult)
    guide = AutoPosterior(regression, MeanField, start=found)
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        guide(x, y)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    draws = guide.sample_posterior(random.key(1), params, x, y, sample_shape=(4000,))
    free = np.column_stack([draws["slope"], np.log(draws["scale"])])
    width = np.sqrt(np.diag(found.scale_tril @ found.scale_tril.T))
    np.testing.assert_allclose((free.mean(0) - found.loc) / width, 0, atol=0.1)
    np.testing.assert_allclose(free.std(0) / width, 1, rtol=0.1)


def test_single_precision() -> None:
    """Data far from 0, in float32: the paths end where the density has no more digits."""
    with jax.enable_x64(False):

        def model(y):
            loc = numpyro.sample("loc", dist.Normal(0.0, 5000.0))
            scale = numpyro.sample("scale", dist.HalfNormal(500.0))
            with numpyro.plate("data", len(y)):
                numpyro.sample("y", dist.Normal(loc, scale), obs=y)

        y = jnp.linspace(2400.0, 2600.0, 50)
        found = run(model, y, num_paths=3)
    assert found.converged.all() and found.loc.dtype == jnp.float32
    np.testing.assert_allclose(found.resampled["loc"].mean(), 2500, atol=3)


def test_funnel() -> None:
    """Neal's: the mode is far down the neck, and the best Normal is not there."""

    def model():
        v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)).expand([3]).to_event(1))

    found = run(model)
    assert found.converged.any() and np.isfinite(found.elbos).all()
    # With v ~ N(m, s^2) and the best x the bound is
    # -log 3 - (m^2 + s^2) / 18 + 1 / 2 + log s - 3 s^2 / 4: best at m = 0, s^2 = 18 / 29.
    best = -math.log(3) - 1 / 29 + 1 / 2 + math.log(18 / 29) / 2 - 27 / 58
    assert found.loc[0] > -8 and best - 0.75 < found.elbo < best + 0.1


def test_density_without_a_mode() -> None:
    """A hierarchy whose density grows without an end as its scale falls: the path is ended."""

    def model(y):
        scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
        with numpyro.plate("groups", len(y)):
            z = numpyro.sample("z", dist.Normal(0.0, scale))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    found = run(model, jnp.linspace(-1, 1, 6), num_paths=4)
    assert set(found.reasons) == {"bound"} and (found.num_iterations <= 250).all()
    assert found.converged.all() and found.log_evidence - found.elbo < 3


def test_wall() -> None:
    """A density that is no number in parts of the space."""

    def model():
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.factor("wall", jnp.where(z[0] > 1.0, jnp.nan, 0.0))

    found = run(model, num_paths=4)
    assert found.converged.all() and np.isneginf(found.elbo)  # no Normal keeps off the wall
    np.testing.assert_allclose(found.log_evidence, np.log(0.8413), atol=0.1)
    assert (found.resampled["z"][:, 0] <= 1).all()


def test_two_modes() -> None:
    """Each mode counts by its mass, however many paths end there."""

    def model():
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), (2,)))
        left = dist.Normal(-5.0, 1.0).log_prob(z).sum() + jnp.log(0.8)
        right = dist.Normal(5.0, 0.5).log_prob(z).sum() + jnp.log(0.2)
        numpyro.factor("mixture", jnp.logaddexp(left, right))

    found = run(model, num_samples=2000, init_radius=6.0)
    assert {bool(loc[0] > 0) for loc in found.locs} == {True, False}
    np.testing.assert_allclose((found.resampled["z"][:, 0] > 0).mean(), 0.2, atol=0.04)
    np.testing.assert_allclose(found.log_evidence, 0, atol=0.02)
    # Each path alone knows one of them.
    np.testing.assert_allclose(np.exp(found.elbos.min()), 0.2, atol=0.01)


def test_unfinished_path() -> None:
    x, y = data()
    text = "Expected one path at least to end within 2 steps; got none. Raise max_iterations"
    with pytest.warns(UserWarning, match=re.escape(text)):
        found = run(regression, x, y, num_paths=2, max_iterations=2)
    assert found.reasons == ("max_iterations",) * 2 and not found.converged.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(regression, x, y, num_paths=2).converged.all()


def hidden(**options) -> None:
    numpyro.sample("z", dist.Normal(0.0, 1.0), **options)


def discrete() -> None:
    hidden()
    numpyro.sample("k", dist.Bernoulli(0.5))


def masked() -> None:
    with numpyro.plate("rows", 2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(jnp.array([True, False])))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=0 * z)


def subsampled() -> None:
    hidden()
    with numpyro.plate("data", 100, subsample_size=10):
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=jnp.zeros(10))


def infinite() -> None:
    hidden()
    numpyro.factor("nowhere", jnp.nan)


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (lambda: hidden(obs=0.0), {}, "Expected at least one continuous latent site in the model;"),
        (discrete, {}, "Expected continuous latent sites under pathfinder; got site 'k' with the"),
        (masked, {}, "Expected latent sites without a mask under pathfinder; got site 'z' with"),
        (
            subsampled,
            {},
            "Expected no subsampled plate under pathfinder; got site 'x' in plate 'data' (10 of "
            "100 rows). Pass the full data.",
        ),
        (
            infinite,
            {},
            "Expected a finite log-density and gradient at one start at least; got none within "
            "2.0 of 0, unconstrained, by site 'nowhere'. Change init_radius",
        ),
        (hidden, {"num_paths": 0}, "Expected num_paths >= 1; got 0."),
        (hidden, {"init_radius": -1.0}, "Expected init_radius > 0; got -1.0."),
    ],
)
def test_errors(model, options, text) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        run(model, **options)


def hierarchy(y) -> None:
    """Supports that depend on another site, a simplex, a scan, a scaled plate."""
    top = numpyro.sample("top", dist.HalfNormal(2.0))
    bound = numpyro.sample("bound", dist.Uniform(0.0, top))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))

    def step(before, _):
        now = numpyro.sample("walk", dist.Normal(before, top))
        return now, now

    _, walk = scan(step, 0.0, None, length=len(y))
    with handlers.scale(scale=2.0), numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(walk + bound, weights[0]), obs=y)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("model", "args"), [(hierarchy, (jnp.ones(4),)), (regression, data())])
def test_flat_density_is_the_hosts(model, args) -> None:
    flat = flat_model(KEY, model, args, {})
    u = flat.start(random.key(1))
    expected = -potential_energy(handlers.seed(model, 0), args, {}, flat.unpack(u))
    np.testing.assert_allclose(flat.log_density(u), expected, rtol=1e-12)
    np.testing.assert_allclose(
        flat.compiled(lambda flat, u: flat.log_density(u))(u), expected, rtol=1e-12
    )
    np.testing.assert_allclose(sum(flat.log_densities(u).values()), expected, rtol=1e-12)
    assert tuple(flat.constrain(u)) == flat.names == tuple(flat.shapes)
