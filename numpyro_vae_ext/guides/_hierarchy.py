"""What the hierarchical families share: their parts, vectors put side by side, and keys."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.distributions.distribution import Unit

from numpyro_vae_ext.guides._base import DirectFamily, GuideFamily

# Of a site that belongs to the guide alone.
AUXILIARY = {"is_auxiliary": True}


def joined(*parts: jax.Array | None) -> jax.Array:
    """Vectors of one batch, broadcast and put side by side; those that are None left out."""
    given = [part for part in parts if part is not None]
    batch = jnp.broadcast_shapes(*(part.shape[:-1] for part in given))
    return jnp.concatenate([jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in given], -1)


def built(
    name: str,
    family: Callable[..., Any],
    latent_dim: int,
    context_dim: int | None,
    rngs: nnx.Rngs,
    param_dtype: Any,
) -> Any:
    """The part that ``family`` builds for the argument called ``name``."""
    # An instance of a family can be called, too, but builds nothing.
    builds = callable(family) and not isinstance(family, nnx.Module)
    part: Any = family
    if builds:
        part = family(latent_dim, context_dim, rngs=rngs, param_dtype=param_dtype)
    if not builds or not isinstance(part, GuideFamily):
        raise TypeError(
            f"Expected a guide family from {name}(latent_dim, context_dim); got "
            f"{type(part).__name__}. Pass IAF, MeanField, or a function that builds one."
        )
    if (part.latent_dim, part.context_dim) != (latent_dim, context_dim):
        raise ValueError(
            f"Expected {name} to build a family of latent_dim={latent_dim} and "
            f"context_dim={context_dim}; got {part.latent_dim} and {part.context_dim}. Pass both "
            "on as they come."
        )
    return part


def built_direct(
    name: str,
    family: Callable[..., Any],
    latent_dim: int,
    context_dim: int | None,
    rngs: nnx.Rngs,
    param_dtype: Any,
) -> DirectFamily:
    """The same for a part whose density must be known."""
    part = built(name, family, latent_dim, context_dim, rngs, param_dtype)
    if not isinstance(part, DirectFamily):
        raise TypeError(
            f"Expected a family with a density of its own from {name}; got "
            f"{type(part).__name__}. Pass IAF, MeanField, or a function that builds one."
        )
    return part


def keys_for(guide: str, rng_key: jax.Array | None, count: int) -> jax.Array:
    """``count`` keys from the one that was given, or from the surrounding handler's."""
    if rng_key is None:
        with warnings.catch_warnings():
            # The host warns where there is no handler, and we raise.
            warnings.simplefilter("ignore", UserWarning)
            rng_key = numpyro.prng_key()
    if rng_key is None:
        raise ValueError(
            f"Expected rng_key for the samples behind log_prob of {guide}; got None outside of a "
            "seed handler. Pass rng_key=jax.random.key(0)."
        )
    return jax.random.split(rng_key, count)


def drawn(
    distribution: dist.Distribution, rng_key: jax.Array, num_samples: int
) -> tuple[jax.Array, jax.Array]:
    """``num_samples`` draws and their log-densities, which the draws carry."""
    value, kept = distribution.sample_with_intermediates(rng_key, (num_samples,))
    return value, distribution.log_prob(value, kept) if kept else distribution.log_prob(value)


class _PathUnit(Unit):
    """The host's factor, whose number is differentiable: no score stands in for its gradient."""

    reparametrized_params = ["log_factor"]


def reverse_factor(name: str, log_reverse: jax.Array) -> None:
    """The factor by which a reverse model enters the guide of the site ``name``."""
    unit = _PathUnit(-log_reverse)
    numpyro.sample(f"{name}_reverse", unit, obs=unit.sample(None), infer=AUXILIARY)
