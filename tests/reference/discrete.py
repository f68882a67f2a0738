"""Estimators of the gradient of an ELBO with discrete latents, as functions of their noise.

The pure functions work on arrays `(..., *event)`: Bernoulli logits of any event shape, or
one-hot categoricals whose categories stand last. The estimators run on a net (see
`belief_net`) with noise `(draws, rows, *event)` for each of its layers, bottom up, and
return an estimate for every draw. `cost` of a layer is the log-weight without the guide's
layers below it, whose scores are its own business:

- REINFORCE, NVIL: `g = (cost - baseline) score`;
- leave-one-out: the baseline of a draw is the mean cost of the others;
- DisARM: `g = (cost - cost') (b - b') sigmoid(|a|) / 2` with the antithetic bits `b'`;
- REBAR: `g = (cost - eta cost(z~)) score + eta d cost(z) / da - eta d cost(z~) / da`;
- RELAX: REBAR with a network of `z` added to `eta cost`.

Derivatives along `z` are taken by a complex step; those in temperature, `eta` and the
network by a difference quotient of eighth order, which has no error to speak of either.

References:
    Williams (1992), Simple statistical gradient-following algorithms, Machine Learning 8.
    Mnih and Gregor (2014), Neural Variational Inference and Learning in Belief Networks,
    arXiv 1402.0030, section 2.3.
    Mnih and Rezende (2016), Variational inference for Monte Carlo objectives, arXiv
    1602.06725, eq. 8-10.
    Maddison, Mnih and Teh (2017), The Concrete Distribution, arXiv 1611.00712.
    Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein (2017), REBAR, arXiv 1703.07370,
    eq. 7-9 and appendices A and C.
    Grathwohl, Choi, Wu, Roeder and Duvenaud (2018), Backpropagation through the Void,
    arXiv 1711.00123, eq. 7-8.
    Yin and Zhou (2019), ARM: Augment-REINFORCE-merge, arXiv 1807.11143.
    Dong, Mnih and Tucker (2020), DisARM, arXiv 2006.10680, eq. 5.
"""

import numpy as np
from scipy.special import logsumexp, softmax

from . import complex_step

# Central difference of eighth order.
OFFSETS = np.array([-4, -3, -2, -1, 1, 2, 3, 4])
WEIGHTS = np.array([1 / 280, -4 / 105, 1 / 5, -4 / 5, 4 / 5, -1 / 5, 4 / 105, -1 / 280])


# Functions that complex numbers pass through.


def softplus(x):
    """`log(1 + exp(x))`."""
    positive = np.real(x) > 0
    return np.where(positive, x, 0.0) + np.log1p(np.exp(np.where(positive, -x, x)))


def sigmoid(x):
    return np.exp(-softplus(-x))


