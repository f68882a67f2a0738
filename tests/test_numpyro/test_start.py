"""Where guides made from a model start: the affine step of a family, and a whitened start."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO, autoguide, init_to_value
from reference import starts
from test_numpyro import models
from test_numpyro.models import normal

from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import IAF, AutoAmortized, AutoPosterior, MeanField
from numpyro_vae_ext.guides._base import GuideFamily
from numpyro_vae_ext.guides._flow import FlowDistribution

KEY = jax.random.key(4)
FAMILIES = [pytest.param(f, id=f.__name__) for f in (MeanField, IAF)]


def badly_scaled() -> None:
    """A Normal whose numbers have scales of 1e-4 and 1e3; there are no data: the evidence is 1."""
    slope, root = map(jnp.asarray, starts.conditional())
    a = numpyro.sample("a", dist.Normal(starts.LOC[0], starts.SCALES[0]))
    mean = starts.LOC[1:] + slope * (a - starts.LOC[0]) / starts.SCALES[0]
    numpyro.sample("b", dist.MultivariateNormal(mean, scale_tril=root))


def begun(model: Any, guide: Any, *args: Any, loss: Any = None, rate: float = 0.02) -> Any:
    svi = SVI(model, guide, optax.adam(rate), loss or Trace_ELBO())
    return svi, jax.jit(svi.init)(KEY, *args)


def at_the_posterior(guide: Any) -> dict[str, Any]:
    """Parameters at which an IAF is the identity and the step does the rest."""
    svi, state = begun(badly_scaled, guide)
    params = svi.get_params(state)
    params["auto_family$params"] = jax.tree.map(jnp.zeros_like, params["auto_family$params"])
    shift, factor = jnp.array([0.5, -1.0, 2.0]), jnp.array([2.0, 0.5, 3.0])
    return params | {"auto_step_loc": shift, "auto_step_log_scale": jnp.log(factor)}


@pytest.mark.parametrize("gradient", ["stl", "dreg", "reparam"])
def test_path_gradient_vanishes_at_the_posterior(exact: None, gradient: str) -> None:
    """Draw by draw, also in the parameters of the step; every weight is the evidence."""
    start = starts.moved(np.array([0.5, -1.0, 2.0]), np.array([2.0, 0.5, 3.0]))
    guide = AutoPosterior(badly_scaled, IAF, start=start)
    params = at_the_posterior(guide)
    elbo = ImportanceWeightedELBO(4, gradient=gradient)
    slopes = jax.jit(jax.grad(lambda p: elbo.loss(KEY, p, badly_scaled, guide)))(params)
    log_weights = jax.jit(lambda p: elbo.log_weights(KEY, p, badly_scaled, guide))(params)
    np.testing.assert_allclose(log_weights, np.zeros(4), atol=1e-8)
    sizes = {k: max(models.largest(x) for x in jax.tree.leaves(v)) for k, v in slopes.items()}
    assert sizes["auto_loc"] == sizes["auto_scale_tril"] == 0
    if gradient == "reparam":
        assert min(sizes["auto_step_loc"], sizes["auto_step_log_scale"]) > 0.1
    else:
        assert max(sizes.values()) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_all_sizes(family: Any) -> None:
    """From a start that is a whole sd off and 1.5 times too wide; the divergence is the loss."""
    start = starts.start(starts.LOC + starts.SCALE_TRIL @ np.ones(3), 1.5 * starts.SCALE_TRIL)
    loss = ImportanceWeightedELBO(1, gradient="stl")
    guide = AutoPosterior(badly_scaled, partial(family), start=start)
    svi, state = begun(badly_scaled, guide, loss=loss)

    @jax.jit
    def run(state: Any) -> Any:
        state, _ = jax.lax.scan(lambda s, _: svi.update(s), state, length=300)
        keys = jax.random.split(KEY, 200)
        losses = jax.vmap(lambda k: loss.loss(k, svi.get_params(state), badly_scaled, guide))(keys)
        return state, losses.mean()

    state, divergence = run(state)
    assert divergence < 0.05
    params = svi.get_params(state)
    draws = guide.sample_posterior(KEY, params, sample_shape=(4000,))
    for name, place in (("a", 0), ("b", slice(1, 3))):
        error = (draws[name].mean(0) - starts.LOC[place]) / starts.SPREADS[place]
        assert np.abs(error).max() < 0.15
        ratio = draws[name].std(0) / starts.SPREADS[place]
        assert np.abs(np.log(ratio)).max() < 0.15
    if family is MeanField:
        assert set(params) == {"auto_family$params", "auto_loc", "auto_scale_tril"}


def test_init_scale_is_no_brake() -> None:
    """Far from the data every step of Adam is one of its rate, in ours as in the host's guide."""

    def model(x: jax.Array) -> None:
        a = numpyro.sample("a", dist.Normal(0.0, 500.0))
        b = numpyro.sample("b", dist.Normal(0.0, 500.0))
        numpyro.sample("x", dist.Normal(jnp.stack([a, b])[:, None], 1.0), obs=x)

    x = 2500 + normal(2, 5)
    options = {"init_loc_fn": init_to_value(values={"a": 0.0, "b": 0.0}), "init_scale": 0.1}

    def moved(guide: Any) -> Any:
        svi, state = begun(model, guide, x, rate=0.01)
        scan = partial(jax.lax.scan, lambda s, _: svi.update(s, x), length=40)
        return svi.get_params(jax.jit(scan)(state)[0])

    theirs = moved(autoguide.AutoNormal(model, **options))
    ours = moved(AutoPosterior(model, MeanField, **options))
    locs = jnp.stack([theirs["a_auto_loc"], theirs["b_auto_loc"]])
    np.testing.assert_allclose(locs, 40 * 0.01, rtol=0.02)
    np.testing.assert_allclose(ours["auto_family$params"]["loc"], locs, rtol=1e-3)
    flow = moved(AutoPosterior(model, IAF, **options))
    np.testing.assert_allclose(flow["auto_step_loc"], locs, rtol=0.02)
    np.testing.assert_array_equal(flow["auto_loc"], jnp.zeros(2))


