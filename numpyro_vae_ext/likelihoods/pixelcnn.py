"""The gated PixelCNN: masked convolutions over an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from numpyro_vae_ext._checks import positive_int
from numpyro_vae_ext.likelihoods._base import Autoregressive, Likelihood, sequential
from numpyro_vae_ext.likelihoods._outputs import make_output
from numpyro_vae_ext.nn.masked import MaskedLinear

_glorot = jax.nn.initializers.glorot_uniform()


class PixelCNN(Likelihood):
    r"""A gated PixelCNN: every pixel given those above it, and those to its left.

    .. math:: \log p(x \mid z) = \sum_i \log p(x_i \mid x_{<i}, z)

    in raster order, the channels of a pixel in turn. A vertical stack of convolutions sees the
    rows above, a horizontal one the row of the pixel, and takes the vertical one in at every
    layer, so that there is no blind spot:

    .. math::
        y = \tanh(W_f * x + V_f c + U_f * s(c)) \odot
        \operatorname{sigmoid}(W_g * x + V_g c + U_g * s(c))

    with :math:`c` the context and the covariates side by side, the same at every pixel, and
    :math:`s(c)` a map of ``spatial_channels`` numbers per pixel, dense in :math:`c`. Elements of a
    categorical output enter the net as one number from -1 to 1.

    ``receptive_field=r`` is a guarantee: with :math:`h = (r - 1) / 2`, pixel :math:`(i, j)`
    depends exactly on the pixels of the rows :math:`i - h, \dots, i - 1` in the columns
    :math:`j - h, \dots, j + h`, on those of its own row in the columns :math:`j - h, \dots, j - 1`,
    and on its own earlier channels. All else that is known of it must come through :math:`c`.

    A sample costs about one parallel pass: the vertical stack runs once per row, the horizontal
    one once per pixel, both on what earlier rows and pixels left behind.

    Args:
        shape: shape of an image, ``(H, W)`` or ``(C, H, W)``.
        context_dim: width of the context, or None for an image without one.
        covariate_dim: width of the covariates, or None.
        channels: features per pixel of each stack, a multiple of the image's channels.
        num_layers: gated layers.
        kernel_size: side of the convolutions, odd.
        first_kernel_size: side of the first convolution, odd and at least 3.
        receptive_field: side of the square around a pixel outside of which it sees nothing, odd;
            what the kernels reach if None.
        spatial_channels: channels of the map that is made of the conditioning; 0 for none.
        output: ``"bernoulli"``, ``"categorical"``, ``"discretized_logistic_mixture"``,
            ``"logistic_mixture"`` or ``"normal"``.
        num_categories: values of an element, for the categorical and the discretized output.
        num_components: components of a mixture.
        rngs: source of the initial weights. The last layer starts at a tenth of Glorot's scale.
        param_dtype: type of the parameters, JAX's default float if None.

    Raises:
        ValueError: if the shape is no image's, a number is too small, a kernel size even,
            ``channels`` no multiple of the image's, the receptive field out of reach or the output
            unknown; at the call, if the conditioning has the wrong width or holds NaN.
        TypeError: if a number is no int; at the call, if the conditioning is not floating-point.

    References:
        van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves and Kavukcuoglu (2016), Conditional
        Image Generation with PixelCNN Decoders, arXiv 1606.05328, eq. 2, 4-5 and fig. 2; van den
        Oord, Kalchbrenner and Kavukcuoglu (2016), arXiv 1601.06759 (the masks); Salimans et al.
        (2017), arXiv 1701.05517 (the discretized mixture); Chen et al. (2017), Variational Lossy
        Autoencoder, arXiv 1611.02731 (limited receptive fields).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> decoder = PixelCNN((5, 5), 3, channels=4, receptive_field=5, rngs=nnx.Rngs(0))
        >>> images = decoder(jnp.ones((2, 3)))
        >>> x = images.sample(jax.random.key(0))
        >>> x.shape, images.log_prob(x).shape, decoder.receptive_field
        ((2, 5, 5), (2,), 5)
    """

    def __init__(
        self,
        shape: Sequence[int],
        context_dim: int | None = None,
        *,
        covariate_dim: int | None = None,
        channels: int = 64,
        num_layers: int = 5,
        kernel_size: int = 3,
        first_kernel_size: int = 7,
        receptive_field: int | None = None,
        spatial_channels: int = 8,
        output: str = "bernoulli",
        num_categories: int = 256,
        num_components: int = 5,
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        made = make_output(output, num_categories, num_components, ordinal=True)
        super().__init__(shape, context_dim, covariate_dim, made)
        if len(self.shape) not in (2, 3):
            raise ValueError(f"Expected a shape (H, W) or (C, H, W); got {self.shape}.")
        self.image_channels = 1 if len(self.shape) == 2 else self.shape[0]
        self.channels = positive_int("channels", channels)
        if self.channels % self.image_channels:
            raise ValueError(
                f"Expected channels to be a multiple of the {self.image_channels} image channels; "
                f"got {channels}."
            )
        self.num_layers = positive_int("num_layers", num_layers)
        self.extents = _extents(self.num_layers, kernel_size, first_kernel_size, receptive_field)
        self.spatial_channels = positive_int("spatial_channels", spatial_channels, minimum=0)

        dtype = jnp.result_type(float) if param_dtype is None else param_dtype
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": dtype}
        groups, width = self.image_channels, self.channels
        num_inputs = groups * made.num_inputs
        self.layers = nnx.List(
            _GatedLayer(width if index else num_inputs, width, extent, groups, index == 0, options)
            for index, extent in enumerate(self.extents)
        )
        self.head = nnx.List(
            MaskedLinear(width, wide, _order(width, wide, groups), **options)
            for wide in (width, groups * made.num_params)
        )
        self.head[1].kernel = nnx.Param(0.1 * self.head[1].kernel[...])
        # Of all gates at once; the last layer has one gate, not two.
        shares = (2 * self.num_layers - 1) * 2 * width
        given, maps = self.conditioning_dim, self.spatial_channels
        self.to_features = _dense(given, shares, options, bias=False) if given else None
        num_pixels = math.prod(self.shape[-2:])
        self.to_map = _dense(given, maps * num_pixels, options) if given and maps else None
        self.from_map = _dense(maps, shares, options, bias=False) if given and maps else None

    @property
    def receptive_field(self) -> int:
        """Side of the square around a pixel outside of which it sees nothing."""
        return 2 * sum(self.extents) + 1

    def __call__(self, context: Any = None, covariates: Any = None) -> Autoregressive:
        """The density given the conditioning.

        Args:
            context: ``(*batch, context_dim)``, or None for a likelihood without a context.
            covariates: ``(*batch, covariate_dim)``, or None for a likelihood without covariates.

        Returns:
            A distribution of batch shape ``batch`` and event shape ``shape``.

        Raises:
            ValueError: If the conditioning is missing, unexpected, of another width, or NaN.
            TypeError: If the conditioning is not of a floating-point type.
        """
        given = self._conditioning(context, covariates)
        if given is None or self.to_features is None:
            return Autoregressive(self, None)
        batch, maps = given.shape[:-1], None
        if self.to_map is not None:
            maps = self.to_map(given).reshape(*batch, self.spatial_channels, *self.shape[-2:])
            maps = jnp.moveaxis(maps, -3, -1)
        return Autoregressive(self, (self.to_features(given)[..., None, None, :], maps), batch)

    def _share(self, gate: int, conditioned: Any) -> Any:
        """What the conditioning adds before a gate, ``(*batch, H or 1, W or 1, 2 channels)``.

        Gates are counted from layer to layer, the vertical one before the horizontal one; the last
        layer has no vertical one, for which nothing would be left to read it.
        """
        if conditioned is None:
            return 0.0
        features, maps = conditioned
        block = slice(2 * self.channels * gate, 2 * self.channels * (gate + 1))
        if maps is None or self.from_map is None:
            return features[..., block]
        return features[..., block] + maps @ self.from_map.kernel[:, block]

    def _params(self, inputs: jax.Array, conditioned: Any) -> jax.Array:
        image = (self.image_channels, *self.shape[-2:], inputs.shape[-1])
        x = inputs.reshape(*inputs.shape[: -len(self.shape) - 1], *image)
        x = jnp.moveaxis(x, -4, -2)
        above = left = x.reshape(*x.shape[:-2], -1)
        last = self.num_layers - 1
        for index, (layer, extent) in enumerate(zip(self.layers, self.extents, strict=True)):
            # The first layer leaves out the row of the pixel itself.
            seen = layer.up(above if index else above[..., :-1, :, :], extent)
            joint = layer.beside(left) + layer.across(seen)
            out = layer.mix(_gate(joint + self._share(2 * index + (index < last), conditioned)))
            left = left + out if index else out
            if index < last:
                above = _gate(seen + self._share(2 * index, conditioned))
        params = self.head[1](nnx.relu(self.head[0](nnx.relu(left))))
        params = params.reshape(*params.shape[:-1], self.image_channels, self.output.num_params)
        return jnp.moveaxis(params, -2, -4).reshape(*params.shape[:-4], *self.shape, -1)

    def _draw(self, noise: jax.Array, conditioned: Any) -> jax.Array:
        batch = noise.shape[: -len(self.shape) - 1]
        size, (height, width) = math.prod(batch), self.shape[-2:]
        noise = noise.reshape(size, self.image_channels, height, width, -1).transpose(2, 3, 0, 1, 4)
        conditioned = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(size, *x.shape[-3:]),
            conditioned,
        )
        values = jnp.zeros(noise.shape[:-1], self.output.value_dtype(noise.dtype))
        rows = tuple(
            jnp.zeros((size, layer.extent, width, layer.in_features), noise.dtype)
            for layer in self.layers
        )
        values, _ = sequential(_draw_row, self, (values, rows), height, noise, conditioned)
        return values.transpose(2, 3, 0, 1).reshape(*batch, *self.shape)


class _GatedLayer(nnx.Module):
    """One layer of both stacks; a kernel's inputs are rows, columns, channels, the last fastest."""

    def __init__(
        self,
        in_features: int,
        width: int,
        extent: int,
        groups: int,
        first: bool,
        options: dict[str, Any],
    ) -> None:
        self.in_features, self.extent = in_features, extent
        num_rows, wide = (extent if first else extent + 1), 2 * width
        self.vertical = _dense(num_rows * (2 * extent + 1) * in_features, wide, options)
        self.across = _dense(wide, wide, options, bias=False)
        centre = np.tile(_order(in_features, width, groups, strict=first), (2, 1))
        mask = np.hstack([np.ones((wide, extent * in_features), bool), centre])
        self.horizontal = MaskedLinear(mask.shape[1], wide, mask, **options)
        self.mix = MaskedLinear(width, width, _order(width, width, groups), **options)

    def up(self, rows: jax.Array, num_above: int) -> jax.Array:
        """The vertical convolution, with ``num_above`` rows of zeros above ``rows``."""
        padding = ((num_above, 0), (self.extent, self.extent))
        return _convolve(rows, self.vertical.kernel[...], padding) + self.vertical.bias[...]

    def beside(self, x: jax.Array) -> jax.Array:
        """The horizontal convolution."""
        padding = ((0, 0), (self.extent, 0))
        return _convolve(x, self.horizontal.masked_weight, padding) + self.horizontal.bias[...]


