"""Pathfinder in NumPy, given a density: paths, Normals along them, and draws.

The same text in both packages, but for the name of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pyro_vae_ext._psis import psis
from pyro_vae_ext.training._lbfgs import Ascent, Density, Path, diagonal, is_curved
from pyro_vae_ext.training._normals import LowRank, Normal, full, log_prob, low_rank

# Steps between two looks at the bounds, and those of a path before it may be given up.
LOOK_EVERY, FEWEST_STEPS = 50, 100
# A path has passed its best bound if it is further behind than so many nats for so much of it.
NATS_BEHIND, SHARE_BEHIND = 10.0, 0.75
# A path is lost if at its pace it needs so many more steps to the best bound of another one.
STEPS_BEHIND = 1000
# Rows of Hessians in all, and iterates of one path, that full Normals are tried at.
HESSIAN_ROWS, HESSIANS_OF_A_PATH = 20_000, 64
# Normals of a path that are compared once more, and the draws for that.
FINALISTS, FINAL_DRAWS = 5, 200
# Times that the starts without a finite density are drawn anew.
START_TRIALS = 100


class Target(NamedTuple):
    """A log-density of vectors.

    Attributes:
        size: Numbers of a vector.
        density: Log-densities and gradients, one row for each path that runs.
        values: Log-densities ``(n,)`` of points ``(n, D)``.
        hessians: Hessians ``(n, D, D)`` of points ``(n, D)``.
        resolution: Relative error of a log-density.
    """

    size: int
    density: Density
    values: Callable[[np.ndarray], np.ndarray]
    hessians: Callable[[np.ndarray], np.ndarray]
    resolution: float


class Candidate(NamedTuple):
    """A Normal of a path, with its bound by a few draws, less the standard error."""

    elbo: float
    normal: Normal


class Outcome(NamedTuple):
    """What a path came to.

    Attributes:
        normal: The best Normal.
        low_rank: The best Normal of low rank; None if there is none.
        num_iterations: Steps of the path.
        reason: What ended it: ``"converged"``, ``"max_iterations"``, ``"line_search"``,
            ``"bound"`` where the best bound was passed long before, or ``"behind"`` where it
            crawls far below another path.
    """

    normal: Normal
    low_rank: LowRank | None
    num_iterations: int
    reason: str


class Draws(NamedTuple):
    """Draws of the best Normals of all paths.

    Attributes:
        points: ``(P, S, D)``.
        elbos: By path.
        log_weights: Of the draws, with the mixture of all Normals as proposal ``(P, S)``.
        khats: By path, with its own Normal as the proposal.
        khat: With the mixture as the proposal.
        log_evidence: From the smoothed weights.
        chosen: Points ``(S, D)``, resampled from all.
    """

    points: np.ndarray
    elbos: np.ndarray
    log_weights: np.ndarray
    khats: np.ndarray
    khat: float
    log_evidence: float
    chosen: np.ndarray


class Search:
    """All paths, with the best Normals along them.

    Args:
        target: The log-density.
        rng: Source of all random numbers.
        starts: Points ``(P, D)`` with a finite density.
        num_particles: Draws of a bound.
        max_iterations: Steps of a path.
        history_size: Pairs that make an inverse Hessian.
        hessian: Try the Normals with the exact curvature as well.
    """

    def __init__(
        self,
        target: Target,
        rng: np.random.Generator,
        starts: np.ndarray,
        *,
        num_particles: int,
        max_iterations: int,
        history_size: int,
        hessian: bool,
    ) -> None:
        self.target, self.hessian = target, hessian
        # The same for all, so that bounds differ by the Normals alone.
        self.noise = rng.standard_normal((num_particles, target.size))
        self.final_noise = rng.standard_normal((FINAL_DRAWS, target.size))
        self.ascent = Ascent(
            target.density,
            starts,
            max_iterations=max_iterations,
            history_size=history_size,
            resolution=target.resolution,
        )
        self._trails = [_Trail(target.size, history_size) for _ in starts]
        self._bounds: list[list[float]] = [[] for _ in starts]
        self._best: list[list[Candidate]] = [[] for _ in starts]
        self._best_low: list[Candidate | None] = [None for _ in starts]

    def run(self, on_look: Callable[[int, float], object]) -> list[Outcome]:
        """Run all paths to their ends; ``on_look`` gets the most steps and the best bound."""
        everyone = range(len(self._best))
        while len(running := self.ascent.running):
            self.ascent.advance(LOOK_EVERY)
            for p in running:
                self._look(p)
            self._give_up()
            best = max(kept[0].elbo if kept else -np.inf for kept in self._best)
            on_look(int(self.ascent.steps.max()), best)
        if self.hessian:
            for p in everyone:
                self._try_hessians(p)
        return [self._outcome(p) for p in everyone]

    def _look(self, p: int) -> None:
        """Normals of low rank at the new iterates of a path, which may end here."""
        bounds = self._bounds[p]
        found = self._trails[p].follow(self.ascent.path(p, len(bounds)))
        normals = [normal for normal in found if normal is not None]
        scored = self._scored(normals, self.noise)
        rest = iter(scored)
        bounds += [-np.inf if normal is None else next(rest).elbo for normal in found]
        self._keep(p, scored)
        for each in scored:
            best = self._best_low[p]
            if best is None or each.elbo > best.elbo:
                self._best_low[p] = each

    def _give_up(self) -> None:
        """End the paths that have nothing left to find."""
        ended = [p for p, reason in enumerate(self.ascent.reasons) if reason == "converged"]
        goal = max((kept[0].elbo for p in ended if (kept := self._best[p])), default=-np.inf)
        for p in self.ascent.running:
            bounds = self._bounds[p]
            if len(bounds) < FEWEST_STEPS:
                continue
            early = int(len(bounds) * (1 - SHARE_BEHIND))
            values = self.ascent.path(p, len(bounds) - LOOK_EVERY).values
            pace = (values[-1] - values[0]) / LOOK_EVERY
            if len(bounds) >= 2 * FEWEST_STEPS and (
                max(bounds[early:]) < max(bounds[:early]) - NATS_BEHIND
            ):
                self.ascent.stop(p, "bound")
            elif values[-1] + STEPS_BEHIND * pace < goal - NATS_BEHIND:
                self.ascent.stop(p, "behind")

    def _try_hessians(self, p: int) -> None:
        """Normals with the exact curvature at some iterates of a path."""
        path = self.ascent.path(p)
        share = HESSIAN_ROWS // (len(self._best) * self.target.size)
        at = _spread(self._bounds[p], min(HESSIANS_OF_A_PATH, max(1, share)))
        if not len(at):
            at = np.array([0])
        normals: list[Normal] = []
        for i, hessian in zip(at, self.target.hessians(path.points[at]), strict=True):
            normals += full(path.points[i], path.gradients[i], hessian)
        self._keep(p, self._scored(normals, self.noise))

    def _outcome(self, p: int) -> Outcome:
        path = self.ascent.path(p)
        low = self._best_low[p]
        best = self._scored([each.normal for each in self._best[p]], self.final_noise)
        if not best:
            unit, none = np.ones(self.target.size), np.zeros((0, self.target.size))
            fallback = low_rank(path.points[-1], np.zeros(self.target.size), unit, none, none)
            best = [Candidate(-np.inf, fallback)]  # type: ignore[arg-type]
        return Outcome(
            max(best, key=lambda each: each.elbo).normal,
            None if low is None else low.normal,  # type: ignore[arg-type]
            len(path.values) - 1,
            str(self.ascent.reasons[p]),
        )

    def _scored(self, normals: Sequence[Normal], noise: np.ndarray) -> list[Candidate]:
        """The Normals with their bounds."""
        if not normals:
            return []
        draws = np.concatenate([normal.draw(noise) for normal in normals])
        values = self.target.values(draws).reshape(len(normals), len(noise))
        return [
            Candidate(_cautious(value - log_prob(normal, noise)), normal)
            for normal, value in zip(normals, values, strict=True)
        ]

    def _keep(self, p: int, scored: list[Candidate]) -> None:
        """Remember the best ones."""
        known = [each for each in [*self._best[p], *scored] if np.isfinite(each.elbo)]
        self._best[p] = sorted(known, key=lambda each: -each.elbo)[:FINALISTS]


class _Trail:
    """The pairs of a path, one iterate after the other."""

    def __init__(self, size: int, history_size: int) -> None:
        self.history_size = history_size
        self.alpha = np.ones(size)
        self.s, self.z = np.zeros((0, size)), np.zeros((0, size))

    def follow(self, path: Path) -> list[LowRank | None]:
        """The Normals at the iterates after the first, which is the last one of before."""
        found = []
        for i in range(1, len(path.values)):
            s = path.points[i] - path.points[i - 1]
            z = path.gradients[i - 1] - path.gradients[i]
            if is_curved(s, z):
                alpha = diagonal(self.alpha, s, z)
                if (np.isfinite(alpha) & (alpha > 0)).all():
                    self.alpha = alpha
                self.s = np.concatenate([self.s, s[None]])[-self.history_size :]
                self.z = np.concatenate([self.z, z[None]])[-self.history_size :]
            found.append(low_rank(path.points[i], path.gradients[i], self.alpha, self.s, self.z))
        return found


def find_starts(
    target: Target, rng: np.random.Generator, num_paths: int, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Uniform points ``(P, D)``, drawn anew where the density is not finite, and which ones are."""
    starts = rng.uniform(-radius, radius, (num_paths, target.size))
    good = np.zeros(num_paths, bool)
    for trial in range(START_TRIALS):
        at = np.flatnonzero(~good)
        if trial:
            starts[at] = rng.uniform(-radius, radius, (len(at), target.size))
        values, gradients = target.density(starts[at], at)
        good[at] = np.isfinite(values) & np.isfinite(gradients).all(-1)
        if good.all():
            break
    return starts, good


