"""A masked autoregressive flow as a prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpyro.distributions as dist
from flax import nnx

from numpyro_vae_ext._checks import positive_int, widths
from numpyro_vae_ext._masked_flow import from_noise, log_density, masked_nets
from numpyro_vae_ext.priors._base import Law, LawDistribution, param_dtype_or_default


class FlowPrior(nnx.Module):
    r"""Masked autoregressive flow: every coordinate is a Normal given those before it.

    .. math::
        u_0 = z, \qquad (m_t, s_t) = \mathrm{net}_t(u_{t-1}), \qquad
        u_t = (u_{t-1} - m_t) \odot e^{-a_t}, \qquad u_T \sim N(0, I), \\
        a_t = b \tanh(s_t / b), \qquad b = \min(3, 12 / T),

    where every net is autoregressive and the order is reversed from one step to the next. All
    steps together scale by :math:`e^{-12}` to :math:`e^{12}` at most: no training makes them
    nearly singular. A density is one parallel pass a step,

    .. math:: \log p(z) = \log N(u_T; 0, I) - \sum_t \sum_i a_{t,i}.

    Such a prior is the inverse of an autoregressive flow as guide: here densities are cheap, which
    is all that training asks of a prior, and samples are sequential, ``latent_dim`` passes a step,
    exact and without a gradient. It starts near the standard Normal. With ``latent_dim=1`` there
    is nothing to be autoregressive in, and it is a Normal.

    Args:
        latent_dim: Dimension of the latent vector :math:`z`.
        hidden_dims: Widths of the hidden layers of each step's masked network.
        num_flows: Number :math:`T` of steps; at least two are advisable, as the order alternates.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.
        rngs: Source of the initial weights.
        param_dtype: Type of the parameters, JAX's default float if None.

    Raises:
        ValueError: If a width or number is not positive, or the activation is unknown.

    References:
        Papamakarios, Pavlakou and Murray, 2017, *Masked Autoregressive Flow for Density
        Estimation*, arXiv:1705.07057, sec. 3.1. Chen et al., 2017, *Variational Lossy
        Autoencoder*, arXiv:1611.02731, sec. 3.2 (as the prior of a VAE).

    Example:
        >>> import numpyro
        >>> from flax import nnx
        >>> prior = FlowPrior(latent_dim=2, hidden_dims=(16,), rngs=nnx.Rngs(0))
        >>> with numpyro.handlers.seed(rng_seed=0), numpyro.plate("data", 7):
        ...     z = numpyro.sample("z", prior())
        >>> z.shape
        (7, 2)
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        hidden_dims: Sequence[int] = (64,),
        num_flows: int = 2,
        activation: str = "elu",
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        self.latent_dim = positive_int("latent_dim", latent_dim)
        num_flows = positive_int("num_flows", num_flows)
        dtype = param_dtype_or_default(param_dtype)
        self.nets = masked_nets(
            latent_dim,
            widths("hidden_dims", hidden_dims),
            num_flows,
            activation=activation,
            rngs=rngs,
            param_dtype=dtype,
        )

    def __call__(self) -> dist.Distribution:
        """The prior as a distribution, ``batch_shape ()`` and ``event_shape (latent_dim,)``."""
        return LawDistribution(_Flow(self))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Flow(Law):
    """The law of one :class:`FlowPrior`."""

    prior: FlowPrior

    @property
    def event_size(self) -> int:
        return self.prior.latent_dim

    def log_prob(self, value: jax.Array) -> jax.Array:
        return log_density(self.prior.nets, value)

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        dtype = self.prior.nets[0].layers[0].bias[...].dtype
        return from_noise(self.prior.nets, jax.random.normal(key, (*shape, self.event_size), dtype))
