"""Inverse Hessians along a quasi-Newton path, as matrices, straight from the definitions."""

from __future__ import annotations

import numpy as np


def diagonal(alpha: np.ndarray, s: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Diagonal of the inverse Hessian after a pair (Gilbert and Lemarechal 1989).

    The Hessian ``diag(1 / alpha)``, scaled by ``z' alpha z / s'z``, gets the direct BFGS update;
    what counts of it is the diagonal.
    """
    hessian = np.diag(1 / alpha) * (z @ (alpha * z)) / (s @ z)
    bent = hessian @ s
    updated = hessian - np.outer(bent, bent) / (s @ bent) + np.outer(z, z) / (s @ z)
    return 1 / np.diag(updated)


def covariance(alpha: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Inverse BFGS updates of ``diag(alpha)``, one pair after the other."""
    found = np.diag(alpha)
    eye = np.eye(len(alpha))
    for s, z in pairs:
        rho = 1 / (s @ z)
        left = eye - rho * np.outer(s, z)
        found = left @ found @ left.T + rho * np.outer(s, s)
    return found
