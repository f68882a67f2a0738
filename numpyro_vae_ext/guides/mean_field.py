"""The diagonal Normal posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx

from numpyro_vae_ext._checks import one_of, widths
from numpyro_vae_ext.guides._base import DirectFamily, param_dtype_or_default
from numpyro_vae_ext.guides._normal import CarryingNormal
from numpyro_vae_ext.nn._activations import ACTIVATIONS
from numpyro_vae_ext.nn._scales import head_bounded

_glorot = jax.nn.initializers.glorot_uniform()
# Of Glorot's scale. A location that starts smaller still leaves fewer units of a VAE active.
_LOC_START, _LOG_SCALE_START = 0.3, 0.1


def _scaled_glorot(scale: float) -> Callable[..., jax.Array]:
    return lambda key, shape, dtype=None: scale * _glorot(key, tuple(shape), dtype)


class MeanField(DirectFamily):
    r"""The diagonal Normal posterior, with heads for its location and log-scale.

    .. math::
        q(z \mid c) = \mathcal N\bigl(z;\, \mu(h), \operatorname{diag} \sigma(h)^2\bigr),
        \qquad \mu(h) = W_\mu h + b_\mu, \quad \log \sigma(h) = \rho(W_\sigma h) + b_\sigma

    where :math:`h` is the context :math:`c` after the hidden layers and
    :math:`\rho(x) = 3 x / \sqrt{9 + x^2}`: a context, however large, moves the scale by
    :math:`e^{\pm 3}` at most. The heads start at .3 and .1 of Glorot's scale. Without a context,
    :math:`\mu` and :math:`\log \sigma` are free parameters that start at 0.

    Args:
        latent_dim: width of the latent variable.
        context_dim: width of the context, or None for a global posterior.
        hidden_dims: widths of hidden layers between the context and the heads; none by default.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``, for the hidden layers.
        rngs: source of the initial weights.
        param_dtype: type of the parameters, JAX's default float if None.

    Raises:
        ValueError: if a width is below 1, the activation is unknown, or hidden layers are asked
            for without a context; at the call, if the context has the wrong width or holds NaN.
        TypeError: at the call, if the context is not floating-point.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes, arXiv 1312.6114, eq. 9.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro
        >>> from flax import nnx
        >>> posterior = MeanField(2, context_dim=4, rngs=nnx.Rngs(0))
        >>> with numpyro.handlers.seed(rng_seed=0), numpyro.plate("data", 5):
        ...     z = posterior("z", jnp.ones((5, 4)))
        >>> z.shape, posterior.log_prob(z, jnp.ones((5, 4))).shape
        ((5, 2), (5,))
    """

    # Heads on the context, or free parameters without one.
    loc: Any
    log_scale: Any

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        *,
        hidden_dims: Sequence[int] = (),
        activation: str = "elu",
        rngs: nnx.Rngs | None = None,
        param_dtype: Any = None,
    ) -> None:
        super().__init__(latent_dim, context_dim)
        hidden_dims = widths("hidden_dims", hidden_dims)
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))
        dtype = param_dtype_or_default(param_dtype)
        if context_dim is None:
            if hidden_dims:
                raise ValueError(f"Expected hidden_dims=() without a context; got {hidden_dims}.")
            self.loc = nnx.Param(jnp.zeros((latent_dim,), dtype))
            self.log_scale = nnx.Param(jnp.zeros((latent_dim,), dtype))
            return
        if rngs is None:
            raise TypeError("Expected rngs for a family with a context; got None.")
        self.trunk = nnx.List(
            nnx.Linear(fan_in, fan_out, kernel_init=_glorot, param_dtype=dtype, rngs=rngs)
            for fan_in, fan_out in zip((context_dim, *hidden_dims), hidden_dims, strict=False)
        )
        width = (context_dim, *hidden_dims)[-1]
        self.loc, self.log_scale = (
            nnx.Linear(
                width,
                latent_dim,
                kernel_init=_scaled_glorot(scale),
                param_dtype=dtype,
                rngs=rngs,
            )
            for scale in (_LOC_START, _LOG_SCALE_START)
        )

    def loc_and_log_scale(self, context: Any = None) -> tuple[jax.Array, jax.Array]:
        """Location and logarithm of the standard deviation, each ``(*batch, latent_dim)``."""
        if context is None:
            return self.loc[...], self.log_scale[...]
        activate, _ = ACTIVATIONS[self.activation]
        for layer in self.trunk:
            context = activate(layer(context))
        moved = head_bounded(context @ self.log_scale.kernel[...])
        return self.loc(context), moved + self.log_scale.bias[...]

    def distribution(self, context: Any = None) -> dist.Distribution:
        """The Normal given ``context``, with ``event_dim`` 1."""
        return CarryingNormal(*self.loc_and_log_scale(context)).to_event(1)
