"""A mixture of diagonal Normals as a prior."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx

from numpyro_vae_ext._checks import positive_int
from numpyro_vae_ext.priors._base import param_dtype_or_default


class Mixture(nnx.Module):
    r"""Mixture of diagonal Normals with learned weights, locations and scales.

    .. math:: p(z) = \sum_{k=1}^{K} \pi_k \prod_i N(z_i;\, \mu_{k,i},\, \sigma_{k,i}^2)

    It starts with equal weights, standard Normal draws as locations and scales of 1. Called inside
    a model it gives the host's ``MixtureSameFamily``, of which the component is summed out.

    Args:
        latent_dim: Dimension of the latent vector :math:`z`.
        num_components: Number :math:`K` of components.
        rngs: Source of the initial locations.
        param_dtype: Type of the parameters, JAX's default float if None.

    Raises:
        ValueError: If a number is not positive.

    References:
        Dilokthanakul et al., 2016, *Deep Unsupervised Clustering with Gaussian Mixture Variational
        Autoencoders*, arXiv:1611.02648. Tomczak and Welling, 2018, *VAE with a VampPrior*,
        arXiv:1705.07120, sec. 3 (a baseline there).

    Example:
        >>> import numpyro
        >>> from flax import nnx
        >>> prior = Mixture(latent_dim=2, num_components=5, rngs=nnx.Rngs(0))
        >>> with numpyro.handlers.seed(rng_seed=0), numpyro.plate("data", 7):
        ...     z = numpyro.sample("z", prior())
        >>> z.shape
        (7, 2)
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        num_components: int = 10,
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.num_components = positive_int("num_components", num_components)
        dtype = param_dtype_or_default(param_dtype)
        shape = (num_components, latent_dim)
        self.logits = nnx.Param(jnp.zeros((num_components,), dtype))
        self.locs = nnx.Param(jax.random.normal(rngs.params(), shape, dtype))
        self.log_scales = nnx.Param(jnp.zeros(shape, dtype))

    def __call__(self) -> dist.Distribution:
        """The prior as a distribution, ``batch_shape ()`` and ``event_shape (latent_dim,)``."""
        components = dist.Normal(self.locs[...], jnp.exp(self.log_scales[...])).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits[...]), components)
