"""The reverse model of a hierarchical family, where it has to be more than a Normal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyro_vae_ext._masked_flow import from_noise, log_density, masked_nets
from pyro_vae_ext.guides._base import DirectFamily


class ReverseFlow(DirectFamily):
    """Masked autoregressive flow with a context: densities are one pass, draws sequential.

    A reverse model is scored at what the guide drew and is never drawn in training. It starts near
    the standard Normal.

    Args:
        latent_dim: Dimension of the vector.
        context_dim: Width of the context.
        hidden_dims: Widths of the hidden layers of each step's masked network.
        num_flows: Number of steps.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.

    References:
        Papamakarios, Pavlakou and Murray, 2017, *Masked Autoregressive Flow for Density
        Estimation*, arXiv:1705.07057, sec. 3.1 and 3.4 (the context).
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        num_flows: int = 2,
        activation: str = "elu",
    ) -> None:
        super().__init__(latent_dim, context_dim)
        self.nets = masked_nets(
            latent_dim, hidden_dims, num_flows, context_dim=context_dim, activation=activation
        )

    def distribution(self, context: Any = None) -> TorchDistribution:
        """The flow given ``context``, with ``event_dim`` 1."""
        return _Reverse(self, context)


class _Reverse(TorchDistribution):
    """The law of one :class:`ReverseFlow` at one context."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, family: ReverseFlow, context: Tensor) -> None:
        self.family, self.context = family, context
        super().__init__(context.shape[:-1], torch.Size((family.latent_dim,)), validate_args=False)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Samples of shape ``(*sample_shape, *batch_shape, latent_dim)``."""
        shape = self.shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.context.dtype, device=self.context.device)
        return from_noise(self.family.nets, noise, self.context)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of shape ``(*batch,)``."""
        return log_density(self.family.nets, value, self.context)
