"""The contract of an objective, written once.

A subclass of the host's ``ELBO``, to be passed as ``SVI(..., loss=...)``. The base turns a (model,
guide) pair into ``log_weights`` of shape ``(num_particles, *common_plates)`` and writes the host's
``loss`` and ``loss_with_mutable_state``; a member only says how the particles combine, by
overriding :meth:`LogWeightELBO.bound`.

A plate that encloses every latent and observed site of model and guide is *common*: there is one
weight for each of its rows, its subsample is drawn once for all particles, and its scale is put
back after the particles are combined. ``loss`` is minimised.

With ``num_outer`` groups of particles the loss is the mean of their bounds. Particle ``k`` of group
``m`` is number ``m * num_particles + k`` of all, which run as those of one group do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_vae_ext import _record, _trace
from numpyro_vae_ext._checks import one_of, positive_int
from numpyro_vae_ext._path import with_derivative_of
from numpyro_vae_ext.elbos._host import HostELBO

GRADIENTS = ("reparam", "stl", "dreg", "vimco")


class LogWeightELBO(HostELBO, ABC):
    """Base of the objectives that are a function of per-datum log-weights.

    Args:
        num_particles: number of particles `K` of a group.
        num_outer: number of groups `M`; the loss is the mean of their bounds.
        gradient: ``"reparam"``, ``"stl"``, ``"dreg"`` or ``"vimco"``.
        vectorize_particles: run the particles side by side, or one at a time.
        chunk_size: run this many particles at a time; memory is that of one chunk, in the
            backward pass too, where each chunk is computed again.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        num_outer: int = 1,
        gradient: str = "reparam",
        vectorize_particles: bool = True,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if chunk_size is not None and (not hasattr(chunk_size, "__index__") or chunk_size < 1):
            raise ValueError(f"Expected chunk_size >= 1 or None; got {chunk_size}.")
        self.num_outer = positive_int("num_outer", num_outer)
        self.gradient = one_of("gradient", gradient, GRADIENTS)
        self.chunk_size = chunk_size
        if gradient == "vimco" and num_particles < 2:
            raise ValueError("Expected num_particles >= 2 under gradient='vimco'; got 1.")
        self.can_infer_discrete = gradient == "vimco"

    @abstractmethod
    def bound(self, log_weights: jax.Array) -> jax.Array:
        """The bound of every datum, from log-weights with the particles of a group in front.

        Several groups are like one more plate, ``(num_particles, num_outer, *common_plates)``.
        """

    def log_weights(
        self,
        rng_key: jax.Array,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """The log-weights ``log p(x, z) - log q(z | x)``, unscaled.

        Args:
            rng_key: random key; the particles are those of :meth:`loss` with the same key.
            param_map: constrained parameters (and mutable state), as ``svi.get_params`` gives.
            model: Program of NumPyro primitives.
            guide: Program of NumPyro primitives.
            args: Positional arguments of both.
            kwargs: Keyword arguments of both.

        Returns:
            Array of shape ``(num_particles, *common_plates)``, or ``(num_outer, num_particles,
            *common_plates)`` if there are several groups. Its derivative is the reparameterised
            one, whatever ``gradient`` is.
        """
        pair = _trace.Pair(model, guide, args, kwargs)
        plate_key = _trace.shared_key(rng_key)
        keys = self._keys(rng_key)
        # Discrete values are drawn in a way of their own where they have an estimator.
        gradient = "vimco" if self.gradient == "vimco" else None
        found = self._map(
            lambda key: _trace.run(key, plate_key, param_map, pair, gradient=gradient), keys
        ).value
        if self.num_outer == 1:
            return found
        return found.reshape(self.num_outer, self.num_particles, *found.shape[1:])

    def _loss_and_state(
        self, rng_key: jax.Array, params: dict[str, Any], pair: _trace.Pair
    ) -> tuple[jax.Array, dict[str, Any]]:
        plate_key = _trace.shared_key(rng_key)
        keys = self._keys(rng_key)
        if self.num_particles == 1:
            # Nothing is averaged inside of a logarithm: scales and subsampled plates are as free
            # as in the host's ELBO.
            def draw(key: jax.Array) -> _trace.LogWeights:
                path = self.gradient != "reparam"
                return _trace.run(
                    key, plate_key, params, pair, joint=True, gradient=self.gradient, path=path
                )

            if self.num_outer == 1:
                only = draw(rng_key)
                return -only.value, only.state
            draws = self._map(draw, keys)
            return -jnp.mean(draws.value), _record.merged_state(draws.state)

        def run(key: jax.Array) -> _trace.LogWeights:
            known = lax.stop_gradient(params) if self.gradient == "dreg" else params
            return _trace.run(
                key, plate_key, known, pair, gradient=self.gradient, path=self.gradient == "stl"
            )

        particles = self._map(run, keys)
        log_weights, scale = self._grouped(particles.value), particles.scale[0]

        def mean(bounds: jax.Array) -> jax.Array:
            """Summed over the data, and averaged over the groups in front if there are several."""
            return jnp.sum(scale * bounds) / self.num_outer

        loss = -mean(self.bound(log_weights))
        if self.gradient == "dreg":
            weights = jax.nn.softmax(log_weights, axis=0)
            if self.num_outer > 1:
                weights = jnp.swapaxes(weights, 0, 1).reshape(particles.value.shape)
            surrogate = self._doubly_reparameterised(
                keys, weights, plate_key, params, pair, particles.plates
            )
            loss = with_derivative_of(loss, -mean(surrogate))
        if particles.score is not None:
            signal = lax.stop_gradient(self.bound(log_weights) - left_out(log_weights))
            surrogate = jnp.sum(signal * self._grouped(particles.score), axis=0)
            loss = with_derivative_of(loss, loss - mean(surrogate))
        return loss, _record.merged_state(particles.state)

    def _doubly_reparameterised(
        self,
        keys: jax.Array,
        weights: jax.Array,
        plate_key: jax.Array,
        params: dict[str, Any],
        pair: _trace.Pair,
        plates: _trace.Plates,
    ) -> jax.Array:
        def run(key: jax.Array, weight: jax.Array) -> jax.Array:
            again = _trace.run(
                key,
                plate_key,
                params,
                pair,
                gradient=self.gradient,
                path=True,
                weight=weight,
                plates=plates,
            )
            return weight * again.value

        return self._map(run, keys, weights)

    def _grouped(self, particles: jax.Array) -> jax.Array:
        """``(num_particles, [num_outer], *common_plates)``: groups are like one more plate."""
        if self.num_outer == 1:
            return particles
        shape = (self.num_outer, self.num_particles, *particles.shape[1:])
        return jnp.swapaxes(particles.reshape(shape), 0, 1)

    def _keys(self, rng_key: jax.Array) -> jax.Array:
        count = self.num_outer * self.num_particles
        # One particle uses the key itself, as the host does.
        return rng_key[None] if count == 1 else random.split(rng_key, count)

    def _map(self, fn: Callable[..., Any], *xs: jax.Array) -> Any:
        """``fn`` over the particles in front of ``xs``, side by side, in a loop or in chunks."""

        def run(*xs: jax.Array) -> Any:
            return jax.vmap(fn)(*xs) if self.vectorize_particles else lax.map(lambda x: fn(*x), xs)

        count = xs[0].shape[0]
        size = count if self.chunk_size is None else self.chunk_size
        if size >= count:
            return run(*xs)
        chunks = count // size
        whole = chunks * size
        looped = jax.checkpoint(run, prevent_cse=False)
        out = lax.map(
            lambda x: looped(*x), tuple(x[:whole].reshape(chunks, size, *x.shape[1:]) for x in xs)
        )
        out = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), out)
        if whole == count:
            return out
        rest = jax.checkpoint(run)(*(x[whole:] for x in xs))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)


def left_out(log_weights: jax.Array) -> jax.Array:
    """Log of the mean weight with each weight in turn replaced by the others' geometric mean.

    Sums over the others are made of those before and those after: nothing is subtracted.
    """
    count = log_weights.shape[0]

    def others(cumulated: Any, join: Any, empty: float) -> jax.Array:
        edge = jnp.full_like(log_weights[:1], empty)
        before = jnp.concatenate([edge, cumulated(log_weights, axis=0)[:-1]])
        after = jnp.concatenate([cumulated(log_weights, axis=0, reverse=True)[1:], edge])
        return join(before, after)

    mean = others(lax.cumsum, jnp.add, 0.0) / (count - 1)
    rest = others(lax.cumlogsumexp, jnp.logaddexp, -jnp.inf)
    return jnp.logaddexp(rest, mean) - jnp.log(count)
