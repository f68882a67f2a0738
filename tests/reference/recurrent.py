"""Recurrent likelihood: GRU and LSTM cells over the positions of a value.

Position `t` of `T` holds `E` elements, each encoded as `I` numbers. The input of step `t` is
`(e_{t-1}, e_{t-2}, ..., e_{t-window}, c_t)`: the encodings of the positions before it, the
nearest first and zeros before the first, and the conditioning. One loop over positions, layer
by layer within a step, gate by gate within a layer.

Weights are named as in a PyTorch state dict, `rnn.{weight,bias}_{ih,hh}_l<layer>` with the
gates stacked as in its documentation, and `head.{weight,bias}`.

References:
    Cho et al. (2014), arXiv 1406.1078, appendix A.1.1 (GRU, here in the variant of
    `torch.nn.GRU`, whose reset gate acts after the recurrent matrix); Hochreiter and
    Schmidhuber (1997) with the forget gate of Gers et al. (2000), as `torch.nn.LSTM`.
"""

import numpy as np

GATES = {"gru": 3, "lstm": 4}


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def _gates(x, h, weights, layer, count):
    """What each gate gets from the input and from the state, `[(a_0, b_0), (a_1, b_1), ...]`."""
    width = h.shape[-1]
    found = []
    for gate in range(count):
        rows = slice(gate * width, (gate + 1) * width)
        parts = [
            source @ weights[f"rnn.weight_{kind}_l{layer}"][rows].T
            + weights[f"rnn.bias_{kind}_l{layer}"][rows]
            for source, kind in ((x, "ih"), (h, "hh"))
        ]
        found.append(tuple(parts))
    return found


def gru_step(x, state, weights, layer):
    """The state `(h,)` after one step of a layer."""
    (h,) = state
    reset, update, new = _gates(x, h, weights, layer, 3)
    r = _sigmoid(reset[0] + reset[1])
    z = _sigmoid(update[0] + update[1])
    n = np.tanh(new[0] + r * new[1])
    return ((1.0 - z) * n + z * h,)


def lstm_step(x, state, weights, layer):
    """The state `(h, c)` after one step of a layer."""
    h, c = state
    input_, forget, cell, output = _gates(x, h, weights, layer, 4)
    c = _sigmoid(forget[0] + forget[1]) * c + _sigmoid(input_[0] + input_[1]) * np.tanh(
        cell[0] + cell[1]
    )
    return (_sigmoid(output[0] + output[1]) * np.tanh(c), c)


STEPS = {"gru": (gru_step, 1), "lstm": (lstm_step, 2)}


def params(encoded, weights, conditioning=None, *, cell="gru", window=1):
    """Outputs of the head, `(*batch, T, outputs)`.

    Args:
        encoded: `(*batch, T, E * I)`, absent positions as zeros.
        weights: see the module.
        conditioning: `(*batch, T, C)` or `None`.
        cell: `"gru"` or `"lstm"`.
        window: how many earlier positions a step sees besides the state.
    """
    encoded = np.asarray(encoded)
    *batch, num_positions, width = encoded.shape
    step, num_states = STEPS[cell]
    hidden_dim = weights["head.weight"].shape[1]
    num_layers = sum(name.startswith("rnn.weight_ih_l") for name in weights)
    zeros = np.zeros((*batch, hidden_dim), dtype=encoded.dtype)
    states = [(zeros,) * num_states for _ in range(num_layers)]
    outputs = []
    for t in range(num_positions):
        parts = [
            encoded[..., t - lag, :] if t >= lag else np.zeros((*batch, width))
            for lag in range(1, window + 1)
        ]
        if conditioning is not None:
            parts.append(conditioning[..., t, :])
        x = np.concatenate(parts, axis=-1)
        for layer in range(num_layers):
            states[layer] = step(x, states[layer], weights, layer)
            x = states[layer][0]
        outputs.append(x @ weights["head.weight"].T + weights["head.bias"])
    return np.stack(outputs, axis=-2)


def bernoulli_log_prob(value, weights, conditioning=None, *, mask=None, cell="gru", window=1):
    """`log p(x)` of bits `(*batch, T, E)`; absent positions, `mask` False, count nothing."""
    value = np.asarray(value, dtype=float)
    present = np.ones(value.shape[:-1], bool) if mask is None else np.asarray(mask)
    bits = np.where(present[..., None], value, 0.0)
    logits = params(bits, weights, conditioning, cell=cell, window=window)
    terms = bits * logits - np.logaddexp(0.0, logits)
    return np.sum(np.where(present[..., None], terms, 0.0), axis=(-2, -1))


def categorical_log_prob(value, weights, num_categories, conditioning=None, **kwargs):
    """`log p(x)` of categories `(*batch, T)`, one element a position."""
    value = np.asarray(value)
    one_hot = np.eye(num_categories)[value]
    logits = params(one_hot, weights, conditioning, **kwargs)
    logits = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return np.sum(one_hot * logits, axis=(-2, -1))


def random_weights(rng, num_inputs, num_outputs, *, cell="gru", hidden_dim=5, num_layers=1):
    """Normal weights, large enough for outputs that depend on the whole past."""
    weights = {}
    gates = GATES[cell]
    for layer in range(num_layers):
        width = num_inputs if layer == 0 else hidden_dim
        for kind, fan_in in (("ih", width), ("hh", hidden_dim)):
            weights[f"rnn.weight_{kind}_l{layer}"] = rng.standard_normal(
                (gates * hidden_dim, fan_in)
            ) / np.sqrt(fan_in)
            weights[f"rnn.bias_{kind}_l{layer}"] = 0.5 * rng.standard_normal(gates * hidden_dim)
    weights["head.weight"] = rng.standard_normal((num_outputs, hidden_dim))
    weights["head.bias"] = 0.3 * rng.standard_normal(num_outputs)
    return weights
