"""The gated PixelCNN: masked convolutions over the pixels of an image."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_vae_ext._checks import positive_int
from pyro_vae_ext.likelihoods._base import Autoregressive, Likelihood, steps
from pyro_vae_ext.likelihoods._outputs import make_output
from pyro_vae_ext.nn import MaskedLinear

# What every gate gets at all pixels, and the map of which it gets a mixture.
_Conditioned = tuple[Tensor, Tensor | None]


class PixelCNN(Likelihood):
    r"""Gated PixelCNN, :math:`p(x \mid c) = \prod_i p(x_i \mid x_{<i}, c)`.

    Pixels in raster order, the channels of a pixel in turn. Of two stacks of convolutions the
    vertical one sees the rows above, the horizontal one the row so far and the vertical one.
    Every layer is gated,

    .. math:: y = \tanh(W_a * x + V_a c + U_a * s) \odot \sigma(W_b * x + V_b c + U_b * s),

    by the conditioning :math:`c`, context and covariates, globally, and by a map
    :math:`s = A c + b` of ``spatial_channels`` numbers per pixel.

    The elements of pixel :math:`(i, j)` depend on this window of pixels, cut at the edges of the
    image, and on nothing else: rows :math:`i-h..i-1` of the columns :math:`j-h..j+h`, columns
    :math:`j-h..j-1` of row :math:`i`, with all of their channels, and the earlier channels of the
    pixel itself. There is no blind spot. :math:`2h+1` is ``receptive_field``: what lies outside
    of the window reaches a pixel through the latents alone. A sample computes every feature once,
    the vertical stack row by row, the horizontal one pixel by pixel: the work of about one pass.

    Args:
        shape: ``(H, W)``, or ``(C, H, W)`` for an image of ``C`` channels.
        context_dim: Width of the context; None for a density without one.
        covariate_dim: Width of the covariates; None for a density without them.
        channels: Number of features of each stack, a multiple of the image's channels.
        num_layers: Number of gated layers.
        kernel_size: Width of the kernels, odd; their mask leaves the part before the pixel.
        first_kernel_size: That of the first layer, at least 3.
        receptive_field: Width of the window, odd and at least 3; the kernels shrink to give it.
            By default it is what the kernels give at their full width.
        spatial_channels: Channels of the map that the conditioning becomes; 0 for none.
        output: Density of an element: ``"bernoulli"``, ``"categorical"``, ``"normal"``,
            ``"logistic_mixture"`` or ``"discretized_logistic_mixture"``. The values of a
            categorical element enter the network as numbers on [-1, 1].
        num_categories: Number of values of an element of a categorical or discretized output.
        num_components: Number of components of a mixture.

    Shape:
        Called with a context ``(*batch, context_dim)`` and covariates ``(*batch, covariate_dim)``;
        the distribution has the batch shape ``batch`` and the event shape ``shape``.

    Raises:
        ValueError: If an argument is out of its range, or the layers cannot give the receptive
            field; at the call, if the conditioning has another width than expected.
        TypeError: At the call, if the conditioning is not floating-point.

    References:
        van den Oord et al., 2016, *Conditional Image Generation with PixelCNN Decoders*,
        arXiv:1606.05328, eq. 2, 4 and 5, figure 2; van den Oord, Kalchbrenner and Kavukcuoglu,
        2016, *Pixel Recurrent Neural Networks*, arXiv:1601.06759, sec. 3.4 (the masks over
        channels); Salimans et al., 2017, *PixelCNN++*, arXiv:1701.05517, eq. 2 (the discretized
        mixture); Chen et al., 2017, *Variational Lossy Autoencoder*, arXiv:1611.02731.

    Example:
        >>> import torch
        >>> decoder = PixelCNN((8, 8), context_dim=2, channels=6, num_layers=3, receptive_field=5)
        >>> p = decoder(torch.zeros(3, 2))
        >>> x = p.sample()
        >>> x.shape, p.log_prob(x).shape
        (torch.Size([3, 8, 8]), torch.Size([3]))
    """

    layers: Any  # an nn.ModuleList, whose members are typed as modules of any kind
    head: Any
    to_features: Any  # None without conditioning, as the two below
    to_map: Any
    from_map: Any

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
    ) -> None:
        made = make_output(output, num_categories, num_components, ordinal=True)
        super().__init__(shape, context_dim, covariate_dim, made)
        if len(self.shape) not in (2, 3):
            raise ValueError(f"Expected a shape (H, W) or (C, H, W); got {self.shape}.")
        self._image = (1, *self.shape)[-3:]
        self.image_channels = groups = self._image[0]
        self.channels = positive_int("channels", channels)
        if channels % groups:
            raise ValueError(
                f"Expected channels to be a multiple of the {groups} image channels; "
                f"got {channels}."
            )
        self.num_layers = positive_int("num_layers", num_layers)
        self.extents = _extents(num_layers, kernel_size, first_kernel_size, receptive_field)
        self.spatial_channels = positive_int("spatial_channels", spatial_channels, minimum=0)
        self.layers = nn.ModuleList(
            _GatedLayer(groups, channels, extent, None if index else groups * made.num_inputs)
            for index, extent in enumerate(self.extents)
        )
        self.head = nn.ModuleList(
            MaskedLinear(channels, width, _mask(groups, channels, width))
            for width in (channels, groups * made.num_params)
        )
        with torch.no_grad():
            self.head[1].weight.mul_(0.1)
        self.to_features = self.to_map = self.from_map = None
        if self.conditioning_dim:
            gates = (2 * num_layers - 1) * 2 * channels
            self.to_features = _dense(self.conditioning_dim, gates, bias=False)
            if spatial_channels:
                numbers = spatial_channels * self._image[1] * self._image[2]
                self.to_map = _dense(self.conditioning_dim, numbers)
                self.from_map = _dense(spatial_channels, gates, bias=False)

    @property
    def receptive_field(self) -> int:
        """Width of the window that a pixel's density depends on."""
        return 2 * sum(self.extents) + 1

    def forward(
        self, context: Tensor | None = None, covariates: Tensor | None = None
    ) -> Autoregressive:
        """The density given the conditioning.

        Args:
            context: ``(*batch, context_dim)``.
            covariates: ``(*batch, covariate_dim)``.

        Returns:
            A distribution of batch shape ``batch``, both inputs broadcast, and event ``shape``.

        Raises:
            ValueError: If the conditioning is missing, unexpected, of another width, or NaN.
            TypeError: If the conditioning is not floating-point.
        """
        conditioning = self._conditioning(context, covariates)
        batch_shape = torch.Size() if conditioning is None else conditioning.shape[:-1]
        return Autoregressive(self, self._condition(conditioning), batch_shape)

    def _condition(self, conditioning: Tensor | None) -> _Conditioned:
        # With the offsets of the convolutions, which then need no pass of their own.
        offsets = []
        for layer in self.layers:
            above = layer.vertical.bias
            offsets += [above, layer.horizontal.bias + layer.across(above)]
        del offsets[-2]  # nothing sees the vertical gate of the last layer
        features = torch.stack(offsets)
        if conditioning is None:
            return features, None
        features = features + self.to_features(conditioning).unflatten(-1, features.shape)
        if self.to_map is None:
            return features, None
        maps = self.to_map(conditioning).unflatten(-1, (-1, *self._image[1:]))
        return features, maps.movedim(-3, -1).contiguous()

    def _term(self, conditioned: _Conditioned, gate: int, row: int | None = None) -> Tensor:
        """What the conditioning adds in one gate: ``(*batch, H or 1, W or 1, 2 channels)``."""
        features, maps = conditioned
        features = features[..., gate, None, None, :]
        if maps is None:
            return features
        weight = self.from_map.weight.unflatten(0, (-1, features.shape[-1]))[gate]
        if row is not None:
            maps = maps[..., row : row + 1, :, :]
        mixed = _dense_at(maps.reshape(-1, *maps.shape[-3:]), weight)
        return mixed.reshape(*maps.shape[:-1], -1) + features

    def _params(self, inputs: Tensor, conditioned: _Conditioned) -> Tensor:
        groups, height, width = self._image
        planes = inputs.reshape(-1, groups, height, width, self.output.num_inputs)
        vertical = horizontal = planes.permute(0, 2, 3, 1, 4).flatten(-2)
        # The first convolutions run on the batch of the values, the others on that of both.
        batch = inputs.shape[: -len(self.shape) - 1]
        for index, layer in enumerate(self.layers):
            above = layer.look_up(functional.pad(vertical, layer.outside))
            here = layer.look_left(horizontal) + _dense_at(above, layer.across.weight)
            last = index == self.num_layers - 1
            here, wide = _add(here, batch, self._term(conditioned, 2 * index + (not last)))
            mixed = _dense_at(_gate(here), layer.mix.masked_weight) + layer.mix.bias
            horizontal = horizontal + mixed if index else mixed
            if not last:
                above, _ = _add(above, batch, self._term(conditioned, 2 * index))
                vertical = _gate(above)
            batch = wide
        for layer in self.head:
            horizontal = _dense_at(torch.relu(horizontal), layer.masked_weight) + layer.bias
        params = horizontal.unflatten(-1, (groups, -1)).permute(0, 3, 1, 2, 4)
        return params.reshape(*batch, *self.shape, -1)

    def _draw(self, noise: Tensor, conditioned: _Conditioned) -> Tensor:
        groups, height, width = self._image
        batch = noise.shape[: -len(self.shape) - 1]
        noise = noise.reshape(-1, groups, height, width, noise.shape[-1])
        weights = [layer.by_group() for layer in self.layers]
        first, second = (_by_group(layer, groups) for layer in self.head)
        # Of every layer, the rows that its vertical convolution takes in: zeros above the image.
        rows: list[deque[Tensor]] = []
        for layer in self.layers:
            outside = noise.new_zeros(len(noise), width, layer.width)
            rows.append(deque([outside] * layer.num_rows, layer.num_rows))
        values = []
        for i in steps(height):
            given = self._row(i, rows, batch, conditioned)
            # Of every layer, the row so far that its horizontal convolution takes in.
            past: list[list[Tensor]] = [[] for _ in self.layers]
            for j in range(width):
                # Of this pixel, group by group: the layers' inputs, their gates, the head's layer.
                parts: list[list[Tensor]] = [[] for _ in range(self.num_layers + 1)]
                gates: list[list[Tensor]] = [[] for _ in self.layers]
                hidden: list[Tensor] = []
                for c in range(groups):
                    for index, (kernels, mixes) in enumerate(weights):
                        seen = past[index][max(j - self.extents[index], 0) :] + parts[index]
                        gates[index].append(_gate(_affine(given[index][j, c], seen, kernels[c])))
                        part = _affine(mixes[c][1], gates[index], mixes[c][0])
                        parts[index + 1].append(part + parts[index][c] if index else part)
                    top = [torch.relu(part) for part in parts[-1]]
                    hidden.append(torch.relu(_affine(first[c][1], top, first[c][0])))
                    params = _affine(second[c][1], hidden, second[c][0])
                    value = self.output.draw(params, noise[:, c, i, j])
                    parts[0].append(self.output.encode(value, noise.dtype))
                    values.append(value)
                for known, new in zip(past, parts, strict=False):
                    known.append(torch.cat(new, -1))
            rows[0].append(torch.stack(past[0], 1))
        value = torch.stack(values, -1).unflatten(-1, (height, width, groups))
        return value.movedim(-1, -3).reshape(*batch, *self.shape)

    def _row(
        self, row: int, rows: list[deque[Tensor]], batch: torch.Size, conditioned: _Conditioned
    ) -> list[Tensor]:
        """The vertical stack at one row; its features join ``rows``.

        Gives what each horizontal gate gets from it and from the conditioning, group by group:
        ``(W, groups, N, 2 channels / groups)``.
        """
        groups, _, width = self._image
        given = []
        for index, layer in enumerate(self.layers):
            above = layer.look_up(torch.stack(list(rows[index]), 1))
            here = layer.across(above)
            last = index == self.num_layers - 1
            here, _ = _add(here, batch, self._term(conditioned, 2 * index + (not last), row))
            by_group = here[:, 0].unflatten(-1, (2, groups, -1)).permute(1, 3, 0, 2, 4)
            given.append(by_group.flatten(-2))
            if not last:
                above, _ = _add(above, batch, self._term(conditioned, 2 * index, row))
                rows[index + 1].append(_gate(above)[:, 0])
        return given


