"""A Normal whose samples carry their noise."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist


class NormalDraw(NamedTuple):
    """The noise behind a sample of a Normal."""

    noise: jax.Array

    def path(self) -> None:
        """Nothing: at a fixed value the usual formula has the derivative that is asked for."""
        return None


class CarryingNormal(dist.Normal):
    r"""Normal that scores its own sample by the noise, :math:`-\epsilon^2/2 - \log\sigma`.

    The value is that of ``Normal`` and so are all derivatives along the sample; the program is
    smaller, above all where one location serves many particles. Any other value is scored by the
    usual formula.
    """

    pytree_data_fields = ("log_scale",)

    def __init__(self, loc: jax.Array, log_scale: jax.Array) -> None:
        self.log_scale = log_scale
        super().__init__(loc, jnp.exp(log_scale))

    def sample_with_intermediates(
        self, key: jax.Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[jax.Array, NormalDraw]:
        """Samples of shape ``(*sample_shape, *batch_shape)``, and their noise."""
        dtype = jnp.result_type(self.loc)
        noise = jax.random.normal(key, (*sample_shape, *self.batch_shape), dtype)
        return self.loc + noise * self.scale, NormalDraw(noise)

    def log_prob(self, value: jax.Array, intermediates: NormalDraw | None = None) -> jax.Array:
        """Log-density of ``value``, elementwise."""
        if intermediates is None:
            noise: Any = (value - self.loc) * jnp.exp(-self.log_scale)
        else:
            noise = intermediates.noise
        return -0.5 * noise**2 - 0.5 * math.log(2.0 * math.pi) - self.log_scale
