"""What a training run leaves behind: losses per epoch and per step, and the steps it skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class Skipped(NamedTuple):
    """A step whose loss or gradient was not finite, and which changed nothing.

    Attributes:
        epoch: Epoch of the step, from 0.
        step: Number of the step in the whole training, from 0.
        site: Name of the first site that is to blame; None if there is none.
        reason: ``"data"`` for an observed value, ``"value"`` for a latent value, ``"log_prob"``
            for a log-density, ``"gradient"`` for the gradient of a log-density that is finite
            itself, ``"loss"`` if all sites are finite on their own.
    """

    epoch: int
    step: int
    site: str | None
    reason: str


class History:
    """Losses of a training run, in nats per datum.

    A loss per datum is the loss of the host divided by the number of rows and by the scale of the
    observed sites (1 if they differ), so that the numbers of minibatches, of all data and of other
    data compare.

    Attributes:
        epochs: Epochs done, from 0.
        loss: By epoch, the mean over the rows of all steps that were not skipped; NaN if all
            were.
        validation_loss: By epoch, the loss on the validation data; NaN where it was not computed.
        samples_per_second: By epoch, rows per second, validation and checkpoints left out.
        step_losses: Array with the loss of every step; NaN where it was skipped. It may be ahead
            of ``epochs`` by a part of an epoch.
        skipped: Steps with a non-finite loss or gradient, as :class:`Skipped`.
        best_epoch: Epoch of the best validation loss; None without one.
        stopped: What ended the training: ``"num_epochs"``, ``"patience"`` or ``"callback"``; None
            before its end.

    Example:
        >>> history = History()
        >>> history.add_steps([2.5, float("nan"), 1.5])
        >>> history.skipped.append(Skipped(epoch=0, step=1, site="x", reason="data"))
        >>> history.add_epoch(2.0, samples_per_second=1e4)
        >>> history
        History(1 epoch, loss 2, 1 skipped step)
    """

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.loss: list[float] = []
        self.validation_loss: list[float] = []
        self.samples_per_second: list[float] = []
        self.skipped: list[Skipped] = []
        self.best_epoch: int | None = None
        self.stopped: str | None = None
        # In pieces: one array would be copied whole at every epoch.
        self._step_losses: list[np.ndarray] = []

    @property
    def step_losses(self) -> np.ndarray:
        """The loss of every step, NaN where it was skipped."""
        if len(self._step_losses) != 1:
            self._step_losses = [np.concatenate([np.empty(0), *self._step_losses])]
        return self._step_losses[0]

    def add_steps(self, losses: Iterable[float]) -> None:
        """Append the losses of steps."""
        self._step_losses.append(np.asarray(losses, dtype=np.float64))

    def add_epoch(
        self,
        loss: float,
        *,
        validation_loss: float = math.nan,
        samples_per_second: float = math.nan,
    ) -> None:
        """Append an epoch."""
        self.epochs.append(len(self.epochs))
        self.loss.append(float(loss))
        self.validation_loss.append(float(validation_loss))
        self.samples_per_second.append(float(samples_per_second))

    def __len__(self) -> int:
        return len(self.epochs)

    def __repr__(self) -> str:
        parts = [_count(len(self), "epoch")]
        if self.loss:
            parts.append(f"loss {self.loss[-1]:.6g}")
        validated = [value for value in self.validation_loss if not math.isnan(value)]
        if validated:
            parts.append(f"validation loss {validated[-1]:.6g}")
        if self.skipped:
            parts.append(_count(len(self.skipped), "skipped step"))
        return f"History({', '.join(parts)})"

    def to_dict(self) -> dict[str, Any]:
        """All of it as lists, numbers and strings, but for the array ``step_losses``."""
        return {
            "epochs": list(self.epochs),
            "loss": list(self.loss),
            "validation_loss": list(self.validation_loss),
            "samples_per_second": list(self.samples_per_second),
            "skipped": [list(row) for row in self.skipped],
            "best_epoch": self.best_epoch,
            "stopped": self.stopped,
            "step_losses": self.step_losses,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> History:
        """The history of which :meth:`to_dict` is ``state``."""
        history = cls()
        for name in ("epochs", "loss", "validation_loss", "samples_per_second"):
            setattr(history, name, list(state[name]))
        history.skipped = [Skipped(*row) for row in state["skipped"]]
        history.best_epoch = state["best_epoch"]
        history.stopped = state["stopped"]
        history.add_steps(state["step_losses"])
        return history

    def plot(self, ax: Any = None) -> Any:
        """Losses by epoch; skipped steps and the best epoch are marked.

        Args:
            ax: Matplotlib axes; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: If Matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                "Expected Matplotlib to be installed; got an import error. Install "
                "vae-ext[examples]."
            ) from error
        if ax is None:
            _, ax = pyplot.subplots()
        # One epoch alone is no line.
        marker = "o" if len(self) == 1 else None
        ax.plot(self.epochs, self.loss, color="C0", marker=marker, label="training")
        validated = [
            row
            for row in zip(self.epochs, self.validation_loss, strict=True)
            if not math.isnan(row[1])
        ]
        if validated:
            marker = "o" if len(validated) == 1 else None
            ax.plot(*zip(*validated, strict=True), color="C1", marker=marker, label="validation")
        if self.best_epoch is not None:
            ax.axvline(
                self.best_epoch, color="0.6", linestyle="--", label=f"best epoch {self.best_epoch}"
            )
        if self.skipped:
            ax.plot(
                [row.epoch for row in self.skipped],
                [0.02] * len(self.skipped),
                "|",
                color="C3",
                markersize=10,
                label=_count(len(self.skipped), "skipped step"),
                transform=ax.get_xaxis_transform(),
            )
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("epoch")
        ax.set_ylabel("loss (nats per datum)")
        ax.legend(frameon=False)
        return ax


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
