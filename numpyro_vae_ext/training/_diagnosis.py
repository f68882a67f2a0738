"""What is said of a fitted posterior: numbers, and one sentence.

The same text in both packages, but for the name of the package.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from numpyro_vae_ext import _psis

# Paths whose bound is at most so many nats below the best belong to the posterior; such Normals
# are apart if a mean is so many standard deviations of the other away, per number.
BEHIND, APART = 10.0, 3.0
# Nats between the bounds of restarts that are one.
SAME_BOUND = 0.1
# Share of the draws that weights are worth that hardly differ.
NEARLY_ALL = 0.9


class Diagnosis(NamedTuple):
    """How good a fitted posterior is, by draws that the training has not seen.

    Attributes:
        elbo: The bound, the mean of the log-weights; minus infinity where one draw has no density.
        elbo_error: Its standard error.
        log_evidence: The log of the mean of the smoothed weights.
        log_evidence_error: Its standard error; NaN where k-hat is too large.
        khat: Shape of the weights' tail.
        threshold: The largest k-hat that can be relied on.
        ess: Effective number of draws among ``num_samples``.
        num_samples: Number of draws.
        converged: Whether the training came to its end before the budget was spent.
        num_modes: Modes that the paths ended at, as far as their Normals tell; 1 without paths.
        advice: What to do next, in one sentence.
    """

    elbo: float
    elbo_error: float
    log_evidence: float
    log_evidence_error: float
    khat: float
    threshold: float
    ess: float
    num_samples: int
    converged: bool
    num_modes: int
    advice: str


def diagnose(
    log_weights: np.ndarray,
    *,
    converged: bool,
    last_gain: float,
    num_modes: int,
    tempered: bool,
    is_flow: bool,
    restarts: list[float],
) -> Diagnosis:
    """The numbers of some log-weights ``(S,)``, and the advice."""
    count = len(log_weights)
    # Where the model has no density, a draw has no weight.
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    lost = int(np.isneginf(log_weights).sum())
    smoothed, khat = _psis.psis(log_weights)
    top = smoothed.max()
    weights = np.exp(smoothed - top)
    share = weights / weights.mean()
    threshold = _psis.threshold(count)
    error = math.sqrt(((share - 1) ** 2).sum() / (count * (count - 1.0)))
    found = Diagnosis(
        elbo=float(log_weights.mean()),
        elbo_error=math.nan if lost else float(log_weights.std(ddof=1) / math.sqrt(count)),
        log_evidence=float(np.log(weights.mean()) + top),
        log_evidence_error=error if khat < threshold else math.nan,
        khat=float(khat),
        threshold=float(threshold),
        ess=float(count**2 / (share**2).sum()),
        num_samples=count,
        converged=converged,
        num_modes=num_modes,
        advice="",
    )
    if lost:
        advice = (
            f"The model has no density at {lost} of {count} draws, so that the bound is infinite: "
            "look for what overflows, or give the sites a support without a hole."
        )
    elif num_modes > 1 and not tempered:
        advice = (
            f"The paths ended at {num_modes} modes, of which the guide may hold one: fit with "
            "temper=True."
        )
    elif not converged and last_gain > SAME_BOUND:
        advice = (
            f"The bound still rose by {last_gain:.2g} nats in the last window: raise num_steps; if "
            "that never ends, look for an improper prior."
        )
    else:
        differ = len(restarts) > 1 and max(restarts) - min(restarts) > SAME_BOUND
        advice = _by_weights(found, is_flow, differ)
    return found._replace(advice=advice)


def _by_weights(found: Diagnosis, is_flow: bool, differ: bool) -> str:
    """The advice that follows from the weights."""
    if found.khat < found.threshold:
        return (
            f"K-hat {found.khat:.2f} is below {found.threshold:.2f}: the guide can be relied on; "
            "sample_posterior with num_importance removes most of the error that is left."
        )
    told = f"K-hat {found.khat:.2f} is not below {found.threshold:.2f}"
    if found.ess > NEARLY_ALL * found.num_samples:
        return (
            f"{told}, though the weights are nearly equal (effective size "
            f"{found.ess / found.num_samples:.1%}): means and standard deviations can be relied "
            "on, the far tails cannot."
        )
    told += ": the guide is too narrow somewhere; "
    if not is_flow:
        return told + "fit with family=IAF."
    if differ:
        return told + "restarts ended at different bounds: raise num_restarts, or temper=True."
    return told + (
        "fit with more flows, functools.partial(IAF, num_flows=8), reparameterise the model, or "
        "run MCMC through the guide with NeuTraReparam."
    )


def count_modes(start: Any) -> int:
    """Modes among the Normals of a result of ``pathfinder``."""
    if not all(hasattr(start, name) for name in ("elbos", "locs", "scale_trils")):
        return 1
    elbos, locs = np.asarray(start.elbos), np.asarray(start.locs, float)
    trils = np.asarray(start.scale_trils, float)
    modes: list[int] = []
    for p in np.argsort(-elbos):
        if not elbos[p] > elbos.max() - BEHIND:
            break
        if all(_apart(locs, trils, p, q) and _apart(locs, trils, q, p) for q in modes):
            modes.append(int(p))
    return max(1, len(modes))


def pooled(start: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Cholesky factor of the Normals of all paths that belong to the posterior."""
    loc, scale_tril = np.asarray(start.loc, float), np.asarray(start.scale_tril, float)
    if not hasattr(start, "locs"):
        return loc, scale_tril
    elbos = np.asarray(start.elbos)
    kept = elbos > elbos.max() - BEHIND
    locs, trils = np.asarray(start.locs, float)[kept], np.asarray(start.scale_trils, float)[kept]
    mean = locs.mean(0)
    away = locs - mean
    covariance = (trils @ trils.transpose(0, 2, 1)).mean(0) + away.T @ away / len(away)
    return mean, np.linalg.cholesky(covariance)


def _apart(locs: np.ndarray, trils: np.ndarray, one: int, other: int) -> bool:
    """Whether one mean is far from another, by the other's standard deviations."""
    away = np.linalg.solve(trils[other], locs[one] - locs[other])
    return bool(np.sqrt((away**2).mean()) > APART)
