"""Batches: arrays cut into rows, or an iterable that comes with batches of its own."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STACK = 32  # batches that are sent to the device at a time


class Batch(NamedTuple):
    """What a step is called with; arrays, or the same with a dimension of batches in front."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Arrays(NamedTuple):
    """Arrays with one leading dimension, cut into batches.

    Attributes:
        batch: All rows.
        rows: Their number.
        size: Rows of a batch.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether the rest of an epoch, less than a batch, is left out.
    """

    batch: Batch
    rows: int
    size: int
    shuffle: bool
    drop_last: bool

    @property
    def num_full(self) -> int:
        """Batches of an epoch that have all their rows."""
        return self.rows // self.size

    @property
    def rest(self) -> int:
        """Rows of the last batch of an epoch if it has fewer."""
        return 0 if self.drop_last else self.rows % self.size

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.num_full + (self.rest > 0)

    def sizes(self, first: int, last: int) -> np.ndarray:
        """Rows of each step."""
        place = np.arange(first, last) % self.steps
        return np.where(place < self.num_full, self.size, self.rest)

    def head(self) -> Batch:
        """The first rows, as many as a batch has."""
        return rows_of(self.batch, slice(self.size))

    def batches(self, order: np.ndarray | None, start: int) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""
        for place in range(start, self.steps):
            index: Any = slice(place * self.size, (place + 1) * self.size)
            yield rows_of(self.batch, index if order is None else order[index])


class Iterable(NamedTuple):
    """Batches that an iterable gives anew each epoch."""

    source: Any

    @property
    def steps(self) -> int | None:
        """Steps of an epoch, where they are known."""
        return len(self.source) if hasattr(self.source, "__len__") else None

    def head(self) -> Batch:
        """The first batch; no random numbers of the host are used up."""
        state = HostRandom.read(self)
        first = next(self.batches(None, 0), None)
        state.write(self)
        if first is None:
            raise ValueError("Expected data with at least one row; got none.")
        return first

    def batches(self, order: np.ndarray | None, start: int) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""
        for place, batch in enumerate(self.source):
            if place >= start:
                found, rows = _read(batch)
                if rows:
                    yield found


class Chunk(NamedTuple):
    """Steps that one call to the device runs.

    Attributes:
        first: Number of the first step in the whole training.
        rows: Rows of each step.
        ends: Numbers of steps before which an epoch has ended, the last of them included.
        stack: Batches, one behind the other; None where the data lie on the device.
    """

    first: int
    rows: np.ndarray
    ends: tuple[int, ...]
    stack: Batch | None = None

    @property
    def last(self) -> int:
        """Number of the step after the last one."""
        return self.first + len(self.rows)

    def until(self, step: int) -> Chunk:
        """The steps before this one."""
        ends = tuple(end for end in self.ends if end <= step)
        return self._replace(rows=self.rows[: step - self.first], ends=ends)


def is_stream(data: Any) -> bool:
    """Whether data are an iterable of batches; raise if they can be iterated once only."""
    if hasattr(data, "__next__"):
        raise ValueError(
            "Expected data that can be iterated again each epoch; got a generator. Pass a list, a "
            "DataLoader, or arrays."
        )
    # A list with containers in it is one of batches, and one of arrays is that of arguments.
    if isinstance(data, list) and any(isinstance(x, (list, tuple, dict)) for x in data):
        return True
    if hasattr(data, "shape") or isinstance(data, (list, tuple, dict)):
        return False
    if not hasattr(data, "__iter__"):
        raise _no_arrays(data)
    return True


def read(data: Any, batch_size: int | None, *, shuffle: bool, drop_last: bool) -> Arrays | Iterable:
    """Arrays or an iterable, checked."""
    if is_stream(data):
        if batch_size is not None:
            raise ValueError(
                f"Expected batch_size=None with an iterable of batches; got {batch_size}."
            )
        return Iterable(data)
    batch, rows = _read(data)
    if not rows:
        raise ValueError("Expected data with at least one row; got none.")
    size = rows if batch_size is None else batch_size
    if drop_last and rows < size:
        raise ValueError(
            "Expected drop_last=False with fewer rows than batch_size; got "
            f"{rows} rows for batch_size={size}."
        )
    return Arrays(batch, rows, min(size, rows), shuffle and size < rows, drop_last)


def _no_arrays(x: Any) -> TypeError:
    return TypeError(
        f"Expected arrays with one leading dimension; got {type(x).__name__}. Pass arrays, or an "
        "iterable of batches."
    )


