"""Learned priors: mixtures and mixtures of posteriors.

All densities are analytic in values and weights (for complex steps). The integrals are sums over
a regular grid, which for smooth densities that vanish at its ends converge faster than any power
of the step.

References:
    Bishop (2006), Pattern Recognition and Machine Learning, eq. 2.188 (mixtures).
    Tomczak and Welling (2018), VAE with a VampPrior, arXiv 1705.07120, sec. 3.
"""

import numpy as np

from . import iaf, mean_field, vgp
from .auxiliary import joined, part

LOG_2PI = np.log(2.0 * np.pi)


def log_sum(x, axis=-1):
    """`log sum exp`, analytic in `x`."""
    top = np.max(np.real(x), axis=axis, keepdims=True)
    return np.log(np.sum(np.exp(x - top), axis=axis)) + np.squeeze(top, axis)


def mixture(value, logits, locs, log_scales):
    """`log sum_k pi_k N(z; mu_k, diag(sigma_k)^2)` of values `(*batch, D)`."""
    log_pi = logits - log_sum(logits)
    return log_sum(log_pi + mean_field.log_prob(value[..., None, :], locs, log_scales))


def mixture_evidence(x, logits, locs, log_scales):
    """`log p(x)` of `x ~ N(z, I)`: each component's variance is one larger."""
    return mixture(x, logits, locs, 0.5 * np.log(np.exp(2.0 * log_scales) + 1.0))


def _auxiliary(value, weights, context):
    """`log q(z | c)` with a one-dimensional auxiliary variable summed over a grid."""
    t = np.linspace(-9.0, 9.0, 601)
    loc, log_scale = mean_field.heads(part(weights, "aux."), context)
    a = loc + np.exp(log_scale) * t[:, None, None]
    heads = mean_field.heads(part(weights, "conditional."), joined(a, context))
    return _over_noise(value, t, *heads)


def _vgp(value, weights, context):
    """`log q(z | c)` with a one-dimensional input summed over a grid."""
    t = np.linspace(-9.0, 9.0, 601)
    xi = np.broadcast_to(t[:, None, None], (len(t), len(context), 1))
    mean, log_sd = vgp.process(xi, weights, context)
    loc, log_scale = mean_field.heads(part(weights, "base."), context)
    return _over_noise(value, t, loc + mean, 0.5 * np.logaddexp(2.0 * log_sd, 2.0 * log_scale))


def _over_noise(value, t, loc, log_scale):
    log_weight = -0.5 * t**2 - 0.5 * LOG_2PI + np.log(t[1] - t[0])
    log_z = mean_field.log_prob(value[..., None, None, :], loc, log_scale)
    return log_sum(log_weight[:, None] + log_z, axis=-2)


def components(name, value, weights, context, activation="elu"):
    """`log q(z | c_k)` for every context, `(*batch, K)` of `(*batch, D)` and `(K, context_dim)`.

    Args:
        name: the family; hierarchical ones have auxiliary variables of width 1.
        value: `(*batch, D)`.
        weights: arrays named as in a PyTorch state dict.
        context: `(K, context_dim)`.
        activation: of a mean-field trunk or of a flow's nets; the default in hierarchical families.
    """
    if name == "MeanField":
        heads = mean_field.heads(weights, context, activation)
        return mean_field.log_prob(value[..., None, :], *heads)
    if name == "IAF":
        wide = value[..., None, :] + np.zeros((len(context), 1))
        return iaf.log_prob(wide, weights, context, activation=activation)
    return {"Auxiliary": _auxiliary, "VGP": _vgp}[name](value, weights, context)


def vamp(name, value, weights, context, activation="elu"):
    """`log 1/K sum_k q(z | c_k)`, `(*batch,)`."""
    log_q = components(name, value, weights, context, activation)
    return log_sum(log_q) - np.log(len(context))


def grid(dim, bound, num):
    """Points `(num**dim, dim)` of a regular grid over `[-bound, bound]^dim`, and one's volume."""
    line = np.linspace(-bound, bound, num)
    points = np.stack(np.meshgrid(*[line] * dim, indexing="ij"), -1).reshape(-1, dim)
    return points, (line[1] - line[0]) ** dim


def evidence(x, log_prior, points, volume):
    """`log p(x) = log int p(z) N(x; z, I) dz` of rows `(N, D)` by a sum over the grid."""
    zeros = np.zeros(points.shape)
    log_likelihood = mean_field.log_prob(x[:, None, :], points, zeros)
    return log_sum(log_prior + log_likelihood) + np.log(volume)
