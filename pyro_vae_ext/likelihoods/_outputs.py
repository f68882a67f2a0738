"""What one element of an autoregressive likelihood holds: its density, its draw, its encoding.

All are pure functions of the numbers that a network gives for the element, and of the value or the
noise. Numbers of an element stand in the last axis.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn import functional

from pyro_vae_ext._checks import one_of, positive_int

KINDS = (
    "bernoulli",
    "categorical",
    "normal",
    "logistic_mixture",
    "discretized_logistic_mixture",
)
# Below this a component of a mixture of logistics is a spike: Salimans et al. (2017) stop here.
_LEAST_LOG_SCALE = -7.0


class Output(ABC):
    """Conditional distribution of one element, given ``num_params`` numbers."""

    is_discrete: ClassVar[bool]
    has_rsample: ClassVar[bool] = False
    num_noise: ClassVar[int] = 1

    @property
    @abstractmethod
    def num_params(self) -> int:
        """Numbers that a network gives for an element."""

    @property
    def num_inputs(self) -> int:
        """Numbers by which an element enters a network."""
        return 1

    @property
    @abstractmethod
    def support(self) -> Any:
        """The host's constraint on an element."""

    @property
    @abstractmethod
    def describe(self) -> str:
        """The support in words."""

    @abstractmethod
    def valid(self, value: Tensor) -> Tensor:
        """Whether each element of ``value`` is in the support."""

    @abstractmethod
    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        """Log-density ``(*s)`` of ``value`` ``(*s)`` under ``params`` ``(*s, num_params)``."""

    @abstractmethod
    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        """The value ``(*s)`` that ``noise`` ``(*s, num_noise)`` makes of ``params``."""

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Inputs ``(*s, num_inputs)`` of a network."""
        return value.to(dtype).unsqueeze(-1)

    def noise(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Standard noise ``(*shape, num_noise)``: the one line of randomness."""
        return torch.rand((*shape, self.num_noise), dtype=dtype, device=device)


@dataclass(frozen=True)
class Bernoulli(Output):
    """Zero or one; the parameter is the logit."""

    is_discrete = True
    num_params = 1
    support = constraints.boolean
    describe = "{0, 1}"

    def valid(self, value: Tensor) -> Tensor:
        return (value == 0) | (value == 1)

    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        logits, value = torch.broadcast_tensors(params.squeeze(-1), value.to(params.dtype))
        return -functional.binary_cross_entropy_with_logits(logits, value, reduction="none")

    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        return (noise.squeeze(-1) < torch.sigmoid(params.squeeze(-1))).to(params.dtype)


@dataclass(frozen=True)
class Categorical(Output):
    """One of several categories; the parameters are their logits."""

    num_categories: int
    ordinal: bool = False

    is_discrete = True

    @property
    def num_params(self) -> int:
        return self.num_categories

    @property
    def num_inputs(self) -> int:
        return 1 if self.ordinal else self.num_categories

    @property
    def support(self) -> Any:
        return constraints.integer_interval(0, self.num_categories - 1)

    @property
    def describe(self) -> str:
        return _integers(self.num_categories)

    def valid(self, value: Tensor) -> Tensor:
        return _whole(value, self.num_categories)

    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        logits = functional.log_softmax(params, -1)
        shape = torch.broadcast_shapes(logits.shape[:-1], value.shape)
        index = value.long().expand(shape).unsqueeze(-1)
        return logits.expand(*shape, -1).gather(-1, index).squeeze(-1)

    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        return _inverse_cdf(params, noise.squeeze(-1))

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if self.ordinal:
            return _centred(value.to(dtype), self.num_categories).unsqueeze(-1)
        # The host's one_hot looks at the values, which breaks the one graph of a traced step.
        categories = torch.arange(self.num_categories, device=value.device)
        return (value.unsqueeze(-1) == categories).to(dtype)


