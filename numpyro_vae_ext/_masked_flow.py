r"""A masked autoregressive flow whose densities are cheap: a prior, or a reverse model.

.. math::
    u_0 = z, \qquad (m_t, s_t) = \mathrm{net}_t(u_{t-1}, c), \qquad
    u_t = (u_{t-1} - m_t) \odot e^{-a_t}, \qquad a_t = b \tanh(s_t / b)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from numpyro_vae_ext.nn._scales import bounded, log_scale_bound
from numpyro_vae_ext.nn.masked import MaskedMLP


def masked_nets(features: int, hidden_dims: Sequence[int], num_flows: int, **kwargs: Any) -> Any:
    """The net of every step of a flow; the order of the features alternates."""
    forwards = tuple(range(features))
    return nnx.List(
        MaskedMLP(
            features,
            hidden_dims,
            2,
            order=forwards if step % 2 == 0 else forwards[::-1],
            **kwargs,
        )
        for step in range(num_flows)
    )


def log_density(nets: Any, value: jax.Array, context: jax.Array | None = None) -> jax.Array:
    """Log-density ``(*batch,)`` of values ``(*batch, features)``: one pass of every net."""
    u, terms = value, jnp.zeros_like(value)
    for net in nets:
        shift, log_scale = _shift_and_log_scale(nets, net, u, context)
        u = (u - shift) * jnp.exp(-log_scale)
        terms = terms - log_scale
    return (terms - 0.5 * u**2).sum(-1) - 0.5 * value.shape[-1] * math.log(2.0 * math.pi)


def from_noise(nets: Any, noise: jax.Array, context: jax.Array | None = None) -> jax.Array:
    """The value that stands for standard Normal noise, one number after the other."""
    u = noise
    for net in reversed(nets):
        u = _sequentially(nets, net, u, context)
    return u


def _sequentially(nets: Any, net: MaskedMLP, target: jax.Array, context: Any) -> jax.Array:
    """The inverse of a step."""
    order = jnp.asarray(net.order)

    # The i-th pass sees the coordinates before the i-th, which are final.
    def fill(i: int, u: jax.Array) -> jax.Array:
        shift, log_scale = _shift_and_log_scale(nets, net, u, context)
        new = shift + jnp.exp(log_scale) * target
        return jnp.where(jnp.arange(len(order)) == order[i], new, u)

    return lax.fori_loop(0, len(order), fill, jnp.zeros_like(target))


def _shift_and_log_scale(
    nets: Any, net: MaskedMLP, u: jax.Array, context: Any
) -> tuple[jax.Array, jax.Array]:
    outputs = net(u, context)
    return outputs[..., 0, :], bounded(outputs[..., 1, :], log_scale_bound(len(nets)))
