"""The contract of a learned prior.

A prior is a module with parameters, made once and *called inside a model* to give a distribution
of the host, ``z = pyro.sample("z", prior())``, over vectors: its ``batch_shape`` is ``()`` and
plates widen it. A prior without a distribution of the host's own defines a :class:`Law`, which
:class:`LawDistribution` turns into one. Its samples carry no gradient: in training a latent site
takes its value from the guide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class Law(ABC):
    """A density over vectors, bound to the parameters of its module."""

    event_size: int

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(*batch,)`` of values ``(*batch, event_size)``."""

    @abstractmethod
    def draw(self, shape: torch.Size) -> Tensor:
        """Values ``(*shape, event_size)``, independent of each other."""


class LawDistribution(TorchDistribution):
    """The host's distribution of a :class:`Law`."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, law: Law, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.law = law
        super().__init__(batch_shape, torch.Size((law.event_size,)), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> LawDistribution:
        """The same law over a wider batch; every element is a draw of its own."""
        return LawDistribution(self.law, torch.Size(batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Samples, ``(*sample_shape, *batch_shape, event_size)``."""
        return self.law.draw(torch.Size(sample_shape) + self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(*batch,)``."""
        if value.shape[-1:] != self.event_shape:
            raise ValueError(
                f"Expected values of width {self.law.event_size} at log_prob; "
                f"got shape {tuple(value.shape)}."
            )
        log_density = self.law.log_prob(value)
        return log_density.expand(torch.broadcast_shapes(log_density.shape, self.batch_shape))
