"""The auxiliary-variable family: a hierarchical guide with a learned reverse model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from numpyro_vae_ext._checks import positive_int, widths
from numpyro_vae_ext.guides._base import GuideFamily, param_dtype_or_default
from numpyro_vae_ext.guides._hierarchy import (
    AUXILIARY,
    built,
    built_direct,
    drawn,
    joined,
    keys_for,
    reverse_factor,
)
from numpyro_vae_ext.guides.mean_field import MeanField

# Correlation at the start of a number and the one that it follows: half of the variance.
_TIE = math.sqrt(0.5)


class Auxiliary(GuideFamily):
    r"""Hierarchical guide :math:`q(z, a \mid c) = q(a \mid c)\, q(z \mid a, c)`.

    The marginal :math:`q(z \mid c) = \int q(a \mid c)\, q(z \mid a, c)\, da` is as rich as the
    parts allow and has no density in closed form. A learned reverse model :math:`r(a \mid z, c)`
    stands in for :math:`q(a \mid z, c)`: the guide's log-density is

    .. math:: \log q(a \mid c) + \log q(z \mid a, c) - \log r(a \mid z, c),

    so that every objective remains a bound, looser than that of :math:`q(z \mid c)` by
    :math:`E\, KL(q(a \mid z, c) \,\|\, r(a \mid z, c))`. The statement has the sites
    ``{name}_aux`` (auxiliary), ``{name}``, and the factor ``{name}_reverse``,
    :math:`-\log r`.

    Where :math:`q(z \mid a, c)` and :math:`r` are the default networks, :math:`z_i` starts with
    half of its variance from :math:`a_i`, and :math:`r` as the exact reverse of that: without a
    correlation to start from, the two parts would wait for one another.

    Each part is a family. A part is given by a function ``(latent_dim, context_dim) -> family``,
    a class such as ``IAF`` or a ``functools.partial`` of one, that takes ``rngs`` and
    ``param_dtype`` as well. Under ``gradient="stl"`` and
    ``"dreg"`` the reverse model keeps all its derivatives, as a part of the model would.

    Args:
        latent_dim: Dimension of the latent vector :math:`z`.
        context_dim: Width of the context, or None for a global posterior.
        aux_dim: Dimension of the auxiliary vector :math:`a`; ``latent_dim`` by default.
        aux_family: Builds :math:`q(a \mid c)`; a mean-field network by default. A hierarchical
            family makes the hierarchy deeper.
        latent_family: Builds :math:`q(z \mid a, c)`, which must have a density of its own; a
            mean-field network by default.
        reverse_family: Builds :math:`r(a \mid z, c)`, likewise.
        hidden_dims: Widths of the hidden layers of the default parts.
        activation: Their activation, ``"elu"``, ``"relu"`` or ``"tanh"``.
        rngs: Source of the initial weights.
        param_dtype: Type of the parameters, JAX's default float if None.

    Raises:
        ValueError: If a width is not positive or the activation is unknown.
        TypeError: If a function builds no family, or one without a density where one is
            needed.

    References:
        Ranganath, Tran and Blei, 2016, *Hierarchical Variational Models*, arXiv:1511.02386,
        eq. 5-7. Maaloe, Sonderby, Sonderby and Winther, 2016, *Auxiliary Deep Generative Models*,
        arXiv:1602.05473, eq. 3-5.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro
        >>> from flax import nnx
        >>> from numpyro_vae_ext.guides import IAF
        >>> posterior = Auxiliary(3, 5, aux_dim=2, reverse_family=IAF, rngs=nnx.Rngs(0))
        >>> with numpyro.handlers.seed(rng_seed=0), numpyro.plate("data", 7):
        ...     z = posterior("z", jnp.zeros((7, 5)))
        ...     log_q = posterior.log_prob(z, jnp.zeros((7, 5)), num_samples=50)
        >>> z.shape, log_q.shape
        ((7, 3), (7,))
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        *,
        aux_dim: int | None = None,
        aux_family: Callable[..., Any] | None = None,
        latent_family: Callable[..., Any] | None = None,
        reverse_family: Callable[..., Any] | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        activation: str = "elu",
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        super().__init__(latent_dim, context_dim)
        self.aux_dim = latent_dim if aux_dim is None else positive_int("aux_dim", aux_dim)
        hidden_dims = widths("hidden_dims", hidden_dims)
        default = partial(MeanField, hidden_dims=hidden_dims, activation=activation)
        # Without a context there is nothing for hidden layers to see.
        first = MeanField if context_dim is None else default
        latent: Any = default
        reverse: Any = default
        if latent_family is None and reverse_family is None:
            # Either is the other's exact reverse at the start.
            tied = partial(_TiedNormal, hidden_dims=hidden_dims, activation=activation)
            latent = partial(tied, num_followed=self.aux_dim)
            reverse = partial(tied, num_followed=latent_dim)
        width = context_dim or 0
        options = (rngs, param_dtype_or_default(param_dtype))
        self.aux = built("aux_family", aux_family or first, self.aux_dim, context_dim, *options)
        self.conditional = built_direct(
            "latent_family", latent_family or latent, latent_dim, self.aux_dim + width, *options
        )
        self.reverse = built_direct(
            "reverse_family", reverse_family or reverse, self.aux_dim, latent_dim + width, *options
        )

    def _sample(self, name: str, context: Any, infer: Any) -> jax.Array:
        auxiliary = self.aux(f"{name}_aux", context, infer=AUXILIARY)
        value = self.conditional(name, joined(auxiliary, context), infer=infer)
        log_reverse = self.reverse.log_prob(auxiliary, joined(value, context))
        reverse_factor(name, log_reverse)
        return value

    def _log_prob(
        self, value: jax.Array, context: Any, num_samples: int, rng_key: jax.Array | None
    ) -> jax.Array:
        r"""Importance sampling: :math:`\log \frac1K \sum_k q(a_k) q(z \mid a_k) / r(a_k \mid z)`.

        Its exponential is an unbiased estimate of :math:`q(z \mid c)`.
        """
        keys = keys_for("Auxiliary", rng_key, 2)
        reverse = self.reverse.distribution(joined(value, context))
        auxiliary, log_reverse = drawn(reverse, keys[0], num_samples)
        log_joint = self.aux.log_prob(auxiliary, context, num_samples=num_samples, rng_key=keys[1])
        log_joint = log_joint + self.conditional.log_prob(value, joined(auxiliary, context))
        log_weights = log_joint - log_reverse
        return jax.nn.logsumexp(log_weights, 0) - math.log(num_samples)


class _TiedNormal(MeanField):
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
        self.tie.kernel[...] = _TIE * jnp.eye(num_followed, latent_dim, dtype=dtype)
        left = jnp.where(jnp.arange(latent_dim) < num_followed, 1 - _TIE**2, 1.0)
        self.log_scale.bias[...] = 0.5 * jnp.log(left).astype(dtype)

    def loc_and_log_scale(self, context: Any = None) -> tuple[jax.Array, jax.Array]:
        """Location and logarithm of the standard deviation, each ``(*batch, latent_dim)``."""
        loc, log_scale = super().loc_and_log_scale(context)
        return loc + self.tie(context[..., : self.num_followed]), log_scale
