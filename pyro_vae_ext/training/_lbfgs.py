"""L-BFGS from many starts side by side, in NumPy; the same text in both packages.

A density is asked for at one point of every path that still runs, as one batch: a path that needs
two trials for a step does not hold up the others, and what a density costs is shared by all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Rows `(n, D)` and the number of the path of each -> log-densities `(n,)`, gradients `(n, D)`.
Density = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Of the line search: what of the predicted gain a step must keep, what of the slope it may keep,
# and how many trials it has (Nocedal and Wright 2006, ch. 3).
SUFFICIENT, CURVATURE, MAX_TRIALS = 1e-4, 0.9, 40
# Least cosine, so to say, of the two vectors of a pair (Zhang et al. 2022, algorithm 3).
LEAST_CURVATURE = 1e-12
# Steps in a row that promise and bring no more than `tolerance` nats.
IDLE_STEPS = 3


class Path(NamedTuple):
    """The iterates of one path, from its start on.

    Attributes:
        points: Vectors ``(L, D)``.
        values: Log-densities ``(L,)``.
        gradients: Gradients ``(L, D)``.
    """

    points: np.ndarray
    values: np.ndarray
    gradients: np.ndarray


def diagonal(alpha: np.ndarray, s: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The diagonal of an inverse Hessian, updated with a pair; all ``(..., D)``.

    ``s`` is a step and ``z`` what the gradient lost along it. The diagonal of the BFGS update of
    a diagonal matrix (Gilbert and Lemarechal 1989, eq. 4.9; Zhang et al. 2022, algorithm 3).
    It is not finite where rounding leaves nothing of a tiny pair; callers keep the old one then.
    """
    a = (z * alpha * z).sum(-1, keepdims=True)
    b = (z * s).sum(-1, keepdims=True)
    c = (s / alpha * s).sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return 1 / (a / (b * alpha) + z**2 / b - a * (s / alpha) ** 2 / (b * c))


