"""A masked autoregressive flow as a prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import lax

from numpyro_vae_ext._checks import positive_int, widths
from numpyro_vae_ext.nn._scales import bounded, log_scale_bound
from numpyro_vae_ext.nn.masked import MaskedMLP
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
        forwards = tuple(range(latent_dim))
        self.nets = nnx.List(
            MaskedMLP(
                latent_dim,
                widths("hidden_dims", hidden_dims),
                2,
                order=forwards if step % 2 == 0 else forwards[::-1],
                activation=activation,
                rngs=rngs,
                param_dtype=dtype,
            )
            for step in range(num_flows)
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
        u, log_density = value, jnp.zeros_like(value)
        for net in self.prior.nets:
            shift, log_scale = self._shift_and_log_scale(net, u)
            u = (u - shift) * jnp.exp(-log_scale)
            log_density = log_density - log_scale
        log_density = log_density - 0.5 * u**2
        return log_density.sum(-1) - 0.5 * self.event_size * math.log(2.0 * math.pi)

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        dtype = self.prior.nets[0].layers[0].bias[...].dtype
        u = jax.random.normal(key, (*shape, self.event_size), dtype)
        for net in reversed(self.prior.nets):
            u = self._sequentially(net, u)
        return u

    def _sequentially(self, net: MaskedMLP, target: jax.Array) -> jax.Array:
        """The inverse of a step, one coordinate after the other."""
        order = jnp.asarray(net.order)

        # The i-th pass sees the coordinates before the i-th, which are final.
        def fill(i: int, u: jax.Array) -> jax.Array:
            shift, log_scale = self._shift_and_log_scale(net, u)
            new = shift + jnp.exp(log_scale) * target
            return jnp.where(jnp.arange(len(order)) == order[i], new, u)

        return lax.fori_loop(0, len(order), fill, jnp.zeros_like(target))

    def _shift_and_log_scale(self, net: MaskedMLP, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = net(u)
        bound = log_scale_bound(len(self.prior.nets))
        return outputs[..., 0, :], bounded(outputs[..., 1, :], bound)
