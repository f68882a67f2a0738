"""The evidence lower bound with free bits.

Per datum of a minibatch, with `M` its rows,

    L = mean_n E log p(x_n | z_n) - sum_j max(free_bits, mean_n KL_j(x_n)),

and the loss is `-L` times the number of data that the minibatch stands for. Rows may count for
more or less than one (scales), or not at all (masks). A weight on the divergence multiplies the
whole second term.

References:
    Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improving Variational
    Inference with Inverse Autoregressive Flow, arXiv 1606.04934, appendix C.8.
"""

import numpy as np
from scipy.special import gammaln

from . import complex_step

LOG_2PI = np.log(2.0 * np.pi)
DEGREES = 5.0


def loss(log_likelihood, divergence, free_bits, groups, counts, weight=1.0):
    """The negative bound; analytic but for the maximum, which looks at real parts.

    Args:
        log_likelihood: `(K, N)`.
        divergence: `(K, N, D)`, in closed form or sampled.
        free_bits: threshold of every group.
        groups: the group of each of the `D` elements.
        counts: `(N,)`, for how many data each row stands.
        weight: of the divergence.
    """
    total = np.sum(counts)
    first = np.sum(counts * np.mean(log_likelihood, axis=0)) / total
    per_row = np.mean(divergence, axis=0)
    cost = 0.0
    for group in sorted(set(groups)):
        members = [j for j, other in enumerate(groups) if other == group]
        mean = np.sum(counts[:, None] * per_row[:, members]) / total
        cost = cost + (mean if np.real(mean) > free_bits else free_bits)
    return -total * (first - weight * cost)


def normal(value, loc, log_scale=0.0):
    """`log N(value; loc, exp(log_scale)^2)`, elementwise."""
    return -0.5 * ((value - loc) * np.exp(-log_scale)) ** 2 - log_scale - 0.5 * LOG_2PI


def student(value, loc):
    """Log-density of Student's t with five degrees of freedom and unit scale, elementwise."""
    constant = gammaln(0.5 * (DEGREES + 1.0)) - gammaln(0.5 * DEGREES)
    constant = constant - 0.5 * np.log(DEGREES * np.pi)
    return constant - 0.5 * (DEGREES + 1.0) * np.log(1.0 + (value - loc) ** 2 / DEGREES)


def normal_divergence(loc, log_scale, prior):
    """`KL(N(loc, exp(log_scale)^2) || N(prior, 1))`, elementwise."""
    return 0.5 * (np.exp(2.0 * log_scale) + (loc - prior) ** 2 - 1.0) - log_scale


def linear_gaussian(noise, x, parameters, free_bits, groups, counts, weight=1.0, prior="normal"):
    """Loss and gradients of `z ~ N(mu, I)` or Student's t, `x ~ N(z W, I)`,
    `q(z | x) = N(x A + b, diag(sigma)^2)`.

    Args:
        noise: `(K, N, D)`.
        x: `(N, P)`.
        parameters: `mu (D,)`, `W (D, P)`, `A (P, D)`, `b (D,)`, `log_scale (D,)`.
        free_bits: threshold of every group.
        groups: the group of each dimension.
        counts: `(N,)`.
        weight: of the divergence.
        prior: `"normal"`, with the closed form, or `"student"`, sampled.

    Returns:
        The loss and a dictionary of its gradients, and the mean divergence by dimension.
    """

    def terms(moved):
        loc, log_scale = x @ moved["A"] + moved["b"], moved["log_scale"]
        z = loc + np.exp(log_scale) * noise
        if prior == "normal":
            divergence = normal_divergence(loc, log_scale, moved["mu"])[None]
        else:
            divergence = normal(z, loc, log_scale) - student(z, moved["mu"])
        return normal(x, z @ moved["W"]).sum(-1), divergence

    def value(moved):
        return loss(*terms(moved), free_bits, groups, counts, weight)

    means = np.sum(counts[:, None] * terms(parameters)[1].mean(0), axis=0) / np.sum(counts)
    return value(parameters), complex_step.gradient(value, parameters), means
