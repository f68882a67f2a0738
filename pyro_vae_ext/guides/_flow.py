r"""Distribution of a transformed standard Normal whose samples carry their log-density.

With :math:`z = f(\epsilon)` and :math:`\ell(\epsilon) = \log N(\epsilon) - \log|\det \partial f /
\partial \epsilon|`, a sample is drawn together with :math:`\log q(z) = \ell(\epsilon)`, and
nothing is inverted. Where the *partial* derivatives of :math:`\log q(z \mid c; \phi)` are wanted
(scores at a foreign ``z``, path gradients), they come from the implicit function theorem:
:math:`u = \partial \log q / \partial z` is found by triangular solves, and

.. math:: \ell(\bar\epsilon; \phi, c) + \bar u^\top (z - f(\bar\epsilon; \phi, c)),

bars marking constants, has the value of :math:`\log q(z \mid c; \phi)` and its exact first
derivatives in ``z``, ``c`` and :math:`\phi` (Vaitl et al., 2022, arXiv:2206.09016, sec. 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor


class Transform(ABC):
    """A map from noise to values, bound to one context; parameters are those of its module."""

    event_size: int

    @abstractmethod
    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Value of noise ``(*batch, D)``, and terms of its log-density, both ``(*batch, D)``."""

    @abstractmethod
    def inverse(self, value: Tensor) -> Tensor:
        """Noise of ``value``, both ``(*batch, D)``; without a gradient."""

    @abstractmethod
    def score(self, noise: Tensor) -> Tensor:
        """Derivative of the log-density in the value, at the value of ``noise``; no gradient."""

    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the noise."""


class FlowDistribution(TorchDistribution):
    """Distribution of ``transform.forward(noise)`` for standard Normal noise."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, transform: Transform, batch_shape: torch.Size) -> None:
        self.transform = transform
        self._sample: tuple[Tensor, Tensor, Tensor] | None = None
        self._alias: Tensor | None = None
        super().__init__(batch_shape, torch.Size((transform.event_size,)), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> FlowDistribution:
        """The same distribution over a wider batch; its noise is drawn for every element."""
        return FlowDistribution(self.transform, torch.Size(batch_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised samples, ``(*sample_shape, *batch_shape, D)``."""
        like = self.transform.like()
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=like.dtype, device=like.device)
        value, terms = self.transform.forward(noise)
        self._sample = (value, noise, terms)
        return value

    def carry(self, alias: Tensor) -> None:
        """Let ``alias`` stand for the last sample: its noise is known, its gradient its own."""
        self._alias = alias

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(*batch,)``: the carried one for the last sample, else by inversion."""
        return self.log_prob_terms(value).sum(-1)

    def log_prob_terms(self, value: Tensor) -> Tensor:
        """Numbers ``(*batch, D)`` that sum to the log-density, one for each dimension."""
        if self._sample is not None:
            if self._sample[0] is value:
                return self._sample[2]
            if self._alias is value:
                return self.implicit_terms(value, self._sample[1])
        return self.implicit_terms(value, self.transform.inverse(value.detach()))

    def carried_score(self) -> tuple[Tensor, Tensor] | None:
        """Log-density of the last sample and its derivative in the value; constants."""
        if self._sample is None:
            return None
        _, noise, terms = self._sample
        return terms.detach().sum(-1), self.transform.score(noise)

    def implicit_terms(self, value: Tensor, noise: Tensor) -> Tensor:
        """Terms of the log-density at ``value``, whose noise is known.

        Their sum has exact partial derivatives; with gradients disabled, which spares the score,
        it has none.

        Args:
            value: ``(*batch, D)``.
            noise: ``(*batch, D)``, a constant.
        """
        image, terms = self.transform.forward(noise)
        if not torch.is_grad_enabled():
            return terms
        return terms + self.transform.score(noise) * (value - image)
