"""Concrete distributions, and a model of one relaxed bit.

References:
    Maddison, Mnih and Teh (2017), The Concrete Distribution, arXiv 1611.00712, eq. 10 (density),
    eq. 16 and appendix B (binary), appendix C.3 (log-odds).
"""

import numpy as np
from scipy import integrate
from scipy.special import expit, gammaln, logsumexp


def soften(noise, log_p, temperature):
    """`softmax((log p - log(-log u)) / t)`, for uniform `noise` of shape `(*batch, k)`."""
    scores = (log_p - np.log(-np.log(noise))) / np.asarray(temperature)[..., None]
    return np.exp(scores - logsumexp(scores, axis=-1, keepdims=True))


def log_prob(value, log_p, temperature):
    """Density on the simplex, over all entries but one; `(*batch, k)` to `(*batch,)`."""
    k, t = np.shape(log_p)[-1], np.asarray(temperature)
    scores = log_p - t[..., None] * np.log(value)
    total = np.sum(scores - np.log(value), axis=-1) - k * logsumexp(scores, axis=-1)
    return gammaln(k) + (k - 1) * np.log(t) + total


def binary_log_prob(value, logit, temperature):
    """Density of `sigmoid((a + logit u) / t)` on (0, 1)."""
    value, t = np.asarray(value), temperature
    tails = -t * (np.log(value) - np.log1p(-value)) + logit
    log_slope = -np.log(value) - np.log1p(-value)
    return np.log(t) + tails - 2.0 * np.logaddexp(0.0, tails) + log_slope


def log_odds_log_prob(value, logit, temperature):
    """Density of the log-odds of a binary Concrete variable: a scaled logistic."""
    tails = logit - temperature * value
    return np.log(temperature) + tails - 2.0 * np.logaddexp(0.0, tails)


def binary_evidence(log_likelihood, logit, temperature):
    """`E p(x | b~)` over one relaxed bit, by quadrature over the noise's log-odds."""

    def integrand(z):
        density = expit(z - logit) * expit(logit - z)
        return density * np.exp(log_likelihood(expit(z / temperature)))

    breaks = [0.0, logit, 3.0 * temperature, -3.0 * temperature]
    return integrate.quad(integrand, -60.0, 60.0, points=sorted(breaks), limit=500)[0]
