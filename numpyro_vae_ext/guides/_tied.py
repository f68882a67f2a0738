"""A diagonal Normal that follows the vector it is given, from the start."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from numpyro_vae_ext.guides._base import param_dtype_or_default
from numpyro_vae_ext.guides.mean_field import MeanField

# Correlation at the start of a number and the one that it follows: half of the variance.
TIE = math.sqrt(0.5)


class TiedNormal(MeanField):
    r"""``MeanField`` whose location gets a linear function of the first numbers of the context.

    It starts as :math:`N(\sqrt{.5}\, v_i, .5)` for number :math:`i`, with :math:`v` these numbers,
    up to what the heads start at. If :math:`v` is standard Normal, so is the marginal, and
    another one with the two exchanged is the exact reverse.

    Args:
        num_followed: How many numbers of the context are followed.
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        *,
        num_followed: int,
        rngs: nnx.Rngs,
        param_dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(latent_dim, context_dim, rngs=rngs, param_dtype=param_dtype, **kwargs)
        dtype = param_dtype_or_default(param_dtype)
        self.num_followed = num_followed
        self.tie = nnx.Linear(
            num_followed, latent_dim, use_bias=False, param_dtype=dtype, rngs=rngs
        )
        self.tie.kernel[...] = TIE * jnp.eye(num_followed, latent_dim, dtype=dtype)
        left = jnp.where(jnp.arange(latent_dim) < num_followed, 1 - TIE**2, 1.0)
        self.log_scale.bias[...] = 0.5 * jnp.log(left).astype(dtype)

    def loc_and_log_scale(self, context: Any = None) -> tuple[jax.Array, jax.Array]:
        """Location and logarithm of the standard deviation, each ``(*batch, latent_dim)``."""
        loc, log_scale = super().loc_and_log_scale(context)
        return loc + self.tie(context[..., : self.num_followed]), log_scale