def draw(
    target: Target, rng: np.random.Generator, normals: Sequence[Normal], num_samples: int
) -> Draws:
    """Draw from the Normals of all paths, weigh and resample.

    The proposal of a draw is the mixture of all Normals, so that a mode counts by its mass and
    not by the number of paths that end there (Veach and Guibas 1995, the balance heuristic).
    """
    num_paths, size = len(normals), target.size
    noise = rng.standard_normal((num_paths, num_samples, size))
    points = np.stack([normal.draw(e) for normal, e in zip(normals, noise, strict=True)])
    values = target.values(points.reshape(-1, size)).reshape(num_paths, num_samples)
    values = np.where(values < np.inf, values, -np.inf)
    own = np.stack([log_prob(normal, e) for normal, e in zip(normals, noise, strict=True)])
    rows = points.reshape(-1, size)
    with np.errstate(over="ignore"):
        others = np.stack([log_prob(normal, normal.whiten(rows)) for normal in normals])
    others = np.where(np.isnan(others), -np.inf, others)
    mixture = _log_mean(others, 0).reshape(num_paths, num_samples)
    log_weights = values - mixture
    smoothed, khat = psis(log_weights.ravel())
    log_evidence = float(_log_mean(smoothed, 0))
    chances = np.exp(smoothed - smoothed.max())
    chosen = rng.choice(len(rows), num_samples, p=chances / chances.sum())
    return Draws(
        points,
        np.array([_mean(row) for row in values - own]),
        log_weights,
        psis((values - own).T).khat,
        float(khat),
        log_evidence,
        rows[chosen],
    )


def _spread(bounds: list[float], count: int) -> np.ndarray:
    """Numbers of up to so many iterates: the last one, the best ones, early ones and others."""
    last = len(bounds)
    if last <= count:
        return np.arange(1, last + 1)
    best = [i + 1 for i in np.argsort(bounds)[::-1]]
    early = range(1, last + 1)
    even = np.linspace(1, last, count).astype(int)
    order = [last, best[0], *best[1 : count // 8], *early[: count // 3], *even[::-1]]
    return np.array(sorted(list(dict.fromkeys(order))[:count]))


def _mean(x: np.ndarray) -> float:
    """The mean; minus infinity where one of the numbers is none, or all are too far below."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = x.mean()
    return float(mean) if mean < np.inf else -np.inf


def _cautious(x: np.ndarray) -> float:
    """The mean less its standard error: the best of many noisy means is else the luckiest."""
    mean = _mean(x)
    if mean == -np.inf:
        return mean
    with np.errstate(over="ignore"):
        return mean - float(x.std()) / math.sqrt(len(x))


def _log_mean(x: np.ndarray, axis: int) -> np.ndarray:
    """The logarithm of the mean of exponentials."""
    top = x.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).mean(axis)) + top.squeeze(axis)
