"""The one-hot categorical distribution, with a density between the corners as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class OneHotCategorical(dist.OneHotCategorical):
    r"""One category out of :math:`k`, as a vector of zeros and a one.

    .. math:: \log p(b) = \sum_{j=1}^{k} b_j \log p_j .

    The host's density looks for the largest entry of its value; this one is multilinear. At the
    corners of the simplex they agree. Between them a soft value has a log-density too, whose
    derivative in the value is :math:`\log p`. Everything else is the host's: enumeration,
    divergences, ``support``. Validation accepts any value on the closed simplex.

    Args:
        probs: Probabilities, of shape ``(*batch, k)``; normalised.
        logits: Log-probabilities up to a constant, ``(*batch, k)``; one of the two.
        validate_args: Whether to check arguments and values; the host's default if None.

    Raises:
        ValueError: If both or neither of ``probs`` and ``logits`` are given; with validation, if
            they are no probabilities, or a value is not on the simplex.

    References:
        Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein, 2017, *REBAR*, arXiv:1703.07370, whose
        relaxed values need such a density.

    Example:
        >>> import torch
        >>> categories = OneHotCategorical(probs=torch.tensor([0.5, 0.25, 0.25]))
        >>> categories.log_prob(torch.tensor([0.0, 1.0, 0.0])).exp()
        tensor(0.2500)
        >>> categories.log_prob(torch.tensor([0.5, 0.5, 0.0]))
        tensor(-1.0397)
    """

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(probs, logits, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> OneHotCategorical:
        """The same distribution with its batch dimensions expanded."""
        new = self._get_checked_instance(OneHotCategorical, _instance)
        return super().expand(batch_shape, _instance=new)

    def _validate_sample(self, value: Tensor) -> None:
        corner = torch.zeros_like(value)
        corner[..., :1] = 1.0
        super()._validate_sample(corner)  # the shape
        if not bool(constraints.simplex.check(value).all()):
            raise ValueError(
                "Expected values on the simplex at OneHotCategorical.log_prob; got others. Pass "
                "one-hot vectors, or soft ones that sum to one."
            )

    def log_prob(self, value: Tensor) -> Tensor:
        """Multilinear log-density of values of shape ``(*batch, k)``."""
        if self._validate_args:
            self._validate_sample(value)
        logits, value = torch.broadcast_tensors(self.logits, value)
        # 0 log 0 = 0: no NaN for a category that cannot occur, and does not.
        absent = torch.isneginf(logits) & (value == 0)
        return (value * logits.masked_fill(absent, 0.0)).sum(-1)
