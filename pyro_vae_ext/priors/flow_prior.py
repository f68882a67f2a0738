"""A masked autoregressive flow as a prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae_ext._checks import positive_int
from pyro_vae_ext._masked_flow import from_noise, log_density, masked_nets
from pyro_vae_ext.priors._base import Law, LawDistribution


class FlowPrior(nn.Module):
    r"""Masked autoregressive flow: every coordinate is a Normal given those before it.

    .. math::
        u_0 = z, \qquad (m_t, s_t) = \mathrm{net}_t(u_{t-1}), \qquad
        u_t = (u_{t-1} - m_t) \odot e^{-a_t}, \qquad u_T \sim N(0, I), \\
        a_t = b \tanh(s_t / b), \qquad b = \min(3, 12 / T),

    where every net is autoregressive and the order is reversed from one step to the next. All
    steps together scale by :math:`e^{-12}` to :math:`e^{12}` at most: no training makes them
    nearly singular. A density is one parallel pass a step,

    .. math:: \log p(z) = \log N(u_T; 0, I) - \sum_t \sum_i a_{t,i}.

    Such a prior is the inverse of an autoregressive flow as guide: here densities are cheap, which
    is all that training asks of a prior, and samples are sequential, ``latent_dim`` passes a step,
    exact and without a gradient. It starts near the standard Normal. With ``latent_dim=1`` there
    is nothing to be autoregressive in, and it is a Normal.

    Args:
        latent_dim: Dimension of the latent vector :math:`z`.
        hidden_dims: Widths of the hidden layers of each step's masked network.
        num_flows: Number :math:`T` of steps; at least two are advisable, as the order alternates.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.

    Raises:
        ValueError: If a width or number is not positive, or the activation is unknown.

    References:
        Papamakarios, Pavlakou and Murray, 2017, *Masked Autoregressive Flow for Density
        Estimation*, arXiv:1705.07057, sec. 3.1. Chen et al., 2017, *Variational Lossy
        Autoencoder*, arXiv:1611.02731, sec. 3.2 (as the prior of a VAE).

    Example:
        >>> import pyro
        >>> prior = FlowPrior(latent_dim=2, hidden_dims=(16,))
        >>> with pyro.plate("data", 7):
        ...     z = pyro.sample("z", prior())
        >>> z.shape
        torch.Size([7, 2])
    """

    nets: Any  # an nn.ModuleList, whose members are typed as modules of any kind

    def __init__(
        self,
        latent_dim: int,
        *,
        hidden_dims: Sequence[int] = (64,),
        num_flows: int = 2,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        self.latent_dim = positive_int("latent_dim", latent_dim)
        positive_int("num_flows", num_flows)
        self.nets = masked_nets(latent_dim, hidden_dims, num_flows, activation=activation)

    def forward(self) -> TorchDistribution:
        """The prior as a distribution, ``batch_shape ()`` and ``event_shape (latent_dim,)``."""
        return LawDistribution(_Flow(self))


class _Flow(Law):
    """The law of one :class:`FlowPrior`."""

    def __init__(self, prior: FlowPrior) -> None:
        self.nets = prior.nets
        self.event_size = prior.latent_dim

    def log_prob(self, value: Tensor) -> Tensor:
        return log_density(self.nets, value)

    def draw(self, shape: torch.Size) -> Tensor:
        like = next(self.nets.parameters())
        noise = torch.randn((*shape, self.event_size), dtype=like.dtype, device=like.device)
        return from_noise(self.nets, noise)