def _draw_row(
    module: PixelCNN, row: jax.Array, carry: Any, noise: jax.Array, conditioned: Any
) -> Any:
    """The vertical stack at one row, then the pixels of the row from left to right.

    The carry holds the values and, for every layer, the rows above as its vertical convolution
    reads them.
    """
    values, rows = carry
    # The map of this row; the features, which are the same in all rows, have but one.
    conditioned = jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, jnp.minimum(row, x.shape[1] - 1), 1, axis=1),
        conditioned,
    )
    last = module.num_layers - 1
    known, kept = [], []
    above = rows[0][:, :0]
    for index, (layer, earlier) in enumerate(zip(module.layers, rows, strict=True)):
        read = jnp.concatenate([earlier, above], axis=1)
        kept.append(read[:, read.shape[1] - layer.extent :])
        seen = layer.up(read, 0)
        joint = layer.across(seen) + layer.horizontal.bias[...]
        joint = joint + module._share(2 * index + (index < last), conditioned)
        known.append(jnp.moveaxis(joint[:, 0], 1, 0))
        if index < last:
            above = _gate(seen + module._share(2 * index, conditioned))
    windows = tuple(jnp.zeros_like(x[:, :, 0]) for x in rows)
    noise = lax.dynamic_index_in_dim(noise, row, 0, keepdims=False)
    _, (drawn, encoded) = lax.scan(_pixel_sampler(module), windows, (tuple(known), noise))
    new = jnp.moveaxis(encoded, 0, 1)[:, None]
    kept[0] = jnp.concatenate([rows[0], new], axis=1)[:, 1:]
    return lax.dynamic_update_index_in_dim(values, drawn, row, 0), tuple(kept)


