"""Bits between two continuous latents: the exact ELBO by enumeration and quadrature.

The guide draws `c ~ N(.)` from the data, bits whose logits depend on `c`, and `s ~ N(.)`
whose mean depends on the bits. Given `c` and the bits, the log-weight is a quadratic in
`s`, which three nodes integrate exactly; in `c` it is smooth, and the nodes converge fast.

References:
    Golub and Welsch (1969), Calculation of Gauss quadrature rules, Math. Comp. 23.
"""

import functools
import itertools

import numpy as np

from . import complex_step, discrete

ROWS, WIDTH, BITS = 8, 4, 3
SHAPES = {
    # Guide: c from x; bits from x and c; s from x and the bits.
    "c_weight": (WIDTH,),
    "c_bias": (),
    "c_log_scale": (),
    "b_weight": (WIDTH, BITS),
    "b_bias": (BITS,),
    "b_of_c": (BITS,),
    "s_weight": (WIDTH,),
    "s_bias": (),
    "s_of_b": (BITS,),
    "s_log_scale": (),
    # Model: bits from c; s from c and the bits; x from all.
    "prior": (BITS,),
    "prior_of_c": (BITS,),
    "mean_of_c": (),
    "mean_of_b": (BITS,),
    "x_bias": (WIDTH,),
    "x_of_c": (WIDTH,),
    "x_of_s": (WIDTH,),
    "x_of_b": (BITS, WIDTH),
}


def normal(value, loc, log_scale=0.0):
    """Log-density of a Normal."""
    return -0.5 * ((value - loc) / np.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi)


def weights(params, x, num_c=16, num_s=3):
    """Nodes' chances `(c, 1, s, 1)`, and `log q(b)` and log-weights `(c, states, s, rows)`."""
    nodes, chance_c = np.polynomial.hermite_e.hermegauss(num_c)
    inner, chance_s = np.polynomial.hermite_e.hermegauss(num_s)
    chance = np.multiply.outer(chance_c, chance_s)[:, None, :, None] / (2 * np.pi)
    states = np.array(list(itertools.product((0.0, 1.0), repeat=BITS)))
    c_loc = x @ params["c_weight"] + params["c_bias"]
    c = c_loc + np.exp(params["c_log_scale"]) * nodes[:, None, None, None]
    b = states[:, None, None, :]
    b_logits = x @ params["b_weight"] + params["b_bias"] + c[..., None] * params["b_of_c"]
    log_q_b = discrete.log_prob("bernoulli", b_logits, b)
    s_loc = x @ params["s_weight"] + params["s_bias"] + b @ params["s_of_b"]
    s = s_loc + np.exp(params["s_log_scale"]) * inner[:, None]
    logits = params["prior"] + c[..., None] * params["prior_of_c"]
    x_loc = (
        params["x_bias"]
        + c[..., None] * params["x_of_c"]
        + s[..., None] * params["x_of_s"]
        + b @ params["x_of_b"]
    )
    log_p = (
        normal(c, 0.0)
        + discrete.log_prob("bernoulli", logits, b)
        + normal(s, c * params["mean_of_c"] + b @ params["mean_of_b"])
        + normal(x, x_loc).sum(-1)
    )
    log_q = normal(c, c_loc, params["c_log_scale"]) + log_q_b
    log_q = log_q + normal(s, s_loc, params["s_log_scale"])
    return chance, log_q_b, log_p - log_q


def elbo(params, x, num_nodes=16):
    """The exact ELBO of each row."""
    chance, log_q, log_w = weights(params, x, num_nodes)
    return np.sum(chance * np.exp(log_q) * log_w, axis=(0, 1, 2))


def by_row(function, params):
    """Derivatives of a function `(rows,)`, `(rows, *shape)`: as if each row had its parameters."""
    found = {}
    for name, value in params.items():
        shape = np.shape(value)
        flat = complex_step.jacobian(
            lambda moved, name=name, shape=shape: function({**params, name: moved.reshape(shape)}),
            np.ravel(value),
        )
        found[name] = flat.reshape(-1, *shape)
    return found


def gradient(params, x):
    """The exact gradient of the ELBO, row by row."""
    return by_row(lambda p: elbo(p, x), params)


def pair_bound(params, x, num_c=10, num_s=10):
    """The exact bound of two particles, of each row."""
    chance, log_q, log_w = weights(params, x, num_c, num_s)
    total = []
    for n in range(len(x)):
        q, own = (chance * np.exp(log_q))[..., n].ravel(), log_w[..., n].ravel()
        top = np.max(np.real(own))
        w = np.exp(own - top)
        total.append(q @ np.log((w[:, None] + w) / 2) @ q + top * np.sum(q) ** 2)
    return np.array(total)


def pair_gradient(params, x, num_c=10, num_s=10):
    """The gradient of the bound of two particles, row by row.

    Particles at the nodes `i`, `j` have the weight `log((w_i + w_j) / 2)`. As particles
    change places, the gradient is a sum over the nodes of one: of its share of the weight
    times `d log w`, which the nodes move along, and of the weight times `d log q(b)`.
    """
    chance, log_q, log_w = weights(params, x, num_c, num_s)
    q = chance * np.exp(log_q)
    share, value = np.empty_like(log_w), np.empty_like(log_w)
    for n in range(len(x)):
        own, weight = q[..., n].ravel(), log_w[..., n].ravel()
        top = weight.max()
        w = np.exp(weight - top)
        total = w[:, None] + w
        share[..., n] = (w * ((1.0 / total) @ own)).reshape(q.shape[:-1])
        value[..., n] = (np.log(total) @ own + top).reshape(q.shape[:-1])
    value = value - np.sum(q * value, axis=(0, 1, 2))

    def surrogate(p):
        _, log_q, log_w = weights(p, x, num_c, num_s)
        return np.sum(2 * q * (share * log_w + value * log_q), axis=(0, 1, 2))

    return by_row(surrogate, params)


@functools.cache
def trained(num_steps=100, rate=0.1):
    """Parameters and data: steps of bounded length up the exact gradient."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, WIDTH)) + 1.5 * rng.integers(2, size=(ROWS, 1))
    params = {name: 0.4 * rng.standard_normal(shape) for name, shape in SHAPES.items()}
    for _ in range(num_steps):
        found = by_row(lambda p: elbo(p, x, 8), params)
        found = {name: value.sum(0) for name, value in found.items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in found.values()))
        params = {k: v + rate * found[k] / (1.0 + norm) for k, v in params.items()}
    return params, x
