"""Autoregressive likelihoods by name: parameters, densities, draws, and what depends on what.

`case` holds a constructor's arguments and `call` what a module is called with besides the
conditioning; weights are named as in a PyTorch state dict; `conditioning` is context and covariates
side by side, `(*batch, C)`, with a row for each position where the case says so.
"""

import numpy as np

from reference import made, outputs, pixelcnn, recurrent


def shape_of(case):
    """The shape of a value."""
    return (case["shape"],) if isinstance(case["shape"], int) else tuple(case["shape"])


def options_of(case):
    """The output's name, and its numbers of categories and components."""
    sizes = {"num_categories": 256, "num_components": 5}
    return case.get("output", "bernoulli"), {key: case.get(key, v) for key, v in sizes.items()}


def _block(case):
    """Elements of a position of a recurrent likelihood."""
    shape = shape_of(case)
    return int(np.prod(shape[len(shape) - case.get("block_dims", 0) :]))


def _recurrent_params(value, weights, conditioning=None, **case):
    output, sizes = options_of(case)
    shape = shape_of(case)
    batch = value.shape[: value.ndim - len(shape)]
    encoded = outputs.encode(output, value, sizes["num_categories"])
    steps = encoded.reshape(*batch, int(np.prod(shape)) // _block(case), -1)
    if conditioning is not None:
        if not case.get("context_per_step", False):
            conditioning = conditioning[..., None, :]
        size = (*batch, steps.shape[-2], conditioning.shape[-1])
        conditioning = np.broadcast_to(conditioning, size)
    kind = {"cell": case.get("cell", "gru"), "window": case.get("window", 1)}
    found = recurrent.params(steps, weights, conditioning, **kind)
    return found.reshape(*batch, int(np.prod(shape)), -1)


def _recurrent_dependency(**case):
    position = np.arange(int(np.prod(shape_of(case)))) // _block(case)
    return position[:, None] > position


PARAMS = {"MADE": made.params, "PixelCNN": pixelcnn.params, "Recurrent": _recurrent_params}
DEPENDENCY = {
    "MADE": made.dependency,
    "PixelCNN": pixelcnn.dependency,
    "Recurrent": _recurrent_dependency,
}


def params(name, value, weights, conditioning, case, **call):
    """Numbers of all elements, `(*batch, D, P)`, given the values `(*batch, *shape)`."""
    return PARAMS[name](np.asarray(value), weights, conditioning, **call, **case)


def log_prob(name, value, weights, conditioning, case, **call):
    """Log-density `(*batch,)`."""
    if name == "MADE":
        return made.log_prob(value, weights, conditioning, **call, **case)
    output, sizes = options_of(case)
    found = params(name, value, weights, conditioning, case, **call)
    flat = np.asarray(value).reshape(found.shape[:-1])
    return outputs.log_prob(output, found, flat, **sizes).sum(-1)


def draw(name, noise, weights, conditioning, case, **call):
    """The value that noise `(*batch, *shape, N)` makes: a whole pass for each round of elements."""
    output, sizes = options_of(case)
    shape = shape_of(case)
    noise = noise.reshape(*noise.shape[: noise.ndim - len(shape) - 1], int(np.prod(shape)), -1)
    value = np.zeros(noise.shape[:-1])
    for ready in rounds(sees(name, case, **call)):
        image = value.reshape(*value.shape[:-1], *shape)
        found = params(name, image, weights, conditioning, case, **call)
        value[..., ready] = outputs.draw(
            output, found[..., ready, :], noise[..., ready, :], **sizes
        )
    return value.reshape(*value.shape[:-1], *shape)


def rounds(seen):
    """The elements in rounds: a round's depend on those of the rounds before alone."""
    done = np.zeros(len(seen), bool)
    found = []
    while not done.all():
        found.append([i for i in range(len(done)) if not done[i] and done[seen[i]].all()])
        done[found[-1]] = True
    return found


def sees(name, case, **call):
    """Boolean `(D, D)`: whether the numbers of an element (row) depend on another one (column)."""
    return DEPENDENCY[name](**call, **case)
