"""Variational Gaussian process.

`xi ~ N(0, I)`, `f_i(xi) ~ GP(0, K) | {(s_n, t_ni)}`, `z_i ~ N(mu_i + f_i, sigma_i^2)`, with the
kernel `K(x, y) = alpha^2 (k(x / l, y / l) + jitter k(0, 0) [x is y])` and the reverse model
`r(xi | z, c) q(f | xi, z, c)`, with which `f` drops out.

The systems are solved as they stand, with a general solver and a row at a time: nothing is shared
with a Cholesky factor.

References:
    Tran, Ranganath and Blei (2016), The Variational Gaussian Process, arXiv 1511.06499,
    sec. 2.2 and 3.1-3.2. Rasmussen and Williams (2006), Gaussian Processes for Machine Learning,
    eq. 2.24 and 2.38 (the conditional process) and 4.9 with a length scale per input.
"""

import numpy as np

from . import mean_field
from .auxiliary import joined, log_prob, part


def kernel(x, y, log_lengthscale, log_amplitude):
    """`alpha^2 exp(-1/2 sum_j (x_j - y_j)^2 / l_j^2)`, `(n, m)` of `(n, c)` and `(m, c)`."""
    difference = (x[:, None] - y[None]) * np.exp(-log_lengthscale)
    return np.exp(2.0 * log_amplitude - 0.5 * np.sum(difference**2, axis=-1))


def before(x, width, mean):
    """The mean function at inputs `(n, c)`: their own coordinates, or 0, `(n, width)`."""
    result = np.zeros((len(x), width), x.dtype)
    if mean == "identity":
        shared = min(width, x.shape[1])
        result[:, :shared] = x[:, :shared]
    return result


def conditional(x, sources, targets, log_lengthscale, log_amplitude, jitter, mean="identity"):
    """Mean `(n, d)` and covariance `(n, n)` of the process at `(n, c)` (eq. 2.24, 2.38)."""
    shape = log_lengthscale, log_amplitude
    noise = jitter * np.exp(2.0 * log_amplitude)
    matrix = kernel(sources, sources, *shape) + noise * np.eye(len(sources))
    solved = np.linalg.solve(matrix, kernel(sources, x, *shape))
    cross = kernel(x, sources, *shape)
    covariance = kernel(x, x, *shape) + noise * np.eye(len(x)) - cross @ solved
    width = targets.shape[1]
    moved = targets - before(sources, width, mean)
    return before(x, width, mean) + solved.T @ moved, covariance


def data(weights, context, amortize):
    """Sources, targets, log length scales and log amplitude for one row of context."""
    sources, targets = weights["sources"], weights["targets"]
    log_lengthscale, log_amplitude = weights["log_lengthscale"], weights["log_amplitude"]
    if amortize != "none":
        targets = targets + (weights["targets_head.weight"] @ context).reshape(targets.shape)
    if amortize == "all":
        sources = sources + (weights["sources_head.weight"] @ context).reshape(sources.shape)
        moved = mean_field.bounded(weights["kernel_head.weight"] @ context)
        log_lengthscale = log_lengthscale + moved[:-1]
        log_amplitude = log_amplitude + moved[-1]
    return sources, targets, log_lengthscale, log_amplitude


def process(xi, weights, context=None, *, amortize=None, jitter=1e-4, mean="identity", **_):
    """Mean and log standard deviation of `f(xi)`, a draw a row: `(*batch, d)`, `(*batch, 1)`."""
    amortize = amortize or ("none" if context is None else "targets")
    batch = xi.shape[:-1]
    if context is not None:
        context = np.broadcast_to(context, (*batch, context.shape[-1]))
    means, log_scales = {}, {}
    for index in np.ndindex(batch):
        row = None if context is None else context[index]
        given = data(weights, row, amortize)
        loc, covariance = conditional(xi[index][None], *given, jitter, mean)
        means[index], log_scales[index] = loc[0], 0.5 * np.log(covariance[0, 0])
    indices = list(np.ndindex(batch))
    loc = np.stack([means[i] for i in indices]).reshape(*batch, -1)
    return loc, np.stack([log_scales[i] for i in indices]).reshape(*batch, 1)


def log_density(values, weights, context=None, **case):
    """`log q(xi) + log q(z | xi) - log r(xi | z)`, the guide's total, `(*batch,)`.

    Args:
        values: `xi` and `z`.
        weights: arrays named as in a PyTorch state dict.
        context: `(*batch, context_dim)` or `None`.
        case: the family's arguments.
    """
    xi, z = values["xi"], values["z"]
    activation = case.get("activation", "elu")
    default = "ReverseFlow" if context is None else "MeanField"
    reverse = case.get("reverse_family") or {"name": default, "activation": activation}
    mean, log_sd = process(xi, weights, context, **case)
    loc, log_scale = mean_field.heads(part(weights, "base."), context)
    zeros = np.zeros(xi.shape)
    log_q = mean_field.log_prob(xi, zeros, zeros)
    log_total = 0.5 * np.log(np.exp(2.0 * log_sd) + np.exp(2.0 * log_scale))
    log_q = log_q + mean_field.log_prob(z, loc + mean, log_total)
    return log_q - log_prob(xi, part(weights, "reverse."), joined(z, context), reverse, activation)


def log_density_with_f(values, weights, context=None, **case):
    """The same with the process's value `f` drawn as well, and `q(f | xi, z)` in `r` (the paper's).

    Equal to `log_density` whatever `f` is: this is why `f` need not be drawn.
    """
    xi, f, z = values["xi"], values["f"], values["z"]
    activation = case.get("activation", "elu")
    default = "ReverseFlow" if context is None else "MeanField"
    reverse = case.get("reverse_family") or {"name": default, "activation": activation}
    mean, log_sd = process(xi, weights, context, **case)
    loc, log_scale = mean_field.heads(part(weights, "base."), context)
    zeros = np.zeros(xi.shape)
    log_q = mean_field.log_prob(xi, zeros, zeros)
    log_q = log_q + mean_field.log_prob(f, mean, log_sd + np.zeros(f.shape))
    log_q = log_q + mean_field.log_prob(z, loc + f, log_scale + np.zeros(z.shape))
    log_r = log_prob(xi, part(weights, "reverse."), joined(z, context), reverse, activation)
    # The Gaussian posterior of f under the prior N(mean, sd^2) and the likelihood of z.
    precision = np.exp(-2.0 * log_sd) + np.exp(-2.0 * log_scale)
    pull = np.exp(-2.0 * log_sd) * mean + np.exp(-2.0 * log_scale) * (z - loc)
    log_r = log_r + mean_field.log_prob(f, pull / precision, -0.5 * np.log(precision))
    return log_q - log_r


def log_marginal(z, weights, context, rng, num_samples, **case):
    """Monte Carlo `log E_xi q(z | xi)`, f integrated out; its exponential is unbiased."""
    xi = rng.standard_normal((num_samples, *z.shape[:-1], weights["sources"].shape[-1]))
    mean, log_sd = process(xi, weights, context, **case)
    loc, log_scale = mean_field.heads(part(weights, "base."), context)
    log_total = 0.5 * np.logaddexp(2.0 * log_sd, 2.0 * log_scale)
    draws = mean_field.log_prob(z, loc + mean, log_total)
    return np.log(np.mean(np.exp(draws), axis=0))
