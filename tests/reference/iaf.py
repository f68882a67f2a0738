"""Inverse autoregressive flow.

`z_0 = mu_0 + sigma_0 eps`, then one masked autoregressive network per step, in the
natural order of the features at even steps and in the reversed order at odd ones:

- affine: `z_t = sigma_t z_{t-1} + m_t` with `sigma_t = exp(b tanh(s_t / b))` and
  `b = min(3, 12 / T)`;
- gated: `z_t = sigma_t z_{t-1} + (1 - g_t) m_t` with the same `sigma_t` and `g_t = sigma_t e^-b`.

With tails of its own the base is `z_0 = mu_0 + sigma_0 h(eps)`, `h(e) = e + k+ q(e) - k- q(-e)`,
`q(x) = log(1 + e^x)^2 / 2`, `k = 1 / (1 + e^-l)` with two logits `l` for each feature.

The inverse below solves one coordinate at a time, in the order of the step, and shares
nothing with a fixed-point solver.

References:
    Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improving
    Variational Inference with Inverse Autoregressive Flow, arXiv 1606.04934, alg. 1 and
    eq. 10-14.
"""

import numpy as np

from . import complex_step, masked, mean_field


def _part(weights, prefix):
    return {
        name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)
    }


def _nets(weights):
    nets = []
    while _part(weights, f"nets.{len(nets)}."):
        nets.append(_part(weights, f"nets.{len(nets)}."))
    return nets


def _order(step, features):
    return np.arange(features) if step % 2 == 0 else np.arange(features)[::-1]


def log_scale_bound(num_flows):
    """What bounds the log-scales of a step: 3, and 12 for all steps together."""
    return min(3.0, 12.0 / num_flows)


def _shift_and_log_scale(z, nets, context, step, update, activation):
    outputs = masked.forward(
        z, nets[step], context, order=_order(step, z.shape[-1]), activation=activation
    )
    m, s = outputs[..., 0, :], outputs[..., 1, :]
    bound = log_scale_bound(len(nets))
    log_sigma = bound * np.tanh(s / bound)
    if update == "gated":
        return (1.0 - np.exp(log_sigma - bound)) * m, log_sigma
    return m, log_sigma


def stretched(noise, weights):
    """The base's noise and the logarithm of its slope; as it is where it has no tails."""
    if "tail_logits" not in weights:
        return noise, np.zeros_like(noise)
    upper, lower = 1.0 / (1.0 + np.exp(-weights["tail_logits"]))
    above, below = np.log(1.0 + np.exp(noise)), np.log(1.0 + np.exp(-noise))
    value = noise + 0.5 * upper * above**2 - 0.5 * lower * below**2
    rise = 1.0 / (1.0 + np.exp(-noise))
    return value, np.log(1.0 + upper * above * rise + lower * below * (1.0 - rise))


def _unstretched(value, weights):
    """By halving an interval, and two of Newton's steps for the imaginary part of a value."""
    if "tail_logits" not in weights:
        return value
    low, high = np.full(value.shape, -50.0), np.full(value.shape, 50.0)
    for _ in range(60):
        middle = (low + high) / 2
        short = stretched(middle, weights)[0] < np.real(value)
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    noise = (low + high) / 2
    for _ in range(2):
        image, log_slope = stretched(noise, weights)
        noise = noise + (value - image) * np.exp(-log_slope)
    return noise


def forward(noise, weights, context=None, *, update="affine", activation="elu"):
    """`(z, log q(z))` of standard Normal noise `(*batch, D)`.

    Args:
        noise: `(*batch, D)`.
        weights: arrays named as in a PyTorch state dict: `base.*` as in
            `mean_field.heads`, `nets.<t>.*` as in `masked.forward`.
        context: `(*batch, context_dim)` or `None`.
        update: `"affine"` or `"gated"`.
        activation: activation of the networks and of the base's trunk.
    """
    loc, log_scale = mean_field.heads(_part(weights, "base."), context, activation)
    base, log_slope = stretched(noise, weights)
    z = mean_field.sample(base, loc, log_scale)
    terms = -0.5 * noise**2 - 0.5 * mean_field.LOG_2PI - log_scale - log_slope
    log_q = np.sum(terms, axis=-1)
    nets = _nets(weights)
    for step in range(len(nets)):
        shift, log_sigma = _shift_and_log_scale(z, nets, context, step, update, activation)
        z = np.exp(log_sigma) * z + shift
        log_q = log_q - np.sum(log_sigma, axis=-1)
    return z, log_q


def inverse(value, weights, context=None, *, update="affine", activation="elu"):
    """The noise that `forward` maps to `value`, one coordinate at a time."""
    z = np.asarray(value)
    nets = _nets(weights)
    for step in reversed(range(len(nets))):
        before = np.zeros(z.shape, dtype=z.dtype)
        for i in _order(step, z.shape[-1]):
            shift, log_sigma = _shift_and_log_scale(before, nets, context, step, update, activation)
            solved = (z[..., i] - shift[..., i]) * np.exp(-log_sigma[..., i])
            dtype = np.result_type(before, solved)
            before = before.astype(dtype, copy=False)
            before[..., i] = solved
        z = before
    loc, log_scale = mean_field.heads(_part(weights, "base."), context, activation)
    return _unstretched((z - loc) * np.exp(-log_scale), weights)


def log_prob(value, weights, context=None, *, update="affine", activation="elu"):
    """`log q(z)` at any `value` through the sequential inverse."""
    noise = inverse(value, weights, context, update=update, activation=activation)
    return forward(noise, weights, context, update=update, activation=activation)[1]


def score(value, weights, context=None, *, update="affine", activation="elu"):
    """`d log q(z) / d z` at a fixed parameter, `(*batch, D)`."""
    return complex_step.jacobian(
        lambda z: log_prob(z, weights, context, update=update, activation=activation),
        value,
    )


def random_weights(
    rng, latent_dim, context_dim=None, hidden_dims=(8,), num_flows=2, scale=0.5, tails=False
):
    """A dictionary of Normal weights, far enough from zero for a flow with a shape."""
    weights = {}

    def linear(name, num_out, num_in):
        weights[f"{name}.weight"] = scale * rng.standard_normal((num_out, num_in))
        weights[f"{name}.bias"] = scale * rng.standard_normal(num_out)

    if context_dim is None:
        weights["base.loc"] = scale * rng.standard_normal(latent_dim)
        weights["base.log_scale"] = scale * rng.standard_normal(latent_dim)
    else:
        linear("base.loc", latent_dim, context_dim)
        linear("base.log_scale", latent_dim, context_dim)
    for step in range(num_flows):
        widths = (latent_dim, *hidden_dims, 2 * latent_dim)
        for layer in range(len(widths) - 1):
            linear(f"nets.{step}.layers.{layer}", widths[layer + 1], widths[layer])
        if context_dim is not None:
            weights[f"nets.{step}.context_layer.weight"] = scale * rng.standard_normal(
                (hidden_dims[0], context_dim)
            )
    if tails:
        weights["tail_logits"] = rng.standard_normal((2, latent_dim))
    return weights
