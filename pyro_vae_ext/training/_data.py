"""Batches of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pyro_vae_ext._checks import positive_int


class Batch(NamedTuple):
    """Arguments of one step, and the number of their rows."""

    args: tuple
    kwargs: dict[str, Any]
    rows: int


class Arrays:
    """Batches out of arrays with one leading dimension; a shuffle depends on its epoch alone."""

    def __init__(
        self, data: Any, batch_size: int | None, *, shuffle: bool, drop_last: bool
    ) -> None:
        self.data = tree_map(_tensor, data)
        leaves = tree_flatten(self.data)[0]
        sizes = [len(leaf) if leaf.dim() else None for leaf in leaves]
        if not sizes or None in sizes or len(set(sizes)) > 1:
            raise ValueError(f"Expected arrays with one leading dimension; got {sizes}.")
        self.num_rows: int | None = len(leaves[0])
        if self.num_rows == 0:
            raise ValueError("Expected data with at least one row; got none.")
        self.device = leaves[0].device
        self.batch_size = batch_size
        # Of all rows at once, the order does not matter.
        self.shuffle = shuffle and batch_size is not None
        size = self.num_rows if batch_size is None else batch_size
        if drop_last and size > self.num_rows:
            raise ValueError(
                f"Expected drop_last=False with fewer rows than batch_size; got {self.num_rows} "
                f"rows for batch_size={batch_size}."
            )
        starts = range(0, self.num_rows, size)
        self._bounds = [(start, min(start + size, self.num_rows)) for start in starts]
        ragged = self.num_rows % size
        if ragged and drop_last:
            self._bounds.pop()
        self.num_steps: int | None = len(self._bounds)

    def examples(self) -> list[Batch]:
        """A batch of each size."""
        sizes = dict.fromkeys(stop - start for start, stop in self._bounds)
        return [self._batch(slice(0, size), size) for size in sizes]

    def epoch(self, seed: int, epoch: int, position: int) -> Iterator[Batch]:
        """Batches of an epoch, from a position on."""
        order = None
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
            # On the CPU, whatever the device: there the shuffle is the same everywhere.
            order = torch.randperm(int(self.num_rows or 0), generator=generator, device="cpu")
            order = order.to(self.device)
        for start, stop in self._bounds[position:]:
            yield self._batch(slice(start, stop), stop - start, order)

    def _batch(self, rows: slice, size: int, order: Tensor | None = None) -> Batch:
        if size == self.num_rows and order is None:
            return _arguments(self.data, size)
        if order is None:
            return _arguments(tree_map(lambda leaf: leaf[rows], self.data), size)
        index = order[rows]
        return _arguments(tree_map(lambda leaf: leaf.index_select(0, index), self.data), size)

    def generators(self) -> list[torch.Generator]:
        """Generators besides the global ones that the order depends on."""
        return []


class Stream:
    """Batches out of something that can be iterated again each epoch."""

    num_rows: int | None = None
    batch_size: int | None = None
    shuffle = False

    def __init__(self, data: Any) -> None:
        self.data = data
        self.num_steps: int | None = len(data) if hasattr(data, "__len__") else None

    def examples(self) -> list[Batch]:
        """The first batch."""
        first = next(self.epoch(0, 0, 0), None)
        if first is None:
            raise ValueError("Expected data with at least one row; got none.")
        return [first]

    def epoch(self, seed: int, epoch: int, position: int) -> Iterator[Batch]:
        """Batches of an epoch, from a position on: those before it are drawn and thrown away."""
        for place, batch in enumerate(self.data):
            if place < position:
                continue
            batch = tree_map(lambda leaf: _tensor(leaf) if hasattr(leaf, "shape") else leaf, batch)
            leaves = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
            rows = next((len(leaf) for leaf in leaves if leaf.dim()), None)
            if rows is None:
                sizes = [tuple(leaf.shape) for leaf in leaves]
                raise ValueError(f"Expected arrays with one leading dimension; got {sizes}.")
            if rows:
                yield _arguments(batch, rows)

    def generators(self) -> list[torch.Generator]:
        """Generators besides the global ones that the order depends on."""
        sampler = getattr(self.data, "sampler", None)
        owners = (self.data, sampler, getattr(self.data, "batch_sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        # In order, and each of them once.
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


Source = Arrays | Stream


def is_stream(data: Any) -> bool:
    """Whether data come as batches: a list does if there are containers in it."""
    if isinstance(data, list):
        return any(isinstance(x, list | tuple | dict) for x in data)
    return not hasattr(data, "shape") and not isinstance(data, tuple | dict)


def source(data: Any, batch_size: int | None, *, shuffle: bool, drop_last: bool) -> Source:
    """Batches out of what ``fit`` takes as data."""
    if hasattr(data, "__next__"):
        raise ValueError(
            "Expected data that can be iterated again each epoch; got a generator. Pass a list, a "
            "DataLoader, or arrays."
        )
    if batch_size is not None:
        positive_int("batch_size", batch_size)
    if not is_stream(data):
        return Arrays(data, batch_size, shuffle=shuffle, drop_last=drop_last)
    if not hasattr(data, "__iter__"):
        raise TypeError(
            f"Expected arrays with one leading dimension; got {type(data).__name__}. Pass arrays, "
            "or an iterable of batches."
        )
    if batch_size is not None:
        raise ValueError(f"Expected batch_size=None with an iterable of batches; got {batch_size}.")
    return Stream(data)


def is_finite(batch: Batch) -> bool:
    """Whether all numbers of a batch are finite."""
    leaves = tree_flatten((batch.args, batch.kwargs))[0]
    return all(bool(torch.isfinite(leaf).all()) for leaf in leaves if isinstance(leaf, Tensor))


def device(batch: Batch) -> torch.device | None:
    """Where a batch lies."""
    leaves = tree_flatten((batch.args, batch.kwargs))[0]
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), None)


def _arguments(data: Any, rows: int) -> Batch:
    if isinstance(data, dict):
        return Batch((), data, rows)
    return Batch(tuple(data) if isinstance(data, list | tuple) else (data,), {}, rows)


def _tensor(leaf: Any) -> Tensor:
    """An array as a tensor; NumPy's default of float64 becomes the default of torch."""
    if isinstance(leaf, Tensor):
        return leaf
    array = np.asarray(leaf)
    if array.dtype == np.float64:
        return torch.as_tensor(array, dtype=torch.get_default_dtype())
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"Expected arrays with one leading dimension; got {type(leaf).__name__}. Pass arrays, "
            "or an iterable of batches."
        )
    return torch.as_tensor(array)
