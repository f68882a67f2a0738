"""The contract of a guide family.

A family is a module with parameters that is *called as a statement inside a guide*::

    z = family("z", context)        # context: (*batch, context_dim), or None

It runs Pyro's ``sample`` statement in the plates that surround it and returns ``z`` of shape
``(*batch, latent_dim)``. ``context`` is the output of an encoder; a family built with
``context_dim=None`` is called without one and is a global posterior. Families start near the
standard Normal, take any left batch, and are exchanged for one another by their constructor
alone. A sampled value carries its log-density: no family inverts itself in training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae_ext._checks import check_context, positive_int


class GuideFamily(nn.Module, ABC):
    """Base of the guide families; a member defines its statement and its log-density."""

    def __init__(self, latent_dim: int, context_dim: int | None) -> None:
        super().__init__()
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.context_dim = None if context_dim is None else positive_int("context_dim", context_dim)

    @abstractmethod
    def _sample(self, name: str, context: Tensor | None, infer: Any) -> Tensor:
        """The statement of :meth:`forward`, the context checked."""

    @abstractmethod
    def _log_prob(self, value: Tensor, context: Tensor | None, num_samples: int) -> Tensor:
        """The log-density of :meth:`log_prob`, the arguments checked."""

    def forward(
        self,
        name: str,
        context: Tensor | None = None,
        *,
        infer: Any = None,
        value: Tensor | None = None,
        num_samples: int = 100,
    ) -> Tensor:
        """Sample the site ``name``; a statement for the body of a guide.

        With a ``value`` it is no statement: nothing is sampled, and :meth:`log_prob` of the value
        is returned: so a model uses the density, as :class:`~pyro_vae_ext.priors.VampPrior` does.

        Args:
            name: Name of the latent site.
            context: ``(*batch, context_dim)``, or None for a family without a context.
            infer: Instructions of the site, as the host's ``sample`` takes them.
            value: If given, ``(*batch, latent_dim)``, what to score instead of sampling.
            num_samples: Samples behind the score of a family whose density is an integral.

        Returns:
            The value, of shape ``(*batch, latent_dim)``, ``batch`` widened by the plates; the
            log-density ``(*batch,)`` of a given value.

        Raises:
            ValueError: If the context is missing, unexpected, of another width, or NaN; with a
                value, what :meth:`log_prob` raises.
            TypeError: If the context is not of a floating-point type.
        """
        if value is not None:
            return self.log_prob(value, context, num_samples=num_samples)
        check_context(context, self.context_dim, f" at site '{name}'")
        return self._sample(name, context, infer)

    def log_prob(
        self, value: Tensor, context: Tensor | None = None, *, num_samples: int = 100
    ) -> Tensor:
        r"""Log-density :math:`\log q(z \mid c)` of any ``value``, not only of the family's own.

        Args:
            value: ``(*batch, latent_dim)``.
            context: ``(*batch, context_dim)``, or None for a family without a context.
            num_samples: Samples behind the estimate of a family whose density is an integral;
                families with a density of their own give it exactly.

        Returns:
            ``(*batch,)``, differentiable once in the value, the context and the parameters.

        Raises:
            ValueError: If the value or the context has another width, or a number is below 1.
            TypeError: If the context is not of a floating-point type.
        """
        check_context(context, self.context_dim, " at log_prob")
        if value.shape[-1:] != (self.latent_dim,):
            raise ValueError(
                f"Expected values of width {self.latent_dim} at log_prob; "
                f"got shape {tuple(value.shape)}."
            )
        return self._log_prob(value, context, positive_int("num_samples", num_samples))


class DirectFamily(GuideFamily, ABC):
    """Base of the families with a density of their own; a member defines :meth:`distribution`."""

    @abstractmethod
    def distribution(self, context: Tensor | None = None) -> TorchDistribution:
        """The posterior given ``context``, as a distribution over vectors.

        Args:
            context: ``(*batch, context_dim)``, or None for a family without a context.

        Returns:
            A distribution with ``batch_shape == batch`` and ``event_shape == (latent_dim,)``.
        """

    def _sample(self, name: str, context: Tensor | None, infer: Any) -> Tensor:
        return pyro.sample(name, self.distribution(context), infer=infer)

    def _log_prob(self, value: Tensor, context: Tensor | None, num_samples: int) -> Tensor:
        return self.distribution(context).log_prob(value)
