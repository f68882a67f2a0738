"""Latent utilisation of a linear-Gaussian pair, and the information of a mixture of Normals.

The model is z ~ N(0, I), x ~ N(W z, s^2 I); the guide is z ~ N(m(x), diag(t^2)). Arrays: ``mean``
(N, d), ``scale`` (d,), ``weight`` (D, d), ``data`` (N, D).
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp


def kl(mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Divergence from N(0, 1) per row and dimension."""
    return 0.5 * (mean**2 + scale**2 - 1.0) - np.log(scale)


def log_likelihoods(
    data: np.ndarray, mean: np.ndarray, scale: np.ndarray, weight: np.ndarray, noise: float
) -> np.ndarray:
    """E log p(x_i | z) for z of row j, (N, N)."""
    error = ((data[:, None] - mean @ weight.T) ** 2).sum(-1)
    spread = (weight**2 @ scale**2).sum()
    size = data.shape[-1]
    return -0.5 * ((error + spread) / noise**2 + size * np.log(2 * np.pi * noise**2))


def others(table: np.ndarray) -> np.ndarray:
    """Mean over all other columns, by row."""
    return (table.sum(1) - np.diag(table)) / (len(table) - 1)


def normal_log_prob(z: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (-0.5 * ((z - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum(-1)


def bounds(
    mean: np.ndarray, scale: np.ndarray, num_contrasts: int, num_draws: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Lower and upper bound and the information of the rows: means and Monte Carlo errors.

    Each time one row, one draw and one set of other rows, chosen by a random permutation.
    """
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(len(mean)), (num_draws, 1)), axis=1)
    z = mean[order[:, 0]] + scale * rng.standard_normal((num_draws, mean.shape[-1]))
    scores = normal_log_prob(z[:, None], mean[order], scale)
    some = scores[:, : num_contrasts + 1]
    own = scores[:, 0]
    found = {
        "mi_lower": own - logsumexp(some, 1) + np.log(num_contrasts + 1),
        "mi_upper": own - logsumexp(some[:, 1:], 1) + np.log(num_contrasts),
        "information": own - logsumexp(scores, 1) + np.log(len(mean)),
    }
    return {k: (v.mean(), v.std() / np.sqrt(num_draws)) for k, v in found.items()}


def auxiliary_bounds(
    mean: np.ndarray, side: float, size: int, num_contrasts: int, num_draws: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The bounds for z ~ N(m + a, side^2), a ~ N(0, 1), with ``size`` draws of a; mean (N,)."""
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(len(mean)), (num_draws, 1)), axis=1)
    loc = mean[order[:, : num_contrasts + 1]]
    generating = rng.standard_normal(num_draws)
    z = loc[:, 0] + generating + side * rng.standard_normal(num_draws)

    def log_mean(a: np.ndarray) -> np.ndarray:
        error = (z[:, None, None] - loc[:, : a.shape[1], None] - a) / side
        return logsumexp(-0.5 * error**2, -1) - np.log(size)

    fresh = log_mean(rng.standard_normal((num_draws, num_contrasts + 1, size)))
    among = rng.standard_normal((num_draws, 1, size))
    among[:, 0, 0] = generating
    own = log_mean(among)
    every = logsumexp(np.concatenate([own, fresh[:, 1:]], 1), 1) - np.log(num_contrasts + 1)
    others = logsumexp(fresh[:, 1:], 1) - np.log(num_contrasts)
    found = {"mi_lower": fresh[:, 0] - every, "mi_upper": own[:, 0] - others}
    return {k: (v.mean(), v.std() / np.sqrt(num_draws)) for k, v in found.items()}


def information(log_densities: np.ndarray, step: float) -> float:
    """Mutual information of a row and a number, from log q(z | x_i) on a grid, (N, grid)."""
    mixture = logsumexp(log_densities, 0) - np.log(len(log_densities))
    ratio = np.where(np.isfinite(log_densities), log_densities - mixture, 0.0)
    return float((np.exp(log_densities) * ratio).sum() * step / len(log_densities))


def one_contrast(log_densities: np.ndarray, step: float) -> float:
    """Expectation of the lower bound with one other row: the information of pairs of rows."""
    rows = len(log_densities)
    pairs = [(i, j) for i in range(rows) for j in range(i)]
    return float(np.mean([information(log_densities[list(pair)], step) for pair in pairs]))
