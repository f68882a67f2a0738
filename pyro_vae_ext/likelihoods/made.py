"""MADE: a masked autoencoder as the distribution of a vector or an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn
from torch.nn import functional

from pyro_vae_ext._checks import one_of, positive_int, widths
from pyro_vae_ext.likelihoods._base import Autoregressive, Likelihood, steps
from pyro_vae_ext.likelihoods._outputs import make_output
from pyro_vae_ext.nn._activations import ACTIVATIONS

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class MADE(Likelihood):
    r"""Masked autoencoder for distribution estimation.

    .. math:: \log p(x \mid z) = \sum_{r=1}^{D} \log p(x_{o_r} \mid x_{o_1}, \dots, x_{o_{r-1}}, z)

    A perceptron gives the parameters of all conditionals in one pass. Every hidden unit has a
    degree: a unit of degree :math:`d` sees the elements whose rank in the order :math:`o` is
    smaller than :math:`d`, and units of at most its degree; the element of rank :math:`r` sees
    units of degree at most :math:`r`. Unit :math:`h` of a layer of width :math:`H` has the degree
    :math:`\lfloor hD/H \rfloor`. Units of degree 0 see the conditioning alone, so the first element
    depends on it as well. A sample computes every unit once, in the order of the degrees: the work
    of about one pass, in :math:`D` steps.

    With ``num_masks`` :math:`M > 1` the weights are shared by :math:`M` nets, each with an order
    and degrees of its own (the first as above, the others at random). Train on another
    ``mask_index`` at each step; called without one, the module is the ensemble

    .. math:: p(x \mid z) = \frac{1}{M} \sum_{m=1}^{M} p_m(x \mid z) .

    Args:
        shape: Shape of the event, an int for a vector.
        context_dim: Width of the context, None for a distribution without one.
        covariate_dim: Width of the covariates, None for a distribution without.
        hidden_dims: Widths of the hidden layers, at least one.
        output: What an element holds: ``"bernoulli"``, ``"categorical"``, ``"normal"``,
            ``"logistic_mixture"`` or ``"discretized_logistic_mixture"``.
        num_categories: Number of values of the categorical and the discretised output.
        num_components: Number of components of the mixtures.
        order: Permutation that lists the flattened elements from first to last; 0, 1, ... by
            default.
        num_masks: Number of nets that share the weights.
        order_agnostic: Whether the further nets have orders of their own, too.
        mask_seed: Seed of their orders and degrees; NumPy draws them, the same in both packages.
        residual: Whether the layers after the first are blocks
            :math:`h + W_2\, \phi(W_1\, \phi(h))`, all of one width.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.

    Shape:
        Context ``(*batch, context_dim)`` and covariates ``(*batch, covariate_dim)`` give a
        distribution with ``batch_shape == batch`` and ``event_shape == shape``.

    Raises:
        ValueError: If a width or number is not positive, an option is unknown, ``order`` is no
            permutation, or ``hidden_dims`` does not fit; called, if the conditioning is missing,
            unexpected, of another width, or NaN, or ``mask_index`` is out of range.
        TypeError: If the conditioning is not of a floating-point type.

    References:
        Germain, Gregor, Murray and Larochelle, 2015, *MADE: Masked Autoencoder for Distribution
        Estimation*, arXiv:1502.03509, eq. 8-13 and sec. 4.2-4.3.

    Example:
        >>> import torch
        >>> decoder = MADE((2, 3), context_dim=4, hidden_dims=(16,))
        >>> pixels = decoder(torch.zeros(5, 4))
        >>> x = pixels.sample()
        >>> x.shape, pixels.log_prob(x).shape
        (torch.Size([5, 2, 3]), torch.Size([5]))
    """

    layers: Any  # an nn.ModuleList, whose members are typed as modules of any kind

    def __init__(
        self,
        shape: int | Sequence[int],
        context_dim: int | None = None,
        *,
        covariate_dim: int | None = None,
        hidden_dims: Sequence[int] = (100,),
        output: str = "bernoulli",
        num_categories: int = 256,
        num_components: int = 5,
        order: Sequence[int] | None = None,
        num_masks: int = 1,
        order_agnostic: bool = True,
        mask_seed: int = 0,
        residual: bool = False,
        activation: str = "relu",
    ) -> None:
        element = make_output(output, num_categories, num_components)
        super().__init__(shape, context_dim, covariate_dim, element)
        features = self.num_elements
        hidden_dims = widths("hidden_dims", hidden_dims)
        if not hidden_dims:
            raise ValueError("Expected at least one hidden layer; got hidden_dims=().")
        if residual and len(set(hidden_dims)) > 1:
            raise ValueError(
                f"Expected equal hidden_dims under residual=True; got {hidden_dims}. Every block "
                "adds to what it is given."
            )
        order = tuple(range(features)) if order is None else tuple(int(i) for i in order)
        if sorted(order) != list(range(features)):
            raise ValueError(
                f"Expected order to be a permutation of range({features}); got {order}."
            )
        self.order = order
        self.num_masks = positive_int("num_masks", num_masks)
        self.order_agnostic = order_agnostic
        self.mask_seed = positive_int("mask_seed", mask_seed, minimum=0)
        self.residual = residual
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))

        first, *others = hidden_dims
        hidden = [first] * (2 * len(others) + 1) if residual else list(hidden_dims)
        sizes = [features * element.num_inputs, *hidden, features * element.num_params]
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.context_layer: nn.Linear | None = None
        if self.conditioning_dim:
            self.context_layer = nn.Linear(self.conditioning_dim, first, bias=False)
            nn.init.xavier_uniform_(self.context_layer.weight)
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            # Near one distribution for all elements, whatever the conditioning.
            self.layers[-1].weight.mul_(0.1)

        masks = [self._draw_mask(hidden, index) for index in range(num_masks)]
        # Degrees, not masks: a mask of H x H is made from two rows of H when it is needed.
        self._ranks = [rank for rank, _ in masks]
        self._degrees = [degrees for _, degrees in masks]
        for level in range(len(hidden) + 2):
            rows = np.stack([self._level(level, index) for index in range(num_masks)])
            self.register_buffer(f"_level{level}", torch.as_tensor(rows), persistent=False)

    def _draw_mask(self, hidden: Sequence[int], index: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Ranks of the elements and degrees of the units of every hidden layer of one net."""
        features = self.num_elements
        order = np.asarray(self.order)
        if index == 0:
            return np.argsort(order), [np.arange(width) * features // width for width in hidden]
        rng = np.random.default_rng((self.mask_seed, index))
        if self.order_agnostic:
            order = rng.permutation(features)
        degrees: list[np.ndarray] = []
        for width in hidden:
            if self.residual and degrees:
                degrees.append(degrees[0])
                continue
            low = degrees[-1].min() if degrees else 0
            degrees.append(rng.integers(low, features, size=width))
        return np.argsort(order), degrees

    def _level(self, level: int, index: int) -> np.ndarray:
        """Ranks of the inputs (as degrees), degrees of a hidden layer, or ranks of the outputs."""
        if level == 0:
            # An element of rank r is seen from degree r + 1 on: then one rule holds for all layers.
            return np.repeat(self._ranks[index] + 1, self.output.num_inputs)
        if level <= len(self._degrees[index]):
            return self._degrees[index][level - 1]
        return np.repeat(self._ranks[index], self.output.num_params)

    def forward(
        self,
        context: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        mask_index: int | Tensor | None = None,
    ) -> Autoregressive:
        """The distribution at a context.

        Args:
            context: ``(*batch, context_dim)``, or None for a likelihood without a context.
            covariates: ``(*batch, covariate_dim)``, or None for a likelihood without.
            mask_index: The net with this mask; None for the ensemble of all.

        Returns:
            A distribution with ``batch_shape == batch`` and ``event_shape == shape``.

        Raises:
            ValueError: If the conditioning is missing, unexpected, of another width, or NaN, or
                the index is out of range.
            TypeError: If the conditioning is not of a floating-point type.
        """
        conditioning = self._conditioning(context, covariates)
        batch: Sequence[int] = ()
        hidden = None
        if self.context_layer is not None and conditioning is not None:
            batch, hidden = conditioning.shape[:-1], self.context_layer(conditioning)
        if mask_index is None and self.num_masks > 1:
            return _Ensemble(self, (hidden, None), batch)
        return Autoregressive(self, (hidden, self._check_index(mask_index)), batch)

    def _check_index(self, index: int | Tensor | None) -> int | Tensor:
        if index is None:
            return 0
        number = index
        if isinstance(index, Tensor) and index.dim() == 0 and index.dtype in _INTEGERS:
            # A look at the value would break the one graph of a traced step: validation only.
            number = int(index) if is_validation_enabled() else 0
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise TypeError(f"Expected mask_index to be an int; got {type(index).__name__}.")
        if not 0 <= number < self.num_masks:
            raise ValueError(f"Expected mask_index in [0, {self.num_masks - 1}]; got {number}.")
        return index

    def _params(self, inputs: Tensor, conditioned: Any) -> Tensor:
        context, index = conditioned
        activate, _ = ACTIVATIONS[self.activation]
        hidden = skip = inputs.flatten(-len(self.shape) - 1)
        for place, layer in enumerate(self.layers):
            if place:
                hidden = activate(hidden)
            below, above = self._row(place, index), self._row(place + 1, index)
            hidden = functional.linear(hidden, layer.weight * (above[:, None] >= below), layer.bias)
            if place == 0 and context is not None:
                hidden = hidden + context
            hidden, skip = self._skipped(place, hidden, skip)
        return hidden.unflatten(-1, (*self.shape, self.output.num_params))

    def _row(self, level: int, index: int | Tensor) -> Tensor:
        """A level of one net."""
        rows = getattr(self, f"_level{level}")
        if isinstance(index, Tensor):
            # Not by indexing, which looks at the value.
            return rows.index_select(0, index.reshape(1).to(rows.device)).squeeze(0)
        return rows[index]

    def _skipped(self, place: int, hidden: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer at ``place`` gives, and what the block after it adds to."""
        if not self.residual or place % 2:
            return hidden, skip
        hidden = hidden + skip if place else hidden
        return hidden, hidden

    def _draw(self, noise: Tensor, conditioned: Any) -> Tensor:
        context, index = conditioned
        activate, _ = ACTIVATIONS[self.activation]
        batch = noise.shape[: -len(self.shape) - 1]
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
        noise = noise.expand(*batch, *noise.shape[-len(self.shape) - 1 :])
        noise = noise.reshape(-1, self.num_elements, self.output.num_noise)

        # With the units in the order of their degrees, a step's are a slice, and all that they
        # see is a prefix: no mask, and no unit twice.
        number = int(index)
        rank = self._ranks[number]
        order = np.argsort(rank)
        levels = [self._level(level, number) for level in range(len(self.layers) + 1)]
        units = [
            torch.as_tensor(np.argsort(level, kind="stable"), device=noise.device)
            for level in levels
        ]
        ends = [np.searchsorted(np.sort(level), np.arange(len(order)), "right") for level in levels]
        weights = [
            layer.weight[above][:, below]
            for layer, below, above in zip(self.layers, units[:-1], units[1:], strict=True)
        ]
        biases = [layer.bias[above] for layer, above in zip(self.layers, units[1:], strict=True)]
        if context is not None:
            context = context.expand(*batch, -1).reshape(len(noise), -1)[:, units[1]]

        known = [_Known(noise, level.size) for level in levels[:-1]]
        values = []
        for step in steps(self.num_elements):
            hidden = skip = noise
            for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                seen = known[place].columns
                new = slice(ends[place + 1][step - 1] if step else 0, ends[place + 1][step])
                hidden = functional.linear(seen, weight[new, : seen.shape[-1]], bias[new])
                if place == 0 and context is not None:
                    hidden = hidden + context[:, new]
                hidden, skip = self._skipped(place, hidden, skip)
                if place < len(weights) - 1:
                    known[place + 1].append(activate(hidden))
            value = self.output.draw(hidden, noise[:, order[step]])
            values.append(value)
            known[0].append(self.output.encode(value, noise.dtype))
        where = torch.as_tensor(rank, device=noise.device)
        return torch.stack(values, -1)[:, where].reshape(*batch, *self.shape)


class _Known:
    """The units of a layer as they become known, one group of columns after the other."""

    def __init__(self, like: Tensor, width: int) -> None:
        self.columns = like.new_empty((len(like), 0))
        self.buffer: Tensor | None = None
        if not torch.is_grad_enabled():
            self.buffer = like.new_empty((len(like), width))

    def append(self, group: Tensor) -> None:
        if self.buffer is None:
            # Written in place, a buffer would change under the graph of the steps before.
            self.columns = torch.cat((self.columns, group), -1)
            return
        start = self.columns.shape[-1]
        stop = start + group.shape[-1]
        self.buffer[:, start:stop] = group
        self.columns = self.buffer[:, :stop]


class _Ensemble(Autoregressive):
    """The mixture of the nets of all masks, in equal parts."""

    likelihood: MADE

    def _log_prob(self, value: Tensor) -> Tensor:
        context, _ = self.conditioned
        number = self.likelihood.num_masks
        terms = [self._density(value, (context, index)) for index in range(number)]
        return torch.logsumexp(torch.stack(terms), 0) - math.log(number)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        # A net for every sample, then all samples of a net at once. The choice depends on no
        # parameter, so the gradient through the samples is that of the mixture.
        likelihood, like = self.likelihood, self.likelihood._like()
        batch = shape[: len(shape) - len(self.event_shape)]
        which = torch.randint(likelihood.num_masks, (math.prod(batch),), device=like.device)
        noise = likelihood.output.noise((len(which), *self.event_shape), like.dtype, like.device)
        context, _ = self.conditioned
        if context is not None:
            context = context.expand(*batch, -1).reshape(len(which), -1)
        parts, values = [], []
        for index in range(likelihood.num_masks):
            rows = torch.nonzero(which == index).squeeze(-1)
            if len(rows):
                given = None if context is None else context[rows]
                parts.append(rows)
                values.append(likelihood._draw(noise[rows], (given, index)))
        return torch.cat(values)[torch.argsort(torch.cat(parts))].reshape(shape)
