"""What groups of particles must have on average: of a bit by enumeration, and of a Normal.

References:
    Rainforth et al. (2018), Tighter Variational Bounds are Not Necessarily Better, arXiv
    1802.04537, section 3.
    Mnih and Rezende (2016), Variational Inference for Monte Carlo Objectives, arXiv
    1602.06725 (the gradient that the enumeration is compared with).
"""

from itertools import product

import numpy as np

# `b ~ Bernoulli(PRIOR)`, `x ~ N(2 b, 1)` at DATUM, `q(b) = Bernoulli(sigmoid(LOGIT))`.
PRIOR, DATUM, LOGIT = 0.3, 1.4, -0.8


def bound(num_particles, logit=LOGIT):
    """`E log (1/K) sum_k w_k` of the bit, summed over the values of all particles."""
    q = np.array([1.0, np.exp(logit)]) / (1.0 + np.exp(logit))
    prior = np.array([1.0 - PRIOR, PRIOR])
    likelihood = np.exp(-0.5 * (DATUM - np.array([0.0, 2.0])) ** 2) / np.sqrt(2.0 * np.pi)
    weights = prior * likelihood / q
    total = 0.0
    for values in map(list, product((0, 1), repeat=num_particles)):
        total = total + np.prod(q[values]) * np.log(np.mean(weights[values]))
    return total


def slope(num_particles):
    """Derivative of the bound in the logit, by a complex step."""
    return np.imag(bound(num_particles, LOGIT + 1e-20j)) / 1e-20


def plain(x, loc, spread):
    """Evidence lower bound of `z ~ N(0, 1)`, `x_n ~ N(z, 1)`, `q = N(loc, spread^2)`, and its
    derivative in `loc`, for `x` of shape `(N, 1)`."""
    square = np.sum((x - loc) ** 2) + len(x) * spread**2
    fit = -0.5 * (square + len(x) * np.log(2.0 * np.pi))
    divergence = 0.5 * (spread**2 + loc**2 - 1.0) - np.log(spread)
    return fit - divergence, np.sum(x - loc) - loc
