r"""Pareto-smoothed importance sampling: log-weights in, smoothed ones and their tail's shape out.

The largest weights are replaced by quantiles of a generalised Pareto distribution that is fitted
to them. Its shape, k-hat, says how many moments the weights have: below 1/2 a variance, below 1 a
mean. NumPy alone, and the same text in both packages.

References:
    Vehtari, Simpson, Gelman, Yao and Gabry, 2024, *Pareto Smoothed Importance Sampling*,
    arXiv:1507.02646, sec. 3 and appendix. Zhang and Stephens, 2009, *A New and Efficient
    Estimation Method for the Generalized Pareto Distribution*, Technometrics 51(3).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Exceedances with which the tail can be fitted at all.
FEWEST = 5
# Prior on the shape: that many draws of a tail with this shape.
PRIOR_DRAWS, PRIOR_SHAPE = 10, 0.5
# A weight that is smaller than the largest by more than this factor is as good as 0.
NEGLIGIBLE = float(np.log(np.finfo(float).tiny)) + 40
# Fewer exceedances than five within so much of the cutoff are none: an exact guide's rounding.
NEGLIGIBLE_GAP = 0.01
# Log-weights that agree up to so many units in the last place are equal.
ROUNDING = 64
# Numbers of one intermediate array: 32 MiB.
MOST_NUMBERS = 2**22


class PSIS(NamedTuple):
    """Smoothed log-weights, not normalised, and the shape of the tail.

    Attributes:
        log_weights: Of the shape of the raw ones, in double precision; the constant is kept, so
            that the log of their mean is an estimate of the log evidence.
        khat: Of that shape without its first axis. ``-inf`` if all draws of the tail have the
            largest weight: it has no tail. ``inf`` if fewer than five draws stand out, or all
            weights are 0: nothing is known.
    """

    log_weights: np.ndarray
    khat: np.ndarray


def psis(log_weights: np.ndarray) -> PSIS:
    """Smooth the largest weights along the first axis.

    Args:
        log_weights: Logs of importance ratios ``(S, *batch)``, of the type that they were
            computed in; ``-inf`` is a weight of 0.

    Raises:
        ValueError: If a log-weight is NaN or ``inf``, or there is none.
    """
    given = np.asarray(log_weights)
    raw = given.astype(float)
    if raw.ndim == 0 or raw.shape[0] == 0:
        raise ValueError(
            f"Expected log-weights of shape (num_samples, ...); got shape {raw.shape}. Pass at "
            "least one draw."
        )
    wrong = np.isnan(raw) | (raw == np.inf)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"Expected log-weights below infinity; got {raw[place]} at {place}, and "
            f"{int(wrong.sum())} of {raw.size} in all. Check the densities of model and guide at "
            "that draw."
        )
    num_samples = len(raw)
    # Of whole numbers nothing was rounded off.
    rounding = ROUNDING * float(np.finfo(given.dtype if given.dtype.kind == "f" else float).eps)
    columns = raw.reshape(num_samples, -1)
    khat = np.full(columns.shape[1], np.inf)
    length = tail_length(num_samples)
    step = max(1, MOST_NUMBERS // (_num_candidates(length) * length + num_samples))
    for start in range(0, columns.shape[1], step):
        block = slice(start, start + step)
        _smooth(columns[:, block], khat[block], length, rounding)
    return PSIS(columns.reshape(raw.shape), khat.reshape(raw.shape[1:]))


def tail_length(num_samples: int) -> int:
    """Number of draws in the tail."""
    return int(np.ceil(min(num_samples / 5, 3 * np.sqrt(num_samples))))


def threshold(num_samples: int) -> float:
    """The largest k-hat with which that many draws can be relied on."""
    return float(min(1 - 1 / np.log10(max(num_samples, 2)), 0.7))


def _smooth(columns: np.ndarray, khat: np.ndarray, length: int, rounding: float) -> None:
    """Smooth columns ``(S, B)`` and set their shapes ``(B,)``, both in place."""
    num_samples = len(columns)
    top = columns.max(axis=0)
    alive = top > -np.inf
    top = np.where(alive, top, 0.0)
    if num_samples == length:  # A single draw: no weight to compare the tail with.
        return
    first = num_samples - length - 1
    places = np.argpartition(columns, first, axis=0)[first:]
    values = np.take_along_axis(columns, places, axis=0)
    order = np.argsort(values, axis=0, kind="stable")
    places = np.take_along_axis(places, order, axis=0)[1:]
    values = np.take_along_axis(values, order, axis=0) - top
    cutoff, tail = np.maximum(values[0], NEGLIGIBLE), values[1:]
    # Ties with the cutoff are no exceedances: columns of the same number of them go together.
    counts = (tail > cutoff).sum(axis=0)
    exact = rounding * np.maximum(1.0, np.abs(top))
    flat = alive & (-values[0] <= np.where(counts < FEWEST, NEGLIGIBLE_GAP, exact))
    if length < FEWEST:
        flat = alive & (top - columns.min(axis=0) <= exact)
    khat[flat] = -np.inf
    counts = np.where(alive & ~flat, counts, 0)
    for count in np.unique(counts[counts >= FEWEST]):
        chosen = np.flatnonzero(counts == count)
        floor = cutoff[chosen]
        # In units of the largest weight; no cancellation where the weights are nearly equal.
        exceedances = np.exp(floor) * np.expm1(tail[-count:, chosen] - floor)
        shape, scale = _fit(exceedances)
        smooth = floor + np.log1p(_quantiles(shape, scale, count) * np.exp(-floor))
        columns[places[-count:, chosen], chosen] = np.minimum(smooth, 0.0) + top[chosen]
        khat[chosen] = shape


def _num_candidates(count: int) -> int:
    return 30 + int(np.sqrt(count))


def _fit(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and scale of generalised Pareto distributions of sorted positive draws ``(n, B)``.

    The posterior mean of b = -shape / scale under the empirical prior of Zhang and Stephens, by
    their quadrature; the shape is then drawn towards 1/2.
    """
    count = len(sample)
    grid = np.arange(1, _num_candidates(count) + 1)[:, None] - 0.5
    quartile = sample[int(count / 4 + 0.5) - 1]
    b = 1 / sample[-1] + (1 - np.sqrt(len(grid) / grid)) / (3 * quartile)
    shapes = _shape(b, sample)
    fit = count * (np.log(1 / _scale(b, shapes, sample)) - shapes - 1)
    weights = np.exp(fit - fit.max(axis=0))
    b = (weights * b).sum(axis=0) / weights.sum(axis=0)
    shape = _shape(b[None], sample)[0]
    scale = _scale(b, shape, sample)
    return (count * shape + PRIOR_DRAWS * PRIOR_SHAPE) / (count + PRIOR_DRAWS), scale


def _shape(b: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """The likeliest shape at given ``b`` of shape ``(m, B)``."""
    return np.log1p(-b[:, None] * sample).mean(axis=1)


def _scale(b: np.ndarray, shape: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """The scale ``-shape / b``; at 0 the mean of an exponential distribution."""
    exponential = (b == 0) | (shape == 0)
    return np.where(exponential, sample.mean(axis=0), -shape / np.where(exponential, 1.0, b))


def _quantiles(shape: np.ndarray, scale: np.ndarray, count: int) -> np.ndarray:
    """Quantiles at the middles of ``count`` equal parts: ``(count, B)``."""
    survival = -np.log1p(-(np.arange(count)[:, None] + 0.5) / count)
    exponential = shape == 0
    power = np.expm1(shape * survival) / np.where(exponential, 1.0, shape)
    return scale * np.where(exponential, survival, power)