class Own(GuideFamily):
    """A family of the user's: a statement, and a density that nothing asks for."""

    nests = True

    def _sample(self, name: str, context: Any, infer: Any) -> jax.Array:
        zeros = jnp.zeros(self.latent_dim)
        site = name if self.nests else f"{name}_of_another_name"
        value = numpyro.sample(site, dist.Normal(zeros, 1.0).to_event(1), infer=infer)
        numpyro.deterministic("seen", value)
        return value

    def _log_prob(self, value: Any, context: Any, num_samples: int, rng_key: Any) -> Any:
        raise NotImplementedError


def own(latent_dim: int, context_dim: int | None, **_: Any) -> Own:
    return Own(latent_dim, context_dim)


def test_family_of_ones_own(exact: None) -> None:
    """Its site has the step as well, and what the family goes on with is before it."""
    guide = AutoPosterior(models.one_latent, own, init_scale=[0.5, 2.0])
    args = (normal(3, 2),)
    svi, state = begun(models.one_latent, guide, *args)
    params = svi.get_params(state) | {"auto_step_loc": jnp.array([1.0, -2.0])}
    program = numpyro.handlers.substitute(guide, data=params)
    sites = numpyro.handlers.trace(numpyro.handlers.seed(program, KEY)).get_trace(*args)
    site, seen = sites["_auto_latent"], sites["seen"]["value"]
    step = jnp.array([1.0, -2.0]) + jnp.array([0.5, 2.0]) * seen
    np.testing.assert_allclose(site["value"], step, rtol=1e-12)
    law = dist.Normal(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0])).to_event(1)
    np.testing.assert_allclose(
        site["fn"].log_prob(site["value"]), law.log_prob(site["value"]), rtol=1e-12
    )


def test_a_family_without_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "nests", False)
    text = (
        "Expected the family to sample the site '_auto_latent' that it is called for; got no such "
        "site. Pass the name on to the sample statement of its latent vector."
    )
    guide = numpyro.handlers.seed(AutoPosterior(models.one_latent, own), KEY)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        guide(normal(3, 2))


def test_a_family_before_the_step_is_what_it_was() -> None:
    """Outside of an AutoPosterior no family has a step."""
    assert isinstance(IAF(2, rngs=nnx.Rngs(0)).distribution(None), FlowDistribution)


# --- amortised --------------------------------------------------------------------------------


def hierarchy(x: jax.Array) -> None:
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(z + a + b.sum(), 1.0), obs=x[:, 0])


def test_marginal_start_of_the_global_latents(exact: None) -> None:
    """Of a start for all sites; one for the global sites alone is taken as it is."""
    rng = np.random.default_rng(1)
    root = np.tril(rng.standard_normal((7, 7)), -1) + np.diag(rng.uniform(0.5, 1.5, 7))
    whole = starts.start(rng.standard_normal(7), root, {"z": (4,), **starts.SITES})
    x = normal(4, 1)
    for start in (whole, starts.start()):
        guide = AutoAmortized(hierarchy, lambda x: x, family=MeanField, start=start)
        svi, state = begun(hierarchy, guide, x)
        params = svi.get_params(state)
        np.testing.assert_allclose(params["auto_loc"], start.loc[-3:], rtol=1e-12)
        found, covariance = params["auto_scale_tril"], start.scale_tril @ start.scale_tril.T
        np.testing.assert_allclose(found @ found.T, covariance[-3:, -3:], rtol=1e-9)
        assert (jnp.diagonal(found) > 0).all() and not jnp.triu(found, 1).any()


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", starts.FAULTS)
def test_start_of_another_model(name: str) -> None:
    start, error, text = starts.FAULTS[name]
    guide = numpyro.handlers.seed(AutoPosterior(badly_scaled, MeanField, start=start), KEY)
    for _ in range(2):
        with pytest.raises(error, match=f"^{re.escape(text)}"):
            guide()


def test_start_without_global_latents() -> None:
    guide = AutoAmortized(models.conjugate, lambda x: x, start=starts.start())
    text = (
        "Expected a latent site outside of the plate for start under AutoAmortized; got sites in "
        "plate 'data' alone. Leave start out: the encoder's rows have none."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        numpyro.handlers.seed(guide, KEY)(normal(3, 2))
