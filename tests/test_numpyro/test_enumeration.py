"""Our families for the continuous sites beside a discrete one that the host sums out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.handlers import scale
from numpyro.infer import Trace_ELBO
from test_numpyro.models import family, module_params, shaken

# The host's enumeration needs it, and does not install it.
pytest.importorskip("funsor")

# Auxiliary and VGP have auxiliary sites, at which the host raises KeyError.
FAMILIES = ("MeanField", "IAF")
KEY = jax.random.key(2)
K, ROWS = 3, 4


def parts() -> tuple[Any, Any, Any, Any]:
    loc = numpyro.param("loc", jnp.cos(jnp.linspace(-1.0, 2.0, 2 * K)).reshape(K, 2))
    logits = numpyro.param("logits", jnp.linspace(-0.5, 0.7, K))
    slope = numpyro.param("slope", jnp.linspace(-1.0, 1.0, 2 * K).reshape(2, K))
    return jnp.linspace(-1.5, 2.0, 2 * ROWS).reshape(ROWS, 2), loc, logits, slope


def check(
    encoder: nnx.Module, enumerated: tuple[Callable, Callable], by_hand: tuple[Callable, Callable]
) -> None:
    """Loss and gradients at one key. Summing out draws nothing: both see the same noise."""
    from numpyro.infer import TraceEnum_ELBO

    _, loc, logits, slope = parts()
    params = {"loc": loc, "logits": logits, "slope": slope, **module_params(posterior=encoder)}

    @jax.jit
    def both(params: Any) -> Any:
        return [
            jax.value_and_grad(lambda p, elbo=elbo, pair=pair: elbo.loss(KEY, p, *pair))(params)
            for elbo, pair in (
                (TraceEnum_ELBO(max_plate_nesting=1), enumerated),
                (Trace_ELBO(), by_hand),
            )
        ]

    found, expected = both(params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-10)
    assert any(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(found[1]["posterior$params"]))


def posterior(name: str, context_dim: int) -> nnx.Module:
    return shaken(family(name, latent_dim=2, context_dim=context_dim))


@pytest.mark.parametrize("name", FAMILIES)
def test_summed_in_the_model(exact: None, name: str) -> None:
    """The guide has the continuous site alone; the model's component is summed out."""
    from numpyro.contrib.funsor import config_enumerate

    encoder = posterior(name, 2)

    def model() -> None:
        x, loc, logits, _ = parts()
        with numpyro.plate("rows", ROWS):
            k = numpyro.sample("k", dist.Categorical(logits=logits))
            z = numpyro.sample("z", dist.Normal(loc[k], 0.7).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def by_hand() -> None:
        x, loc, logits, _ = parts()
        component = dist.Normal(loc, 0.7).to_event(1)
        with numpyro.plate("rows", ROWS):
            mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), component)
            z = numpyro.sample("z", mixture)
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        encode = nnx_module("posterior", encoder)
        with numpyro.plate("rows", ROWS):
            encode("z", parts()[0])

    check(encoder, (config_enumerate(model, "parallel"), guide), (by_hand, guide))


@pytest.mark.parametrize("name", FAMILIES)
def test_summed_in_the_guide(exact: None, name: str) -> None:
    """The context of the family depends on the value that is summed over."""
    from numpyro.contrib.funsor import config_enumerate

    encoder = posterior(name, 2 + K)

    def context(x: jax.Array, k: jax.Array) -> jax.Array:
        batch = jnp.broadcast_shapes(k.shape, (ROWS,))
        parts = jnp.broadcast_to(x, (*batch, 2)), jnp.broadcast_to(jnp.eye(K)[k], (*batch, K))
        return jnp.concatenate(parts, -1)

    def model() -> None:
        x, loc, logits, _ = parts()
        with numpyro.plate("rows", ROWS):
            k = numpyro.sample("k", dist.Categorical(logits=logits))
            z = numpyro.sample("z", dist.Normal(loc[k], 0.7).to_event(1))
            shifted = dist.Normal(z + jnp.tanh(loc[k]), 1.0).to_event(1)
            numpyro.sample("x", shifted, obs=x)

    def guide() -> None:
        encode = nnx_module("posterior", encoder)
        x, _, _, slope = parts()
        with numpyro.plate("rows", ROWS):
            k = numpyro.sample("k", dist.Categorical(logits=x @ slope))
            encode("z", context(x, k))

    # By hand: every value of k is a row of one more plate, weighed by its probability.
    def model_by_hand() -> None:
        x, loc, logits, slope = parts()
        q = jax.nn.softmax(x @ slope).T
        with numpyro.plate("k", K, dim=-2), numpyro.plate("rows", ROWS), scale(scale=q):
            numpyro.factor("p(k)", jax.nn.log_softmax(logits)[:, None] - jnp.log(q))
            z = numpyro.sample("z", dist.Normal(loc[:, None], 0.7).to_event(1))
            shifted = dist.Normal(z + jnp.tanh(loc)[:, None], 1.0).to_event(1)
            numpyro.sample("x", shifted, obs=jnp.broadcast_to(x, (K, ROWS, 2)))

    def guide_by_hand() -> None:
        encode = nnx_module("posterior", encoder)
        x, _, _, slope = parts()
        every = jnp.broadcast_to(jnp.arange(K)[:, None], (K, ROWS))
        q = jax.nn.softmax(x @ slope).T
        with numpyro.plate("k", K, dim=-2), numpyro.plate("rows", ROWS), scale(scale=q):
            numpyro.prng_key()  # the one that "k" uses up
            encode("z", context(x, every))

    by_hand = (model_by_hand, guide_by_hand)
    check(encoder, (model, config_enumerate(guide, "parallel")), by_hand)