def log_softmax(x):
    """Over the last axis."""
    shifted = x - np.max(np.real(x), axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


# Pure functions of noise, `kind` being "bernoulli" or "one_hot".


def noisy(kind, logits, uniform):
    """`z`: logistic noise on the logits, or Gumbel noise on the log-probabilities."""
    if kind == "bernoulli":
        return logits + np.log(uniform) - np.log1p(-uniform)
    return log_softmax(logits) - np.log(-np.log(uniform))


def harden(kind, z):
    """`b`, the exact draw that `z` stands for."""
    if kind == "bernoulli":
        return (np.real(z) > 0) * 1.0
    return np.eye(z.shape[-1])[np.argmax(np.real(z), axis=-1)]


def soften(kind, z, temperature):
    """The Concrete draw that `z` stands for."""
    if kind == "bernoulli":
        return sigmoid(z / temperature)
    return np.exp(log_softmax(z / temperature))


def conditional(kind, logits, b, uniform):
    """`z~`, distributed as `z` given that `harden(z) = b` (REBAR, appendix C)."""
    if kind == "bernoulli":
        p_zero = sigmoid(-logits)
        given = np.where(b > 0, p_zero + uniform * (1 - p_zero), (1 - uniform) * p_zero)
        return logits + np.log(given) - np.log(1 - given)
    # The largest Gumbel has location 0; the others are truncated at it.
    largest = -np.log(-np.log(np.sum(b * uniform, axis=-1, keepdims=True)))
    others = -np.log(-np.log(uniform) / np.exp(log_softmax(logits)) + np.exp(-largest))
    return np.where(b > 0, largest, others)


def log_prob(kind, logits, value):
    """Multilinear in the value; summed over the last axis."""
    if kind == "bernoulli":
        return np.sum(value * logits - softplus(logits), axis=-1)
    return np.sum(value * log_softmax(logits), axis=(-2, -1))


def normalised(kind, logits):
    """Logits, or log-probabilities."""
    return logits if kind == "bernoulli" else log_softmax(logits)


def mean(kind, logits):
    return sigmoid(logits) if kind == "bernoulli" else np.exp(log_softmax(logits))


def score(kind, logits, b):
    """`d log_prob / d logits` at a corner."""
    return b - mean(kind, logits)


# The toy: `E (b - t)^2` with `b ~ Bernoulli(p)`, gradients in the logit of p.


class Toy:
    """Closed forms of the gradient and of the variances of its estimators."""

    def __init__(self, t, p):
        self.one, self.zero = (1 - t) ** 2, t**2
        self.d, self.pq = self.one - self.zero, p * (1 - p)
        self.p, self.largest, self.smallest = p, np.maximum(p, 1 - p), np.minimum(p, 1 - p)

    @property
    def gradient(self):
        return self.d * self.pq

    @property
    def reinforce(self):
        second = (1 - self.p) * self.one**2 + self.p * self.zero**2
        return self.pq * (second - self.d**2 * self.pq)

    @property
    def arm(self):
        second = (0.125 - (self.largest - 0.5) ** 3) * 2 / 3
        return self.d**2 * (second - self.pq**2)

    @property
    def leave_one_out(self):
        """Of two draws."""
        return self.d**2 * self.pq * (0.5 - self.pq)

    @property
    def disarm(self):
        return self.d**2 * self.largest**2 * self.smallest * (0.5 - self.smallest)


# Estimators on a net.


def run(net, params, x, uniforms):
    """Hard values and logits of all layers, bottom up."""
    values, logits = [], []
    for layer, uniform in enumerate(uniforms):
        logits.append(net.logits(params, x, values, layer))
        values.append(harden(net.kind, noisy(net.kind, logits[-1], uniform)))
    return values, logits


def cost(net, params, x, values, layer):
    """The log-weight without the guide's layers below this one."""
    log_q = net.log_q(params, x, values)
    return net.log_joint(params, x, values) - sum(log_q[layer:])


def downstream(net, params, x, below, value, uniforms, draw):
    """All layers, given those below one and its own value; those above it by `draw(z, layer)`."""
    values = [*below, value]
    for layer in range(len(values), len(uniforms)):
        logits = net.logits(params, x, values, layer)
        values.append(draw(noisy(net.kind, logits, uniforms[layer]), layer))
    return values


def network(weights, *inputs):
    """Tanh layers and a linear head, `[(weight, bias), ...]`, on `(draws, rows, *event)`."""
    h = np.concatenate([x.reshape(*x.shape[:2], -1) for x in inputs], axis=-1)
    *layers, (weight, bias) = weights
    for inner, shift in layers:
        h = np.tanh(h @ inner + shift)
    return (h @ weight + bias)[..., 0]


def rebar(net, params, x, uniforms, others, temperature, eta, surrogate=None, scale=1.0):
    """Estimates of the gradient in each layer's logits.

    Args:
        net: the net.
        params: its parameters.
        x: data `(rows, pixels)`.
        uniforms: per layer, `(draws, rows, *event)`, of the hard and the relaxed values.
        others: per layer, of the conditional values.
        temperature: per layer.
        eta: per layer.
        surrogate: per layer, `[(weight, bias), ...]` of RELAX's network; None for REBAR.
        scale: of all sites.

    Returns:
        The values, and per layer the estimates `(draws, rows, *event)`.
    """
    kind = net.kind
    values, logits = run(net, params, x, uniforms)
    estimates = []
    for layer, (u, v) in enumerate(zip(uniforms, others, strict=True)):
        a, b, below = np.broadcast_to(logits[layer], u.shape), values[layer], values[:layer]

        def control(z, layer=layer, a=a, below=below):
            relaxed = downstream(
                net,
                params,
                x,
                below,
                soften(kind, z, temperature[layer]),
                uniforms,
                lambda z, above: soften(kind, z, temperature[above]),
            )
            value = eta[layer] * cost(net, params, x, relaxed, layer)
            if surrogate is not None:
                value = value + network(surrogate[layer], z, normalised(kind, a))
            return scale * value

        def slope(path, shape=u.shape, a=a, control=control):
            flat = complex_step.jacobian(
                lambda moved: control(path(moved.reshape(shape))), a.reshape(*shape[:2], -1)
            )
            return flat.reshape(shape)

        left = scale * cost(net, params, x, values, layer)
        left = left - control(conditional(kind, a, b, v))
        estimates.append(
            left.reshape(*left.shape, *[1] * (a.ndim - 2)) * score(kind, a, b)
            + slope(lambda moved, u=u: noisy(kind, moved, u))
            - slope(lambda moved, b=b, v=v: conditional(kind, moved, b, v))
        )
    return values, estimates


def disarm(net, params, x, uniforms, scale=1.0):
    """The values of the hard run and of each antithetic one, and the estimates in the logits."""
    values, logits = run(net, params, x, uniforms)
    runs, estimates = [values], []
    for layer, u in enumerate(uniforms):
        a, b = logits[layer], values[layer]
        flipped = harden(net.kind, a - np.log(u) + np.log1p(-u))
        other = downstream(
            net, params, x, values[:layer], flipped, uniforms, lambda z, _: harden(net.kind, z)
        )
        difference = cost(net, params, x, values, layer) - cost(net, params, x, other, layer)
        estimates.append(scale * 0.5 * difference[..., None] * (b - flipped) * sigmoid(np.abs(a)))
        runs.append(other)
    return runs, estimates


def signals(net, params, x, uniforms):
    """The values, the logits and each layer's cost: what a score-function estimator needs."""
    values, logits = run(net, params, x, uniforms)
    costs = [cost(net, params, x, values, layer) for layer in range(len(uniforms))]
    return values, logits, costs


def nvil(signal, running, decay=0.9, normalize=False, loo=False):
    """What the score is multiplied by, what the network is fitted to, and the new moments.

    Args:
        signal: `(draws, rows)`, the costs less the network's output.
        running: mean, variance and count of the steps before, not corrected for their start.
        decay: of the running moments.
        normalize: divide by the running standard deviation where it is above 1.
        loo: subtract the mean of the other draws.
    """
    mean, variance, count = running
    known = 1 - decay**count
    centred = signal - (mean / known if count else 0.0)
    deviation = np.sqrt(variance / known) if count else 1.0
    multiplier = centred / max(1.0, deviation) if normalize else centred
    new = [
        decay * before + (1 - decay) * now
        for before, now in ((mean, signal.mean()), (variance, np.mean(centred**2)))
    ]
    return leave_one_out(multiplier) if loo else multiplier, centred, (*new, count + 1)


def leave_one_out(costs):
    """`r_k` minus the mean of the other draws' `r`."""
    count = len(costs)
    return (costs - costs.mean(0)) * count / (count - 1)


def vimco(log_weights):
    """Each draw's coefficients `(draws, rows)` of the model's and the guide's log-densities."""
    count = len(log_weights)
    bound = logsumexp(log_weights, axis=0) - np.log(count)
    shares = softmax(log_weights, axis=0)
    signal = np.empty_like(log_weights)
    for k in range(count):
        without = log_weights.copy()
        without[k] = np.delete(log_weights, k, axis=0).mean(0)
        signal[k] = bound - (logsumexp(without, axis=0) - np.log(count))
    return bound, shares, signal - shares


# What the tuning parameters descend.


def spread(estimates, scale=1.0):
    """The single-sample objective: squared estimates, mean over draws and rows, sum over events."""
    return sum(np.sum((g / scale) ** 2) / np.prod(g.shape[:2]) for g in estimates)


def difference_quotient(function, parameters, step=0.02):
    """Gradient of a smooth scalar function of a dictionary of arrays, to about 1e-11."""
    gradients = {}
    for name, value in parameters.items():
        value = np.asarray(value, dtype=float)
        result = np.empty(value.shape)
        for index in np.ndindex(value.shape):
            found = []
            for offset in OFFSETS:
                moved = value.copy()
                moved[index] += offset * step
                found.append(function({**parameters, name: moved}))
            result[index] = WEIGHTS @ found / step
        gradients[name] = result
    return gradients
