"""A Normal whose location follows what it is given from the start."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from numpyro_vae_ext.guides._base import param_dtype_or_default
from numpyro_vae_ext.guides.mean_field import MeanField


class TiedNormal(MeanField):
    r"""``MeanField`` whose location gets a linear function of the first numbers of the context.

    Number :math:`i` starts as a Normal around ``slope`` times number :math:`i` of these, up to what
    the heads start at.

    Args:
        num_followed: How many numbers of the context are followed.
        slope: What a number that is followed is multiplied by at the start.
        variance: The variance at the start of a number that follows one.
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        *,
        num_followed: int,
        slope: float,
        variance: float,
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
        self.tie.kernel[...] = slope * jnp.eye(num_followed, latent_dim, dtype=dtype)
        left = jnp.where(jnp.arange(latent_dim) < num_followed, variance, 1.0)
        self.log_scale.bias[...] = 0.5 * jnp.log(left).astype(dtype)

    def loc_and_log_scale(self, context: Any = None) -> tuple[jax.Array, jax.Array]:
        """Location and logarithm of the standard deviation, each ``(*batch, latent_dim)``."""
        loc, log_scale = super().loc_and_log_scale(context)
        return loc + self.tie(context[..., : self.num_followed]), log_scale
