"""A Normal whose samples carry their log-density."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor


class CarryingNormal(dist.Normal):
    r"""Normal that scores its own last sample by the noise, :math:`-\epsilon^2/2 - \log\sigma`.

    The value is that of ``Normal`` and so are all derivatives along the sample; the graph is
    smaller, above all where one location serves many particles. Any other value is scored by the
    usual formula.
    """

    def __init__(
        self, loc: Tensor, log_scale: Tensor, batch_shape: torch.Size | None = None
    ) -> None:
        self._narrow = (loc, log_scale.exp(), log_scale)
        self._sample: tuple[Tensor, Tensor] | None = None
        # Past Normal's own set-up, which would widen and check loc and scale at every step.
        torch.distributions.Distribution.__init__(
            self, loc.shape if batch_shape is None else batch_shape, validate_args=False
        )

    @property
    def loc(self) -> Tensor:
        """Location, ``batch_shape``."""
        return self._narrow[0].expand(self._batch_shape)

    @property
    def scale(self) -> Tensor:
        """Standard deviation, ``batch_shape``."""
        return self._narrow[1].expand(self._batch_shape)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> CarryingNormal:
        """The same Normal over a wider batch."""
        wide = CarryingNormal.__new__(CarryingNormal)
        wide._narrow, wide._sample = self._narrow, None
        torch.distributions.Distribution.__init__(
            wide, torch.Size(batch_shape), validate_args=False
        )
        return wide

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised samples, ``(*sample_shape, *batch_shape)``."""
        loc, scale, _ = self._narrow
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        value = loc + scale * noise
        self._sample = (value, noise)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value``, elementwise."""
        loc, scale, log_scale = self._narrow
        if self._sample is not None and self._sample[0] is value:
            noise = self._sample[1]
        else:
            noise = (value - loc) / scale
        return noise.square() * -0.5 - 0.5 * math.log(2.0 * math.pi) - log_scale

    def carried_score(self) -> tuple[Tensor, Tensor] | None:
        """Log-density of the last sample and its derivative in the value; constants."""
        if self._sample is None:
            return None
        _, scale, log_scale = self._narrow
        noise = self._sample[1]
        density = noise.square() * -0.5 - 0.5 * math.log(2.0 * math.pi) - log_scale.detach()
        return density, -noise / scale.detach()
