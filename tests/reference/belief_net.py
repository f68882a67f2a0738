"""Belief nets of linear layers with discrete latents, small enough to be enumerated.

The guide goes up from the data `x`, `q(z_0 | x) q(z_1 | z_0) ...`; the model comes down,
`p(z_top) ... p(z_0 | z_1) p(x | z_0)`; the data are bits. A layer is a vector of bits, or
of one-hot categoricals `(number, categories)`.

References:
    Saul, Jaakkola and Jordan (1996), Mean field theory for sigmoid belief networks, JAIR 4.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from . import discrete

NETS = {
    "one layer": ("bernoulli", ((10,),)),
    "two layers": ("bernoulli", ((4,), (4,))),
    "one-hot": ("one_hot", ((3, 4),)),
}


class Net(NamedTuple):
    """A net: `kind` of its latents, and the event shape of each layer, bottom up."""

    kind: str
    layers: tuple

    @property
    def widths(self):
        return [int(np.prod(shape)) for shape in self.layers]

    def logits(self, params, x, values, layer):
        """The guide's logits of a layer, given the values of those below it."""
        below = x if layer == 0 else _flat(values[layer - 1], self.layers[layer - 1])
        flat = below @ params[f"encoder_{layer}"] + params[f"encoder_bias_{layer}"]
        return flat.reshape(*flat.shape[:-1], *self.layers[layer])

    def log_q(self, params, x, values):
        """Per layer, `(..., rows)`."""
        return [
            discrete.log_prob(self.kind, self.logits(params, x, values, layer), value)
            for layer, value in enumerate(values)
        ]

    def _below(self, params, values, layer):
        """The model's logits of what stands below a layer."""
        value = _flat(values[layer], self.layers[layer])
        flat = value @ params[f"decoder_{layer}"] + params[f"decoder_bias_{layer}"]
        return flat if layer == 0 else flat.reshape(*flat.shape[:-1], *self.layers[layer - 1])

    def log_joint(self, params, x, values):
        """`log p(x, z)`, `(..., rows)`."""
        total = discrete.log_prob("bernoulli", self._below(params, values, 0), x)
        for layer, value in enumerate(values[:-1]):
            logits = self._below(params, values, layer + 1)
            total = total + discrete.log_prob(self.kind, logits, value)
        prior = params["prior"].reshape(self.layers[-1])
        return total + discrete.log_prob(self.kind, prior, values[-1])

    def gradients(self, params, x, values, model, guide):
        """Per draw, the gradients for coefficients of the model's terms and the guide's logits.

        Args:
            params: the parameters.
            x: data `(rows, pixels)`.
            values: hard values, `(draws, rows, *event)` of each layer.
            model: `(draws, rows)`, the coefficients of `log p`.
            guide: per layer, `(draws, rows, *event)`, the gradients in the logits.
        """
        found = {}
        for layer, (value, estimate) in enumerate(zip(values, guide, strict=True)):
            below = x if layer == 0 else _flat(values[layer - 1], self.layers[layer - 1])
            below = np.broadcast_to(below, (*value.shape[:2], below.shape[-1]))
            upward = _flat(estimate, self.layers[layer])
            found[f"encoder_{layer}"] = np.einsum("knd,kne->kde", below, upward)
            found[f"encoder_bias_{layer}"] = upward.sum(1)
            logits = self._below(params, values, layer)
            kind, target = ("bernoulli", x) if layer == 0 else (self.kind, values[layer - 1])
            downward = discrete.score(kind, logits, target)
            downward = downward.reshape(*value.shape[:2], -1) * model[..., None]
            flat = _flat(value, self.layers[layer])
            found[f"decoder_{layer}"] = np.einsum("knd,kne->kde", flat, downward)
            found[f"decoder_bias_{layer}"] = downward.sum(1)
        prior = params["prior"].reshape(self.layers[-1])
        top = _flat(discrete.score(self.kind, prior, values[-1]), self.layers[-1])
        found["prior"] = np.sum(model[..., None] * top, axis=1)
        return found

    def states(self):
        """Every joint state, `(states, *event)` of each layer."""
        corners = [_corners(self.kind, shape) for shape in self.layers]
        index = np.array(list(itertools.product(*(range(len(c)) for c in corners))))
        return [c[i] for c, i in zip(corners, index.T, strict=True)]

    def enumerated(self, params, x):
        """`log p(x, z)` and `log q(z | x)` of every state, `(states, rows)`."""
        states = self.states()
        flat = [_flat(value, shape) for value, shape in zip(states, self.layers, strict=True)]
        logits = self._below(params, states, 0)
        log_p = logits @ x.T - discrete.softplus(logits).sum(-1, keepdims=True)
        rest = params["prior"].reshape(self.layers[-1])
        rest = discrete.log_prob(self.kind, rest, states[-1])
        for layer, value in enumerate(states[:-1]):
            logits = self._below(params, states, layer + 1)
            rest = rest + discrete.log_prob(self.kind, logits, value)
        logits = self.logits(params, x, [], 0)
        if self.kind == "one_hot":
            log_q = flat[0] @ _flat(discrete.log_softmax(logits), self.layers[0]).T
        else:
            log_q = flat[0] @ logits.T - discrete.softplus(logits).sum(-1)
        for layer in range(1, len(states)):
            logits = self.logits(params, x, states, layer)
            log_q = log_q + discrete.log_prob(self.kind, logits, states[layer])[:, None]
        return log_p + rest[:, None], log_q

    def bound(self, params, x, num_particles=1):
        """The exact multi-sample bound of each row, and the gradient that `weighted` makes of it.

        By exchange of the particles the gradient is one weighted sum over the states of one
        of them.
        """
        log_p, log_q = self.enumerated(params, x)
        q, log_w = np.exp(log_q), log_p - log_q
        if num_particles == 1:
            bound = np.sum(q * log_w, axis=0)
            return bound, self.weighted(params, x, q, q * (log_w - bound))
        bounds, model, guide = np.empty(len(x)), np.empty_like(q), np.empty_like(q)
        for n, (own, chance) in enumerate(zip(log_w.T, q.T, strict=True)):
            top = own.max()
            w = np.exp(own - top)
            others = functools.reduce(np.add.outer, [w] * (num_particles - 1)).ravel()
            chances = functools.reduce(np.multiply.outer, [chance] * (num_particles - 1)).ravel()
            total = w[:, None] + others
            value = np.log(total) @ chances + top - np.log(num_particles)
            share = w * ((1.0 / total) @ chances)
            bounds[n] = chance @ value
            model[:, n] = num_particles * chance * share
            guide[:, n] = num_particles * chance * (value - bounds[n] - share)
        return bounds, self.weighted(params, x, model, guide)

    def weighted(self, params, x, model, guide):
        """Gradient of `sum model log p + guide log q` over states and rows, both `(states, rows)`.

        Biases, and the prior, get a gradient of each row, as if each row had its own; the
        weights' one is summed. No logits depend on both the state and the row, so that all
        sums are matrix products.
        """
        states = self.states()
        flat = [_flat(value, shape) for value, shape in zip(states, self.layers, strict=True)]
        found = {}
        logits = self._below(params, states, 0)
        mean = discrete.sigmoid(logits)
        found["decoder_0"] = flat[0].T @ (model @ x - model.sum(1, keepdims=True) * mean)
        found["decoder_bias_0"] = model.sum(0)[:, None] * x - model.T @ mean
        for layer in range(1, len(states)):
            logits = self._below(params, states, layer)
            error = discrete.score(self.kind, logits, states[layer - 1])
            error = _flat(error, self.layers[layer - 1])
            found[f"decoder_{layer}"] = flat[layer].T @ (model.sum(1)[:, None] * error)
            found[f"decoder_bias_{layer}"] = model.T @ error
        prior = params["prior"].reshape(self.layers[-1])
        error = _flat(discrete.score(self.kind, prior, states[-1]), self.layers[-1])
        found["prior"] = model.T @ error
        mean = _flat(discrete.mean(self.kind, self.logits(params, x, [], 0)), self.layers[0])
        up = guide.T @ flat[0] - guide.sum(0)[:, None] * mean
        found["encoder_0"], found["encoder_bias_0"] = x.T @ up, up
        for layer in range(1, len(states)):
            error = discrete.score(self.kind, self.logits(params, x, states, layer), states[layer])
            error = _flat(error, self.layers[layer])
            found[f"encoder_{layer}"] = flat[layer - 1].T @ (guide.sum(1)[:, None] * error)
            found[f"encoder_bias_{layer}"] = guide.T @ error
        return found

    def means(self, params, x):
        """Per layer, the guide's mean `(rows, width)`."""
        q = np.exp(self.enumerated(params, x)[1])
        return [
            q.T @ _flat(value, shape)
            for value, shape in zip(self.states(), self.layers, strict=True)
        ]

    def regular(self, params, x):
        """Of `weighted`'s biases, those whose mean over a thousand draws is nearly Normal.

        A mask `(rows, width)` of each: the guide's bits that are not saturated, `.05 < p <
        .95`, and those gradients of the model whose kurtosis is no larger than such a bit's.
        """
        masks = {
            f"encoder_bias_{layer}": (mean > 0.05) & (mean < 0.95)
            for layer, mean in enumerate(self.means(params, x))
        }
        q, states = np.exp(self.enumerated(params, x)[1]), self.states()
        draws = {"decoder_bias_0": discrete.sigmoid(self._below(params, states, 0))}
        for layer in range(1, len(states)):
            logits = self._below(params, states, layer)
            error = discrete.score(self.kind, logits, states[layer - 1])
            draws[f"decoder_bias_{layer}"] = _flat(error, self.layers[layer - 1])
        draws["prior"] = _flat(states[-1], self.layers[-1])
        for name, draw in draws.items():
            mean = q.T @ draw
            second = q.T @ draw**2 - mean**2
            fourth = q.T @ draw**4 - 4 * mean * (q.T @ draw**3) + 6 * mean**2 * (q.T @ draw**2)
            fourth = fourth - 3 * mean**4
            masks[name] = (second > 1e-6) & (fourth < 20 * second**2)
        return masks

    def start(self, rng, pixels, scale=0.3):
        """Random parameters."""
        widths = self.widths
        shapes = {"prior": (widths[-1],)}
        for layer, width in enumerate(widths):
            below = pixels if layer == 0 else widths[layer - 1]
            shapes |= {
                f"encoder_{layer}": (below, width),
                f"encoder_bias_{layer}": (width,),
                f"decoder_{layer}": (width, below),
                f"decoder_bias_{layer}": (below,),
            }
        return {name: scale * rng.standard_normal(shape) for name, shape in shapes.items()}


