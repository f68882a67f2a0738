"""Where batches come from, and the programs that run steps on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.infer.svi import SVIState

from numpyro_vae_ext.training._data import (
    Arrays,
    Batch,
    Chunk,
    HostRandom,
    Iterable,
    num_rows,
    on_device,
    on_host,
    rows_of,
    stacks,
)
from numpyro_vae_ext.training._engine import Engine

CALL = 1000  # steps that one call runs, more or less

Scale = Callable[[SVIState, Batch], float]


class Resident:
    """Arrays that lie on the device: one program runs any steps of any epochs."""

    def __init__(self, engine: Engine, arrays: Arrays, key: jax.Array) -> None:
        self.engine = engine
        self.arrays = arrays
        self.key = key
        self.data = on_device(arrays.batch)
        steps = arrays.steps
        self.period = steps * -(-CALL // steps)
        # An epoch of very many steps is cut as well; its order is then made once for each part.
        self.longest = min(self.period, max(CALL, arrays.rows // 256))
        self.length = self.longest if steps > CALL else self.period

    def chunks(
        self, step: int, next_cut: Callable[[int], int], epoch: int, place: int
    ) -> Iterator[Chunk]:
        """All chunks from a step on, their boundaries a function of the step alone."""
        steps = self.arrays.steps
        while True:
            last = min(next_cut(step), step + self.period - step % self.period)
            if steps > CALL:
                place = step % steps
                last = min(last, step - place + (place // self.longest + 1) * self.longest)
            ends = range((step // steps + 1) * steps, last + 1, steps)
            yield Chunk(step, self.arrays.sizes(step, last), tuple(ends))
            step = last

    def warm_up(self, state: SVIState, guarded: bool) -> SVIState:
        """Compile, run no step, and return the state as later calls will have it."""
        none = Chunk(0, np.empty(0, int), ())
        return self.run(state, none, stop=0, guarded=guarded)[0]

    def run(
        self, state: SVIState, chunk: Chunk, *, stop: int, guarded: bool, start: int | None = None
    ) -> tuple[SVIState, jax.Array, jax.Array]:
        """Steps of a chunk; see :meth:`Engine.result`."""
        program = self.engine.program((id(self), guarded), lambda: self._program(guarded))
        first = chunk.first if start is None else start
        return program(state, self.data, self.engine.extras, self.key, first, stop)

    def _program(self, guarded: bool) -> Callable[..., Any]:
        steps, num_full = self.arrays.steps, self.arrays.num_full

        def program(
            state: SVIState, data: Batch, extras: list[Any], key: jax.Array, first: Any, stop: Any
        ) -> Any:
            def epoch(number: Any, carry: Any) -> Any:
                origin = number * steps
                begin, end = jnp.maximum(first - origin, 0), jnp.minimum(stop - origin, steps)
                order = order_of(self.arrays, key, number)

                def loop(size: int, begin: Any, end: Any, carry: Any) -> Any:
                    def pick(i: Any) -> Batch:
                        return _picked(data, order, i * self.arrays.size, size)

                    body = self.engine.steps(pick, extras, first, origin, guarded=guarded)
                    return lax.fori_loop(begin, end, body, carry)

                if num_full:
                    carry = loop(self.arrays.size, begin, jnp.minimum(end, num_full), carry)
                if self.arrays.rest:
                    carry = loop(self.arrays.rest, jnp.maximum(begin, num_full), end, carry)
                return carry

            carry = (state, jnp.zeros(self.length))
            carry = lax.fori_loop(first // steps, (stop + steps - 1) // steps, epoch, carry)
            return self.engine.result(carry)

        return program

    def batch(self, chunk: Chunk, step: int) -> Batch:
        """The batch of a step."""
        epoch, place = divmod(step, self.arrays.steps)
        size = int(self.arrays.sizes(step, step + 1)[0])
        order = order_of(self.arrays, self.key, epoch)
        return _picked(self.data, order, place * self.arrays.size, size)

    def evaluate(self, state: SVIState, step: int, scale: Scale) -> float:
        """The loss per datum, with the same random numbers each time."""
        arrays = self.arrays

        def program(
            state: SVIState, data: Batch, extras: list[Any], key: jax.Array, at: Any
        ) -> Any:
            def loss(i: Any, size: int) -> jax.Array:
                batch = _picked(data, None, i * arrays.size, size)
                rng_key = random.fold_in(key, i)
                return self.engine.evaluation(state, batch, extras, at, rng_key)

            full = lax.map(lambda i: loss(i, arrays.size), jnp.arange(arrays.num_full))
            rest = [loss(arrays.num_full, arrays.rest)] if arrays.rest else []
            return jnp.concatenate([full, jnp.stack(rest)]) if rest else full

        compiled = self.engine.program((id(self), "evaluate"), lambda: program)
        losses = compiled(state, self.data, self.engine.extras, self.key, step)
        rows = arrays.sizes(0, arrays.steps)
        scales = {n: scale(state, rows_of(self.data, slice(n))) for n in set(rows.tolist())}
        return _mean(np.asarray(losses), rows, np.array([scales[n] for n in rows.tolist()]))


class Streamed:
    """Batches that come from the host, in stacks of equal shapes."""

    def __init__(self, engine: Engine, source: Arrays | Iterable, key: jax.Array) -> None:
        self.engine = engine
        self.source = source
        self.key = key
        # Before the present epoch; what an iterable draws is drawn again by who goes on in it.
        self.random: HostRandom | None = None
        if isinstance(source, Arrays):
            self.source = source._replace(batch=on_host(source.batch))
        self._order = jax.jit(lambda key, epoch: order_of(source, key, epoch))

    def chunks(
        self, step: int, next_cut: Callable[[int], int], epoch: int, place: int
    ) -> Iterator[Chunk]:
        """All chunks from a step on, which is the one at ``place`` in its epoch."""
        while True:
            order = None
            if isinstance(self.source, Arrays):
                if self.source.shuffle:
                    order = np.asarray(self._order(self.key, epoch))
            else:
                self.random = HostRandom.read(self.source)
            batches = self.source.batches(order, place)
            start = step
            for chunk in stacks(batches, place, step, self.source.steps, next_cut):
                yield chunk
                step = chunk.last
            if step == start:
                raise ValueError("Expected data with at least one row; got none.")
            epoch, place = epoch + 1, 0

    def warm_up(self, state: SVIState, guarded: bool) -> SVIState:
        """Nothing can be compiled before the first stack is there."""
        return state

    def run(
        self, state: SVIState, chunk: Chunk, *, stop: int, guarded: bool, start: int | None = None
    ) -> tuple[SVIState, jax.Array, jax.Array]:
        """Steps of a chunk; see :meth:`Engine.result`."""
        program = self.engine.program(("stack", guarded), lambda: self._program(guarded))
        first = chunk.first if start is None else start
        return program(state, chunk.stack, self.engine.extras, chunk.first, first, stop)

    def _program(self, guarded: bool) -> Callable[..., Any]:
        def program(
            state: SVIState, stack: Batch, extras: list[Any], origin: Any, first: Any, stop: Any
        ) -> Any:
            def pick(i: Any) -> Batch:
                return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), stack)

            body = self.engine.steps(pick, extras, first, origin, guarded=guarded)
            carry = (state, jnp.zeros(num_rows(stack)))
            carry = lax.fori_loop(first - origin, stop - origin, body, carry)
            return self.engine.result(carry)

        return program

    def batch(self, chunk: Chunk, step: int) -> Batch:
        """The batch of a step."""
        return jax.tree.map(lambda x: x[step - chunk.first], chunk.stack)

    def evaluate(self, state: SVIState, step: int, scale: Scale) -> float:
        """The loss per datum, with the same random numbers each time."""
        random_state = HostRandom.read(self.source)
        program = self.engine.program("evaluate", lambda: self.engine.evaluation)
        losses, rows, scales = [], [], []
        for i, batch in enumerate(self.source.batches(None, 0)):
            rng_key = random.fold_in(self.key, i)
            losses.append(program(state, batch, self.engine.extras, step, rng_key))
            rows.append(num_rows(batch))
            scales.append(scale(state, batch))
        random_state.write(self.source)
        return _mean(np.array([float(x) for x in losses]), np.array(rows), np.array(scales))


def _mean(losses: np.ndarray, rows: np.ndarray, scales: np.ndarray) -> float:
    """The loss per datum over all rows."""
    return float(np.sum(losses.astype(float) / scales) / np.sum(rows))


def order_of(arrays: Any, key: jax.Array, epoch: Any) -> jax.Array | None:
    """The order of the rows in an epoch; None for that of the arrays."""
    if not arrays.shuffle:
        return None
    return random.permutation(random.fold_in(key, epoch), arrays.rows)


def _picked(data: Batch, order: jax.Array | None, start: Any, size: int) -> Batch:
    if size == num_rows(data):
        return data
    if order is None:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), data)
    index = lax.dynamic_slice_in_dim(order, start, size)
    return jax.tree.map(lambda x: x.at[index].get(mode="promise_in_bounds"), data)
