"""Log-weights of many draws, chunk by chunk: memory is that of one chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_vae_ext import _trace
from pyro_vae_ext._checks import positive_int


class Weigher:
    """Draws from a guide and weighs the draws; to be used without gradients."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        num_samples: int,
        chunk_size: int | None,
    ) -> None:
        self.num_samples = positive_int("num_samples", num_samples)
        if chunk_size is None:
            chunk_size = _trace.chunk_size(model, guide, args, kwargs)
        self.size = min(num_samples, positive_int("chunk_size", chunk_size))
        self._pair = (model, guide, args, kwargs)
        self._particle_dim = -1 - _trace.plate_nesting(model, guide, args, kwargs)

    def chunks(self, name: str, progress_bar: bool) -> Iterator[_trace.LogWeights]:
        """Log-weights of ``chunk_size`` draws, the last of them fewer."""
        subsamples: dict[str, torch.Tensor] = {}
        starts = range(0, self.num_samples, self.size)
        for start in tqdm(starts, desc=name, disable=not progress_bar or len(starts) < 2):
            yield _trace.run(
                *self._pair,
                num_particles=min(self.size, self.num_samples - start),
                particle_dim=self._particle_dim,
                subsamples=subsamples,
            )
