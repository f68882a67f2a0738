"""Masked autoencoder for distribution estimation, entry by entry.

Every hidden unit has a degree in `0..D-1`: a unit of degree `d` sees the elements of rank smaller
than `d` and the units below of degree at most `d`; the element of rank `r` sees the units of degree
at most `r`. Degree-0 units see the conditioning alone.

Weights are named as in a PyTorch state dict: `layers.<l>.{weight,bias}` and
`context_layer.weight`, matrices of shape `(out, in)`. Element `i` owns the inputs `i I .. i I + I`
and the outputs `i P .. i P + P`.

References:
    Germain, Gregor, Murray and Larochelle (2015), MADE, arXiv 1502.03509, eq. 8-13, and
    sec. 4.2-4.3 for several orders and masks.
"""

import numpy as np

from reference import outputs
from reference.masked import ACTIVATIONS

DEFAULTS = {
    "hidden_dims": (100,),
    "output": "bernoulli",
    "num_categories": 256,
    "num_components": 5,
    "order": None,
    "num_masks": 1,
    "order_agnostic": True,
    "mask_seed": 0,
    "residual": False,
    "activation": "relu",
}


def _options(case):
    features = int(np.prod(case["shape"]))
    chosen = DEFAULTS | {key: value for key, value in case.items() if key in DEFAULTS}
    element = {key: chosen[key] for key in ("num_categories", "num_components")}
    return features, chosen, element


def degrees(mask_index=0, **case):
    """The order of the elements and the degrees of every hidden layer of one mask."""
    features, options, _ = _options(case)
    order = list(range(features)) if options["order"] is None else list(options["order"])
    if mask_index == 0:
        return order, [
            [unit * features // width for unit in range(width)] for width in options["hidden_dims"]
        ]
    rng = np.random.default_rng((options["mask_seed"], mask_index))
    if options["order_agnostic"]:
        order = list(rng.permutation(features))
    found, low = [], 0
    for width in options["hidden_dims"]:
        if found and options["residual"]:
            found.append(found[0])
            continue
        found.append(list(rng.integers(low, features, size=width)))
        low = min(found[-1])
    return order, found


def masks(mask_index=0, **case):
    """One boolean `(out, in)` mask per layer between levels of elements and units."""
    features, options, element = _options(case)
    order, levels = degrees(mask_index, **case)
    rank = {feature: place for place, feature in enumerate(order)}
    inputs = outputs.encode(options["output"], np.zeros(1), options["num_categories"]).shape[-1]
    params = outputs.num_params(options["output"], **element)
    result = [
        [[rank[j // inputs] < unit for j in range(features * inputs)] for unit in levels[0]],
    ]
    for below, above in zip(levels, levels[1:], strict=False):
        result.append([[low <= unit for low in below] for unit in above])
    result.append(
        [[low <= rank[i // params] for low in levels[-1]] for i in range(features * params)]
    )
    return [np.array(mask) for mask in result]


def dependency(mask_index=0, **case):
    """Boolean `(D, D)`: whether an element's parameters (row) depend on an element (column)."""
    features, options, _ = _options(case)
    first, *middle, last = [mask.astype(int) for mask in masks(mask_index, **case)]
    reach = first
    for mask in middle:
        # A residual block keeps what it is given, and goes through its mask twice.
        reach = reach + mask @ mask @ reach if options["residual"] else mask @ reach
    found = (last @ reach).reshape(features, -1, features, first.shape[1] // features)
    return found.any(axis=(1, 3))


def params(value, weights, conditioning=None, mask_index=0, **case):
    """Parameters of all conditionals, `(*batch, D, P)`, of values `(*batch, *shape)`."""
    features, options, element = _options(case)
    value = np.asarray(value)
    value = value.reshape(*value.shape[: value.ndim - np.size(case["shape"])], features)
    encoded = outputs.encode(options["output"], value, options["num_categories"])
    act, _ = ACTIVATIONS[options["activation"]]
    kept = masks(mask_index, **case)

    def layer(place, mask, x):
        return x @ (weights[f"layers.{place}.weight"] * mask).T + weights[f"layers.{place}.bias"]

    hidden = layer(0, kept[0], encoded.reshape(*encoded.shape[:-2], -1))
    if conditioning is not None:
        hidden = hidden + conditioning @ weights["context_layer.weight"].T
    place = 1
    for mask in kept[1:-1]:
        if options["residual"]:
            inner = layer(place, mask, act(hidden))
            hidden = hidden + layer(place + 1, mask, act(inner))
            place += 2
        else:
            hidden = layer(place, mask, act(hidden))
            place += 1
    found = layer(place, kept[-1], act(hidden))
    return found.reshape(*found.shape[:-1], features, -1)


def log_prob(value, weights, conditioning=None, mask_index=None, **case):
    """Log-density `(*batch,)`; the mixture over all masks if `mask_index` is None."""
    features, options, element = _options(case)
    if mask_index is None:
        number = options["num_masks"]
        terms = [log_prob(value, weights, conditioning, mask, **case) for mask in range(number)]
        return np.logaddexp.reduce(terms, axis=0) - np.log(number)
    found = params(value, weights, conditioning, mask_index, **case)
    value = np.asarray(value)
    flat = value.reshape(*value.shape[: value.ndim - np.size(case["shape"])], features)
    flat = np.broadcast_to(flat, found.shape[:-1])
    return outputs.log_prob(options["output"], found, flat, **element).sum(axis=-1)


def draw(noise, weights, conditioning=None, mask_index=0, **case):
    """The value that noise `(*batch, *shape, N)` makes: one whole pass per element."""
    features, options, element = _options(case)
    noise = np.asarray(noise)
    batch = noise.shape[: noise.ndim - np.size(case["shape"]) - 1]
    noise = noise.reshape(*batch, features, -1)
    value = np.zeros((*batch, features))
    shape = np.atleast_1d(case["shape"])
    order, _ = degrees(mask_index, **case)
    for feature in order:
        found = params(value.reshape(*batch, *shape), weights, conditioning, mask_index, **case)
        value[..., feature] = outputs.draw(
            options["output"], found[..., feature, :], noise[..., feature, :], **element
        )
    return value.reshape(*batch, *shape)
