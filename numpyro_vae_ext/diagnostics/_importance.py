"""What ``importance`` returns: estimates with their standard errors, a table and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
# Without a variance there is no standard error.
FINITE_VARIANCE = 0.5


@dataclass(frozen=True, repr=False)
class Importance:
    """Result of ``importance``; arrays have the shape of the common plates, ``()`` if joint.

    Attributes:
        khat: Shape of the weights' tail; ``-inf`` if they have none.
        khat_error: Its standard error.
        threshold: The largest k-hat that can be relied on with that many draws.
        good: Whether k-hat is below it.
        ess: Effective number of draws, of ``num_samples``.
        elbo: Mean of the log-weights, the bound of one particle.
        elbo_error: Its standard error.
        log_evidence: Log of the mean of the weights as they are.
        log_evidence_error: Its standard error; NaN where the weights have no variance.
        smoothed: Log of the mean of the smoothed weights.
        smoothed_error: Its standard error; NaN where k-hat is too large.
        log_weights: ``(num_samples, *common_plates)``.
        smoothed_log_weights: The same, smoothed; neither is normalised.
        num_samples: Number of draws.
        plates: Names of the common plates.
    """

    khat: Array
    khat_error: Array
    threshold: float
    good: Array
    ess: Array
    elbo: Array
    elbo_error: Array
    log_evidence: Array
    log_evidence_error: Array
    smoothed: Array
    smoothed_error: Array
    log_weights: Array
    smoothed_log_weights: Array
    num_samples: int
    plates: tuple[str, ...]

    def __repr__(self) -> str:
        name = type(self).__name__
        if not self.plates:
            verdict = "good" if self.good else "too large"
            return (
                f"{name}({self.num_samples} draws, k-hat {self.khat:.2f} ({verdict}), "
                f"ess {self.ess:.0f}, log evidence {self.smoothed:.2f})"
            )
        rows = self.khat.size
        if not rows:
            return f"{name}({self.num_samples} draws, no rows)"
        return (
            f"{name}({self.num_samples} draws, {rows} rows, k-hat {np.median(self.khat):.2f} "
            f"in the middle and {self.khat.max():.2f} at worst, {int(self.good.sum())} rows good, "
            f"log evidence {self.smoothed.sum():.2f} in all)"
        )

    def _records(self) -> Iterator[tuple[Any, ...]]:
        numbers = (
            self.khat,
            self.khat_error,
            self.good,
            self.ess,
            self.elbo,
            self.elbo_error,
            self.log_evidence,
            self.log_evidence_error,
            self.smoothed,
            self.smoothed_error,
        )
        for place in np.ndindex(self.khat.shape):
            yield (*place, *(np.asarray(number)[place].item() for number in numbers))

    @property
    def table(self) -> Any:
        """A ``pandas.DataFrame`` with a row per weight.

        Columns: one per common plate with the index in it, then ``khat``, ``khat_error``,
        ``good``, ``ess``, ``elbo``, ``elbo_error``, ``log_evidence``, ``log_evidence_error``,
        ``smoothed`` and ``smoothed_error``.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Expected pandas to be installed; got an import error. Install vae-ext[arviz]."
            ) from error
        columns = [*self.plates, "khat", "khat_error", "good", "ess", "elbo", "elbo_error"]
        columns += ["log_evidence", "log_evidence_error", "smoothed", "smoothed_error"]
        return pandas.DataFrame(list(self._records()), columns=columns)

    def plot(self, ax: Any = None) -> Any:
        """K-hat of every row with its standard error, or the largest of the joint weights.

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
        (self._plot_rows if self.plates else self._plot_weights)(ax)
        return ax

    def _plot_rows(self, ax: Any) -> None:
        khat, errors = self.khat.ravel(), self.khat_error.ravel()
        good, shown = self.good.ravel(), np.isfinite(self.khat.ravel())
        for wanted, label, color in ((True, "good", "C0"), (False, "too large", "C3")):
            rows = np.flatnonzero((good == wanted) & shown)
            if rows.size:
                ax.errorbar(
                    rows,
                    khat[rows],
                    yerr=errors[rows],
                    fmt="o",
                    color=color,
                    markersize=4,
                    elinewidth=0.8,
                    label=f"{label} ({int((good == wanted).sum())})",
                )
        ax.axhline(self.threshold, color="0.4", linestyle="--", linewidth=1)
        ax.set_xlabel(", ".join(self.plates))
        ax.set_ylabel("k-hat")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False)
        hidden = "" if shown.all() else f", {int((~shown).sum())} without a tail to fit"
        ax.set_title(
            f"{int(good.sum())} of {good.size} rows below {self.threshold:.2f}{hidden}\n"
            f"log evidence {self.smoothed.sum():.2f} nats"
        )

    def _plot_weights(self, ax: Any) -> None:
        ranks = np.arange(1, self.num_samples + 1)
        for weights, label, style in (
            (self.log_weights, "as they are", {"color": "0.6", "marker": ".", "linestyle": ""}),
            (self.smoothed_log_weights, "smoothed", {"color": "C0"}),
        ):
            ordered = np.sort(weights)[::-1]
            ax.plot(ranks, ordered - self.smoothed, label=label, **style)
        ax.set_xscale("log")
        ax.set_xlabel("rank of the weight")
        ax.set_ylabel("log-weight - log evidence (nats)")
        ax.legend(frameon=False)
        ax.set_title(
            f"k-hat {self.khat:.2f} ± {self.khat_error:.2f}, threshold {self.threshold:.2f}\n"
            f"log evidence {self.smoothed:.2f} ± {self.smoothed_error:.2f} nats"
        )


def report(
    log_weights: Array,
    smoothed: Array,
    khat: Array,
    *,
    threshold: float,
    tail_length: int,
    plates: tuple[str, ...],
) -> Importance:
    """Everything that follows from the weights, raw and smoothed, and the shape of their tails."""
    good = khat < threshold
    raw_evidence, raw_error, _ = _mean(log_weights)
    evidence, error, ess = _mean(smoothed)
    elbo, elbo_error = _plain_mean(log_weights)
    # The spread of the likeliest shape, (1 + k) / sqrt(M), shrunk as the estimate is.
    shrinkage = np.sqrt(tail_length) / (tail_length + 10)
    return Importance(
        khat=khat,
        khat_error=np.where(khat == -np.inf, 0.0, (1 + np.maximum(khat, -0.5)) * shrinkage),
        threshold=threshold,
        good=good,
        ess=ess,
        elbo=elbo,
        elbo_error=elbo_error,
        log_evidence=raw_evidence,
        log_evidence_error=np.where(khat < FINITE_VARIANCE, raw_error, np.nan),
        smoothed=evidence,
        smoothed_error=np.where(good, error, np.nan),
        log_weights=log_weights,
        smoothed_log_weights=smoothed,
        num_samples=len(log_weights),
        plates=plates,
    )


def _mean(log_weights: Array) -> tuple[Array, Array, Array]:
    """Log of the mean of the weights, its standard error by the delta method, and their ESS."""
    count = len(log_weights)
    top = log_weights.max(axis=0)
    dead = top == -np.inf
    top = np.where(dead, 0.0, top)
    weights = np.exp(log_weights - top)
    mean = weights.mean(axis=0)
    squares = (weights**2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ess = np.where(dead, 0.0, (count * mean) ** 2 / squares)
        error = ((weights / mean - 1) ** 2).sum(axis=0) / (count * (count - 1.0))
        return np.log(mean) + top, np.sqrt(error), ess


def _plain_mean(values: Array) -> tuple[Array, Array]:
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = values.mean(axis=0)
        error = ((values - mean) ** 2).sum(axis=0) / (len(values) * (len(values) - 1.0))
        return mean, np.sqrt(error)
