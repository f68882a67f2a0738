"""The one-hot categorical distribution, with a density between the corners as well."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import random
from numpyro.distributions import constraints
from numpyro.distributions.util import assert_one_of, lazy_property, validate_sample

from numpyro_vae_ext._checks import is_traced


class _OneHot(constraints.Constraint):
    """Vectors of zeros and a one."""

    is_discrete = True
    event_dim = 1

    def __call__(self, x: Any) -> Any:
        return jnp.all((x == 0) | (x == 1), axis=-1) & (jnp.sum(x, axis=-1) == 1)

    def feasible_like(self, prototype: Any) -> Any:
        return jnp.zeros_like(prototype).at[..., 0].set(1)

    def eq(self, other: object, static: bool = False) -> bool:
        return isinstance(other, _OneHot)

    def tree_flatten(self) -> Any:
        return (), ((), {})


class OneHotCategorical(dist.Distribution):
    r"""One category out of :math:`k`, as a vector of zeros and a one.

    .. math:: \log p(b) = \sum_{j=1}^{k} b_j \log p_j .

    The host has no such distribution. The density is multilinear: at the corners of the simplex
    it is that of the host's ``Categorical``, and between them a soft value has a log-density too,
    whose derivative in the value is :math:`\log p`. Validation accepts any value on the closed
    simplex. Values are floats, of the type of the parameters.

    Args:
        probs: probabilities, of shape ``(*batch, k)``; normalised.
        logits: log-probabilities up to a constant, ``(*batch, k)``; one of the two.
        validate_args: whether to check arguments and values; the host's default if None.

    Raises:
        ValueError: if both or neither of ``probs`` and ``logits`` are given; with validation, if
            they are no probabilities.

    References:
        Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein (2017), REBAR, arXiv 1703.07370, whose
        relaxed values need such a density.

    Example:
        >>> import jax.numpy as jnp
        >>> categories = OneHotCategorical(probs=jnp.array([0.5, 0.25, 0.25]))
        >>> print(jnp.exp(categories.log_prob(jnp.array([0.0, 1.0, 0.0]))).round(2))
        0.25
        >>> print(categories.log_prob(jnp.array([0.5, 0.5, 0.0])).round(4))
        -1.0397
    """

    arg_constraints = {"probs": constraints.simplex, "logits": constraints.real_vector}
    support = _OneHot()
    pytree_data_fields = ("logits",)
    has_enumerate_support = True
    # How estimators for discrete sites recognise what they can relax.
    is_one_hot = True

    def __init__(
        self, probs: Any = None, logits: Any = None, *, validate_args: bool | None = None
    ) -> None:
        assert_one_of(probs=probs, logits=logits)
        given = jnp.asarray(logits if probs is None else probs, _float_type(probs, logits))
        if probs is None:
            self.logits = jax.nn.log_softmax(given)
        else:
            self.probs = given / given.sum(-1, keepdims=True)
            # As the host's Categorical has it: finite for a category that cannot occur.
            self.logits = jnp.maximum(jnp.log(self.probs), jnp.finfo(given.dtype).min)
        super().__init__(given.shape[:-1], given.shape[-1:], validate_args=validate_args)

    @lazy_property
    def probs(self) -> jax.Array:
        """Probabilities, ``(*batch, k)``."""
        return jnp.exp(self.logits)

    @property
    def mean(self) -> jax.Array:
        """The probabilities."""
        return self.probs

    @property
    def variance(self) -> jax.Array:
        """Of each entry."""
        return self.probs * (1.0 - self.probs)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw one-hot vectors, ``(*sample_shape, *batch, k)``."""
        index = random.categorical(key, self.logits, shape=sample_shape + self.batch_shape)
        return jax.nn.one_hot(index, self.event_shape[0], dtype=self.logits.dtype)

    def expand(self, batch_shape: Sequence[int]) -> OneHotCategorical:
        """The same distribution with its batch dimensions expanded."""
        # The host's wrapper cannot enumerate values that have an event dimension.
        logits = jnp.broadcast_to(self.logits, (*batch_shape, *self.event_shape))
        return OneHotCategorical(logits=logits, validate_args=self._validate_args)

    def _validate_sample(self, value: Any) -> Any:
        inside = constraints.simplex(jnp.asarray(value))
        if not is_traced(inside) and not np.all(inside):
            # The host's own words: it warns, and scores such values with -inf.
            warnings.warn(
                "Out-of-support values provided to log prob method. The value argument should be "
                "within the support.",
                stacklevel=3,
            )
        return inside

    @validate_sample
    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Multilinear log-density of values of shape ``(*batch, k)``."""
        # 0 log 0 = 0: no NaN for a category that cannot occur, and does not.
        absent = jnp.isneginf(self.logits) & (jnp.asarray(value) == 0)
        return jnp.sum(value * jnp.where(absent, 0.0, self.logits), axis=-1)

    def entropy(self) -> jax.Array:
        """Entropy, of shape ``batch``."""
        return -jnp.sum(self.probs * jnp.where(self.probs > 0, self.logits, 0.0), axis=-1)

    def enumerate_support(self, expand: bool = True) -> jax.Array:
        """All ``k`` values, of shape ``(k, *batch, k)``, or with ones for ``batch``."""
        k = self.event_shape[0]
        values = jnp.eye(k, dtype=self.logits.dtype)
        values = values.reshape((k,) + (1,) * len(self.batch_shape) + (k,))
        return jnp.broadcast_to(values, (k, *self.batch_shape, k)) if expand else values


def _float_type(*values: Any) -> Any:
    """The floating-point type of what is given, JAX's default float for integers."""
    dtype = jnp.result_type(*(value for value in values if value is not None))
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)
