"""A masked autoregressive flow, whose densities are cheap: a prior, or a reverse model.

References:
    Papamakarios, Pavlakou and Murray (2017), Masked Autoregressive Flow for Density Estimation,
    arXiv 1705.07057, sec. 3.1 and 3.4.
"""

import numpy as np

from . import iaf, masked

LOG_2PI = np.log(2.0 * np.pi)


def _part(weights, prefix):
    return {
        name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)
    }


def _nets(weights):
    nets = []
    while part := _part(weights, f"nets.{len(nets)}."):
        nets.append(part)
    return nets


def _order(step, features):
    return np.arange(features) if step % 2 == 0 else np.arange(features)[::-1]


def _shift_and_log_scale(u, nets, context, step, activation):
    order, bound = _order(step, u.shape[-1]), iaf.log_scale_bound(len(nets))
    outputs = masked.forward(u, nets[step], context, order=order, activation=activation)
    return outputs[..., 0, :], bound * np.tanh(outputs[..., 1, :] / bound)


def log_prob(value, weights, context=None, activation="elu"):
    """`log p(z)` of the flow: `u_t = (u_{t-1} - m_t) exp(-a_t)`, `u_T ~ N(0, I)`."""
    u, log_slope = value, 0.0
    nets = _nets(weights)
    for step in range(len(nets)):
        shift, log_scale = _shift_and_log_scale(u, nets, context, step, activation)
        u = (u - shift) * np.exp(-log_scale)
        log_slope = log_slope + np.sum(log_scale, axis=-1)
    return np.sum(-0.5 * u**2 - 0.5 * LOG_2PI, axis=-1) - log_slope


def sample(noise, weights, context=None, activation="elu"):
    """The value whose noise is given, one coordinate at a time."""
    u = noise
    nets = _nets(weights)
    for step in reversed(range(len(nets))):
        target, u = u, np.full(u.shape, np.nan)
        for i in _order(step, u.shape[-1]):
            # What has not been drawn yet is no number, and must not be looked at.
            known = np.where(np.isnan(u), 0.0, u)
            shift, log_scale = _shift_and_log_scale(known, nets, context, step, activation)
            u[..., i] = shift[..., i] + np.exp(log_scale[..., i]) * target[..., i]
    return u
