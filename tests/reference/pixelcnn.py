"""The gated PixelCNN, pixel by pixel.

An image of `C` channels; `F` features in each of two stacks, `C` groups of them; layer `l` reaches
`e_l` pixels far. `vertical` sees whole rows above, `horizontal` the row to the left; what is
outside of the image is 0. A layer's two gates give `tanh(a) sigmoid(b)`, where `(a, b)` is a
convolution plus the conditioning, once the same for all pixels and once through a map.

Weights are named as in a PyTorch state dict, `(out, in)`; the inputs of a convolution are rows,
columns, channels, the last fastest. `case` holds the constructor's arguments; `conditioning` is
context and covariates side by side, `(*batch, D)`, or None.

References:
    van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves and Kavukcuoglu (2016), arXiv 1606.05328,
    eq. 2, 4, 5 and fig. 2; van den Oord, Kalchbrenner and Kavukcuoglu (2016), arXiv 1601.06759,
    sec. 3.4 (masks A and B).
"""

import numpy as np

from reference import outputs

DEFAULTS = {
    "channels": 64,
    "num_layers": 5,
    "kernel_size": 3,
    "first_kernel_size": 7,
    "receptive_field": None,
    "spatial_channels": 8,
    "output": "bernoulli",
    "num_categories": 256,
    "num_components": 5,
}


def _options(case):
    return DEFAULTS | case


def _image(case):
    """Channels, height and width."""
    return (1, *case["shape"])[-3:]


