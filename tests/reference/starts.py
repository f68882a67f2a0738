"""Normals to start a guide from, and what is wrong with others; NumPy alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

# A number with the scale 1e-4 and a pair with 1e3, all three dependent.
LOC = np.array([3.0, -2e3, 5e2])
SCALES = np.array([1e-4, 1e3, 2e3])
ROOT = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.4, 0.7]])
SCALE_TRIL = SCALES[:, None] * ROOT
SPREADS = np.linalg.norm(SCALE_TRIL, axis=1)  # standard deviations
SITES: dict[str, tuple[int, ...]] = {"a": (), "b": (2,)}


def start(loc: Any = LOC, scale_tril: Any = SCALE_TRIL, sites: Any = SITES) -> SimpleNamespace:
    """What a guide reads of a start."""
    return SimpleNamespace(loc=loc, scale_tril=scale_tril, sites=sites)


def conditional() -> tuple[np.ndarray, np.ndarray]:
    """Slope and Cholesky factor of the pair given the number, in units of the latter's noise."""
    return SCALE_TRIL[1:, 0], SCALE_TRIL[1:, 1:]


def moved(shift: np.ndarray, factor: np.ndarray) -> SimpleNamespace:
    """A start from which the step ``shift + factor * z`` ends at the exact Normal."""
    scale_tril = SCALE_TRIL / factor
    return start(LOC - scale_tril @ shift, scale_tril)


_MODEL = "Expected start to be of this model; got {}. Pass what training.pathfinder returns for "
FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "missing": (start(sites={"b": (3,)}), ValueError, _MODEL.format("no site 'a'")),
    "other": (
        start(sites={**SITES, "c": ()}),
        ValueError,
        _MODEL.format("a site 'c', which the model does not have"),
    ),
    "shape": (
        start(sites={"a": (), "b": (1,)}),
        ValueError,
        _MODEL.format("site 'b' of unconstrained shape (1,) instead of (2,)"),
    ),
    "order": (
        start(sites=dict(reversed(SITES.items()))),
        ValueError,
        _MODEL.format("site 'b' in another place of the vector"),
    ),
    "loc": (
        start(loc=np.array([0.0, np.nan, np.inf])),
        ValueError,
        "Expected start.loc to be 3 finite numbers; got shape (3,), 2 of them not finite.",
    ),
    "matrix": (
        start(scale_tril=np.ones(3)),
        ValueError,
        "Expected start.scale_tril to be a lower triangular matrix of shape (3, 3) with a positive "
        "diagonal; got shape (3,) and other numbers. Pass the Cholesky factor of a covariance.",
    ),
    "covariance": (
        start(scale_tril=ROOT @ ROOT.T),
        ValueError,
        "Expected start.scale_tril to be a lower triangular matrix of shape (3, 3) with a positive "
        "diagonal; got shape (3, 3) and other numbers.",
    ),
    "sign": (
        start(scale_tril=-ROOT),
        ValueError,
        "Expected start.scale_tril to be a lower triangular matrix of shape (3, 3) with a positive "
        "diagonal; got shape (3, 3) and other numbers.",
    ),
    "kind": (
        {"loc": LOC},
        TypeError,
        "Expected start with the attributes loc, scale_tril and sites; got dict. Pass what "
        "training.pathfinder returns.",
    ),
}
