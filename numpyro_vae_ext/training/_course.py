"""The course of a fit: which learning rate, when to lower it, when to stop.

The same text in both packages.

The steps are Adam's, at a learning rate that is lowered in stages. At the end of every window of
steps the mean of the window's parameters is looked at: the bound, the means and the standard
deviations of one and the same draws, so that two looks differ by the parameters alone. A stage ends
when the bound of a window is no better than that of the windows before it; the last one when means
and standard deviations stand still as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from numpyro_vae_ext._checks import positive_int
from numpyro_vae_ext.training.posterior_history import PosteriorHistory

# Steps that are run at a time, of the race at one rate, and of a window.
BLOCK, RACE, WINDOW = 50, 150, 250
# Learning rates of the stages, as shares of the first; what each leaves to those after it.
STAGES, LEFT = (1.0, 0.3, 0.1, 0.03), 0.12
# Gain of a window, in nats, and changes of means and log standard deviations, in those of the
# posterior, that are none.
NATS, MEANS, SCALES = 0.002, 0.02, 0.02
# Windows without a gain that end a stage.
PATIENCE = 2
# A window that ends so many nats below the best one has diverged.
DIVERGED = 100.0
# Share of the draws that must have a density.
ENOUGH = 0.99
# Standard deviations of the start that no posterior is away from it, or wide.
ENDLESS = 1e4
# Of the steps of a tempered fit, those on the way to the whole density, and the first power.
TEMPERED, FLATTEST = 0.3, 0.01


class Look(NamedTuple):
    """What draws say of the parameters: log-weights ``(S,)`` and points ``(S, D)``."""

    log_weights: np.ndarray
    points: np.ndarray


class Trainer(Protocol):
    """One fit in a backend; it holds the parameters, the optimiser and the mean parameters."""

    def advance(self, rate: float, powers: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Run ``BLOCK`` steps; return their bounds, NaN where a step was skipped.

        The density of the model has the given power, and the Normal of the start the rest of it.
        The mean parameters go by the given share of the way to those of the step.
        """

    def look(self) -> Look:
        """Draw with the mean parameters; always the same noise."""

    def settle(self) -> None:
        """Put the parameters where their mean is."""

    def save(self) -> Any:
        """A copy of everything."""

    def restore(self, saved: Any) -> None:
        """Go back to a copy."""