@dataclass(frozen=True)
class Normal(Output):
    """A real number; the parameters are location and log-scale."""

    is_discrete = False
    has_rsample = True
    num_params = 2
    support = constraints.real
    describe = "finite numbers"

    def valid(self, value: Tensor) -> Tensor:
        return torch.isfinite(value)

    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        loc, log_scale = params.unbind(-1)
        standard = (value.to(params.dtype) - loc) * (-log_scale).exp()
        return -0.5 * standard.square() - log_scale - 0.5 * math.log(2.0 * math.pi)

    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        loc, log_scale = params.unbind(-1)
        return loc + log_scale.exp() * noise.squeeze(-1)

    def noise(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        return torch.randn((*shape, self.num_noise), dtype=dtype, device=device)


@dataclass(frozen=True)
class LogisticMixture(Output):
    """A real number; the parameters are logits, locations and log-scales of the components."""

    num_components: int

    is_discrete = False
    num_noise = 2
    support = constraints.real
    describe = "finite numbers"

    @property
    def num_params(self) -> int:
        return 3 * self.num_components

    def valid(self, value: Tensor) -> Tensor:
        return torch.isfinite(value)

    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        logits, locs, log_scales = _components(params)
        standard = (value.to(params.dtype).unsqueeze(-1) - locs) * (-log_scales).exp()
        density = functional.logsigmoid(standard) + functional.logsigmoid(-standard) - log_scales
        return torch.logsumexp(functional.log_softmax(logits, -1) + density, -1)

    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        return _draw_logistic(params, noise)


@dataclass(frozen=True)
class DiscretizedLogisticMixture(Output):
    r"""A whole number; the mass of a mixture of logistics in its bin.

    Value :math:`k` of :math:`0, \dots, V-1` lies at :math:`x = 2k/(V-1) - 1`, in a bin of
    half-width :math:`h = 1/(V-1)`; the first and the last bin are open. With :math:`a, b` the upper
    and lower edge in units of the logistic,

    .. math:: \sigma(a) - \sigma(b) = \sigma(a)\, \sigma(-b)\, (1 - e^{b - a}) ,

    which has no cancellation, wherever the bin is: the masses sum to one.
    """

    num_categories: int
    num_components: int

    is_discrete = True
    num_noise = 2

    @property
    def num_params(self) -> int:
        return 3 * self.num_components

    @property
    def support(self) -> Any:
        return constraints.integer_interval(0, self.num_categories - 1)

    @property
    def describe(self) -> str:
        return _integers(self.num_categories)

    def valid(self, value: Tensor) -> Tensor:
        return _whole(value, self.num_categories)

    def log_prob(self, params: Tensor, value: Tensor) -> Tensor:
        logits, locs, log_scales = _components(params)
        last = self.num_categories - 1
        value = value.to(params.dtype).unsqueeze(-1)
        centre, rate = _centred(value, self.num_categories), (-log_scales).exp()
        upper = functional.logsigmoid((centre - locs + 1.0 / last) * rate)
        lower = functional.logsigmoid((locs - centre + 1.0 / last) * rate)
        inner = upper + lower + torch.log(-torch.expm1(-2.0 / last * rate))
        mass = torch.where(value == 0, upper, torch.where(value == last, lower, inner))
        return torch.logsumexp(functional.log_softmax(logits, -1) + mass, -1)

    def draw(self, params: Tensor, noise: Tensor) -> Tensor:
        last = self.num_categories - 1
        place = (_draw_logistic(params, noise) + 1.0) * (0.5 * last)
        return place.round().clamp(0, last).long()

    def encode(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return _centred(value.to(dtype), self.num_categories).unsqueeze(-1)


def make_output(
    output: str, num_categories: int, num_components: int, *, ordinal: bool = False
) -> Output:
    """The kind of element called ``output``.

    Args:
        output: One of :data:`KINDS`.
        num_categories: Number of values of the kinds with a finite support.
        num_components: Number of components of the mixtures.
        ordinal: Whether a category enters a network as one number in [-1, 1], not as a one-hot.

    Raises:
        ValueError: If the kind is unknown or a number is too small.
    """
    one_of("output", output, KINDS)
    positive_int("num_categories", num_categories, minimum=2)
    positive_int("num_components", num_components)
    if output == "bernoulli":
        return Bernoulli()
    if output == "categorical":
        return Categorical(num_categories, ordinal)
    if output == "normal":
        return Normal()
    if output == "logistic_mixture":
        return LogisticMixture(num_components)
    return DiscretizedLogisticMixture(num_categories, num_components)


def _integers(number: int) -> str:
    return "{0, 1}" if number == 2 else f"{{0, ..., {number - 1}}}"


def _whole(value: Tensor, number: int) -> Tensor:
    whole = (value >= 0) & (value <= number - 1)
    return whole & (value == value.floor()) if value.is_floating_point() else whole


def _centred(value: Tensor, number: int) -> Tensor:
    """Values 0..V-1 on [-1, 1]."""
    return value * (2.0 / (number - 1)) - 1.0


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Category whose share of the cumulated probabilities ``uniform`` falls into."""
    cumulated = torch.softmax(logits, -1).cumsum(-1)
    # Against the sum as it was rounded: a category without mass is never drawn, the last neither.
    level = uniform.unsqueeze(-1) * cumulated[..., -1:]
    return (cumulated[..., :-1] <= level).sum(-1)


def _components(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, locations and log-scales of the components."""
    logits, locs, log_scales = params.unflatten(-1, (3, -1)).unbind(-2)
    return logits, locs, log_scales.clamp(min=_LEAST_LOG_SCALE)


def _draw_logistic(params: Tensor, noise: Tensor) -> Tensor:
    """A draw of the component by the first uniform, of its logistic by the second."""
    logits, locs, log_scales = _components(params)
    which, uniform = noise.unbind(-1)
    shape = torch.broadcast_shapes(logits.shape[:-1], which.shape)
    component = _inverse_cdf(logits, which).expand(shape).unsqueeze(-1)
    loc = locs.expand(*shape, -1).gather(-1, component).squeeze(-1)
    log_scale = log_scales.expand(*shape, -1).gather(-1, component).squeeze(-1)
    limits = torch.finfo(uniform.dtype)
    uniform = uniform.clamp(limits.tiny, 1.0 - limits.eps)
    return loc + log_scale.exp() * (uniform.log() - torch.log1p(-uniform))
