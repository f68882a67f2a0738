"""What one element of a likelihood is: how it enters the net, its density and its inverse cdf.

Pure functions of (parameters, value) and of (parameters, noise). :meth:`Output.noise` is the one
line of randomness. The parameters of an element are the last axis of an array, and lie one kind
after another where there are several: the logits, then the locations, then the log-scales.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.distributions import constraints

from numpyro_vae_ext._checks import one_of, positive_int

OUTPUTS = (
    "bernoulli",
    "categorical",
    "discretized_logistic_mixture",
    "logistic_mixture",
    "normal",
)
_MIN_LOG_SCALE = -7.0  # of a logistic: a steeper one has no use, and no stable gradient


@dataclass(frozen=True)
class Output(ABC):
    """What an element is; hashable, and without parameters.

    Attributes:
        num_params: numbers that the net gives per element.
        num_inputs: numbers by which an element enters the net.
        num_noise: random numbers behind a sampled element.
        is_discrete: whether the values are.
        has_rsample: whether a sample is differentiable in the parameters.
    """

    num_inputs: ClassVar[int] = 1
    num_noise: ClassVar[int] = 1
    is_discrete: ClassVar[bool] = False
    has_rsample: ClassVar[bool] = False

    @property
    @abstractmethod
    def num_params(self) -> int:
        """Numbers that the net gives per element."""

    @property
    @abstractmethod
    def support(self) -> constraints.Constraint:
        """The values of one element, as the host says it."""

    @property
    @abstractmethod
    def describe(self) -> str:
        """The values of one element, in words."""

    @abstractmethod
    def valid(self, value: Any) -> Any:
        """Which elements of known numbers are values; NaN never is."""

    @abstractmethod
    def log_prob(self, params: jax.Array, value: jax.Array) -> jax.Array:
        """Log-densities ``(*s,)`` of values ``(*s,)`` under parameters ``(*s, num_params)``."""

    @abstractmethod
    def draw(self, params: jax.Array, noise: jax.Array) -> jax.Array:
        """Values ``(*s,)`` of parameters ``(*s, num_params)`` and noise ``(*s, num_noise)``."""

    def encode(self, value: jax.Array, dtype: Any) -> jax.Array:
        """What enters the net, ``(*s, num_inputs)``, for values ``(*s,)``."""
        return value[..., None].astype(dtype)

    def value_dtype(self, dtype: Any) -> Any:
        """The type of a drawn value, for parameters of type ``dtype``."""
        return dtype

    def noise(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Noise ``(*shape, num_noise)``."""
        return random.uniform(key, (*shape, self.num_noise), dtype)


@dataclass(frozen=True)
class Bernoulli(Output):
    """A bit, 0 or 1 as a float, by its logit."""

    is_discrete: ClassVar[bool] = True
    num_params: ClassVar[int] = 1
    support = constraints.boolean
    describe: ClassVar[str] = "{0, 1}"

    def valid(self, value: Any) -> Any:
        return (value == 0) | (value == 1)

    def log_prob(self, params: jax.Array, value: jax.Array) -> jax.Array:
        logit = params[..., 0]
        return value * logit - jax.nn.softplus(logit)

    def draw(self, params: jax.Array, noise: jax.Array) -> jax.Array:
        return (noise[..., 0] < jax.nn.sigmoid(params[..., 0])).astype(params.dtype)


@dataclass(frozen=True)
class _Integers(Output):
    """The integers 0, ..., V - 1."""

    num_categories: int
    is_discrete: ClassVar[bool] = True

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_categories - 1)

    @property
    def describe(self) -> str:
        between = "" if self.num_categories == 2 else "..., "
        return f"{{0, {between}{self.num_categories - 1}}}"

    def valid(self, value: Any) -> Any:
        return (value >= 0) & (value < self.num_categories) & (value == np.floor(value))

    def value_dtype(self, dtype: Any) -> Any:
        return jnp.result_type(int)

    def on_scale(self, value: jax.Array, dtype: Any) -> jax.Array:
        """0, ..., V - 1 as numbers from -1 to 1."""
        return 2.0 * value.astype(dtype) / (self.num_categories - 1) - 1.0


@dataclass(frozen=True)
class Categorical(_Integers):
    """One of V categories by their logits; enters the net one-hot, or as a number."""

    ordinal: bool = False

    @property
    def num_params(self) -> int:
        return self.num_categories

    @property
    def num_inputs(self) -> int:
        return 1 if self.ordinal else self.num_categories

    def encode(self, value: jax.Array, dtype: Any) -> jax.Array:
        if self.ordinal:
            return self.on_scale(value, dtype)[..., None]
        return jax.nn.one_hot(value.astype(int), self.num_categories, dtype=dtype)

    def log_prob(self, params: jax.Array, value: jax.Array) -> jax.Array:
        shape = jnp.broadcast_shapes(params.shape[:-1], value.shape)
        index = jnp.broadcast_to(value.astype(int), shape)[..., None]
        logits = jnp.broadcast_to(jax.nn.log_softmax(params), (*shape, self.num_categories))
        return jnp.take_along_axis(logits, index, axis=-1, mode="clip")[..., 0]

    def draw(self, params: jax.Array, noise: jax.Array) -> jax.Array:
        return _inverse_cdf(params, noise[..., 0])


