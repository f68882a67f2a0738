"""Activations together with their derivatives, for forward-mode Jacobians."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# name -> (function, derivative as a function of the pre-activation)
ACTIVATIONS: dict[
    str, tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]
] = {
    "elu": (jax.nn.elu, lambda a: jnp.exp(jnp.minimum(a, 0.0))),
    "relu": (jax.nn.relu, lambda a: (a > 0).astype(a.dtype)),
    "tanh": (jnp.tanh, lambda a: 1.0 - jnp.tanh(a) ** 2),
}