def _flat(value, shape):
    """Events of `shape` as vectors."""
    return value.reshape(*value.shape[: value.ndim - len(shape)], -1)


def _corners(kind, shape):
    """Every value of one layer."""
    if kind == "bernoulli":
        return np.array(list(itertools.product((0.0, 1.0), repeat=shape[0])))
    return np.eye(shape[1])[list(itertools.product(range(shape[1]), repeat=shape[0]))]


@functools.cache
def digits():
    """Scikit-learn's digits, `(rows, 64)`, drawn as bits of their grey."""
    from sklearn.datasets import load_digits

    grey = load_digits().data / 16.0
    return (np.random.default_rng(1).random(grey.shape) < grey) * 1.0


@functools.cache
def trained(name, num_steps=1500, batch_size=50, rate=0.01, scale=0.3):
    """Net and parameters: Adam on leave-one-out gradients of four draws.

    Adam: Kingma and Ba (2015), arXiv 1412.6980.
    """
    net, data, rng = Net(*NETS[name]), digits(), np.random.default_rng(0)
    params = net.start(rng, data.shape[1], scale)
    moments = {key: np.zeros((2, *value.shape)) for key, value in params.items()}
    for step in range(1, num_steps + 1):
        x = data[rng.integers(len(data), size=batch_size)]
        uniforms = [rng.random((4, len(x), *shape)) for shape in net.layers]
        values, logits, costs = discrete.signals(net, params, x, uniforms)
        guide = [
            discrete.leave_one_out(s).reshape(*s.shape, *[1] * (b.ndim - 2))
            * discrete.score(net.kind, a, b)
            for a, b, s in zip(logits, values, costs, strict=True)
        ]
        found = net.gradients(params, x, values, np.ones(costs[0].shape), guide)
        for key, value in params.items():
            gradient = found[key].mean(0) / len(x)
            moments[key][0] += 0.1 * (gradient - moments[key][0])
            moments[key][1] += 0.001 * (gradient**2 - moments[key][1])
            first, second = moments[key][0] / (1 - 0.9**step), moments[key][1] / (1 - 0.999**step)
            params[key] = value + rate * first / (np.sqrt(second) + 1e-8)
    return net, params


@functools.cache
def undecided(name, num_rows=40):
    """Rows of the digits on whose latents the trained net's guide is least decided."""
    net, params = trained(name)
    x = digits()[:400]
    decided = sum(np.mean(np.abs(mean - 0.5), axis=1) for mean in net.means(params, x))
    return x[np.argsort(decided, kind="stable")[:num_rows]]


def by_parameter(gradient):
    """The gradient of the biases that all rows share."""
    return {
        name: value.sum(0) if "bias" in name or name == "prior" else value
        for name, value in gradient.items()
    }