def extents(**case):
    """How far each layer reaches: the total is dealt out from the first layer on."""
    case = _options(case)
    largest = [(case["first_kernel_size"] - 1) // 2]
    for _ in range(case["num_layers"] - 1):
        largest.append((case["kernel_size"] - 1) // 2)
    if case["receptive_field"] is None:
        return largest
    left = (case["receptive_field"] - 1) // 2
    found = []
    for most in largest:
        found.append(min(most, left))
        left -= found[-1]
    return found


def dependency(**case):
    """Boolean `(D, D)`: whether element (row) depends on another one (column)."""
    channels, height, width = _image(case)
    reach = sum(extents(**case))
    places = [(c, i, j) for c in range(channels) for i in range(height) for j in range(width)]
    found = np.zeros((len(places), len(places)), bool)
    for a, (c, i, j) in enumerate(places):
        for b, (d, k, m) in enumerate(places):
            if k < i:
                found[a, b] = i - k <= reach and abs(j - m) <= reach
            elif k == i and m < j:
                found[a, b] = j - m <= reach
            elif k == i and m == j:
                found[a, b] = d < c
    return found


def _mask(num_in, num_out, groups, strict=False):
    """Mask B: outputs see the inputs of their own group and of those before; A: before alone."""
    found = np.zeros((num_out, num_in))
    for o in range(num_out):
        for i in range(num_in):
            mine, its = o // (num_out // groups), i // (num_in // groups)
            found[o, i] = its < mine if strict else its <= mine
    return found


def _patch(features, rows, columns):
    """Features at `rows` x `columns`, side by side, 0 outside of the image."""
    parts = []
    for i in rows:
        for j in columns:
            inside = 0 <= i < features.shape[-3] and 0 <= j < features.shape[-2]
            part = features[..., i, j, :] if inside else np.zeros_like(features[..., 0, 0, :])
            parts.append(part)
    if not parts:
        return features[..., 0, 0, :0]
    return np.concatenate(parts, -1)


def _gate(x):
    half = x.shape[-1] // 2
    return np.tanh(x[..., :half]) / (1.0 + np.exp(-x[..., half:]))


def params(value, weights, conditioning=None, **case):
    """Numbers of all elements, `(*batch, D, P)`, given the values `(*batch, *shape)`."""
    case = _options(case)
    groups, height, width = _image(case)
    value = np.asarray(value)
    batch = value.shape[: value.ndim - len(case["shape"])]
    if conditioning is not None:
        batch = np.broadcast_shapes(batch, conditioning.shape[:-1])
        conditioning = np.broadcast_to(conditioning, (*batch, conditioning.shape[-1]))
    value = np.broadcast_to(value, (*batch, *case["shape"]))
    encoded = outputs.encode(case["output"], value, case["num_categories"], ordinal=True)[..., 0]
    encoded = np.moveaxis(encoded.reshape(*batch, groups, height, width), -3, -1)

    wide = 2 * case["channels"]
    pixels = [(i, j) for i in range(height) for j in range(width)]

    def given(gate, i, j):
        """What the conditioning adds before a gate at a pixel."""
        if conditioning is None:
            return 0.0
        block = slice(gate * wide, (gate + 1) * wide)
        found = conditioning @ weights["to_features.weight"][block].T
        if case["spatial_channels"]:
            maps = conditioning @ weights["to_map.weight"].T + weights["to_map.bias"]
            maps = maps.reshape(*batch, case["spatial_channels"], height, width)
            found = found + maps[..., i, j] @ weights["from_map.weight"][block].T
        return found

    def dense(name, x, mask=1.0):
        return x @ (mask * weights[f"{name}.weight"]).T + weights.get(f"{name}.bias", 0.0)

    vertical = horizontal = encoded
    order = _mask(case["channels"], case["channels"], groups)
    gate, last = 0, case["num_layers"] - 1
    for index, extent in enumerate(extents(**case)):
        name = f"layers.{index}"
        centre = _mask(vertical.shape[-1], case["channels"], groups, strict=index == 0)
        left = np.ones((wide, extent * vertical.shape[-1]))
        mask = np.concatenate([left, np.concatenate([centre, centre])], -1)
        seen, up, out = {}, {}, {}
        for i, j in pixels:
            bottom = i if index == 0 else i + 1
            rows, columns = range(i - extent, bottom), range(j - extent, j + extent + 1)
            seen[i, j] = dense(f"{name}.vertical", _patch(vertical, rows, columns))
            if index < last:
                up[i, j] = _gate(seen[i, j] + given(gate, i, j))
        gate += index < last
        for i, j in pixels:
            x = dense(f"{name}.horizontal", _patch(horizontal, [i], range(j - extent, j + 1)), mask)
            x = x + dense(f"{name}.across", seen[i, j]) + given(gate, i, j)
            out[i, j] = dense(f"{name}.mix", _gate(x), order)
            if index > 0:
                out[i, j] = out[i, j] + horizontal[..., i, j, :]
        gate += 1
        horizontal = _join(out, height, width)
        vertical = _join(up, height, width) if up else None
    hidden = dense("head.0", np.maximum(horizontal, 0.0), order)
    num_params = weights["head.1.weight"].shape[0]
    found = dense("head.1", np.maximum(hidden, 0.0), _mask(case["channels"], num_params, groups))
    found = found.reshape(*batch, height, width, groups, -1)
    return np.moveaxis(found, -2, -4).reshape(*batch, groups * height * width, -1)


def _join(pixels, height, width):
    """Vectors by pixel as one array `(*batch, H, W, F)`."""
    rows = [np.stack([pixels[i, j] for j in range(width)], -2) for i in range(height)]
    return np.stack(rows, -3)


def log_prob(value, weights, conditioning=None, **case):
    """Log-density `(*batch,)`."""
    found = params(value, weights, conditioning, **case)
    options = _options(case)
    sizes = {key: options[key] for key in ("num_categories", "num_components")}
    value = np.asarray(value)
    flat = value.reshape(*value.shape[: value.ndim - len(case["shape"])], found.shape[-2])
    return outputs.log_prob(options["output"], found, flat, **sizes).sum(-1)


def draw(noise, weights, conditioning=None, **case):
    """The value that noise `(*batch, *shape, N)` makes: a whole pass for every element."""
    options = _options(case)
    sizes = {key: options[key] for key in ("num_categories", "num_components")}
    channels, height, width = _image(case)
    batch = noise.shape[: noise.ndim - len(case["shape"]) - 1]
    noise = noise.reshape(*batch, channels * height * width, -1)
    value = np.zeros(noise.shape[:-1])
    for i in range(height):
        for j in range(width):
            for c in range(channels):
                element = (c * height + i) * width + j
                image = value.reshape(*batch, *case["shape"])
                found = params(image, weights, conditioning, **case)[..., element, :]
                drawn = outputs.draw(options["output"], found, noise[..., element, :], **sizes)
                value[..., element] = drawn
    return value.reshape(*batch, *case["shape"])
