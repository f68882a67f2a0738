"""Bounds on log-scales: of the steps of a flow, and of the heads on a context."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# Nothing that training does to a net makes a step, or all steps together, nearly singular. Half of
# the steps have a feature after another one: those scale it by e^6, given the other, at most.
_STEP_BOUND = 3.0
_TOTAL_BOUND = 12.0
# What a context can add to a log-scale, whatever the context's own scale.
_HEAD_BOUND = 3.0


def log_scale_bound(num_flows: int) -> float:
    """What the log-scales of each of ``num_flows`` steps stay within; 12 for all at most."""
    return min(_STEP_BOUND, _TOTAL_BOUND / num_flows)


def bounded(raw: jax.Array, bound: float) -> jax.Array:
    """``raw`` near 0, and never outside of ``bound`` on either side."""
    return bound * jnp.tanh(raw / bound)


def head_bounded(raw: jax.Array) -> jax.Array:
    """``raw`` near 0, and never outside of 3 on either side.

    The slope falls as a power of ``raw``, so that a head that starts far out is trained back: the
    optimisers that divide by the size of a gradient see one that is small, and not one that is 0.
    """
    return raw * lax.rsqrt(1.0 + (raw / _HEAD_BOUND) ** 2)
