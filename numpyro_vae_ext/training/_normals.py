r"""Normals along a path, in NumPy; the same text in both packages.

An inverse Hessian of low rank is :math:`\operatorname{diag}\alpha + \beta \gamma \beta^\top`, from
the last steps of a quasi-Newton path; a full one comes from the Hessian itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# The smallest curvature that counts, in units of the diagonal: of the 1e3 wide there is no more.
LEAST_EIGENVALUE = 1e-6


class LowRank(NamedTuple):
    r"""A Normal with the covariance :math:`\operatorname{diag}\alpha + \beta\gamma\beta^\top`.

    Attributes:
        loc: Mean ``(D,)``.
        alpha: Diagonal ``(D,)``.
        beta: Factor ``(D, 2J)``.
        gamma: Symmetric matrix ``(2J, 2J)``.
        basis: Orthonormal columns ``(D, K)`` that span ``beta``, in units of ``sqrt(alpha)``.
        chol: Lower triangular ``(K, K)``: the Cholesky factor of the covariance in that basis.
    """

    loc: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    gamma: np.ndarray
    basis: np.ndarray
    chol: np.ndarray

    @property
    def log_scale(self) -> float:
        """Half of the log-determinant of the covariance."""
        return float(0.5 * np.log(self.alpha).sum() + np.log(np.diag(self.chol)).sum())

    def draw(self, noise: np.ndarray) -> np.ndarray:
        """Draws ``(n, D)`` from standard Normal numbers of that shape (algorithm 4)."""
        inner = noise @ self.basis
        within = inner @ (self.chol.T - np.eye(len(self.chol)))
        return self.loc + np.sqrt(self.alpha) * (noise + within @ self.basis.T)

    def whiten(self, x: np.ndarray) -> np.ndarray:
        """The numbers ``(n, D)`` that :meth:`draw` takes to ``x``."""
        w = (x - self.loc) / np.sqrt(self.alpha)
        inner = w @ self.basis
        within = np.linalg.solve(self.chol, inner.T).T - inner
        return w + within @ self.basis.T

    def scale_tril(self) -> np.ndarray:
        """The Cholesky factor of the covariance ``(D, D)``."""
        within = (self.chol - np.eye(len(self.chol))) @ self.basis.T
        root = np.sqrt(self.alpha)[:, None] * (np.eye(len(self.loc)) + self.basis @ within)
        return triangular(root)


class Full(NamedTuple):
    """A Normal with a Cholesky factor.

    Attributes:
        loc: Mean ``(D,)``.
        tril: Lower triangular ``(D, D)``.
    """

    loc: np.ndarray
    tril: np.ndarray

    @property
    def log_scale(self) -> float:
        """Half of the log-determinant of the covariance."""
        return float(np.log(np.diag(self.tril)).sum())

    def draw(self, noise: np.ndarray) -> np.ndarray:
        """Draws ``(n, D)`` from standard Normal numbers of that shape."""
        return self.loc + noise @ self.tril.T

    def whiten(self, x: np.ndarray) -> np.ndarray:
        """The numbers ``(n, D)`` that :meth:`draw` takes to ``x``."""
        return np.linalg.solve(self.tril, (x - self.loc).T).T

    def scale_tril(self) -> np.ndarray:
        """The Cholesky factor of the covariance ``(D, D)``."""
        return self.tril


Normal = LowRank | Full


def log_prob(normal: Normal, whitened: np.ndarray) -> np.ndarray:
    """Log-densities ``(n,)`` of draws, from the numbers ``(n, D)`` that they were made of."""
    dim = whitened.shape[-1]
    return -0.5 * (whitened**2).sum(-1) - 0.5 * dim * math.log(2 * math.pi) - normal.log_scale


def triangular(root: np.ndarray) -> np.ndarray:
    """The lower triangular L with a positive diagonal and ``L L' = root root'``."""
    r: np.ndarray = np.linalg.qr(root.T)[1]
    signs = np.where(np.diag(r) < 0, -1.0, 1.0)
    return r.T * signs


def low_rank(
    point: np.ndarray, gradient: np.ndarray, alpha: np.ndarray, s: np.ndarray, z: np.ndarray
) -> LowRank | None:
    r"""The Normal at a point of a path; None where numbers give none.

    With the pairs as columns of :math:`S` and :math:`Z`, :math:`R` the upper triangle of
    :math:`S^\top Z` and :math:`E` its diagonal,

    .. math:: \beta = (\operatorname{diag}(\alpha) Z, S), \qquad
              \gamma = \begin{pmatrix} 0 & -R^{-1} \\ -R^{-\top} &
              R^{-\top} (E + Z^\top \operatorname{diag}(\alpha) Z) R^{-1} \end{pmatrix},

    and the mean is one Newton step from the point (Zhang et al. 2022, algorithms 3 and 4).

    Args:
        point: Where the path is, ``(D,)``.
        gradient: Of the log-density there.
        alpha: Diagonal ``(D,)`` of :func:`diagonal`.
        s: The last steps ``(J, D)``, all of them curved, the latest at the end.
        z: What the gradient lost along each.
    """
    num_pairs = len(s)
    products = s @ z.T
    inverse = np.linalg.inv(np.triu(products)) if num_pairs else products
    corner = inverse.T @ (np.diag(np.diag(products)) + z @ (alpha * z).T) @ inverse
    nothing = np.zeros((num_pairs, num_pairs))
    beta = np.concatenate([alpha * z, s]).T
    gamma = np.block([[nothing, -inverse], [-inverse.T, corner]])
    root = np.sqrt(alpha)
    try:
        basis, r = np.linalg.qr(beta / root[:, None])
        chol = np.linalg.cholesky(np.eye(len(r)) + r @ gamma @ r.T)
    except np.linalg.LinAlgError:
        return None
    loc = point + alpha * gradient + beta @ (gamma @ (beta.T @ gradient))
    found = LowRank(loc, alpha, beta, gamma, basis, chol)
    return found if np.isfinite(loc).all() and np.isfinite(found.log_scale) else None


def full(point: np.ndarray, gradient: np.ndarray, hessian: np.ndarray) -> list[Full]:
    """The Normals with the curvature at a point: around the point, and one Newton step on.

    Directions in which the density bends up get the width of as strong a bend down.
    """
    curvature = -(hessian + hessian.T) / 2
    if not np.isfinite(curvature).all():
        return []
    # In units of the diagonal: scales of many orders of magnitude leave few digits otherwise.
    largest = np.abs(np.diag(curvature)).max(initial=0.0)
    unit = np.sqrt(np.maximum(np.abs(np.diag(curvature)), np.finfo(float).tiny * 1e8))
    if largest == 0:
        return []
    try:
        values, vectors = np.linalg.eigh(curvature / unit / unit[:, None])
    except np.linalg.LinAlgError:
        return []
    width = 1 / np.sqrt(np.maximum(np.abs(values), LEAST_EIGENVALUE))
    root = vectors * width / unit[:, None]
    tril = triangular(root)
    step = root @ (root.T @ gradient)
    if not (np.isfinite(tril).all() and (np.diag(tril) > 0).all() and np.isfinite(step).all()):
        return []
    return [Full(point, tril), Full(point + step, tril)]
