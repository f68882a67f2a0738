"""The bound on the log-scales of a flow's steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Nothing that training does to a net makes a step, or all steps together, nearly singular.
_STEP_BOUND = 3.0
_TOTAL_BOUND = 6.0


def log_scale_bound(num_flows: int) -> float:
    """What the log-scales of each of ``num_flows`` steps stay within; 6 for all of them at most."""
    return min(_STEP_BOUND, _TOTAL_BOUND / num_flows)


def bounded(raw: jax.Array, bound: float) -> jax.Array:
    """``raw`` near 0, and never outside of ``bound`` on either side."""
    return bound * jnp.tanh(raw / bound)
