"""NumPyro's contract of an objective, which every base here shares.

A subclass says what is minimised and what the mutable state is after it; ``loss`` and
``loss_with_mutable_state`` follow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
from numpyro.infer import ELBO

from numpyro_vae_ext import _trace
from numpyro_vae_ext._checks import positive_int


class HostELBO(ELBO, ABC):
    """What NumPyro's SVI calls, from a loss and a state.

    Args:
        num_particles: number of particles `K`.
        vectorize_particles: run the particles side by side, or one at a time.
    """

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True) -> None:
        positive_int("num_particles", num_particles)
        if not isinstance(vectorize_particles, bool):
            raise TypeError(
                "Expected vectorize_particles to be a bool; got "
                f"{type(vectorize_particles).__name__}."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)

    @abstractmethod
    def _loss_and_state(
        self, rng_key: jax.Array, params: dict[str, Any], pair: _trace.Pair
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The loss, and the mutable state after it."""

    def loss(
        self,
        rng_key: jax.Array,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """The negative bound, summed over the data and scaled to the full data."""
        pair = _trace.Pair(model, guide, args, kwargs)
        return self._loss_and_state(rng_key, param_map, pair)[0]

    def loss_with_mutable_state(
        self,
        rng_key: jax.Array,
        param_map: dict[str, Any],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The loss, and the mutable state after it.

        Floating-point state is averaged over the particles; other state is the first particle's.
        """
        pair = _trace.Pair(model, guide, args, kwargs)
        loss, state = self._loss_and_state(rng_key, param_map, pair)
        return {"loss": loss, "mutable_state": state or None}
