r"""A masked autoregressive flow whose densities are cheap: a prior, or a reverse model.

.. math::
    u_0 = z, \qquad (m_t, s_t) = \mathrm{net}_t(u_{t-1}, c), \qquad
    u_t = (u_{t-1} - m_t) \odot e^{-a_t}, \qquad a_t = b \tanh(s_t / b)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae_ext.nn._scales import bounded, log_scale_bound
from pyro_vae_ext.nn.masked import MaskedMLP


def masked_nets(features: int, hidden_dims: Sequence[int], num_flows: int, **kwargs: Any) -> Any:
    """The net of every step of a flow; the order of the features alternates."""
    forwards = tuple(range(features))
    return nn.ModuleList(
        MaskedMLP(
            features,
            hidden_dims,
            2,
            order=forwards if step % 2 == 0 else forwards[::-1],
            **kwargs,
        )
        for step in range(num_flows)
    )


def log_density(nets: Any, value: Tensor, context: Tensor | None = None) -> Tensor:
    """Log-density ``(*batch,)`` of values ``(*batch, features)``: one pass of every net."""
    u, terms = value, torch.zeros_like(value)
    for net in nets:
        shift, log_scale = _shift_and_log_scale(nets, net, u, context)
        u = (u - shift) * (-log_scale).exp()
        terms = terms - log_scale
    return (terms - 0.5 * u.square()).sum(-1) - 0.5 * value.shape[-1] * math.log(2.0 * math.pi)


def from_noise(nets: Any, noise: Tensor, context: Tensor | None = None) -> Tensor:
    """The value that stands for standard Normal noise, one number after the other."""
    u = noise
    for net in reversed(nets):
        target, u = u, torch.zeros_like(u)
        places = torch.arange(u.shape[-1], device=u.device)
        # The i-th pass sees the coordinates before the i-th, which are final.
        for i in net.order:
            shift, log_scale = _shift_and_log_scale(nets, net, u, context)
            u = torch.where(places == i, shift + log_scale.exp() * target, u)
    return u


def _shift_and_log_scale(
    nets: Any, net: nn.Module, u: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    shift, raw = net(u, context).unbind(-2)
    return shift, bounded(raw, log_scale_bound(len(nets)))
