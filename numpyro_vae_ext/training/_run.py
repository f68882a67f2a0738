"""The loop over epochs and steps: where a training is, and what it goes on from."""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import random
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from numpyro_vae_ext.training import _data, _file
from numpyro_vae_ext.training._engine import RATE, Engine, has_rate
from numpyro_vae_ext.training._feeds import Resident, Streamed
from numpyro_vae_ext.training.history import History, Skipped

SECONDS = 10.0  # between two checkpoints that nobody has asked for at a step


class Options(NamedTuple):
    """Arguments of ``fit``, checked."""

    num_epochs: int
    validation_every: int
    patience: int | None
    min_delta: float
    callbacks: tuple[Callable[..., Any], ...]
    max_skipped: int
    path: str | os.PathLike[str] | None
    every: int | None
    resident: bool


class Run:
    """A training: where it is, and what it has seen."""

    def __init__(
        self,
        rng_key: jax.Array,
        engine: Engine,
        source: _data.Arrays | _data.Iterable,
        validation: _data.Arrays | _data.Iterable | None,
        options: Options,
    ) -> None:
        self.rng_key, self.engine, self.options = rng_key, engine, options
        self.source, self.validation = source, validation
        self.history = History()
        self.best: SVIState | None = None
        # What a checkpoint keeps beside states and history; sums are those of the present epoch.
        self.now: dict[str, Any] = {"step": 0, "epoch": 0, "place": 0, "guarded": None}
        self.now |= {"loss": 0.0, "rows": 0, "seen": 0, "seconds": 0.0}
        self.now |= {"best_loss": math.inf, "waited": 0}
        self.scales: dict[tuple[bool, int], float] = {}
        self.warned = False
        self.host: _data.HostRandom | None = None
        self.shown: dict[str, str] = {}
        self.saved_at = time.monotonic()

    # --- before the first step -----------------------------------------------------------

    def start(self, init_state: SVIState | None, *, resume: bool) -> None:
        """The state and the data, checked."""
        svi, path = self.engine.svi, self.options.path
        head = _data.on_device(self.source.head())
        state = init_state
        if state is None or svi.constrain_fn is None:
            state = self.engine.init(self.rng_key, head)
            state = state if init_state is None else init_state
        if RATE in self.engine.schedules and not has_rate(state.optim_state):
            kind = type(svi.optim).__name__
            raise ValueError(
                f"Expected an optimiser with the hyperparameter '{RATE}' to schedule; got "
                f"{'an optax transformation' if kind == '_NumPyroOptim' else kind}. Build it by "
                "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)."
            )
        if path is not None and resume and _file.exists(path):
            state = self._load(path, state)
        if _data.is_finite(head):
            self.engine.check(state, head, self.now["step"])
        self.feed = self._feed(self.source, b"order")
        if isinstance(self.source, _data.Arrays):
            for size in (self.source.size, self.source.rest):
                if size:
                    self._scale(state, _data.rows_of(self.source.batch, slice(size)))
        self.other = None if self.validation is None else self._feed(self.validation, b"validation")
        if self.now["guarded"] is None:
            self.now["guarded"] = self.engine.hides(state)
        self.state = self.feed.warm_up(state, self.now["guarded"])

    def _feed(self, source: _data.Arrays | _data.Iterable, purpose: bytes) -> Resident | Streamed:
        key = random.fold_in(self.rng_key, zlib.crc32(purpose))
        if self.options.resident and isinstance(source, _data.Arrays):
            return Resident(self.engine, source, key)
        return Streamed(self.engine, source, key)

    def _scale(self, state: SVIState, batch: _data.Batch, other: bool = False) -> float:
        """The scale of the observed sites for the rows of a batch."""
        rows = _data.num_rows(batch)
        if (other, rows) not in self.scales:
            scale, name = self.engine.scale(state, batch)
            for (is_other, first), known in self.scales.items():
                if not (other or is_other) and scale > 1 and math.isclose(scale, known):
                    raise ValueError(
                        f"Expected the scale of site '{name}' to follow the rows of a batch; got "
                        f'{scale:g} for {first} rows and for {rows}. Write plate("data", N, '
                        "subsample_size=len(x)), or pass drop_last=True."
                    )
            self.scales[other, rows] = scale
        return self.scales[other, rows]

    # --- steps ---------------------------------------------------------------------------

    def train(self, *, progress_bar: bool) -> None:
        """All that is left of the training."""
        options, now, steps = self.options, self.now, self.source.steps
        history = self.history
        if history.stopped == "patience" and now["waited"] < (options.patience or math.inf):
            history.stopped = None
        if history.stopped in (None, "num_epochs"):
            history.stopped = "num_epochs" if now["epoch"] >= options.num_epochs else None
        if history.stopped is not None:
            return
        total = None if steps is None else steps * options.num_epochs
        if self.host is not None:
            self.host.write(self.source)
        with tqdm(total=total, initial=now["step"], disable=not progress_bar, desc="fit") as bar:
            chunks = self.feed.chunks(now["step"], self._next_cut, now["epoch"], now["place"])
            while history.stopped is None:
                chunk = next(chunks)
                self._advance(chunk)
                if chunk.ends and chunk.ends[-1] == chunk.last:
                    self._call_back()
                bar.set_postfix(self.shown, refresh=False)
                bar.update(now["step"] - bar.n)
                if history.stopped is None and now["epoch"] >= options.num_epochs:
                    history.stopped = "num_epochs"
                self._save_if_due()

    def _next_cut(self, step: int) -> int:
        """The next step before which a call has to end; it depends on the step alone."""
        options, every = self.options, []
        if options.path is not None and options.every is not None:
            every.append(options.every)
        if isinstance(self.source, _data.Arrays):
            epochs = [options.num_epochs]
            epochs += [options.validation_every] if self.validation is not None else []
            epochs += [1] if options.callbacks else []
            every += [count * self.source.steps for count in epochs]
        return min(((step // count + 1) * count for count in every), default=2**31 - 1)

    def _advance(self, chunk: _data.Chunk) -> None:
        """Run the steps of a chunk and record them."""
        now, start = self.now, time.perf_counter()
        run = functools.partial(self.feed.run, self.state, chunk, stop=chunk.last)
        state, losses, fine = run(guarded=now["guarded"])
        if not (fine or now["guarded"]):
            # From the same start, and with the whole guard from now on.
            now["guarded"] = True
            state, losses, _ = run(guarded=True)
        values = np.asarray(losses, float)[: len(chunk.rows)]
        seconds = time.perf_counter() - start
        error = None
        if np.isnan(values).any():
            stop, error = self._name_skipped(chunk, np.isnan(values))
            if stop is not None:
                state, chunk = stop[0], chunk.until(stop[1])
        self.state = state
        if len(chunk.rows):
            self._record(chunk, values[: len(chunk.rows)], seconds)
        if error is not None:
            self._save()
            raise error

    def _name_skipped(
        self, chunk: _data.Chunk, skipped: np.ndarray
    ) -> tuple[tuple[SVIState, int] | None, FloatingPointError | None]:
        """Find out why steps were skipped.

        Returns:
            Where the training ends, and the error that ends it, if those steps are too many.
        """
        state, at, limit = self.state, chunk.first, self.options.max_skipped
        run = functools.partial(self.feed.run, guarded=self.now["guarded"])
        for step in (chunk.first + np.flatnonzero(skipped)).tolist():
            state, _, _ = run(state, chunk, start=at, stop=step)
            at = step
            site, reason = self.engine.blame(state, self.feed.batch(chunk, step), step)
            where = "" if site is None else f" at site '{site}'"
            count = len(self.history.skipped) + 1
            if count > limit:
                return (state, step), FloatingPointError(
                    f"Expected at most {limit} steps with a non-finite loss or gradient; got "
                    f"{count}, the last{where} ({reason}). The parameters and the last "
                    "checkpoint are those of the last finite step."
                )
            epoch = self.now["epoch"] + sum(end <= step for end in chunk.ends)
            self.history.skipped.append(Skipped(epoch, step, site, reason))
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"Skipped step {step} (epoch {epoch}): non-finite {reason}{where}. "
                    "It changed nothing; further ones are in the history, without a warning.",
                    UserWarning,
                    stacklevel=5,
                )
        return None, None

    def _record(self, chunk: _data.Chunk, losses: np.ndarray, seconds: float) -> None:
        """Losses per datum of all steps, and the epochs that end among them."""
        now, data = self.now, np.empty(len(chunk.rows))
        for rows in dict.fromkeys(chunk.rows.tolist()):
            here = chunk.rows == rows
            if (False, rows) not in self.scales:
                place = chunk.first + int(np.argmax(here))
                self._scale(self.state, self.feed.batch(chunk, place))
            data[here] = rows * self.scales[False, rows]
        values = losses / data
        self.history.add_steps(values)
        kept = ~np.isnan(values)
        self.shown = {"loss": f"{values[kept].mean() if kept.any() else math.nan:.4g}"}
        self.shown["samples/s"] = f"{chunk.rows.sum() / seconds:.3g}"
        if self.history.skipped:
            self.shown["skipped"] = str(len(self.history.skipped))
        bounds = sorted({chunk.first, *chunk.ends, chunk.last})
        for a, b in itertools.pairwise(bounds):
            part = slice(a - chunk.first, b - chunk.first)
            rows, fine = chunk.rows[part], kept[part]
            now["loss"] += float(np.sum((values[part] * rows)[fine]))
            now["rows"] += int(np.sum(rows[fine]))
            now["seen"] += int(np.sum(rows))
            now["seconds"] += seconds * (b - a) / len(values)
            now["step"], now["place"] = b, now["place"] + b - a
            if b in chunk.ends:
                self._end_epoch()

    def _end_epoch(self) -> None:
        now, options, loss = self.now, self.options, math.nan
        if self.other is not None and (now["epoch"] + 1) % options.validation_every == 0:
            loss = self._validate(self.other)
        self.history.add_epoch(
            now["loss"] / now["rows"] if now["rows"] else math.nan,
            validation_loss=loss,
            samples_per_second=now["seen"] / max(now["seconds"], 1e-9),
        )
        now |= {"epoch": now["epoch"] + 1, "place": 0}
        now |= {"loss": 0.0, "rows": 0, "seen": 0, "seconds": 0.0}

    def _validate(self, other: Resident | Streamed) -> float:
        """The validation loss of this epoch, and what follows from it."""
        now, options = self.now, self.options
        loss = other.evaluate(
            self.state, now["step"] - 1, lambda state, batch: self._scale(state, batch, True)
        )
        if now["best_loss"] - loss > options.min_delta:
            now |= {"best_loss": loss, "waited": 0}
            self.history.best_epoch = now["epoch"]
            self.best = None if options.patience is None else self.state
        else:
            now["waited"] += 1
        if options.patience is not None and now["waited"] >= options.patience:
            self.history.stopped = "patience"
        return loss

    def _call_back(self) -> None:
        if not self.options.callbacks:
            return
        params = self.engine.svi.get_params(self.state)
        epoch = self.now["epoch"] - 1
        stops = [callback(epoch, params, self.history) for callback in self.options.callbacks]
        if any(stops) and self.history.stopped is None:
            self.history.stopped = "callback"

    # --- checkpoints -----------------------------------------------------------------------

    def _save_if_due(self) -> None:
        now, every = self.now, self.options.every
        if self.history.stopped is not None:
            due = True
        elif every is None:
            due = now["place"] == 0 and time.monotonic() - self.saved_at >= SECONDS
        else:
            due = now["step"] % every == 0
        if due:
            self._save()

    def _save(self) -> None:
        path = self.options.path
        if path is None:
            return
        self.saved_at = time.monotonic()
        history = self.history.to_dict()
        arrays = {
            "step_losses": history.pop("step_losses"),
            "rng_key": _file.pack([self.rng_key])[0],
        }
        metadata = {"run": self._kind(), "now": self.now, "history": history}
        if self.best is not None:
            best = _file.pack(jax.tree.leaves(self.best))
            arrays |= {f"best/{place}": value for place, value in enumerate(best)}
        if isinstance(self.feed, Streamed) and isinstance(self.source, _data.Iterable):
            host = self.feed.random
            if self.now["place"] == 0 or host is None:
                host = _data.HostRandom.read(self.source)
            metadata["host"] = host.values
            arrays |= {f"host/{name}": value for name, value in host.arrays.items()}
        try:
            _file.write(path, self.state, metadata, arrays)
        except ValueError as error:
            warnings.warn(str(error), UserWarning, stacklevel=5)

    def _kind(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that it goes on from."""
        if isinstance(self.source, _data.Iterable):
            return {"num_steps": self.source.steps}
        rows, size, shuffle, drop_last = self.source[1:]
        return {"num_rows": rows, "batch_size": size, "shuffle": shuffle, "drop_last": drop_last}

    def _load(self, path: str | os.PathLike[str], state: SVIState) -> SVIState:
        found, metadata, arrays = _file.read(path, state)
        kind, saved = self._kind(), metadata.get("run")
        if saved is None:
            raise _file.mismatch(path, "one that fit did not write")
        for name in [*kind, *saved]:
            if kind.get(name) != saved.get(name):
                got = f"one with {name}={saved.get(name)}, not {kind.get(name)}"
                raise _file.mismatch(path, got)
        self.now = metadata["now"]
        history = {**metadata["history"], "step_losses": arrays["step_losses"]}
        self.history = History.from_dict(history)
        self.rng_key = _file.unpack([arrays["rng_key"]], [self.rng_key])[0]
        leaves, tree = jax.tree.flatten(found)
        best = [arrays[f"best/{i}"] for i in range(len(leaves)) if f"best/{i}" in arrays]
        if best:
            self.best = jax.tree.unflatten(tree, _file.unpack(best, leaves))
        if "host" in metadata:
            own = {name[5:]: x for name, x in arrays.items() if name.startswith("host/")}
            self.host = _data.HostRandom(metadata["host"], own)
        return found