def is_curved(s: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Whether the density bends down along a step, as the pair's update needs."""
    return (s * z).sum(-1) > LEAST_CURVATURE * (z * z).sum(-1)


class _Memory:
    """The last pairs of every path, and their inverse Hessians."""

    def __init__(self, num_paths: int, size: int, dim: int) -> None:
        self.s = np.zeros((num_paths, size, dim))
        self.z = np.zeros((num_paths, size, dim))
        self.rho = np.zeros((num_paths, size))  # 1 / (s . z); 0 where there is no pair
        self.alpha = np.ones((num_paths, dim))

    def push(self, paths: np.ndarray, s: np.ndarray, z: np.ndarray) -> None:
        """Add a pair to each of some paths, where it is curved."""
        kept = is_curved(s, z)
        paths, s, z = paths[kept], s[kept], z[kept]
        alpha = diagonal(self.alpha[paths], s, z)
        good = (np.isfinite(alpha) & (alpha > 0)).all(-1, keepdims=True)
        self.alpha[paths] = np.where(good, alpha, self.alpha[paths])
        for store, new in ((self.s, s), (self.z, z), (self.rho, 1 / (s * z).sum(-1))):
            store[paths] = np.roll(store[paths], -1, axis=1)
            store[paths, -1] = new

    def forget(self, paths: np.ndarray) -> None:
        """Start anew on some paths."""
        self.rho[paths], self.alpha[paths] = 0, 1

    def times(self, paths: np.ndarray, g: np.ndarray) -> np.ndarray:
        """The inverse Hessians times vectors ``(n, D)``: the recursion of two loops."""
        s, z, rho = self.s[paths], self.z[paths], self.rho[paths]
        size = s.shape[1]
        weights = np.zeros((size, len(g)))
        for i in reversed(range(size)):
            weights[i] = rho[:, i] * (s[:, i] * g).sum(-1)
            g = g - weights[i, :, None] * z[:, i]
        g = self.alpha[paths] * g
        for i in range(size):
            weight = weights[i] - rho[:, i] * (z[:, i] * g).sum(-1)
            g = g + weight[:, None] * s[:, i]
        return g


class Ascent:
    """Climbs to a mode from every start.

    A path has converged when three steps in a row neither promise, by the squared length of the
    gradient in units of the inverse Hessian, nor bring more than ``tolerance`` nats, or what the
    density can tell apart.

    Args:
        density: Log-densities and gradients of a batch of points.
        starts: Points ``(P, D)`` where both are finite.
        max_iterations: Steps of a path.
        history_size: Pairs that make an inverse Hessian.
        tolerance: In nats.
        resolution: Relative error of a log-density.
    """

    def __init__(
        self,
        density: Density,
        starts: np.ndarray,
        *,
        max_iterations: int,
        history_size: int,
        tolerance: float = 1e-6,
        resolution: float = float(np.finfo(np.float64).eps),
    ) -> None:
        self.density = density
        self.max_iterations = max_iterations
        self.tolerance, self.resolution = tolerance, resolution
        num_paths, dim = starts.shape
        everyone = np.arange(num_paths)
        self.u = np.array(starts, dtype=np.float64)
        self.f, self.g = density(self.u, everyone)
        self.reasons: list[str | None] = [None] * num_paths
        self.steps, self.idle = np.zeros(num_paths, int), np.zeros(num_paths, int)
        self._rows = [[(self.u[p].copy(), self.f[p], self.g[p].copy())] for p in everyone]
        self._memory = _Memory(num_paths, history_size, dim)
        # Of the search: direction, slope, step, what is known to be too short and too long.
        self.d, self.slope = self.g.copy(), np.zeros(num_paths)
        self.t, self.trials = np.ones(num_paths), np.zeros(num_paths, int)
        self.low, self.high = np.zeros(num_paths), np.full(num_paths, np.inf)
        self.plain = np.ones(num_paths, bool)  # the direction is the gradient itself
        self._restart(everyone)
        self._end(everyone[self.slope <= 0], "converged")

    @property
    def running(self) -> np.ndarray:
        """Numbers of the paths that have not ended."""
        return np.flatnonzero([reason is None for reason in self.reasons])

    def path(self, p: int, first: int = 0) -> Path:
        """The iterates of a path from a number on."""
        points, values, gradients = zip(*self._rows[p][first:], strict=True)
        return Path(np.stack(points), np.array(values), np.stack(gradients))

    def stop(self, p: int, reason: str) -> None:
        """End a path."""
        self._end(np.array([p]), reason)

    def advance(self, num_steps: int) -> None:
        """Take up to so many steps on every path that still runs."""
        goal = self.steps + num_steps
        while len(at := np.array([p for p in self.running if self.steps[p] < goal[p]], int)):
            self._trial(at)

    def _trial(self, at: np.ndarray) -> None:
        """One evaluation of the paths ``at``, and what follows from it."""
        step = self.t[at, None] * self.d[at]
        f, g = self.density(self.u[at] + step, at)
        finite = np.isfinite(f) & np.isfinite(g).all(-1)
        f, g = np.where(finite, f, -np.inf), np.where(finite[:, None], g, 0)
        noise = 4 * self.resolution * np.abs(self.f[at])
        wanted = self.f[at] + SUFFICIENT * self.t[at] * self.slope[at] - noise
        gains, flat = f >= wanted, (g * self.d[at]).sum(-1) <= CURVATURE * self.slope[at]
        self.trials[at] += 1
        spent = self.trials[at] >= MAX_TRIALS
        self._narrow(at[~gains], f[~gains])
        self._widen(at[gains & ~flat])

        done = gains & (flat | spent)
        taken, lost = at[done], at[~gains & spent]
        gain = f[done] - self.f[taken]
        self._memory.push(taken, step[done], self.g[taken] - g[done])
        self.u[taken] += step[done]
        self.f[taken], self.g[taken] = f[done], g[done]
        self.steps[taken] += 1
        for p in taken:
            self._rows[p].append((self.u[p].copy(), self.f[p], self.g[p].copy()))
        # A search that fails starts once more along the gradient, without a memory.
        self._end(lost[self.plain[lost]], "line_search")
        self._restart(lost[~self.plain[lost]])
        self._turn(taken)
        enough = np.maximum(self.tolerance, 16 * self.resolution * np.abs(self.f[taken]))
        idle = (self.slope[taken] < enough) & (gain < enough)
        self.idle[taken] = np.where(idle, self.idle[taken] + 1, 0)
        self._end(taken[(self.idle[taken] >= IDLE_STEPS) | (self.slope[taken] <= 0)], "converged")
        self._end(taken[self.steps[taken] >= self.max_iterations], "max_iterations")

    def _narrow(self, at: np.ndarray, f: np.ndarray) -> None:
        """A step was too long: the top of a parabola, or half of the way."""
        low, t, slope = self.low[at], self.t[at], self.slope[at]
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            top = slope * t**2 / (2 * (self.f[at] + slope * t - f))
        top = np.clip(np.where(np.isfinite(top), top, 0), 0.1 * t, 0.5 * t)
        self.high[at] = t
        self.t[at] = np.where(low > 0, (low + t) / 2, top)

    def _widen(self, at: np.ndarray) -> None:
        """A step was too short: half of the way to one that was too long, or twice as long."""
        low, high = self.t[at], self.high[at]
        self.low[at] = low
        self.t[at] = np.where(np.isinf(high), 2 * low, (low + high) / 2)

    def _turn(self, at: np.ndarray) -> None:
        """New directions, after a step."""
        self.d[at] = self._memory.times(at, self.g[at])
        self.slope[at] = (self.g[at] * self.d[at]).sum(-1)
        self.t[at], self.trials[at], self.plain[at] = 1, 0, False
        self.low[at], self.high[at] = 0, np.inf
        self._restart(at[~(np.isfinite(self.slope[at]) & (self.slope[at] >= 0))])

    def _restart(self, at: np.ndarray) -> None:
        """New directions along the gradient."""
        self._memory.forget(at)
        self.d[at] = self.g[at]
        self.slope[at] = (self.g[at] ** 2).sum(-1)
        self.t[at] = 1 / np.maximum(1, np.sqrt(self.slope[at]))
        self.trials[at], self.plain[at] = 0, True
        self.low[at], self.high[at] = 0, np.inf

    def _end(self, at: np.ndarray, reason: str) -> None:
        for p in at:
            self.reasons[p] = self.reasons[p] or reason