class _GatedLayer(nn.Module):
    """One layer of both stacks; a kernel is one row per output: rows, columns, then channels.

    ``entries`` is the number of inputs of the first layer, which leaves out the pixel itself; the
    others have the features of the layer before, as None says.
    """

    def __init__(self, groups: int, channels: int, extent: int, entries: int | None) -> None:
        super().__init__()
        first, width = entries is not None, channels if entries is None else entries
        self.groups, self.width, self.extent = groups, width, extent
        self.num_rows = extent if first else extent + 1
        # Rows of zeros above the image; the first layer stops short of the pixel's own row.
        self.outside = (0, 0, 0, 0, extent, -1 if first else 0)
        self.vertical = _dense(self.num_rows * (2 * extent + 1) * width, 2 * channels)
        self.across = _dense(2 * channels, 2 * channels, bias=False)
        centre = np.tile(_mask(groups, width, channels, strict=first), (2, 1))
        left = np.ones((2 * channels, extent * width), dtype=bool)
        self.horizontal = MaskedLinear(
            (extent + 1) * width, 2 * channels, np.concatenate((left, centre), 1)
        )
        self.mix = MaskedLinear(channels, channels, _mask(groups, channels, channels))

    def look_up(self, features: Tensor) -> Tensor:
        """The vertical convolution of rows ``(N, rows, W, width)``, those outside included."""
        weight = self.vertical.weight.unflatten(-1, (self.num_rows, 2 * self.extent + 1, -1))
        return _convolve(features, weight, padding=(0, self.extent))

    def look_left(self, features: Tensor) -> Tensor:
        """The horizontal convolution of ``(N, H, W, width)``."""
        weight = self.horizontal.masked_weight.unflatten(-1, (1, self.extent + 1, -1))
        return _convolve(functional.pad(features, (0, 0, self.extent, 0)), weight)

    def by_group(self) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Of every group, the horizontal kernel ``(in, out)``, inputs that it sees, and ``mix``."""
        weight = self.horizontal.masked_weight.unflatten(0, (2, self.groups, -1))
        first, kernels = self.num_rows == self.extent, []
        for c in range(self.groups):
            seen = self.extent * self.width + (c + 1 - first) * self.width // self.groups
            kernels.append(weight[:, c].flatten(0, 1)[:, :seen].mT.contiguous())
        return kernels, _by_group(self.mix, self.groups)


def _extents(
    num_layers: int, kernel_size: int, first_kernel_size: int, receptive_field: int | None
) -> tuple[int, ...]:
    """Pixels that each layer's kernels reach out to a side, dealt out from the first layer on."""
    positive_int("kernel_size", kernel_size)
    positive_int("first_kernel_size", first_kernel_size, minimum=3)
    for name, value in (("kernel_size", kernel_size), ("first_kernel_size", first_kernel_size)):
        if value % 2 == 0:
            raise ValueError(f"Expected an odd {name}; got {value}.")
    extents = [first_kernel_size // 2] + [kernel_size // 2] * (num_layers - 1)
    if receptive_field is None:
        return tuple(extents)
    largest = 2 * sum(extents) + 1
    positive_int("receptive_field", receptive_field)
    if receptive_field % 2 == 0 or not 3 <= receptive_field <= largest:
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


def _mask(groups: int, inputs: int, outputs: int, *, strict: bool = False) -> np.ndarray:
    """Outputs see inputs of their own group and of those before it, or of those before it alone."""
    before = np.repeat(np.arange(groups), inputs // groups)
    after = np.repeat(np.arange(groups), outputs // groups)[:, None]
    return before < after if strict else before <= after


def _dense(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A dense layer as a masked one starts: Glorot, no offset."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _convolve(x: Tensor, weight: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Convolution of features ``(N, H, W, in)`` by a kernel ``(out, rows, columns, in)``."""
    x, weight = x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2)
    return functional.conv2d(x, weight, padding=padding).permute(0, 2, 3, 1)


def _dense_at(x: Tensor, weight: Tensor) -> Tensor:
    """A dense layer at every pixel; as a convolution it takes half the time on some processors."""
    return _convolve(x, weight[:, None, None])


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.tanh(a) * torch.sigmoid(b)


def _add(x: Tensor, batch: torch.Size, term: Tensor) -> tuple[Tensor, torch.Size]:
    """``x`` of the flattened ``batch`` plus ``term``, and the batch of both."""
    total = x.reshape(*batch, *x.shape[1:]) + term
    return total.reshape(-1, *total.shape[-3:]), total.shape[:-3]


def _by_group(layer: MaskedLinear, groups: int) -> list[tuple[Tensor, Tensor]]:
    """Weight ``(in, out)`` and offset of every group's outputs, from the groups up to it."""
    part = layer.in_features // groups
    weights = layer.masked_weight.unflatten(0, (groups, -1))
    offsets = layer.bias.unflatten(0, (groups, -1))
    return [(weights[c, :, : (c + 1) * part].mT.contiguous(), offsets[c]) for c in range(groups)]


def _affine(offset: Tensor, parts: list[Tensor], weight: Tensor) -> Tensor:
    """``offset`` plus the product; what has no part, outside of the image, comes first."""
    if not parts:
        return offset
    x = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return torch.addmm(offset, x, weight[len(weight) - x.shape[-1] :])
