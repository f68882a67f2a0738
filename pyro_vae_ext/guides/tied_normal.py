"""A Normal whose location follows what it is given from the start."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae_ext.guides.mean_field import MeanField


class TiedNormal(MeanField):
    r"""``MeanField`` whose location gets a linear function of the first numbers of the context.

    Number :math:`i` starts as a Normal around ``slope`` times number :math:`i` of these, up to what
    the heads start at.

    Args:
        num_followed: How many numbers of the context are followed.
        slope: What a number that is followed is multiplied by at the start.
        variance: The variance at the start of a number that follows one.
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        *,
        num_followed: int,
        slope: float,
        variance: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(latent_dim, context_dim, **kwargs)
        self.num_followed = num_followed
        self.tie = nn.Linear(num_followed, latent_dim, bias=False)
        with torch.no_grad():
            self.tie.weight.copy_(slope * torch.eye(latent_dim, num_followed))
            self.log_scale.bias[:num_followed] = 0.5 * math.log(variance)

    def loc_and_log_scale(self, context: Any = None) -> tuple[Tensor, Tensor]:
        """Location and log-scale, each ``(*batch, latent_dim)``."""
        loc, log_scale = super().loc_and_log_scale(context)
        return loc + self.tie(context[..., : self.num_followed]), log_scale
