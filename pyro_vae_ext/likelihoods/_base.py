r"""The contract of an autoregressive likelihood.

A likelihood is a module with parameters, made once, and called to give a distribution::

    decoder = MADE((8, 8), context_dim=10)
    pyro.sample("x", decoder(z), obs=x)          # batch_shape: z.shape[:-1], event_shape: (8, 8)

With :math:`x_1, \dots, x_D` the elements in the order of the likelihood,

.. math:: \log p(x \mid z) = \sum_i \log p(x_i \mid x_{<i}, z) ,

one parallel pass for all terms of the density, and one element after the other for a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_vae_ext._checks import check_context, positive_int, widths
from pyro_vae_ext.likelihoods._outputs import Output


def steps(number: int) -> Iterator[int]:
    """The steps of a sampler, with a progress bar where they take long."""
    return iter(tqdm(range(number), desc="sampling", delay=2, leave=False))


class Likelihood(nn.Module, ABC):
    """Base of the likelihoods; a member defines its parallel pass and its cached sampler."""

    def __init__(
        self,
        shape: int | Sequence[int],
        context_dim: int | None,
        covariate_dim: int | None,
        output: Output,
    ) -> None:
        super().__init__()
        self.shape = widths("shape", shape if isinstance(shape, Sequence) else (shape,))
        if not self.shape:
            raise ValueError("Expected a shape of at least one dimension; got ().")
        self.num_elements = 1
        for size in self.shape:
            self.num_elements *= size
        self.context_dim = None if context_dim is None else positive_int("context_dim", context_dim)
        self.covariate_dim = (
            None if covariate_dim is None else positive_int("covariate_dim", covariate_dim)
        )
        self.output = output

    @property
    def conditioning_dim(self) -> int:
        """Width of what :meth:`_conditioning` gives; 0 for a likelihood without conditioning."""
        return (self.context_dim or 0) + (self.covariate_dim or 0)

    @abstractmethod
    def _params(self, inputs: Tensor, conditioned: Any) -> Tensor:
        """Numbers of all elements in one pass, an element's from those before it.

        Args:
            inputs: Encoded values, ``(*batch, *shape, num_inputs)``.
            conditioned: What the member made of the conditioning, once for all passes.

        Returns:
            ``(*batch, *shape, num_params)``, ``batch`` broadcast with that of ``conditioned``.
        """

    @abstractmethod
    def _draw(self, noise: Tensor, conditioned: Any) -> Tensor:
        """The value ``(*batch, *shape)`` that ``noise`` ``(*batch, *shape, num_noise)`` makes.

        Element by element; what an element leaves unchanged is not computed again.
        """

    def _conditioning(self, context: Tensor | None, covariates: Tensor | None) -> Tensor | None:
        """Context and covariates, checked and side by side; None for a likelihood without."""
        where = f" at {type(self).__name__}"
        check_context(context, self.context_dim, where, owner="likelihood")
        check_context(covariates, self.covariate_dim, where, "covariates", "likelihood")
        if context is None or covariates is None:
            return covariates if context is None else context
        batch = torch.broadcast_shapes(context.shape[:-1], covariates.shape[:-1])
        return torch.cat((context.expand(*batch, -1), covariates.expand(*batch, -1)), -1)

    def _like(self) -> Tensor:
        """A tensor of the dtype and device of the parameters."""
        return next(self.parameters())


class Autoregressive(TorchDistribution):
    """Distribution of a likelihood at one conditioning.

    Args:
        likelihood: The module.
        conditioned: What the module made of the conditioning; its tensors broadcast on the left.
        batch_shape: Left dimensions of the conditioning.
        present: Boolean, broadcastable with ``(*batch_shape, *event_shape)``: False for elements
            that are not there. They add nothing, and no other element sees them.
        validate_args: Whether to check values; the host's default if None.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        likelihood: Likelihood,
        conditioned: Any,
        batch_shape: Sequence[int] = (),
        present: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.likelihood = likelihood
        self.conditioned = conditioned
        self.present = present
        self.has_rsample = likelihood.output.has_rsample
        super().__init__(
            torch.Size(batch_shape), torch.Size(likelihood.shape), validate_args=validate_args
        )

    @constraints.dependent_property
    def support(self) -> Any:
        """The support of the elements, as a constraint on events."""
        return constraints.independent(self.likelihood.output.support, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Autoregressive:
        """The same distribution over a wider batch."""
        return type(self)(
            self.likelihood, self.conditioned, batch_shape, self.present, self._validate_args
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(*batch,)`` of values ``(*batch, *event_shape)``."""
        self._check_shape(value)
        if self._validate_args:
            # A look at the values would break the one graph of a traced step: validation only.
            self._check_values(value)
        if self.present is not None:
            value = torch.where(self.present, value, 0)
        density = self._log_prob(value)
        return density.expand(torch.broadcast_shapes(density.shape, self.batch_shape))

    def sample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:  # noqa: B008
        """Samples ``(*sample_shape, *batch_shape, *event_shape)``, without a gradient."""
        with torch.no_grad():
            return self._sample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = torch.Size()) -> Tensor:  # noqa: B008
        """Samples through which a gradient flows, where the elements' distribution has such."""
        if not self.has_rsample:
            raise NotImplementedError
        return self._sample(sample_shape)

    def _log_prob(self, value: Tensor) -> Tensor:
        """The log-density of checked values, 0 at absent elements, on a batch of its own."""
        return self._density(value, self.conditioned)

    def _density(self, value: Tensor, conditioned: Any) -> Tensor:
        """The log-density under one ``conditioned``."""
        likelihood, output = self.likelihood, self.likelihood.output
        inputs = output.encode(value, likelihood._like().dtype)
        if self.present is not None:
            inputs = inputs * self.present.unsqueeze(-1)
        terms = output.log_prob(likelihood._params(inputs, conditioned), value)
        if self.present is not None:
            terms = torch.where(self.present, terms, 0.0)
        return terms.flatten(-len(self.event_shape)).sum(-1)

    def _sample(self, sample_shape: Sequence[int]) -> Tensor:
        sizes = (sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape)
        if any(size < 1 for size in sizes):
            raise ValueError(f"Expected a sample shape of positive sizes; got {sizes}.")
        shape = self._extended_shape(torch.Size(sizes))
        value = self._draw(tuple(shape))
        if self.present is None:
            return value
        return torch.where(self.present, value, 0)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        """A value of the given shape."""
        like = self.likelihood._like()
        noise = self.likelihood.output.noise(shape, like.dtype, like.device)
        return self.likelihood._draw(noise, self.conditioned)

    def _check_shape(self, value: Tensor) -> None:
        rank = len(self.event_shape)
        if value.shape[max(value.dim() - rank, 0) :] != self.event_shape:
            sizes = ", ".join(map(str, self.event_shape))
            raise ValueError(
                f"Expected values of shape (..., {sizes}) at "
                f"{type(self.likelihood).__name__}.log_prob; got shape {tuple(value.shape)}."
            )

    def _check_values(self, value: Tensor) -> None:
        output = self.likelihood.output
        bad = ~output.valid(value)
        if self.present is not None:
            bad = bad & self.present
        if bool(bad.any()):
            # The present elements may vary over a wider batch than the value: its own index.
            index = tuple(torch.nonzero(bad)[0].tolist())[-value.dim() :]
            index = tuple(i if n > 1 else 0 for i, n in zip(index, value.shape, strict=True))
            raise ValueError(
                f"Expected values in {output.describe} at {type(self.likelihood).__name__}"
                f".log_prob; got {value[index].item()} at position {index}."
            )
