"""A diagonal Normal that follows the vector it is given, from the start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae_ext.guides.mean_field import MeanField

# Correlation at the start of a number and the one that it follows: half of the variance.
TIE = math.sqrt(0.5)


class TiedNormal(MeanField):
    r"""``MeanField`` whose location gets a linear function of the first numbers of the context.

    It starts as :math:`N(\sqrt{.5}\, v_i, .5)` for number :math:`i`, with :math:`v` these numbers,
    up to what the heads start at. If :math:`v` is standard Normal, so is the marginal, and
    another one with the two exchanged is the exact reverse.

    Args:
        num_followed: How many numbers of the context are followed.
    """

    def __init__(
        self, latent_dim: int, context_dim: int, *, num_followed: int, **kwargs: Any
    ) -> None:
        super().__init__(latent_dim, context_dim, **kwargs)
        self.num_followed = num_followed
        self.tie = nn.Linear(num_followed, latent_dim, bias=False)
        with torch.no_grad():
            self.tie.weight.copy_(TIE * torch.eye(latent_dim, num_followed))
            self.log_scale.bias[:num_followed] = 0.5 * math.log(1 - TIE**2)

    def loc_and_log_scale(self, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Location and log-scale, each ``(*batch, latent_dim)``."""
        loc, log_scale = super().loc_and_log_scale(context)
        assert context is not None
        return loc + self.tie(context[..., : self.num_followed]), log_scale
