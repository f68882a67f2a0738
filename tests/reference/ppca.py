"""Maximum likelihood of probabilistic principal component analysis.

`z ~ N(0, I_q)`, `x ~ N(W z + mu, sigma^2 I_d)`. The best ELBO of a linear VAE with a
diagonal Normal guide is this maximum: the columns of `W` may be chosen orthogonal, and
then the posterior's covariance is diagonal.

References:
    Tipping and Bishop (1999), Probabilistic Principal Component Analysis, J. R. Stat.
    Soc. B 61(3), eq. 4-9 and appendix A.
    Lucas, Tucker, Grosse and Norouzi (2019), Don't Blame the ELBO!, arXiv 1911.02469,
    theorem 1.
"""

from typing import NamedTuple

import numpy as np


class PPCA(NamedTuple):
    """Parameters at the maximum, and the log-likelihood of all rows together."""

    loc: np.ndarray
    weight: np.ndarray
    noise_variance: float
    log_likelihood: float


def log_likelihood(x, loc, weight, noise_variance):
    """`sum_n log N(x_n; mu, W W^T + sigma^2 I)` (eq. 4)."""
    dim = x.shape[1]
    covariance = weight @ weight.T + noise_variance * np.eye(dim)
    residual = x - loc
    _, log_det = np.linalg.slogdet(covariance)
    quadratic = np.sum(residual * np.linalg.solve(covariance, residual.T).T)
    return -0.5 * (quadratic + len(x) * (log_det + dim * np.log(2.0 * np.pi)))


def maximum_likelihood(x, latent_dim):
    """The closed-form maximum (eq. 7-8) with the rotation `R = I`."""
    loc = x.mean(0)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    noise_variance = float(values[latent_dim:].mean())
    weight = vectors[:, :latent_dim] * np.sqrt(values[:latent_dim] - noise_variance)
    maximum = log_likelihood(x, loc, weight, noise_variance)
    return PPCA(loc, weight, noise_variance, float(maximum))


def posterior(x, fit):
    """Mean `(N, q)` and diagonal standard deviation `(q,)` of `p(z | x)` (eq. 6)."""
    precision = fit.weight.T @ fit.weight + fit.noise_variance * np.eye(fit.weight.shape[1])
    mean = np.linalg.solve(precision, fit.weight.T @ (x - fit.loc).T).T
    return mean, np.sqrt(fit.noise_variance * np.diag(np.linalg.inv(precision)))
