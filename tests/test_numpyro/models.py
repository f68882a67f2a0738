"""Models with a known evidence, and guides that shake the families off their start."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from cases import resolved
from flax import nnx
from numpyro.contrib.module import nnx_module

from numpyro_vae_ext import guides, nn

Params = dict[str, Any]


def shaken(tree: Any, scale: float = 0.3, seed: int = 0) -> Any:
    """The module or parameters with noise on every leaf: far from the identity and symmetry."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    moved = [x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, moved)


def family(name: str, **kwargs: Any) -> Any:
    return getattr(guides, name)(rngs=nnx.Rngs(0), **resolved(guides, kwargs))


def layer(name: str, **kwargs: Any) -> Any:
    return getattr(nn, name)(rngs=nnx.Rngs(0), **kwargs)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def named(module: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters under the names and in the layout of a torch state dict."""
    found = {}
    for path, value in nnx.to_flat_state(nnx.state(module)):
        *head, last = map(str, path)
        array = np.asarray(value[...])
        if last == "kernel":
            last, array = "weight", array.T
        found[".".join([*head, last])] = array
    return found


def module_params(**modules: nnx.Module) -> Params:
    """The modules' parameters, as `svi.get_params` gives them."""
    return {f"{k}$params": nnx.to_pure_dict(nnx.state(m, nnx.Param)) for k, m in modules.items()}


def conjugate(x: jax.Array, batch_size: int | None = None) -> None:
    """z ~ N(mu, I), x ~ N(z, I) for every row: the model."""
    mu = numpyro.param("mu", jnp.zeros(x.shape[-1]))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        batch = numpyro.subsample(x, event_dim=1)
        z = numpyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=batch)


def amortised(posterior: nnx.Module) -> Any:
    """The family on the data themselves as context: a guide for :func:`conjugate`."""

    def guide(x: jax.Array, batch_size: int | None = None) -> None:
        post = nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x), subsample_size=batch_size):
            post("z", numpyro.subsample(x, event_dim=1))

    return guide


def one_latent(x: jax.Array) -> None:
    """z ~ N(0, I), all rows of x ~ N(z, I): one latent for all rows."""
    z = numpyro.sample("z", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def one_posterior(posterior: nnx.Module) -> Any:
    """A family without context: a guide for :func:`one_latent`."""

    def guide(x: jax.Array) -> None:
        nnx_module("posterior", posterior)("z")

    return guide


def z_score(draws: jax.Array, truth: Any) -> Any:
    """How many standard errors the mean over the first axis is above the truth."""
    draws = np.asarray(draws)
    return (draws.mean(0) - truth) / (draws.std(0, ddof=1) / np.sqrt(len(draws)))


def largest(tree: Any) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def difference(a: Any, b: Any) -> float:
    return largest(jax.tree.map(jnp.subtract, a, b))


def wide_reverse(posterior: nnx.Module, by: float) -> None:
    """Make the reverse model wider: estimates of light tails."""
    reverse = posterior.reverse
    bias = reverse.nets[0].layers[-1].bias if hasattr(reverse, "nets") else reverse.log_scale.bias
    # Of a flow the second half of the outputs.
    first = len(bias) // 2 if hasattr(reverse, "nets") else 0
    bias[...] = bias[...].at[first:].add(by)
