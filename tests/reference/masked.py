"""Masked autoregressive multilayer perceptron.

Every hidden unit has a degree in `0..D-1`: a unit of degree `d` sees the inputs of rank
smaller than `d`, so degree-0 units see the context alone and the first output depends on
the context too.

References:
    Germain, Gregor, Murray and Larochelle (2015), MADE, arXiv 1502.03509, eq. 8-13.
"""

import numpy as np


def _elu(x):
    return np.where(np.real(x) > 0, x, np.expm1(np.where(np.real(x) > 0, 0.0, x)))


def _elu_derivative(x):
    return np.where(np.real(x) > 0, 1.0, np.exp(np.where(np.real(x) > 0, 0.0, x)))


ACTIVATIONS = {
    "elu": (_elu, _elu_derivative),
    "relu": (
        lambda x: np.where(np.real(x) > 0, x, 0.0),
        lambda x: np.where(np.real(x) > 0, 1.0, 0.0),
    ),
    "tanh": (np.tanh, lambda x: 1.0 - np.tanh(x) ** 2),
}


def degrees(features, width):
    """Degree `floor(h D / H)` of every hidden unit `h` of a layer of width `H`."""
    return np.array([(h * features) // width for h in range(width)])


def masks(features, hidden_dims, num_outputs, order=None):
    """One boolean `(out, in)` mask per layer, entry by entry from the rule above."""
    order = np.arange(features) if order is None else np.asarray(order)
    rank = np.empty(features, dtype=int)
    for position, feature in enumerate(order):
        rank[feature] = position
    result = []
    previous = None
    for width in hidden_dims:
        degree = degrees(features, width)
        if previous is None:
            mask = [[rank[j] < degree[h] for j in range(features)] for h in range(width)]
        else:
            mask = [[below <= degree[h] for below in previous] for h in range(width)]
        result.append(np.array(mask))
        previous = degree
    last = [[below <= rank[i] for below in previous] for i in range(features)]
    result.append(np.array(last * num_outputs))
    return result


def _layers(weights):
    count = 0
    while f"layers.{count}.weight" in weights:
        count += 1
    return [
        (weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"])
        for layer in range(count)
    ]


def _masked(weights, features, order):
    layers = _layers(weights)
    hidden_dims = [weight.shape[0] for weight, _ in layers[:-1]]
    num_outputs = layers[-1][0].shape[0] // features
    return [
        (weight * mask, bias)
        for (weight, bias), mask in zip(
            layers, masks(features, hidden_dims, num_outputs, order), strict=True
        )
    ]


def forward(z, weights, context=None, *, order=None, activation="elu"):
    """Outputs of shape `(*batch, num_outputs, D)`.

    Args:
        z: inputs `(*batch, D)`.
        weights: arrays named as in a PyTorch state dict, `layers.<l>.{weight,bias}` and
            `context_layer.weight`, matrices of shape `(out, in)`.
        context: `(*batch, context_dim)` or `None`.
        order: permutation that lists the features from first to last.
        activation: `"elu"`, `"relu"` or `"tanh"`.
    """
    z = np.asarray(z)
    act, _ = ACTIVATIONS[activation]
    layers = _masked(weights, z.shape[-1], order)
    hidden = z
    for index, (weight, bias) in enumerate(layers):
        hidden = hidden @ weight.T + bias
        if index == 0 and context is not None:
            hidden = hidden + context @ weights["context_layer.weight"].T
        if index < len(layers) - 1:
            hidden = act(hidden)
    return hidden.reshape(*hidden.shape[:-1], -1, z.shape[-1])


def jacobian(z, weights, context=None, *, order=None, activation="elu"):
    """`d outputs / d z`, `(*batch, num_outputs, D, D)`: one tangent per input feature."""
    z = np.asarray(z)
    act, derivative = ACTIVATIONS[activation]
    layers = _masked(weights, z.shape[-1], order)
    columns = []
    for j in range(z.shape[-1]):
        hidden, tangent = z, np.zeros(z.shape)
        tangent[..., j] = 1.0
        for index, (weight, bias) in enumerate(layers):
            hidden, tangent = hidden @ weight.T + bias, tangent @ weight.T
            if index == 0 and context is not None:
                hidden = hidden + context @ weights["context_layer.weight"].T
            if index < len(layers) - 1:
                hidden, tangent = act(hidden), derivative(hidden) * tangent
        columns.append(tangent.reshape(*tangent.shape[:-1], -1, z.shape[-1]))
    return np.stack(columns, axis=-1)
