"""The Concrete distribution: a one-hot categorical, relaxed to the inside of the simplex."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ExpTransform
from numpyro.distributions.util import validate_sample

from numpyro_vae_ext._relaxation import check_temperature, noisy, uniform
from numpyro_vae_ext.distributions.one_hot_categorical import OneHotCategorical


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

    Args:
        temperature: a positive number, or an array that broadcasts with the batch; may be traced.
        probs: probabilities, of shape ``(*batch, k)``; normalised.
        logits: log-probabilities up to a constant, ``(*batch, k)``; one of the two.
        validate_args: whether to check arguments and values; the host's default if None.

    Raises:
        ValueError: if the temperature is not positive (and not traced), or if both or neither of
            ``probs`` and ``logits`` are given.

    References:
        Maddison, Mnih and Teh (2017), The Concrete Distribution, arXiv 1611.00712, eq. 10.
        Jang, Gu and Poole (2017), Categorical Reparameterization with Gumbel-Softmax,
        arXiv 1611.01144.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> relaxed = RelaxedOneHotCategorical(0.5, probs=jnp.array([0.5, 0.25, 0.25]))
        >>> x = relaxed.sample(jax.random.key(0), (4,))
        >>> x.shape, relaxed.log_prob(x).shape
        ((4, 3), (4,))
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.simplex

    def __init__(
        self,
        temperature: Any,
        probs: Any = None,
        logits: Any = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        check_temperature(temperature)
        categories = OneHotCategorical(probs, logits, validate_args=validate_args)
        base = _LogConcrete(temperature, categories.logits, validate_args=validate_args)
        super().__init__(base, _ClampedExp(), validate_args=validate_args)

    @property
    def temperature(self) -> jax.Array:
        """The temperature, of the batch's shape."""
        return self.base_dist.temperature

    @property
    def logits(self) -> jax.Array:
        """Log-probabilities, ``(*batch, k)``."""
        return self.base_dist.logits

    @property
    def probs(self) -> jax.Array:
        """Probabilities, ``(*batch, k)``."""
        return jnp.exp(self.logits)


class _LogConcrete(dist.Distribution):
    """The logarithm of a Concrete variable: log-probabilities in, normalised logarithms out."""

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real_vector}
    reparametrized_params = ["temperature", "logits"]
    support = constraints.real_vector

    def __init__(
        self, temperature: Any, logits: jax.Array, *, validate_args: bool | None = None
    ) -> None:
        temperature = jnp.asarray(temperature, logits.dtype)
        batch_shape = jnp.broadcast_shapes(temperature.shape, logits.shape[:-1])
        self.temperature = jnp.broadcast_to(temperature, batch_shape)
        self.logits = jnp.broadcast_to(logits, batch_shape + logits.shape[-1:])
        super().__init__(batch_shape, logits.shape[-1:], validate_args=validate_args)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        u = uniform(key, self.shape(sample_shape), self.logits.dtype)
        z = noisy("one_hot", self.logits, u)
        return jax.nn.log_softmax(z / self.temperature[..., None])

    @validate_sample
    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        others = self.event_shape[-1] - 1
        score = jax.nn.log_softmax(self.logits - self.temperature[..., None] * value)
        return score.sum(-1) + math.lgamma(others + 1) + others * jnp.log(self.temperature)


class _ClampedExp(ExpTransform):
    """The exponential function, never zero."""

    def __call__(self, x: Any) -> Any:
        return jnp.maximum(jnp.exp(x), jnp.finfo(jnp.result_type(x)).tiny)
