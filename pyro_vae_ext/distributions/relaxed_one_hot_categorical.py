"""The Concrete distribution: a one-hot categorical, relaxed to the inside of the simplex."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform

from pyro_vae_ext._relaxation import check_temperature, noisy, uniform


class RelaxedOneHotCategorical(dist.TransformedDistribution):
    r"""The Concrete distribution over :math:`k` categories at temperature :math:`t`.

    .. math::
        x = \operatorname{softmax}\bigl((\log p + g) / t\bigr), \qquad
        g_j = -\log(-\log u_j), \quad u_j \sim U(0, 1)

    .. math::
        \log p_t(x) = \log (k - 1)! + (k - 1) \log t
        + \sum_j \bigl( \log p_j - (t + 1) \log x_j \bigr)
        - k \log \sum_j p_j\, x_j^{-t} .

    The largest entry of :math:`x` is category :math:`j` with probability :math:`p_j`, at any
    temperature; as it falls, :math:`x` tends to a corner. Samples are reparameterised, and no
    entry is below the smallest normal number of its type. At a low temperature more than that
    would be below it: ``base_dist`` is the distribution of :math:`\log x`, which has no such end.

    The host's distribution of this name takes no temperature for each row.

    Args:
        temperature: A positive number, or a tensor that broadcasts with the batch.
        probs: Probabilities, of shape ``(*batch, k)``; normalised.
        logits: Log-probabilities up to a constant, ``(*batch, k)``; one of the two.
        validate_args: Whether to check arguments and values; the host's default if None.

    Raises:
        ValueError: If the temperature is not positive (tensors: with validation), or if both or
            neither of ``probs`` and ``logits`` are given.

    References:
        Maddison, Mnih and Teh, 2017, *The Concrete Distribution*, arXiv:1611.00712, eq. 10.
        Jang, Gu and Poole, 2017, *Categorical Reparameterization with Gumbel-Softmax*,
        arXiv:1611.01144.

    Example:
        >>> import torch
        >>> relaxed = RelaxedOneHotCategorical(0.5, probs=torch.tensor([0.5, 0.25, 0.25]))
        >>> x = relaxed.rsample((4,))
        >>> x.shape, relaxed.log_prob(x).shape
        (torch.Size([4, 3]), torch.Size([4]))
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.simplex
    has_rsample = True
    base_dist: _LogConcrete

    def __init__(
        self,
        temperature: float | Tensor,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        check_temperature(temperature)
        categories = torch.distributions.Categorical(probs, logits, validate_args=validate_args)
        base = _LogConcrete(temperature, categories.logits, validate_args=validate_args)
        super().__init__(base, _ClampedExp(), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> RelaxedOneHotCategorical:
        """The same distribution with its batch dimensions expanded."""
        new = self._get_checked_instance(RelaxedOneHotCategorical, _instance)
        return super().expand(torch.Size(batch_shape), _instance=new)

    @property
    def temperature(self) -> Tensor:
        """The temperature, of the batch's shape."""
        return self.base_dist.temperature

    @property
    def logits(self) -> Tensor:
        """Log-probabilities, ``(*batch, k)``."""
        return self.base_dist.logits

    @property
    def probs(self) -> Tensor:
        """Probabilities, ``(*batch, k)``."""
        return self.logits.exp()


class _LogConcrete(dist.TorchDistribution):
    """The logarithm of a Concrete variable: log-probabilities in, normalised logarithms out."""

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, temperature: float | Tensor, logits: Tensor, *, validate_args: bool | None = None
    ) -> None:
        temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
        batch_shape = torch.broadcast_shapes(temperature.shape, logits.shape[:-1])
        self.temperature = temperature.expand(batch_shape)
        self.logits = logits.expand(batch_shape + logits.shape[-1:])
        super().__init__(batch_shape, logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _LogConcrete:
        new = self._get_checked_instance(_LogConcrete, _instance)
        batch_shape = torch.Size(batch_shape)
        new.temperature = self.temperature.expand(batch_shape)
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        super(_LogConcrete, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        u = uniform(shape, self.logits.dtype, self.logits.device)
        z = noisy("one_hot", self.logits, u)
        return torch.log_softmax(z / self.temperature.unsqueeze(-1), -1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        others = self.event_shape[-1] - 1
        score = torch.log_softmax(self.logits - self.temperature.unsqueeze(-1) * value, -1)
        return score.sum(-1) + math.lgamma(others + 1) + others * self.temperature.log()


class _ClampedExp(ExpTransform):
    """The exponential function, never zero."""

    def _call(self, x: Tensor) -> Tensor:
        return x.exp().clamp(min=torch.finfo(x.dtype).tiny)
