"""The mean-field family: a diagonal Normal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae_ext._checks import one_of, widths
from pyro_vae_ext.guides._base import DirectFamily
from pyro_vae_ext.guides._normal import CarryingNormal
from pyro_vae_ext.nn._activations import ACTIVATIONS
from pyro_vae_ext.nn._scales import head_bounded

# Of Glorot's scale. A location that starts smaller still leaves fewer units of a VAE active.
_LOC_START, _LOG_SCALE_START = 0.3, 0.1


class MeanField(DirectFamily):
    r"""Diagonal Normal, :math:`q(z \mid c) = \prod_i N(z_i;\, \mu_i(c),\, \sigma_i(c)^2)`.

    Location and log-scale are linear heads on the context, after a dense network if
    ``hidden_dims`` is given,

    .. math:: \mu(h) = W_\mu h + b_\mu, \qquad \log \sigma(h) = \rho(W_\sigma h) + b_\sigma,
              \qquad \rho(x) = 3 x / \sqrt{9 + x^2},

    so that a context, however large, moves the scale by :math:`e^{\pm 3}` at most. The heads start
    at .3 and .1 of Glorot's scale. Without a context they are free parameters.

    Args:
        latent_dim: Dimension of the latent vector.
        context_dim: Width of the context, or None for a global posterior.
        hidden_dims: Widths of dense layers between context and heads; none by default.
        activation: Their activation, ``"elu"``, ``"relu"`` or ``"tanh"``.

    Raises:
        ValueError: If a width is not positive, the activation is unknown, or ``hidden_dims`` is
            given without a context.

    References:
        Kingma and Welling, 2014, *Auto-Encoding Variational Bayes*, arXiv:1312.6114, eq. 9.

    Example:
        >>> import torch
        >>> posterior = MeanField(latent_dim=2, context_dim=5)
        >>> posterior("z", torch.zeros(7, 5)).shape
        torch.Size([7, 2])
    """

    # Heads on the context, or free parameters without one.
    loc: Any
    log_scale: Any

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        *,
        hidden_dims: Sequence[int] = (),
        activation: str = "elu",
    ) -> None:
        super().__init__(latent_dim, context_dim)
        hidden_dims = widths("hidden_dims", hidden_dims)
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))
        if context_dim is None:
            if hidden_dims:
                raise ValueError(f"Expected hidden_dims=() without a context; got {hidden_dims}.")
            self.loc = nn.Parameter(torch.zeros(latent_dim))
            self.log_scale = nn.Parameter(torch.zeros(latent_dim))
            return
        ends = (context_dim, *hidden_dims)
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in zip(ends, hidden_dims, strict=False))
        self.loc = nn.Linear(ends[-1], latent_dim)
        self.log_scale = nn.Linear(ends[-1], latent_dim)
        for layer in (*self.trunk, self.loc, self.log_scale):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.loc.weight.mul_(_LOC_START)
            self.log_scale.weight.mul_(_LOG_SCALE_START)

    def loc_and_log_scale(self, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Location and log-scale, each ``(*batch, latent_dim)``."""
        if self.context_dim is None:
            return self.loc, self.log_scale
        activate, _ = ACTIVATIONS[self.activation]
        hidden: Any = context
        for layer in self.trunk:
            hidden = activate(layer(hidden))
        moved = head_bounded(nn.functional.linear(hidden, self.log_scale.weight))
        return self.loc(hidden), moved + self.log_scale.bias

    def distribution(self, context: Tensor | None = None) -> TorchDistribution:
        """The diagonal Normal given ``context``: ``Normal(loc, scale).to_event(1)``."""
        loc, log_scale = self.loc_and_log_scale(context)
        return CarryingNormal(loc, log_scale).to_event(1)
