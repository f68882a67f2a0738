"""Log-weights of many draws, chunk by chunk: memory is that of one chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax import lax, random
from tqdm.auto import tqdm

from numpyro_vae_ext import _trace
from numpyro_vae_ext._checks import positive_int


class Weigher:
    """Draws from a guide and weighs the draws.

    Attributes:
        layout: Shape, type and plates of one draw's weights.
    """

    def __init__(
        self,
        rng_key: jax.Array,
        params: dict[str, Any],
        pair: _trace.Pair,
        num_samples: int,
        chunk_size: int | None,
    ) -> None:
        self.num_samples = positive_int("num_samples", num_samples)
        most, side_by_side = _trace.chunk_sizes(rng_key, params, pair)
        most = most if chunk_size is None else positive_int("chunk_size", chunk_size)
        self.size = size = min(num_samples, most)
        self.layout = _trace.layout(rng_key, params, pair)
        self._keys, self._params = random.split(rng_key, -(-num_samples // size) * size), params
        plate_key = _trace.shared_key(rng_key)

        def many(pair: _trace.Pair, params: Any, keys: jax.Array) -> jax.Array:
            def run(key: jax.Array) -> jax.Array:
                return _trace.run(key, plate_key, params, pair).value

            return lax.map(run, keys, batch_size=min(size, side_by_side))

        self._many = _trace.compiled(many, pair)

    def chunks(self, name: str, progress_bar: bool) -> Iterator[jax.Array]:
        """Log-weights ``(chunk_size, *common_plates)``, the last of them fewer."""
        starts = range(0, self.num_samples, self.size)
        for start in tqdm(starts, desc=name, disable=not progress_bar or len(starts) < 2):
            # The last chunk is run as long as the others, so that there is one program.
            runs = self._many(self._params, self._keys[start : start + self.size])
            yield runs[: self.num_samples - start]
