"""What a fit of a posterior leaves behind: bounds by step and by window, rates and seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np


class PosteriorHistory:
    """Bounds of a run of ``fit_posterior``, in nats of the joint bound.

    Attributes:
        steps: Steps done at the end of every window.
        elbo: Bound of the mean parameters of every window, by the same draws each time. Of a
            tempered fit, too, it is that of the whole density.
        learning_rate: By window.
        race: By learning rate of the race, the bound that it came to.
        stopped: What ended the run: ``"converged"`` or ``"num_steps"``; None before its end.
        restarts: Bounds of all runs, this one included; one number per restart.
        seconds: Seconds by part: ``"pathfinder"``, its own compilation included,
            ``"compilation"`` of the steps, ``"race"``, ``"training"`` and ``"diagnosis"``.
        num_draws: Draws of all steps.

    Example:
        >>> history = PosteriorHistory()
        >>> history.add_steps([-12.5, float("nan"), -11.5])
        >>> history.add_look(3, 0.01, -11.2)
        >>> history
        PosteriorHistory(3 steps, bound -11.2, 1 skipped step)
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.elbo: list[float] = []
        self.learning_rate: list[float] = []
        self.race: dict[float, float] = {}
        self.stopped: str | None = None
        self.restarts: list[float] = []
        self.seconds: dict[str, float] = {}
        self.num_draws = 0
        self._step_elbos: list[np.ndarray] = []

    @property
    def step_elbos(self) -> np.ndarray:
        """The bound of every step, by its own draws; NaN where the step was skipped."""
        return np.concatenate([np.empty(0), *self._step_elbos])

    @property
    def num_skipped(self) -> int:
        """Steps with a bound or gradient that was not finite, which changed nothing."""
        return int(np.isnan(self.step_elbos).sum())

    @property
    def draws_per_second(self) -> float:
        """Draws of the race and the training per second; NaN before their end."""
        seconds = self.seconds.get("race", 0.0) + self.seconds.get("training", np.nan)
        return self.num_draws / seconds if seconds else np.nan

    @property
    def last_gain(self) -> float:
        """Nats of the last window; infinity where there were not two."""
        return self.elbo[-1] - self.elbo[-2] if len(self) > 1 else math.inf

    def add_steps(self, elbos: Iterable[float]) -> None:
        """Append the bounds of steps."""
        self._step_elbos.append(np.asarray(elbos, dtype=np.float64))

    def add_look(self, steps: int, learning_rate: float, elbo: float) -> None:
        """Append a window."""
        self.steps.append(int(steps))
        self.learning_rate.append(float(learning_rate))
        self.elbo.append(float(elbo))

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        parts = [_count(len(self.step_elbos), "step")]
        if self.elbo:
            parts.append(f"bound {self.elbo[-1]:.6g}")
        if self.num_skipped:
            parts.append(_count(self.num_skipped, "skipped step"))
        if self.stopped:
            parts.append(self.stopped)
        return f"PosteriorHistory({', '.join(parts)})"

    def plot(self, ax: Any = None) -> Any:
        """Bounds by step and by window; the first tenth of the steps may lie below the axes.

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
        bounds = self.step_elbos
        ax.plot(1 + np.arange(len(bounds)), bounds, color="0.8", linewidth=0.5, label="steps")
        marker = "o" if len(self) == 1 else None
        ax.plot(self.steps, self.elbo, color="C0", marker=marker, label="mean of a window")
        for i in range(1, len(self)):
            if self.learning_rate[i] < self.learning_rate[i - 1]:
                ax.axvline(self.steps[i - 1], color="0.6", linestyle=":", linewidth=1)
        late = bounds[len(bounds) // 10 :]
        shown = np.concatenate([late[np.isfinite(late)], np.asarray(self.elbo)])
        shown = shown[np.isfinite(shown)]
        if len(shown):
            low, high = np.quantile(shown, 0.01), shown.max()
            margin = 0.05 * (high - low) or 1.0
            ax.set_ylim(low - margin, high + margin)
        ax.set_xlabel("step")
        ax.set_ylabel("bound (nats)")
        ax.set_title(f"learning rate {self.learning_rate[0]:g} at first" if len(self) else "")
        ax.legend(frameon=False)
        return ax


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