class Course:
    """One run, from the first step to the last.

    Args:
        trainer: What is run.
        history: What is written into.
        num_steps: The most steps.
        rates: Learning rates of the race.
        temper: Go from the start's Normal to the model's density.
        where: Names the site of a number of the vector.
        on_block: Called after every block with the number of steps and the bound.
    """

    def __init__(
        self,
        trainer: Trainer,
        history: PosteriorHistory,
        *,
        num_steps: int,
        rates: tuple[float, ...],
        temper: bool,
        where: Callable[[int], str],
        on_block: Callable[[int, float], object],
    ) -> None:
        self.trainer, self.history = trainer, history
        self.num_steps = num_steps // BLOCK * BLOCK
        self.rates, self.where, self.on_block = rates, where, on_block
        whole = self.num_steps // 40 // BLOCK * BLOCK
        self.window = min(WINDOW, max(BLOCK, whole))
        self.warm = int(TEMPERED * self.num_steps) // BLOCK * BLOCK if temper else 0
        self.steps = 0
        self.steps_in_all = 0  # those of rates that lost, too
        self.best, self.best_elbo = trainer.save(), -math.inf

    def race(self) -> float:
        """Try every learning rate from the start; go on from where the best one came to."""
        if len(self.rates) == 1:
            return self.rates[0]
        start, reached = self.trainer.save(), []
        for rate in self.rates:
            self.trainer.restore(start)
            losses = self._run(rate, RACE)
            elbo = _mean(self.trainer.look().log_weights)
            self.history.race[rate] = elbo
            reached.append((elbo, rate, self.trainer.save(), losses))
        self.steps += RACE
        best = max(each[0] for each in reached)
        # Of rates that are as good, the one that was named first.
        _, rate, saved, losses = next(each for each in reached if not each[0] < best - NATS)
        self.trainer.restore(saved)
        self.history.add_steps(losses)
        return rate

    def train(self, rate: float) -> None:
        """Run all stages; the trainer ends with the best mean parameters."""
        last = len(STAGES) - 1
        stopped = "num_steps"
        for i, share in enumerate(STAGES):
            end = int(self.num_steps * (1 - LEFT * (last - i)))
            done = self._stage(rate * share, end, is_last=i == last)
            if done and i == last:
                stopped = "converged"
            self.trainer.settle()
        if self.best_elbo == -math.inf:
            raise FloatingPointError(
                f"Expected a bound that is finite; got none in {self.steps} steps. Look for draws "
                "without a density in the model, or pass a start near the posterior."
            )
        self.history.stopped = stopped
        self.trainer.restore(self.best)

    def _stage(self, rate: float, end: int, *, is_last: bool) -> bool:
        """One learning rate; whether it ended before ``end``."""
        before: Look | None = None
        top, idle = -math.inf, 0
        while self.steps + self.window <= end:
            self.history.add_steps(self._run(rate, self.window))
            self.steps += self.window
            look = self.trainer.look()
            elbo = _mean(look.log_weights)
            self.history.add_look(self.steps, rate, elbo)
            if self.steps < self.warm + self.window:
                continue  # Another density than the model's.
            self._check_proper(look, elbo)
            if elbo > self.best_elbo:
                self.best, self.best_elbo = self.trainer.save(), elbo
            elif not elbo > self.best_elbo - DIVERGED:
                self.trainer.restore(self.best)
                return False
            idle = idle + 1 if elbo < top + NATS else 0
            if idle >= PATIENCE and not (is_last and not _stands_still(before, look)):
                return True
            before, top = look, max(top, elbo)
        return False

    def _run(self, rate: float, num_steps: int) -> np.ndarray:
        """Steps at a rate, with the mean parameters those of all of them."""
        bounds = []
        for start in range(0, num_steps, BLOCK):
            at = np.arange(start, start + BLOCK)
            bounds.append(self.trainer.advance(rate, self._powers(self.steps + at), 1 / (at + 1)))
            self.steps_in_all += BLOCK
            shown = bounds[-1][np.isfinite(bounds[-1])]
            self.on_block(self.steps + start + BLOCK, shown.mean() if len(shown) else -math.inf)
        return np.concatenate(bounds)

    def _powers(self, steps: np.ndarray) -> np.ndarray:
        """Of the model's density: in equal steps up to 1."""
        if not self.warm:
            return np.ones(len(steps))
        return np.minimum(1.0, FLATTEST + (1 - FLATTEST) * steps / self.warm)

    def _check_proper(self, look: Look, elbo: float) -> None:
        """Refuse a posterior whose bound grows without an end."""
        with np.errstate(over="ignore", invalid="ignore"):
            spread = np.maximum(np.abs(look.points.mean(0)), look.points.std(0))
        far = int(np.argmax(np.where(np.isfinite(spread), spread, np.inf)))
        # A posterior that is merely far from its start has a bound that comes to an end.
        grows = elbo > self.best_elbo + NATS and self.best_elbo > -math.inf
        if grows and not spread[far] < ENDLESS:
            raise ValueError(
                "Expected a proper posterior; got a bound that grows without an end along site "
                f"'{self.where(far)}'. Give it a proper prior, or look for a mode at infinity."
            )


def checked_rates(learning_rates: Any) -> tuple[float, ...]:
    """The learning rates of a race as a tuple."""
    given = learning_rates if isinstance(learning_rates, list | tuple) else (learning_rates,)
    numbers = [isinstance(rate, int | float) and 0 < rate < math.inf for rate in given]
    if not given or not all(numbers):
        raise ValueError(f"Expected learning_rates > 0; got {learning_rates}.")
    return tuple(map(float, given))


def check_steps(num_steps: int, rates: tuple[float, ...]) -> None:
    """Refuse a budget that holds no race, or not one window of every stage."""
    positive_int("num_steps", num_steps)
    fewest = 4 * RACE * len(rates) if len(rates) > 1 else BLOCK * len(STAGES)
    if num_steps < fewest:
        why = f"to race {len(rates)} learning rates" if len(rates) > 1 else "for all stages"
        raise ValueError(
            f"Expected num_steps >= {fewest} {why}; got {num_steps}. Raise num_steps"
            + (", or give one learning rate." if len(rates) > 1 else ".")
        )


def _mean(log_weights: np.ndarray) -> float:
    """The bound by the draws that have a density, if they are nearly all; else minus infinity."""
    good = np.isfinite(log_weights)
    if good.mean() < ENOUGH:
        return -math.inf
    return float(log_weights[good].mean())


def _stands_still(before: Look | None, look: Look) -> bool:
    if before is None:
        return False
    old, new = before.points, look.points
    scale = old.std(0)
    means = np.abs(new.mean(0) - old.mean(0)) / scale
    scales = np.abs(np.log(new.std(0) / scale))
    return bool((means < MEANS).all() and (scales < SCALES).all())