def _pixel_sampler(module: PixelCNN) -> Callable[[Any, Any], Any]:
    """The step of a scan over the pixels of a row.

    It carries, for every layer, the inputs of its horizontal convolution at the ``extent`` pixels
    to the left. Channels are drawn in turn, and a channel computes its own group of features.
    """
    groups, output = module.image_channels, module.output

    def own(array: jax.Array, group: int, num_blocks: int = 1) -> jax.Array:
        """The columns of a group; each of ``num_blocks`` blocks of columns holds all groups."""
        blocks = jnp.split(array, num_blocks, axis=-1)
        return jnp.concatenate([jnp.split(x, groups, axis=-1)[group] for x in blocks], axis=-1)

    # The weights are cut once, outside of the loop: what a mask would remove is left out.
    kernels = []
    for index, layer in enumerate(module.layers):
        part = layer.in_features // groups
        known = [layer.extent * layer.in_features + (c + (index > 0)) * part for c in range(groups)]
        kernel = layer.horizontal.kernel[...]
        kernels.append([own(kernel[:rows], c, 2) for c, rows in enumerate(known)])

    def dense(layer: MaskedLinear, group: int) -> tuple[jax.Array, jax.Array]:
        rows = (group + 1) * (layer.in_features // groups)
        return own(layer.kernel[:rows], group), own(layer.bias[...], group)

    mixes = [[dense(layer.mix, c) for c in range(groups)] for layer in module.layers]
    heads = [[dense(layer, c) for c in range(groups)] for layer in module.head]

    def draw(windows: Any, given: Any) -> Any:
        sums, noise = given
        # What this pixel has so far, group by group: the inputs of the layers, and their gates.
        inputs: list[list[jax.Array]] = [[] for _ in range(module.num_layers + 1)]
        gates: list[list[jax.Array]] = [[] for _ in range(module.num_layers)]
        hidden: list[jax.Array] = []
        values = []
        for c in range(groups):
            for index, window in enumerate(windows):
                seen = [window.reshape(len(window), -1), *inputs[index]]
                joint = own(sums[index], c, 2) + jnp.concatenate(seen, -1) @ kernels[index][c]
                gates[index].append(_gate(joint))
                out = _affine(gates[index], mixes[index][c])
                inputs[index + 1].append(inputs[index][c] + out if index else out)
            hidden.append(nnx.relu(_affine([nnx.relu(x) for x in inputs[-1]], heads[0][c])))
            params = _affine(hidden, heads[1][c])
            values.append(output.draw(params, noise[:, c]))
            inputs[0].append(output.encode(values[c], params.dtype))
        current = [jnp.concatenate(x, -1)[:, None] for x in inputs]
        windows = tuple(
            jnp.concatenate([window, x], 1)[:, 1:] if window.shape[1] else window
            for window, x in zip(windows, current, strict=False)
        )
        return windows, (jnp.stack(values, -1), current[0][:, 0])

    return draw


def _extents(
    num_layers: int, kernel_size: int, first_kernel_size: int, receptive_field: int | None
) -> tuple[int, ...]:
    """How far the kernel of each layer reaches: up, to the left, and above to the right."""
    positive_int("kernel_size", kernel_size)
    positive_int("first_kernel_size", first_kernel_size, minimum=3)
    for name, value in (("kernel_size", kernel_size), ("first_kernel_size", first_kernel_size)):
        if value % 2 == 0:
            raise ValueError(f"Expected an odd {name}; got {value}.")
    extents = [first_kernel_size // 2] + [kernel_size // 2] * (num_layers - 1)
    if receptive_field is None:
        return tuple(extents)
    largest = 2 * sum(extents) + 1
    if positive_int("receptive_field", receptive_field) not in range(3, largest + 1, 2):
        raise ValueError(
            f"Expected an odd receptive_field from 3 to {largest} for num_layers={num_layers}, "
            f"kernel_size={kernel_size}, first_kernel_size={first_kernel_size}; got "
            f"{receptive_field}. Add layers, or widen the kernels."
        )
    left = receptive_field // 2
    for index, extent in enumerate(extents):
        extents[index] = min(extent, left)
        left -= extents[index]
    return tuple(extents)


def _order(num_in: int, num_out: int, groups: int, *, strict: bool = False) -> np.ndarray:
    """Mask ``(num_out, num_in)``: which outputs see which inputs, both in groups of channels."""
    of_in = np.arange(num_in) * groups // num_in
    of_out = np.arange(num_out) * groups // num_out
    return (np.less if strict else np.less_equal)(of_in[None, :], of_out[:, None])


def _dense(num_in: int, num_out: int, options: dict[str, Any], *, bias: bool = True) -> Any:
    return nnx.Linear(num_in, num_out, use_bias=bias, kernel_init=_glorot, **options)


def _affine(parts: list[jax.Array], weights: tuple[jax.Array, jax.Array]) -> jax.Array:
    kernel, bias = weights
    return jnp.concatenate(parts, axis=-1) @ kernel + bias


def _gate(x: jax.Array) -> jax.Array:
    signal, gate = jnp.split(x, 2, axis=-1)
    return jnp.tanh(signal) * nnx.sigmoid(gate)


def _convolve(x: jax.Array, kernel: jax.Array, padding: Any) -> jax.Array:
    """``x`` ``(*batch, H, W, I)`` under a kernel ``(rows * columns * I, O)``; as wide as ``x``."""
    # One product. XLA's own convolution is no faster on a CPU, and inside of a loop over training
    # steps its derivative is slower by an order of magnitude.
    width, num_columns = x.shape[-2], 1 + sum(padding[1])
    num_rows = kernel.shape[0] // (num_columns * x.shape[-1])
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [*padding, (0, 0)])
    height = x.shape[-3] - num_rows + 1
    rows = [x[..., i : i + height, :, :] for i in range(num_rows)]
    parts = [row[..., j : j + width, :] for row in rows for j in range(num_columns)]
    return jnp.concatenate(parts, axis=-1) @ kernel
