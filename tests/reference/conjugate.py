"""Normal models whose evidence and posterior are known in closed form.

- local: `z_n ~ N(mu, I)`, `x_n ~ N(z_n, I)`, one latent per row;
- global: `z ~ N(mu, I)`, `x_n ~ N(z, I)`, one latent for all rows;
- hierarchical: `t ~ N(mu, tau^2 I)`, `z_n ~ N(t, I)`, `x_n ~ N(z_n, I)`, both.

References:
    Bishop (2006), Pattern Recognition and Machine Learning, eq. 2.113-2.117 (linear
    Gaussian models) and 2.141-2.142 (the mean of a Normal).
"""

import numpy as np

LOG_2PI = np.log(2.0 * np.pi)


def log_evidence(x, mu):
    """`log p(x_n) = log N(x_n; mu, 2 I)` per row, `(*batch,)` from `(*batch, D)`."""
    return np.sum(-0.25 * (x - mu) ** 2 - 0.5 * np.log(2.0) - 0.5 * LOG_2PI, axis=-1)


def posterior(x, mu):
    """Mean `(*batch, D)` and standard deviation of `p(z_n | x_n)`."""
    return 0.5 * (x + mu), np.sqrt(0.5)


def log_joint(z, x, mu):
    """`log p(x_n, z_n)`, summed over the last axis."""
    return np.sum(-0.5 * (z - mu) ** 2 - 0.5 * (x - z) ** 2 - LOG_2PI, axis=-1)


def global_log_evidence(x, mu):
    """Joint `log p(x_1..x_N)` of the global model, a scalar from `(N, D)`.

    Each dimension is `N(mu 1, I + 1 1^T)`, with determinant `1 + N`.
    """
    num_rows, dim = x.shape
    residual = x - mu
    quadratic = np.sum(residual**2) - np.sum(residual.sum(0) ** 2) / (1.0 + num_rows)
    return -0.5 * (quadratic + dim * np.log(1.0 + num_rows) + x.size * LOG_2PI)


def global_posterior(x, mu):
    """Mean `(D,)` and standard deviation of `p(z | x_1..x_N)` of the global model."""
    num_rows = len(x)
    return (mu + x.sum(0)) / (1.0 + num_rows), (1.0 + num_rows) ** -0.5


def hierarchical_log_evidence(x, mu, tau=1.0):
    """Joint `log p(x_1..x_N)`: each dimension is `N(mu 1, 2 I + tau^2 1 1^T)`."""
    num_rows, dim = x.shape
    residual = x - mu
    share = tau**2 / (2.0 + num_rows * tau**2)
    quadratic = 0.5 * (np.sum(residual**2) - share * np.sum(residual.sum(0) ** 2))
    log_det = num_rows * np.log(2.0) + np.log1p(0.5 * num_rows * tau**2)
    return -0.5 * (quadratic + dim * log_det + x.size * LOG_2PI)


def hierarchical_posterior(x, mu, tau=1.0):
    """Mean `(D,)` and standard deviation of `p(t | x_1..x_N)`."""
    precision = tau**-2 + 0.5 * len(x)
    return (mu * tau**-2 + 0.5 * x.sum(0)) / precision, precision**-0.5