def _read(data: Any) -> tuple[Batch, int]:
    """Data as the arguments of a step, and the number of rows."""
    data = jax.tree.map(_as_array, data)
    leaves = jax.tree.leaves(data)
    sizes = [len(leaf) if leaf.ndim else None for leaf in leaves]
    if not sizes or None in sizes or len(set(sizes)) > 1:
        raise ValueError(f"Expected arrays with one leading dimension; got {sizes}.")
    if isinstance(data, dict):
        return Batch((), data), len(leaves[0])
    return Batch(tuple(data) if isinstance(data, (list, tuple)) else (data,), {}), len(leaves[0])


def _as_array(x: Any) -> Any:
    """Arrays of JAX as they are; of NumPy and of torch, which is not imported, as NumPy's."""
    if isinstance(x, jax.Array):
        return x
    x = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    if x.dtype.kind not in "biufc":
        raise _no_arrays(x)
    # What JAX makes of it: no 64-bit numbers are kept and sent only to be cut there.
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def num_rows(batch: Batch) -> int:
    """Rows of a batch."""
    return jax.tree.leaves(batch)[0].shape[0]


def rows_of(batch: Batch, index: Any) -> Batch:
    """Some rows of all arrays."""
    return jax.tree.map(lambda x: x[index], batch)


def on_host(batch: Batch) -> Batch:
    """NumPy's arrays: nothing is left on the device."""
    return jax.tree.map(np.asarray, batch)


def on_device(batch: Batch) -> Batch:
    """JAX's arrays."""
    return jax.tree.map(jnp.asarray, batch)


def is_finite(batch: Batch) -> bool:
    """Whether all numbers are."""
    return all(np.isfinite(x).all() for x in map(np.asarray, jax.tree.leaves(batch)))


def _signature(batch: Batch) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, [(x.shape, x.dtype) for x in leaves]


def stacks(
    batches: Iterator[Batch],
    start: int,
    first: int,
    steps: int | None,
    next_cut: Callable[[int], int],
) -> Iterator[Chunk]:
    """Batches of equal shapes, stacked; boundaries are a function of the step alone.

    Args:
        batches: Those of an epoch.
        start: Number of the first of them in the epoch.
        first: Its number in the whole training.
        steps: Batches of an epoch if it is known.
        next_cut: The next step before which a stack has to end.
    """
    # A stack of several batches has one length, however many there are: nothing is recompiled.
    length = STACK if steps is None else min(STACK, steps)
    offset = first - start
    group: list[Batch] = []
    end = -1

    def stacked(last: bool) -> Chunk:
        padded = group + group[:1] * (length - len(group) if len(group) > 1 else 0)
        rows = np.full(len(group), num_rows(group[0]))
        stack = jax.tree.map(lambda *x: np.stack(x), *padded)
        return Chunk(first, rows, (first + len(group),) if last else (), stack)

    for batch in batches:
        batch = on_host(batch)
        if group and (first + len(group) == end or _signature(batch) != _signature(group[0])):
            yield stacked(last=False)
            first += len(group)
            group = []
        if not group:
            end = min(next_cut(first), offset + ((first - offset) // STACK + 1) * STACK)
        group.append(batch)
    if group:
        yield stacked(last=True)


class HostRandom(NamedTuple):
    """States of the random numbers that an iterable may draw from: Python's, NumPy's, torch's.

    Attributes:
        values: What a JSON file can hold.
        arrays: The rest, by name.
    """

    values: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, source: Arrays | Iterable) -> HostRandom:
        """The present states; of torch only if it has been imported."""
        version, words, gauss = random.getstate()
        name, key, *numbers = np.random.get_state(legacy=True)
        arrays = {"numpy": np.asarray(key)}
        for label, generator in _generators(source):
            arrays[label] = np.asarray(generator.get_state())
        return cls({"python": [version, list(words), gauss], "numpy": [name, *numbers]}, arrays)

    def write(self, source: Arrays | Iterable) -> None:
        """Make these the present states."""
        version, words, gauss = self.values["python"]
        random.setstate((version, tuple(words), gauss))
        name, *numbers = self.values["numpy"]
        np.random.set_state((name, self.arrays["numpy"], *numbers))
        for label, generator in _generators(source):
            if label in self.arrays:
                state = sys.modules["torch"].from_numpy(np.array(self.arrays[label]))
                generator.set_state(state)


def _generators(source: Any) -> list[tuple[str, Any]]:
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    found = [("torch", torch.default_generator)]
    loader = getattr(source, "source", None)
    for label, owner in (("loader", loader), ("sampler", getattr(loader, "sampler", None))):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found.append((label, generator))
    return found
