"""Diagonal Normal guide.

References:
    Kingma and Welling (2014), Auto-Encoding Variational Bayes, arXiv 1312.6114,
    eq. 9-10 and appendix C.2.
"""

import numpy as np

from .masked import ACTIVATIONS

LOG_2PI = np.log(2.0 * np.pi)


def bounded(raw):
    """What a head adds to a log-scale: within 3 on either side."""
    return raw / np.sqrt(1 + raw**2 / 9)


def heads(weights, context=None, activation="elu"):
    """Location and log-scale, `(*batch, D)` each.

    Args:
        weights: arrays named as in a PyTorch state dict: `loc` and `log_scale` for the
            global posterior; `trunk.<l>.{weight,bias}`, `loc.{weight,bias}` and
            `log_scale.{weight,bias}` (matrices of shape `(out, in)`) with a context, and
            `tie.weight` where there is one.
        context: `(*batch, context_dim)` or `None`.
        activation: activation of the trunk.
    """
    if context is None:
        return weights["loc"], weights["log_scale"]
    act, _ = ACTIVATIONS[activation]
    hidden = np.asarray(context)
    layer = 0
    while f"trunk.{layer}.weight" in weights:
        hidden = act(hidden @ weights[f"trunk.{layer}.weight"].T + weights[f"trunk.{layer}.bias"])
        layer += 1
    loc, raw = (hidden @ weights[f"{head}.weight"].T for head in ("loc", "log_scale"))
    if "tie.weight" in weights:  # A part of `Auxiliary` that follows the first numbers it is given.
        followed = weights["tie.weight"].shape[1]
        loc = loc + np.asarray(context)[..., :followed] @ weights["tie.weight"].T
    return loc + weights["loc.bias"], bounded(raw) + weights["log_scale.bias"]


def sample(noise, loc, log_scale):
    """`z = mu + sigma * eps` (eq. 10)."""
    return loc + np.exp(log_scale) * noise


def log_prob(value, loc, log_scale):
    """`sum_d log N(z_d; mu_d, sigma_d^2)`, summed over the last axis."""
    noise = (value - loc) * np.exp(-log_scale)
    return np.sum(-0.5 * noise**2 - log_scale - 0.5 * LOG_2PI, axis=-1)


def score_value(value, loc, log_scale):
    """`d log q / d z = -(z - mu) / sigma^2`."""
    return -(value - loc) * np.exp(-2.0 * log_scale)


def score_parameters(value, loc, log_scale):
    """`d log q / d mu` and `d log q / d log sigma` at a fixed `z`."""
    noise = (value - loc) * np.exp(-log_scale)
    return noise * np.exp(-log_scale), noise**2 - 1.0
