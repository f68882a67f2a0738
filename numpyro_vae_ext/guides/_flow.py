"""The distribution of a normalising flow whose forward direction is the cheap one.

Noise is drawn on one line; all the rest is a pure function of noise, context and parameters. A
sampled value carries its log-density as the host's *intermediates*, a :class:`FlowDraw`, so that
nothing is inverted in training. Any other value is scored through :meth:`Transform.inverse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import constraints


class Transform(ABC):
    """A flow at one context: three pure functions in any left batch. A pytree."""

    latent_dim: int
    dtype: Any

    @abstractmethod
    def forward(self, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The value that the noise is sent to, and terms of its log-density by dimension."""

    @abstractmethod
    def inverse(self, value: jax.Array) -> jax.Array:
        """The noise that is sent to a value; needs no derivative."""

    @abstractmethod
    def score(self, noise: jax.Array) -> jax.Array:
        """The derivative of the log-density in the value; needs no derivative itself."""


class FlowDraw(NamedTuple):
    """The noise behind a sampled value, and the terms of its log-density where they are kept."""

    noise: jax.Array
    terms: jax.Array | None

    def path(self) -> FlowDraw:
        """The draw without its log-density, which is then scored at the fixed value."""
        return FlowDraw(self.noise, None)


class FlowDistribution(dist.Distribution):
    r"""The law of :math:`f(\epsilon)` under standard Normal noise.

    ``log_prob(value, draw)`` is the kept log-density. ``log_prob(value)``, which inverts the flow,
    and ``log_prob(value, draw.path())``, which does not, have exact first derivatives in the
    value, the context and the parameters.

    Args:
        transform: The flow :math:`f`.
        batch_shape: The batch, against which the transform's context broadcasts.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    pytree_data_fields = ("transform",)

    def __init__(self, transform: Transform, batch_shape: tuple[int, ...]) -> None:
        self.transform = transform
        super().__init__(tuple(batch_shape), (transform.latent_dim,))

    def expand(self, batch_shape: Any) -> FlowDistribution:
        """The same flow over a wider batch, without the host's wrapper around it."""
        return FlowDistribution(self.transform, tuple(batch_shape))

    def mask(self, mask: Any) -> MaskedFlow:
        """The flow with some rows left out of its log-density."""
        return MaskedFlow(self, mask)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Samples of shape ``(*sample_shape, *batch_shape, latent_dim)``."""
        return self.sample_with_intermediates(key, sample_shape)[0]

    def sample_with_intermediates(
        self, key: jax.Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[jax.Array, FlowDraw]:
        """Samples, and what they carry."""
        noise = jax.random.normal(key, self.shape(sample_shape), self.transform.dtype)
        value, terms = self.transform.forward(noise)
        return value, FlowDraw(noise, terms)

    def log_prob(self, value: jax.Array, intermediates: FlowDraw | None = None) -> jax.Array:
        """Log-density of shape ``(*batch,)``."""
        return self.log_prob_terms(value, intermediates).sum(-1)

    def log_prob_terms(self, value: jax.Array, intermediates: FlowDraw | None = None) -> jax.Array:
        """Numbers ``(*batch, latent_dim)`` that sum to the log-density, one a dimension."""
        if not intermediates:
            batch = jnp.broadcast_shapes(jnp.shape(value)[:-1], self.batch_shape)
            value = jnp.broadcast_to(value, (*batch, *self.event_shape))
            # The solver takes no derivative; `implicit_terms` supplies it.
            transform, target = lax.stop_gradient((self.transform, value))
            return self.implicit_terms(value, transform.inverse(target))
        if intermediates.terms is None:
            return self.implicit_terms(value, intermediates.noise)
        return intermediates.terms

    def implicit_terms(self, value: jax.Array, noise: jax.Array) -> jax.Array:
        r"""Terms of the log-density from the noise sent to ``value``, with exact derivatives.

        With the noise held fixed, :math:`l = \log q(f(\epsilon))` along the forward pass and
        :math:`u = \partial \log q / \partial z` held fixed too, the terms sum to
        :math:`l + u^\top (z - f(\epsilon))`. Its value is :math:`l`, its derivative in
        :math:`z` is :math:`u`, and its derivative in a parameter is
        :math:`\partial l - u^\top \partial f`, which is that of :math:`\log q(z)` at fixed
        :math:`z`. The cost is one forward pass and, where a derivative is taken, one
        :meth:`Transform.score`.

        References:
            Vaitl, Nicoli, Nakajima and Kessel, 2022, arXiv:2206.09016, sec. 3.
        """
        noise = lax.stop_gradient(noise)
        reached, terms = self.transform.forward(noise)
        return terms + _along_score(value - reached, lax.stop_gradient(self.transform), noise)


@jax.custom_jvp
def _along_score(gap: jax.Array, transform: Transform, noise: jax.Array) -> jax.Array:
    """Zeros, whose derivative in ``gap`` is the score: it is computed for a derivative only."""
    # Not `zeros_like`: zeros that stand for no row fail in a vmap inside of a checkpoint.
    return 0 * gap


@_along_score.defjvp
def _along_score_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    gap, transform, noise = primals
    # `transform` and `noise` are constants to every caller, and have no tangents.
    slope = lax.stop_gradient(transform.score(noise))
    return 0 * gap, tangents[0] * slope


class MaskedFlow(dist.MaskedDistribution):
    """A masked flow that keeps its draws, which the host's wrapper drops."""

    def sample_with_intermediates(
        self, key: jax.Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[jax.Array, FlowDraw]:
        """Samples, and what they carry."""
        return self.base_dist.sample_with_intermediates(key, sample_shape)

    def log_prob(self, value: jax.Array, intermediates: FlowDraw | None = None) -> jax.Array:
        """Log-density of shape ``(*batch,)``, 0 where the mask says so."""
        if not intermediates or self._mask is False:
            return super().log_prob(value)
        return jnp.where(self._mask, self.base_dist.log_prob(value, intermediates), 0.0)
