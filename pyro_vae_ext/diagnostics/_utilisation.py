"""From runs of a (model, guide) pair to the numbers of a report, in NumPy.

What a host does is in :mod:`._rows`; nothing here knows of tensors or traces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from pyro_vae_ext.diagnostics._report import Estimate, LatentUtilisation

Array = np.ndarray


class Draws(NamedTuple):
    """What one chunk of draws says: ``(num_draws, num_rows)``, by site with a dimension more.

    Attributes:
        own: Log-density of a latent vector in the guide at its own row, given auxiliaries.
        log_q: That of all guide sites, auxiliaries and reverse factors included.
        log_p: That of the latent sites in the model.
        log_likelihood: That of the observed sites.
        values: Latent vectors by site.
        kl: Divergence per dimension, of the sites where it splits.
        present: ``(num_rows,)``, False for rows that are masked out.
    """

    own: Array
    log_q: Array
    log_p: Array
    log_likelihood: Array
    values: dict[str, Array]
    kl: dict[str, Array]
    present: Array


class Runs(ABC):
    """Runs of a pair. ``state`` is whatever a later run needs of the draws.

    ``source`` of shape ``(num_draws, num_rows)`` says from which row each row gets its latents.

    Attributes:
        latent: Names of the latent sites of the data plates.
        observed: Names of the observed ones.
        hierarchical: Whether the density of the guide is an integral over auxiliary sites.
        marginal: Latent sites whose divergence does not split over dimensions.
    """

    latent: tuple[str, ...]
    observed: tuple[str, ...]
    hierarchical: bool
    marginal: tuple[str, ...]

    @abstractmethod
    def draw(self, start: int, size: int) -> tuple[Draws, Any]:
        """Draws ``start, ..., start + size - 1`` of the guide, and their state."""

    @abstractmethod
    def prior(self, state: Any, start: int, size: int) -> dict[str, Array]:
        """As many draws of the model's latent sites, by site."""

    @abstractmethod
    def likelihood(self, state: Any, source: Array) -> Array:
        """Log-density of the data of every row at the latents of its source."""

    @abstractmethod
    def density(self, state: Any, source: Array, stream: int, start: int) -> Array:
        """Log-density in the guide of every row at the latents of its source.

        Auxiliary sites are drawn anew: draws ``start, ...`` of the random numbers ``stream``.
        """

    @abstractmethod
    def repeated(self, state: Any, size: int) -> Any:
        """State of the first draw, ``size`` times."""


def data_plates(
    observed: Mapping[str, Iterable[str]], latent: Mapping[str, Iterable[str]]
) -> set[str]:
    """Names of the plates whose elements are rows, from those of every site.

    They enclose every observed site that has a plate, and every latent one that shares such a
    plate with them; latent sites elsewhere belong to all rows.
    """
    inside = [set(plates) for plates in observed.values() if plates]
    common = set.intersection(*inside) if inside else set()
    local = [set(plates) & common for plates in latent.values() if set(plates) & common]
    return set.intersection(*local) if local else set()


def too_few_rows(rows: Mapping[str, int]) -> ValueError:
    """The error of a pair without rows to compare."""
    return ValueError(
        f"Expected latent sites inside a data plate of at least 2 rows; got {dict(rows)}. "
        "Utilisation compares data."
    )


def partly_masked(name: str) -> ValueError:
    """The error of a latent vector of which a part counts: its density is no other row's."""
    return ValueError(
        f"Expected a mask of whole rows at latent site '{name}'; got rows with a part masked "
        "out. Mask whole rows, or none."
    )


def row_order(seed: int, present: Array) -> Array:
    """The rows that count, shuffled: a shift then pairs them at random, sorted data too."""
    return np.random.default_rng((seed, 0)).permutation(np.flatnonzero(present))


def other_rows(seed: int, num_draws: int, num_contrasts: int, num_rows: int) -> Array:
    """Distinct shifts in ``1, ..., num_rows - 1`` for every draw, ``(num_draws, num_contrasts)``.

    Every set of other rows is as likely as any other.
    """
    rng = np.random.default_rng((seed, 1))
    size = min(num_contrasts, num_rows - 1)
    return 1 + np.stack([rng.choice(num_rows - 1, size, replace=False) for _ in range(num_draws)])


class _Shift:
    """Latents of every row at the row that stands ``shift`` places behind it in ``order``."""

    def __init__(self, order: Array, present: Array, shifts: Array) -> None:
        places = (np.arange(len(order)) + shifts[:, None]) % len(order)
        self.source = np.tile(np.arange(len(present)), (len(shifts), 1))
        np.put_along_axis(self.source, order[places], np.tile(order, (len(shifts), 1)), 1)
        ranks = np.argsort(order)
        self.target = order[places][:, ranks]

    def back(self, values: Array) -> Array:
        """What was found at the targets, by the row that the latents came from."""
        return np.take_along_axis(values, self.target, 1)


def _mean(rows: Array) -> Estimate:
    with np.errstate(invalid="ignore"):
        mean, error = rows.mean(0), rows.std(0, ddof=1) / np.sqrt(len(rows))
    return Estimate(float(mean), float(error)) if rows.ndim == 1 else Estimate(mean, error)


def _log_mean(values: Array) -> Array:
    return np.logaddexp.reduce(values, 0) - np.log(len(values))