@dataclass(frozen=True)
class Normal(Output):
    """A number by the location and the log-scale of a Normal."""

    num_params: ClassVar[int] = 2
    has_rsample: ClassVar[bool] = True
    support = constraints.real
    describe: ClassVar[str] = "finite numbers"

    def valid(self, value: Any) -> Any:
        return abs(value) < math.inf

    def log_prob(self, params: jax.Array, value: jax.Array) -> jax.Array:
        loc, log_scale = params[..., 0], params[..., 1]
        scaled = (value - loc) * jnp.exp(-log_scale)
        return -0.5 * scaled**2 - log_scale - 0.5 * math.log(2.0 * math.pi)

    def draw(self, params: jax.Array, noise: jax.Array) -> jax.Array:
        return params[..., 0] + jnp.exp(params[..., 1]) * noise[..., 0]

    def noise(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return random.normal(key, (*shape, self.num_noise), dtype)


@dataclass(frozen=True)
class LogisticMixture(Output):
    """A number by a mixture of logistic distributions."""

    num_components: int
    num_noise: ClassVar[int] = 2
    support = constraints.real
    describe: ClassVar[str] = "finite numbers"

    @property
    def num_params(self) -> int:
        return 3 * self.num_components

    def valid(self, value: Any) -> Any:
        return abs(value) < math.inf

    def log_prob(self, params: jax.Array, value: jax.Array) -> jax.Array:
        logits, locs, log_scales = _split(params)
        scaled = (value[..., None] - locs) * jnp.exp(-log_scales)
        densities = jax.nn.log_sigmoid(scaled) + jax.nn.log_sigmoid(-scaled) - log_scales
        return jax.nn.logsumexp(jax.nn.log_softmax(logits) + densities, axis=-1)

    def draw(self, params: jax.Array, noise: jax.Array) -> jax.Array:
        return _draw_mixture(params, noise)


@dataclass(frozen=True)
class DiscretizedLogisticMixture(_Integers):
    r"""An integer by the mass that a mixture of logistics has nearest to it.

    Value ``k`` is the bin of half-width :math:`1 / (V - 1)` around :math:`2 k / (V - 1) - 1`; the
    first bin begins at minus infinity and the last one ends at infinity, so the masses sum to 1.
    """

    num_components: int
    num_noise: ClassVar[int] = 2

    @property
    def num_params(self) -> int:
        return 3 * self.num_components

    def encode(self, value: jax.Array, dtype: Any) -> jax.Array:
        return self.on_scale(value, dtype)[..., None]

    def log_prob(self, params: jax.Array, value: jax.Array) -> jax.Array:
        logits, locs, log_scales = _split(params)
        value = value[..., None].astype(params.dtype)
        precision = jnp.exp(-log_scales)
        last = self.num_categories - 1
        # Neighbours compute their common edge in the same way, so that the masses telescope.
        upper = ((2.0 * value + 1.0) / last - 1.0 - locs) * precision
        lower = ((2.0 * value - 1.0) / last - 1.0 - locs) * precision
        # s(b) - s(a) = s(b) s(-a) (1 - e^(a - b)): nothing cancels, in either tail.
        gap = jnp.log(-jnp.expm1(-2.0 / last * precision))
        log_below = jnp.where(value >= last, 0.0, jax.nn.log_sigmoid(upper))
        log_above = jnp.where(value <= 0, 0.0, jax.nn.log_sigmoid(-lower))
        inside = (value > 0) & (value < last)
        masses = log_below + log_above + jnp.where(inside, gap, 0.0)
        return jax.nn.logsumexp(jax.nn.log_softmax(logits) + masses, axis=-1)

    def draw(self, params: jax.Array, noise: jax.Array) -> jax.Array:
        last = self.num_categories - 1
        nearest = jnp.round((_draw_mixture(params, noise) + 1.0) * (0.5 * last))
        return jnp.clip(nearest, 0, last).astype(self.value_dtype(params.dtype))


def make_output(
    output: str, num_categories: int, num_components: int, *, ordinal: bool = False
) -> Output:
    """The output named ``output``; ``ordinal`` lets categories enter the net as one number."""
    one_of("output", output, OUTPUTS)
    num_categories = positive_int("num_categories", num_categories, minimum=2)
    num_components = positive_int("num_components", num_components)
    if output == "bernoulli":
        return Bernoulli()
    if output == "categorical":
        return Categorical(num_categories, ordinal)
    if output == "normal":
        return Normal()
    if output == "logistic_mixture":
        return LogisticMixture(num_components)
    return DiscretizedLogisticMixture(num_categories, num_components)


def _split(params: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits, locs, log_scales = jnp.split(params, 3, axis=-1)
    return logits, locs, jnp.maximum(log_scales, _MIN_LOG_SCALE)


def _inverse_cdf(logits: jax.Array, u: jax.Array) -> jax.Array:
    """The category in whose part of the unit interval ``u`` lies."""
    cdf = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    # Scaled by the last entry, which rounding may leave off 1.
    return jnp.sum(cdf[..., :-1] <= u[..., None] * cdf[..., -1:], axis=-1)


def _draw_mixture(params: jax.Array, noise: jax.Array) -> jax.Array:
    logits, locs, log_scales = _split(params)
    limits = jnp.finfo(params.dtype)
    u = jnp.clip(noise[..., 1], limits.tiny, 1.0 - limits.eps)
    component = _inverse_cdf(logits, noise[..., 0])
    shape = jnp.broadcast_shapes(component.shape, logits.shape[:-1])

    def chosen(numbers: jax.Array) -> jax.Array:
        numbers = jnp.broadcast_to(numbers, (*shape, numbers.shape[-1]))
        return jnp.take_along_axis(numbers, component[..., None], axis=-1)[..., 0]

    return chosen(locs) + jnp.exp(chosen(log_scales)) * (jnp.log(u) - jnp.log1p(-u))
