"""The contract of a guide family.

A family is an :class:`flax.nnx.Module`, built eagerly with ``rngs=`` and near the identity, and
registered as users register their own encoders, with ``nnx_module("posterior", family)``. It is
called as a statement inside the guide, ``z = family("z", context)``: it runs the sample statement
in the plates that surround it and returns ``z`` of shape ``(*batch, latent_dim)``. The context has
shape ``(*batch, context_dim)``; families built with ``context_dim=None`` are global posteriors and
take none. All state is parameters, so a family needs no mutable site.

A family with a density of its own is a :class:`DirectFamily` and overrides
:meth:`DirectFamily.distribution` alone. A hierarchical family writes its statement, which samples
auxiliary sites and adds its reverse model as a factor, and estimates its density.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx

from numpyro_vae_ext._checks import check_context, positive_int


def param_dtype_or_default(param_dtype: Any) -> Any:
    """``param_dtype``, or JAX's default float where it is None."""
    return jnp.result_type(float) if param_dtype is None else param_dtype


class GuideFamily(nnx.Module):
    """Base of the guide families; see the module's docstring for the contract.

    Attributes:
        latent_dim: width of the latent variable.
        context_dim: width of the context, or None for a global posterior.
    """

    def __init__(self, latent_dim: int, context_dim: int | None) -> None:
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.context_dim = None if context_dim is None else positive_int("context_dim", context_dim)

    @abstractmethod
    def _sample(self, name: str, context: Any, infer: Any) -> jax.Array:
        """The statement of :meth:`__call__`, the context checked."""

    @abstractmethod
    def _log_prob(
        self, value: jax.Array, context: Any, num_samples: int, rng_key: jax.Array | None
    ) -> jax.Array:
        """The log-density of :meth:`log_prob`, the arguments checked."""

    def __call__(
        self,
        name: str,
        context: Any = None,
        *,
        infer: Any = None,
        value: Any = None,
        num_samples: int = 100,
        rng_key: jax.Array | None = None,
    ) -> jax.Array:
        """Sample the site ``name``; a statement for the body of a guide.

        With a ``value`` it is no statement: nothing is sampled, and :meth:`log_prob` of the value
        is returned: so a model uses the density, as :class:`~numpyro_vae_ext.priors.VampPrior`
        does. What ``nnx_module`` returns can be called and has no methods.

        Args:
            name: Name of the latent site.
            context: ``(*batch, context_dim)``, or None for a family without a context.
            infer: Instructions of the site, as the host's ``sample`` takes them.
            value: If given, ``(*batch, latent_dim)``, what to score instead of sampling.
            num_samples: Samples behind the score of a family whose density is an integral.
            rng_key: Key of these samples; by default that of the surrounding ``seed`` handler.

        Returns:
            The value, of shape ``(*batch, latent_dim)``, ``batch`` widened by the plates; the
            log-density ``(*batch,)`` of a given value.

        Raises:
            ValueError: If the context is missing, unexpected, of another width, or NaN; with a
                value, what :meth:`log_prob` raises.
            TypeError: If the context is not of a floating-point type.
        """
        if value is not None:
            return self.log_prob(value, context, num_samples=num_samples, rng_key=rng_key)
        return self._sample(name, self._checked(context, f" at site '{name}'"), infer)

    def log_prob(
        self,
        value: Any,
        context: Any = None,
        *,
        num_samples: int = 100,
        rng_key: jax.Array | None = None,
    ) -> jax.Array:
        r"""Log-density :math:`\log q(z \mid c)` of any ``value``, not only of the family's own.

        Args:
            value: ``(*batch, latent_dim)``.
            context: ``(*batch, context_dim)``, or None for a family without a context.
            num_samples: Samples behind the estimate of a family whose density is an integral;
                families with a density of their own give it exactly.
            rng_key: Key of these samples; by default that of the surrounding ``seed`` handler.

        Returns:
            ``(*batch,)``, differentiable once in the value, the context and the parameters.

        Raises:
            ValueError: If the value or the context has another width, a number is below 1, or
                there is no key where one is needed.
            TypeError: If the context is not of a floating-point type.
        """
        context = self._checked(context, " at log_prob")
        if jnp.shape(value)[-1:] != (self.latent_dim,):
            raise ValueError(
                f"Expected values of width {self.latent_dim} at log_prob; "
                f"got shape {jnp.shape(value)}."
            )
        num_samples = positive_int("num_samples", num_samples)
        return self._log_prob(jnp.asarray(value), context, num_samples, rng_key)

    def _checked(self, context: Any, where: str) -> jax.Array | None:
        return check_context(context, self.context_dim, where)


class DirectFamily(GuideFamily):
    """Base of the families with a density of their own; a member defines :meth:`distribution`."""

    @abstractmethod
    def distribution(self, context: Any = None) -> dist.Distribution:
        """The posterior given ``context``, as a distribution over vectors.

        Args:
            context: ``(*batch, context_dim)``, or None for a family without a context.

        Returns:
            A distribution with ``batch_shape == batch`` and ``event_shape == (latent_dim,)``.
        """

    def _sample(self, name: str, context: Any, infer: Any) -> jax.Array:
        return numpyro.sample(name, self.distribution(context), infer=infer)

    def _log_prob(
        self, value: jax.Array, context: Any, num_samples: int, rng_key: jax.Array | None
    ) -> jax.Array:
        return self.distribution(context).log_prob(value)