class _Moments:
    """Running sums of draws, by half and squared."""

    def __init__(self, num_draws: int) -> None:
        self.total = num_draws
        self.halves: list[Any] = [0.0, 0.0]
        self.squares: Any = 0.0

    def add(self, values: Array, start: int) -> None:
        split = max(0, self.total // 2 - start)
        self.halves[0] = self.halves[0] + values[:split].sum(0)
        self.halves[1] = self.halves[1] + values[split:].sum(0)
        self.squares = self.squares + (values**2).sum(0)

    def mean(self) -> Array:
        return (self.halves[0] + self.halves[1]) / self.total

    def variance(self) -> Array:
        return (self.squares - self.total * self.mean() ** 2) / (self.total - 1)

    def covariance(self) -> Array:
        """By row, the product of the centred means of the halves: of mean zero for noise."""
        first = self.halves[0] / (self.total // 2)
        second = self.halves[1] / (self.total - self.total // 2)
        products = (first - first.mean(0)) * (second - second.mean(0))
        return products * (len(products) / (len(products) - 1))


def _normal_kl(q: _Moments, p: _Moments) -> Array:
    """KL divergence of Normals with these moments; without bias if the draws are Normal."""
    size, freedom = q.total, q.total - 1
    mean, q_variance, p_variance = q.mean() - p.mean(), q.variance(), p.variance()
    with np.errstate(divide="ignore", invalid="ignore"):
        # Of the inverse of an estimated variance, and of the squares of estimated means.
        square = q_variance * (1 - 1 / size) + mean**2
        ratio = (freedom - 2) / freedom * square / p_variance - 1 / size
        return 0.5 * (np.log(p_variance / q_variance) + ratio - 1)


def estimate(
    runs: Runs,
    seed: int,
    *,
    num_samples: int,
    num_contrasts: int,
    threshold: float,
    chunk_size: int,
    progress_bar: bool,
) -> LatentUtilisation:
    """All quantities of the report, chunk by chunk."""
    starts = range(0, num_samples, chunk_size)
    rows: dict[str, Any] = {}
    posterior = {name: _Moments(num_samples) for name in runs.latent}
    prior = {name: _Moments(num_samples) for name in runs.marginal}
    kl: dict[str, Any] = {}

    def add(to: dict[str, Any], name: str, values: Array) -> None:
        to[name] = to.get(name, 0.0) + values.sum(0) / num_samples

    with tqdm(desc="utilisation", disable=not progress_bar) as bar:
        for start in starts:
            size = min(chunk_size, num_samples - start)
            draws, state = runs.draw(start, size)
            bar.update()
            if start == 0:
                first, generated, present = state, draws.own[:1], draws.present
                num_rows = int(present.sum())
                if num_rows < 2:
                    raise too_few_rows(dict.fromkeys(runs.latent, num_rows))
                order = row_order(seed, present)
                shifts = other_rows(seed, num_samples, num_contrasts, num_rows)
                contrasts = shifts.shape[1]
                each = 2 + bool(runs.marginal) + contrasts + runs.hierarchical
                bar.total = len(starts) * each
            add(rows, "log_likelihood", draws.log_likelihood[:, present])
            add(rows, "kl_total", (draws.log_q - draws.log_p)[:, present])
            for name, values in draws.values.items():
                posterior[name].add(values[:, present], start)
            for name, values in draws.kl.items():
                add(kl, name, values[:, present])
            chosen = shifts[start : start + size]
            swap = _Shift(order, present, chosen[:, 0])
            add(rows, "swapped", runs.likelihood(state, swap.source)[:, present])
            bar.update()
            if runs.marginal:
                for name, values in runs.prior(state, start, size).items():
                    prior[name].add(values[:, present], start)
                bar.update()
            if runs.hierarchical:
                continue
            own = draws.own[:, present]
            others = np.full_like(own, -np.inf)
            for shift in chosen.T:
                move = _Shift(order, present, shift)
                found = runs.density(state, move.source, 0, start)
                others = np.logaddexp(others, move.back(found))
                bar.update()
            add(rows, "mi_lower", own - np.logaddexp(own, others) + np.log(contrasts + 1))
            add(rows, "mi_upper", own - others + np.log(contrasts))
        if runs.hierarchical:
            # One latent vector per row; the draws are those of the auxiliaries.
            fresh = []
            for stream, shift in enumerate((0, *shifts[0])):
                parts = []
                for start in starts:
                    size = min(chunk_size, num_samples - start)
                    move = _Shift(order, present, np.full(size, shift))
                    repeated = runs.repeated(first, size)
                    found = runs.density(repeated, move.source, stream, start)
                    parts.append(move.back(found))
                    bar.update()
                scores = np.concatenate(parts)
                fresh.append(_log_mean(scores))
                if stream == 0:
                    # With the auxiliary that the vector was drawn from among the draws.
                    among = _log_mean(np.concatenate([generated[:, present], scores[:-1]]))
            others = np.logaddexp.reduce(fresh[1:], 0)
            rows["mi_lower"] = fresh[0] - np.logaddexp(among, others) + np.log(contrasts + 1)
            rows["mi_upper"] = among - others + np.log(contrasts)

    variance = {name: _mean(moments.covariance()) for name, moments in posterior.items()}
    active = {name: found.estimate > threshold for name, found in variance.items()}
    kl |= {name: _normal_kl(posterior[name], prior[name]) for name in runs.marginal}
    return LatentUtilisation(
        count=sum(int(flags.sum()) for flags in active.values()),
        active=active,
        variance=variance,
        kl={name: _mean(kl[name]) for name in runs.latent if name in kl},
        kl_total=_mean(rows["kl_total"]),
        log_likelihood=_mean(rows["log_likelihood"]),
        log_likelihood_swapped=_mean(rows["swapped"]),
        swap_drop=_mean(rows["log_likelihood"] - rows["swapped"]),
        mi_lower=_mean(rows["mi_lower"]),
        mi_upper=_mean(rows["mi_upper"]),
        marginal=runs.marginal,
        latent=runs.latent,
        observed=runs.observed,
        num_rows=num_rows,
        num_contrasts=contrasts,
    )
