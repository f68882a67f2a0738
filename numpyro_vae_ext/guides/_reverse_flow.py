"""The reverse model of a hierarchical family, where it has to be more than a Normal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpyro.distributions as dist
from flax import nnx
from numpyro.distributions import constraints

from numpyro_vae_ext._masked_flow import from_noise, log_density, masked_nets
from numpyro_vae_ext.guides._base import DirectFamily, param_dtype_or_default


class ReverseFlow(DirectFamily):
    """Masked autoregressive flow with a context: densities are one pass, draws sequential.

    A reverse model is scored at what the guide drew and is never drawn in training. It starts near
    the standard Normal.

    Args:
        latent_dim: Dimension of the vector.
        context_dim: Width of the context.
        hidden_dims: Widths of the hidden layers of each step's masked network.
        num_flows: Number of steps.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.
        rngs: Source of the initial weights.
        param_dtype: Type of the parameters, JAX's default float if None.

    References:
        Papamakarios, Pavlakou and Murray, 2017, *Masked Autoregressive Flow for Density
        Estimation*, arXiv:1705.07057, sec. 3.1 and 3.4 (the context).
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        *,
        hidden_dims: Sequence[int] = (64, 64),
        num_flows: int = 2,
        activation: str = "elu",
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        super().__init__(latent_dim, context_dim)
        self.nets = masked_nets(
            latent_dim,
            hidden_dims,
            num_flows,
            context_dim=context_dim,
            activation=activation,
            rngs=rngs,
            param_dtype=param_dtype_or_default(param_dtype),
        )

    def distribution(self, context: Any = None) -> dist.Distribution:
        """The flow given ``context``, with ``event_dim`` 1."""
        return _Reverse(self, context)


class _Reverse(dist.Distribution):
    """The law of one :class:`ReverseFlow` at one context."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    pytree_data_fields = ("family", "context")

    def __init__(self, family: ReverseFlow, context: jax.Array) -> None:
        self.family, self.context = family, context
        super().__init__(context.shape[:-1], (family.latent_dim,))

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Samples of shape ``(*sample_shape, *batch_shape, latent_dim)``, differentiable."""
        noise = jax.random.normal(key, self.shape(sample_shape), self.context.dtype)
        return from_noise(self.family.nets, noise, self.context)

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log-density of shape ``(*batch,)``."""
        return log_density(self.family.nets, value, self.context)
