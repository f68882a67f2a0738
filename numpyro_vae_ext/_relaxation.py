r"""Hard, relaxed and conditionally relaxed values of discrete sites, from noise and logits.

Randomness enters at :func:`uniform` alone; all else is a pure function of (noise, logits). A hard
value is :math:`b = H(z)` of :math:`z = g(u, a)`, a relaxed one :math:`\sigma_t(z)`, and the
conditionally relaxed one :math:`\sigma_t(\tilde z)` comes from a draw of :math:`z` given
:math:`b` (Tucker et al. 2017, arXiv 1703.07370, appendix C). Log-densities are multilinear in the
value: right at the corners, and with a derivative between them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax, random

from numpyro_vae_ext._checks import is_traced, unwrapped


def kind(fn: Any) -> str | None:
    """``"bernoulli"`` or ``"one_hot"`` for what can be relaxed, None for anything else."""
    base = unwrapped(fn)
    if isinstance(base, (dist.BernoulliLogits, dist.BernoulliProbs)):
        return "bernoulli"
    return "one_hot" if getattr(base, "is_one_hot", False) else None


def logits(fn: Any) -> jax.Array:
    """Log-odds, or normalised log-probabilities, of the shape of a value."""
    value = jnp.asarray(unwrapped(fn).logits)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        value = value.astype(float)
    # A Python number has no type of its own, and would leave what is made of it without one.
    value = lax.convert_element_type(value, value.dtype)
    if kind(fn) == "one_hot":
        value = jax.nn.log_softmax(value)
    return jnp.broadcast_to(value, fn.shape())


def uniform(rng_key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform numbers between 0 and 1, without either."""
    info = jnp.finfo(dtype)
    return jnp.clip(random.uniform(rng_key, shape, dtype), info.tiny, 1 - info.eps)


def noisy(kind: str, logits: jax.Array, u: jax.Array) -> jax.Array:
    """The unrelaxed value whose sign, or largest entry, is the draw: ``z`` of the papers."""
    if kind == "bernoulli":
        return logits + jnp.log(u) - jnp.log1p(-u)
    return jax.nn.log_softmax(logits) - jnp.log(-jnp.log(u))


def harden(kind: str, z: jax.Array) -> jax.Array:
    """The discrete value, as floats and without a derivative."""
    z = lax.stop_gradient(z)
    if kind == "bernoulli":
        return (z > 0).astype(z.dtype)
    return jax.nn.one_hot(jnp.argmax(z, axis=-1), z.shape[-1], dtype=z.dtype)


def soften(kind: str, z: jax.Array, temperature: Any) -> jax.Array:
    """The relaxed value."""
    return (
        jax.nn.sigmoid(z / temperature) if kind == "bernoulli" else jax.nn.softmax(z / temperature)
    )


def conditional(kind: str, logits: jax.Array, hard: jax.Array, v: jax.Array) -> jax.Array:
    """An unrelaxed value given the discrete one, from noise of its own."""
    if kind == "bernoulli":
        odds = jnp.log(v) - jnp.log1p(-v)
        one = jax.nn.softplus(odds + jax.nn.softplus(logits))
        zero = -jax.nn.softplus(odds + jax.nn.softplus(-logits))
        return jnp.where(hard > 0, one, zero)
    log_p = jax.nn.log_softmax(logits)
    log_e = jnp.log(-jnp.log(v))
    largest = jnp.sum(hard * log_e, axis=-1, keepdims=True)
    return jnp.where(hard > 0, -largest, -jnp.logaddexp(log_e - log_p, largest))


def log_prob(kind: str, logits: jax.Array, value: jax.Array) -> jax.Array:
    """The log-density, multilinear in the value."""
    if kind == "bernoulli":
        return value * logits - jax.nn.softplus(logits)
    log_p = jax.nn.log_softmax(logits)
    # 0 log 0 = 0: no NaN for a category that cannot occur, and does not.
    absent = jnp.isneginf(log_p) & (value == 0)
    return jnp.sum(value * jnp.where(absent, 0.0, log_p), axis=-1)


def score(kind: str, logits: jax.Array, hard: jax.Array) -> jax.Array:
    """The derivative of the log-density in the logits, at a discrete value."""
    return hard - (jax.nn.sigmoid(logits) if kind == "bernoulli" else jax.nn.softmax(logits))


def soft_log_prob(fn: Any, value: jax.Array) -> jax.Array:
    """:func:`log_prob` through the host's wrappers, of the shape of the batch."""
    if isinstance(fn, dist.Independent):
        inner = soft_log_prob(fn.base_dist, value)
        return jnp.sum(inner, axis=tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    if isinstance(fn, dist.ExpandedDistribution):
        inner = soft_log_prob(fn.base_dist, value)
        return jnp.broadcast_to(inner, lax.broadcast_shapes(inner.shape, fn.batch_shape))
    if isinstance(fn, dist.MaskedDistribution):
        return jnp.where(fn._mask, soft_log_prob(fn.base_dist, value), 0.0)
    return log_prob(str(kind(fn)), logits(fn), value)


def check_temperature(value: Any) -> None:
    """Temperatures are positive, where the numbers are known."""
    if not is_traced(value) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"Expected temperature > 0; got {value}.")


def check_relaxable(cls: str, name: str, fn: Any) -> None:
    """A site must be one that can be relaxed; ``cls`` is what asks for it."""
    if kind(fn) is not None:
        return
    base = unwrapped(fn)
    if isinstance(base, (dist.CategoricalLogits, dist.CategoricalProbs)):
        remedy = "Use OneHotCategorical of the package's distributions module, or TraceNVIL_ELBO."
    else:
        remedy = "Marginalise it with the host's TraceEnum_ELBO, or use TraceNVIL_ELBO."
    raise ValueError(
        f"Expected Bernoulli or one-hot categorical latent sites under {cls}; got site '{name}' "
        f"with the distribution {type(base).__name__}. {remedy}"
    )
