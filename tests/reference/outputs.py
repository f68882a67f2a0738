"""What one element of an autoregressive likelihood is: densities, inverse cdfs and encodings.

The parameters of an element are the last axis: a logit; logits; location and log-scale; or logits,
locations and log-scales (at least -7) of `num_components` logistic distributions. An integer `k`
of `0..V-1` stands for the number `2 k / (V - 1) - 1`; its discretised density is the mass of the
bin between the midpoints to its neighbours, and the outer bins go on to infinity.

References:
    Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, arXiv 1701.05517, eq. 1-2.
"""

import numpy as np

DISCRETE = ("bernoulli", "categorical", "discretized_logistic_mixture")
MIN_LOG_SCALE = -7.0


def num_params(output, num_categories=256, num_components=5):
    """Numbers per element."""
    return {
        "bernoulli": 1,
        "categorical": num_categories,
        "normal": 2,
        "logistic_mixture": 3 * num_components,
        "discretized_logistic_mixture": 3 * num_components,
    }[output]


def num_values(output, num_categories=256):
    """How many values an element has; None for a number."""
    if output not in DISCRETE:
        return None
    return 2 if output == "bernoulli" else num_categories


def encode(output, value, num_categories=256, ordinal=False):
    """What enters a net for each element, on a new last axis."""
    value = np.asarray(value)
    if output == "categorical" and not ordinal:
        return np.eye(num_categories)[value.astype(int)]
    if output in ("categorical", "discretized_logistic_mixture"):
        value = 2.0 * value / (num_categories - 1) - 1.0
    return value[..., None].astype(float)


def _sigmoid(x):
    # Both tails to full relative precision.
    tail = np.exp(-np.abs(x))
    return np.where(np.asarray(x) > 0, 1.0, tail) / (1.0 + tail)


def _softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _mixture(params, num_components):
    logits, locs, log_scales = (
        params[..., k * num_components : (k + 1) * num_components] for k in range(3)
    )
    return _softmax(logits), locs, np.exp(np.maximum(log_scales, MIN_LOG_SCALE))


def _interval(lower, upper):
    """Mass of a standard logistic between two points, from the tail that is nearer."""
    lower, upper = (np.asarray(x, dtype=np.longdouble) for x in (lower, upper))
    flip = lower + upper > 0
    lower, upper = np.where(flip, -upper, lower), np.where(flip, -lower, upper)

    # Left of zero the differences lose nothing.
    return _sigmoid(upper) - _sigmoid(lower)


def log_prob(output, params, value, num_categories=256, num_components=5):
    """Log-densities of values `(*s,)` under parameters `(*s, num_params)`."""
    params, value = np.asarray(params, float), np.asarray(value)
    if output == "bernoulli":
        logit = params[..., 0]
        return -np.logaddexp(0.0, np.where(value == 1, -logit, logit))
    if output == "categorical":
        normalised = params - np.logaddexp.reduce(params, axis=-1, keepdims=True)
        return np.sum(np.eye(num_categories)[value.astype(int)] * normalised, axis=-1)
    if output == "normal":
        loc, scale = params[..., 0], np.exp(params[..., 1])
        return -0.5 * ((value - loc) / scale) ** 2 - np.log(scale * np.sqrt(2.0 * np.pi))
    weights, locs, scales = _mixture(params, num_components)
    if output == "logistic_mixture":
        x = (value[..., None] - locs) / scales
        return np.log(np.sum(weights * _sigmoid(x) * _sigmoid(-x) / scales, axis=-1))
    last = num_categories - 1
    lower = ((2.0 * value[..., None] - 1.0) / last - 1.0 - locs) / scales
    upper = ((2.0 * value[..., None] + 1.0) / last - 1.0 - locs) / scales
    lower = np.where(value[..., None] == 0, -np.inf, lower)
    upper = np.where(value[..., None] == last, np.inf, upper)
    masses = np.sum(weights * _interval(lower, upper), axis=-1)
    return np.log(masses).astype(float)


def cdf(output, params, value, num_components=5):
    """Cumulative distribution function of the continuous outputs."""
    from scipy.stats import norm

    if output == "normal":
        return norm.cdf(value, params[..., 0], np.exp(params[..., 1]))
    weights, locs, scales = _mixture(params, num_components)
    return np.sum(weights * _sigmoid((np.asarray(value)[..., None] - locs) / scales), axis=-1)


def _pick(weights, u):
    """The category whose part of the unit interval holds `u`, by walking through them."""
    chosen = np.zeros(u.shape, int)
    for at in np.ndindex(u.shape):
        rest = u[at] * np.cumsum(weights[at])[-1]
        total = np.cumsum(weights[at])
        while chosen[at] < len(total) - 1 and total[chosen[at]] <= rest:
            chosen[at] += 1
    return chosen


def draw(output, params, noise, num_categories=256, num_components=5):
    """Values `(*s,)` of parameters `(*s, num_params)` and noise `(*s, num_noise)`."""
    params, noise = np.asarray(params, float), np.asarray(noise, float)
    if output == "bernoulli":
        return (noise[..., 0] < _sigmoid(params[..., 0])).astype(float)
    if output == "categorical":
        return _pick(_softmax(params), noise[..., 0])
    if output == "normal":
        return params[..., 0] + np.exp(params[..., 1]) * noise[..., 0]
    weights, locs, scales = _mixture(params, num_components)
    component = _pick(weights, noise[..., 0])[..., None]
    limits = np.finfo(float)
    u = np.clip(noise[..., 1], limits.tiny, 1.0 - limits.eps)
    loc, scale = (np.take_along_axis(x, component, -1)[..., 0] for x in (locs, scales))
    number = loc + scale * np.log(u / (1.0 - u))
    if output == "logistic_mixture":
        return number
    nearest = np.rint((number + 1.0) * (num_categories - 1) / 2.0)
    return np.clip(nearest, 0, num_categories - 1).astype(int)
