"""The contract of a learned prior.

A prior is an :class:`flax.nnx.Module`, made once and registered as every network of a model, with
``prior = nnx_module("prior", module)``. It is *called inside the model* to give a distribution of
the host, ``z = numpyro.sample("z", prior())``, over vectors: its ``batch_shape`` is ``()`` and
plates widen it. A prior without a distribution of the host's own defines a :class:`Law`, which
:class:`LawDistribution` turns into one. Its samples carry no gradient: in training a latent site
takes its value from the guide. All state is parameters, so a prior needs no mutable site.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import constraints


def param_dtype_or_default(param_dtype: Any) -> Any:
    """``param_dtype``, or JAX's default float where it is None."""
    return jnp.result_type(float) if param_dtype is None else param_dtype


class Law(ABC):
    """A density over vectors, bound to the parameters of its module. A pytree."""

    event_size: int

    @abstractmethod
    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density ``(*batch,)`` of values ``(*batch, event_size)``."""

    @abstractmethod
    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Values ``(*shape, event_size)``, independent of each other."""


class LawDistribution(dist.Distribution):
    """The host's distribution of a :class:`Law`."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = False
    pytree_data_fields = ("law",)

    def __init__(self, law: Law, batch_shape: tuple[int, ...] = ()) -> None:
        self.law = law
        super().__init__(tuple(batch_shape), (law.event_size,))

    def expand(self, batch_shape: Any) -> LawDistribution:
        """The same law over a wider batch; every element is a draw of its own."""
        return LawDistribution(self.law, tuple(batch_shape))

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Samples, ``(*sample_shape, *batch_shape, event_size)``."""
        return lax.stop_gradient(self.law.draw(key, (*sample_shape, *self.batch_shape)))

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density ``(*batch,)``."""
        if jnp.shape(value)[-1:] != self.event_shape:
            raise ValueError(
                f"Expected values of width {self.law.event_size} at log_prob; "
                f"got shape {jnp.shape(value)}."
            )
        log_density = self.law.log_prob(jnp.asarray(value))
        batch = jnp.broadcast_shapes(log_density.shape, self.batch_shape)
        return jnp.broadcast_to(log_density, batch)
