"""The loop over epochs and steps: where a training is, and what it goes on from."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_ext.training import _data
from pyro_vae_ext.training._data import Batch
from pyro_vae_ext.training._file import NotFinite, Stored, read, write
from pyro_vae_ext.training._state import Random
from pyro_vae_ext.training._steps import Steps, validation
from pyro_vae_ext.training.history import History, Skipped

SECONDS = 10.0  # between two checkpoints that nobody has asked for at a step


class Options(NamedTuple):
    """Arguments of ``fit``, checked."""

    num_epochs: int
    validation_every: int
    patience: int | None
    min_delta: float
    callbacks: tuple[Callable[..., Any], ...]
    max_skipped: int
    path: str | os.PathLike | None
    every: int | None


class Run:
    """A training: where it is, and what it goes on from."""

    def __init__(
        self,
        steps: Steps,
        source: _data.Source,
        validation: _data.Source | None,
        options: Options,
    ) -> None:
        self.steps, self.svi = steps, steps.svi
        self.source, self.validation, self.options = source, validation, options
        self.history = History()
        # What a checkpoint keeps beside the history.
        self.now: dict[str, Any] = {"step": 0, "epoch": 0, "position": 0, "seed": 0}
        self.now |= {"best": math.inf, "waited": 0}
        self.best: dict[str, Tensor] = {}
        # Of the present epoch: losses per datum and rows by step; the last ones on their device.
        self.losses: list[float] = []
        self.rows: list[int] = []
        self.pending: list[tuple[Tensor, float]] = []
        # Of the present epoch's start, for batches that come in an order of their own.
        self.random: Random | None = None
        self.generators = source.generators()
        self.has_warned = False
        self.saved_at = self.shown_at = time.monotonic()
        self.unshown = 0  # rows since then

    # --- the start -----------------------------------------------------------------------

    def start(self, *, resume: bool) -> None:
        """One run of the pair; then all as it was saved, if it was."""
        path, stored = self.options.path, None
        if path is not None and resume and os.path.exists(path):
            stored = read(path)
            self._restore(stored)
        else:
            self.now["seed"] = int(torch.randint(2**31 - 1, (), device="cpu"))
        before = Random.now(self.generators)
        examples = self.source.examples()
        before.restore(self.generators)
        self.steps.probe(examples, self.now["step"])
        if stored is not None:
            # After that run, which has made the parameters.
            stored.apply(self.svi, self.steps.guard.places, self.steps.names)
            self.steps.guard.look()
            self.steps.guard.keep()

    def _restore(self, stored: Stored) -> None:
        saved = stored.metadata.get("fit")
        if saved is None:
            raise stored.mismatch("one that fit did not write")
        for name, value in self._data_kind().items():
            if saved["data"][name] != value:
                raise stored.mismatch(f"one with {name}={saved['data'][name]}, not {value}")
        arrays = stored.arrays
        steps = arrays["step_losses"].numpy()
        self.history = History.from_dict({**saved["history"], "step_losses": steps})
        self.now = saved["now"]
        self.rows = arrays["rows"].tolist()
        self.losses = steps[len(steps) - len(self.rows) :].tolist()
        self.best = {n[5:]: x.clone() for n, x in arrays.items() if n.startswith("best/")}
        if saved["random"] is not None:
            start = {n[7:]: x for n, x in arrays.items() if n.startswith("random/")}
            self.random = Random.unflat(start, saved["random"])
        # What ended it may not end it now; but a callback is asked at the ends of epochs alone.
        if self.history.stopped != "callback":
            self.history.stopped = None

    def _data_kind(self) -> dict[str, Any]:
        """What the batches of a run depend on, besides its random numbers."""
        source = self.source
        names = ("num_rows", "batch_size", "shuffle", "num_steps")
        return {name: getattr(source, name) for name in names}

    # --- epochs --------------------------------------------------------------------------

    def train(self, *, progress_bar: bool) -> None:
        """All that is left of the training."""
        now, total = self.now, self.source.num_steps
        total = None if total is None else total * self.options.num_epochs
        is_new = False
        self._stop()
        with tqdm(total=total, initial=now["step"], desc="fit", disable=not progress_bar) as bar:
            while self.history.stopped is None:
                self._end_epoch(self._run_epoch(bar))
                is_new = True
                if self.history.stopped is None and self.options.every is None:
                    if time.monotonic() - self.saved_at >= SECONDS:
                        self._save()
        if is_new:
            self._save()
        if self.options.patience is not None:
            self.steps.put_back(self.best)

    def _stop(self) -> None:
        """Say why the training is over, if it is."""
        history, patience = self.history, self.options.patience
        if history.stopped is None and patience is not None and self.now["waited"] >= patience:
            history.stopped = "patience"
        if history.stopped is None and self.now["epoch"] >= self.options.num_epochs:
            history.stopped = "num_epochs"

    def _run_epoch(self, bar: Any) -> float:
        """The steps of an epoch that are left; returns rows per second."""
        start, apart, done = time.perf_counter(), 0.0, len(self.rows)
        now, every = self.now, self.options.every
        with validation(False):
            for batch in self._batches():
                outcome = self.steps.take(batch, now["step"], look=now["position"] == 0)
                self.pending.append((outcome.loss, math.nan if outcome.skipped else outcome.data))
                self.rows.append(batch.rows)
                if outcome.skipped:
                    self._skip(*outcome.skipped)
                now["step"] += 1
                now["position"] += 1
                self._show(bar)
                if every is not None and now["step"] % every == 0:
                    before = time.perf_counter()
                    self._save()
                    apart += time.perf_counter() - before
        return sum(self.rows[done:]) / (time.perf_counter() - start - apart)

    def _batches(self) -> Iterator[Batch]:
        source, now = self.source, self.now
        if isinstance(source, _data.Arrays):
            return source.epoch(now["seed"], now["epoch"], now["position"])
        if now["position"] == 0 or self.random is None:
            self.random = Random.now(self.generators)
            return source.epoch(now["seed"], now["epoch"], 0)
        # In the midst of an epoch: in the order as it began, and then on as it was.
        here = Random.now()
        self.random.restore(self.generators)
        batches = source.epoch(now["seed"], now["epoch"], 0)
        for _ in range(now["position"]):
            next(batches, None)
        here.restore()
        return batches

    def _skip(self, site: str | None, reason: str) -> None:
        skipped, most, now = self.history.skipped, self.options.max_skipped, self.now
        skipped.append(Skipped(now["epoch"], now["step"], site, reason))
        where = "" if site is None else f" at site '{site}'"
        if len(skipped) > most:
            raise FloatingPointError(
                f"Expected at most {most} steps with a non-finite loss or gradient; got "
                f"{len(skipped)}, the last{where} ({reason}). The parameters and the last "
                "checkpoint are those of the last finite step."
            )
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"Skipped step {now['step']} (epoch {now['epoch']}): non-finite {reason}{where}. "
                "It changed nothing; further ones are in the history, without a warning.",
                UserWarning,
                stacklevel=5,
            )

    def _end_epoch(self, samples_per_second: float) -> None:
        history, options, now = self.history, self.options, self.now
        self._read_losses()
        losses, rows = np.array(self.losses), np.array(self.rows, float)
        fine = ~np.isnan(losses)
        loss = float(np.average(losses[fine], weights=rows[fine])) if fine.any() else math.nan
        measured = validation_loss = math.nan
        if self.validation is None:
            measured = loss
        elif (now["epoch"] + 1) % options.validation_every == 0:
            measured = validation_loss = self._validate()
        history.add_epoch(
            loss, validation_loss=validation_loss, samples_per_second=samples_per_second
        )
        self.steps.end_epoch(measured)
        epoch, now["epoch"], now["position"] = now["epoch"], now["epoch"] + 1, 0
        self.losses, self.rows = [], []
        if options.callbacks:
            params = self.steps.params()
            # All of them are called, whatever the first ones say.
            if any([callback(epoch, params, history) for callback in options.callbacks]):
                history.stopped = "callback"
        self._stop()

    def _validate(self) -> float:
        """The loss on the validation data; keeps the parameters if it is the best so far."""
        source, now, options = self.validation, self.now, self.options
        generators = [] if source is None else source.generators()
        before = Random.now(generators)
        batches = iter(()) if source is None else source.epoch(now["seed"], 0, 0)
        # With the schedules as they were at the last step.
        loss = self.steps.evaluate(batches, now["step"] - 1, now["seed"])
        before.restore(generators)
        if loss < now["best"] - options.min_delta:
            now["best"], now["waited"] = loss, 0
            self.history.best_epoch = now["epoch"]
            if options.patience is not None:
                self.best = self.steps.snapshot()
        else:
            now["waited"] += 1
        return loss

    def _read_losses(self) -> None:
        """Fetch the losses of the last steps, all at once."""
        if self.pending:
            tensors, data = zip(*self.pending, strict=True)
            numbers = torch.stack(tensors).double().cpu().numpy() / np.array(data)
            self.losses += numbers.tolist()
            self.history.add_steps(numbers)
            self.pending = []

    def _show(self, bar: Any) -> None:
        bar.update(1)
        self.unshown += self.rows[-1]
        seconds = time.monotonic() - self.shown_at
        # A look at the loss makes the host wait for the device: once in a while.
        if not bar.disable and (seconds > 0.5 or bar.n == bar.total):
            loss, data = self.pending[-1] if self.pending else (math.nan, 1.0)
            shown = {
                "loss": f"{float(loss) / data:.4g}",
                "samples/s": f"{self.unshown / seconds:.3g}",
            }
            if self.history.skipped:
                shown["skipped"] = str(len(self.history.skipped))
            bar.set_postfix(shown, refresh=False)
            self.shown_at, self.unshown = time.monotonic(), 0

    def _save(self) -> None:
        if self.options.path is None:
            return
        self._read_losses()
        history = self.history.to_dict()
        arrays: dict[str, Any] = {"step_losses": history.pop("step_losses")}
        arrays["rows"] = torch.tensor(self.rows, dtype=torch.int64, device="cpu")
        arrays |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        numbers = None
        if self.random is not None:
            tensors, numbers = self.random.flat()
            arrays |= {f"random/{name}": tensor for name, tensor in tensors.items()}
        metadata = {
            "data": self._data_kind(),
            "history": history,
            "now": self.now,
            "random": numbers,
        }
        places = self.steps.guard.places
        try:
            write(self.options.path, self.svi, places, {"fit": metadata}, arrays)
        except NotFinite as error:
            warnings.warn(str(error), UserWarning, stacklevel=4)
        self.saved_at = time.monotonic()
