"""What ``latent_utilisation`` returns: numbers with their standard errors, a table and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Estimate(NamedTuple):
    """A mean over rows and its standard error: numbers, or one of each per dimension."""

    estimate: Any
    standard_error: Any


@dataclass(frozen=True)
class LatentUtilisation:
    """Result of ``latent_utilisation``; log-densities are in nats.

    Attributes:
        count: Number of active units, over all latent sites.
        active: By site, a boolean array ``(D,)``.
        variance: By site, the variance over the data of the posterior mean, ``(D,)``.
        kl: By site, the divergence from the prior per dimension, ``(D,)``.
        kl_total: Divergence of the whole latent vector.
        log_likelihood: Log-density of the data given their own latents.
        log_likelihood_swapped: The same given the latents of another row.
        swap_drop: Difference of the two.
        mi_lower: Lower bound on the mutual information of data and latents.
        mi_upper: Upper bound on it.
        marginal: Sites whose ``kl`` is that of Normals with the moments of the marginals.
        latent: Names of the latent sites.
        observed: Names of the observed sites.
        num_rows: Number of rows.
        num_contrasts: Number of other rows that each row was compared with.
    """

    count: int
    active: dict[str, Array]
    variance: dict[str, Estimate]
    kl: dict[str, Estimate]
    kl_total: Estimate
    log_likelihood: Estimate
    log_likelihood_swapped: Estimate
    swap_drop: Estimate
    mi_lower: Estimate
    mi_upper: Estimate
    marginal: tuple[str, ...]
    latent: tuple[str, ...]
    observed: tuple[str, ...]
    num_rows: int
    num_contrasts: int

    def _records(self) -> Iterator[tuple[str, str, Any, float, float]]:
        for name, kl in self.kl.items():
            quantity = "kl_marginal" if name in self.marginal else "kl"
            for d, row in enumerate(zip(*kl, strict=True)):
                yield (quantity, name, d, *row)
        latent, observed = ", ".join(self.latent), ", ".join(self.observed)
        yield ("kl", latent, "all", *self.kl_total)
        for name, variance in self.variance.items():
            for d, row in enumerate(zip(*variance, strict=True)):
                yield ("variance", name, d, *row)
        yield ("log_likelihood", observed, "all", *self.log_likelihood)
        yield ("log_likelihood_swapped", observed, "all", *self.log_likelihood_swapped)
        yield ("swap_drop", observed, "all", *self.swap_drop)
        yield ("mi_lower", latent, "all", *self.mi_lower)
        yield ("mi_upper", latent, "all", *self.mi_upper)

    @property
    def table(self) -> Any:
        """A ``pandas.DataFrame`` with a row per number.

        Columns: ``quantity``, ``site``, ``dimension`` (an index, or ``"all"``), ``estimate``
        and ``standard_error``.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Expected pandas to be installed; got an import error. Install vae-ext[arviz]."
            ) from error
        columns = ["quantity", "site", "dimension", "estimate", "standard_error"]
        return pandas.DataFrame(list(self._records()), columns=columns)

    def plot(self, ax: Any = None) -> Any:
        """Divergence per dimension, largest first, active units marked.

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
        bars = [
            (*row, bool(active), str(d) if len(self.kl) == 1 else f"{name} {d}")
            for name, kl in self.kl.items()
            for d, (row, active) in enumerate(
                zip(zip(*kl, strict=True), self.active[name], strict=True)
            )
        ]
        bars.sort(key=lambda bar: -bar[0])
        for wanted, label, color in ((True, "active", "C0"), (False, "idle", "0.75")):
            chosen = [(place, bar) for place, bar in enumerate(bars) if bar[2] is wanted]
            if not chosen:
                continue
            ax.bar(
                [place for place, _ in chosen],
                [bar[0] for _, bar in chosen],
                yerr=[bar[1] for _, bar in chosen],
                color=color,
                label=f"{label} ({len(chosen)})",
            )
        ax.set_xticks(range(len(bars)), [bar[3] for bar in bars])
        ax.set_xlabel("latent dimension")
        ax.set_ylabel("KL from the prior (nats)")
        ax.legend(frameon=False)
        drop, low, high = self.swap_drop, self.mi_lower, self.mi_upper
        ax.set_title(
            f"swap drop {drop.estimate:.2f} ± {drop.standard_error:.2f} nats\n"
            f"{low.estimate:.2f} ± {low.standard_error:.2f} ≤ I(x; z) ≤ "
            f"{high.estimate:.2f} ± {high.standard_error:.2f} nats"
        )
        return ax
