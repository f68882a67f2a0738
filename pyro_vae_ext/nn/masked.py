r"""Dense layers with masked weights, and the autoregressive network made of them.

A masked network over ``features`` inputs keeps the autoregressive property of MADE (Germain et
al., 2015, arXiv:1502.03509, eq. 8-13): an output that belongs to feature :math:`i` depends only on
the features that precede :math:`i` in the chosen order, and on the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae_ext._checks import one_of, positive_int, widths
from pyro_vae_ext.nn._activations import ACTIVATIONS


class MaskedLinear(nn.Linear):
    r"""Dense layer :math:`y = (W \odot M)\, x + b` with a fixed binary mask :math:`M`.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        mask: Boolean array of shape ``(out_features, in_features)``; False cuts a connection.

    Shape:
        Input ``(*batch, in_features)``, output ``(*batch, out_features)``.

    Raises:
        ValueError: If the mask has another shape.

    References:
        Germain, Gregor, Murray and Larochelle, 2015, *MADE: Masked Autoencoder for Distribution
        Estimation*, arXiv:1502.03509, eq. 8.

    Example:
        >>> import torch
        >>> layer = MaskedLinear(3, 2, torch.tensor([[True, False, False], [True, True, False]]))
        >>> layer(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    mask: Tensor

    def __init__(self, in_features: int, out_features: int, mask: np.ndarray | Tensor) -> None:
        super().__init__(in_features, out_features)
        mask = torch.as_tensor(mask, dtype=torch.bool)
        if mask.shape != (out_features, in_features):
            raise ValueError(
                f"Expected a mask of shape {(out_features, in_features)}; got {tuple(mask.shape)}."
            )
        # As a number: a product is cheaper than a `where`, and its gradient is masked as well.
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    @property
    def masked_weight(self) -> Tensor:
        """The weight that is in effect, of shape ``(out_features, in_features)``."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``x`` of shape ``(*batch, in_features)``."""
        return nn.functional.linear(x, self.masked_weight, self.bias)


class MaskedMLP(nn.Module):
    r"""Autoregressive network: outputs of feature :math:`i` see the features before it.

    Hidden unit :math:`h` of a layer of width :math:`H` has the degree :math:`\lfloor hD/H \rfloor`.
    It sees the features whose rank in ``order`` is smaller than its degree and the hidden units
    of at most its degree; outputs of the feature of rank :math:`r` see the hidden units of degree
    at most :math:`r`. Units of degree 0 see the context alone, so the first feature's outputs
    depend on the context as well.

    Args:
        features: Number :math:`D` of features.
        hidden_dims: Widths of the hidden layers, at least one.
        num_outputs: Outputs per feature.
        context_dim: Width of the context; None for a network without one.
        order: Permutation that lists the features from first to last; 0, 1, ... by default.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.

    Shape:
        Features ``(*batch, D)``, context ``(*batch, context_dim)`` broadcastable against them on
        the left; output ``(*batch, num_outputs, D)``.

    Raises:
        ValueError: If a width is not positive, there is no hidden layer, ``order`` is not a
            permutation, or the activation is unknown.

    References:
        Germain et al., 2015, arXiv:1502.03509, eq. 8-13.

    Example:
        >>> import torch
        >>> net = MaskedMLP(3, (16,), 2, context_dim=4)
        >>> net(torch.zeros(5, 3), torch.zeros(5, 4)).shape
        torch.Size([5, 2, 3])
    """

    layers: Any  # an nn.ModuleList, whose members are typed as modules of any kind

    def __init__(
        self,
        features: int,
        hidden_dims: Sequence[int],
        num_outputs: int,
        *,
        context_dim: int | None = None,
        order: Sequence[int] | None = None,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        self.features = positive_int("features", features)
        self.num_outputs = positive_int("num_outputs", num_outputs)
        hidden_dims = widths("hidden_dims", hidden_dims)
        if not hidden_dims:
            raise ValueError("Expected at least one hidden layer; got hidden_dims=().")
        order = tuple(range(features)) if order is None else tuple(int(i) for i in order)
        if sorted(order) != list(range(features)):
            raise ValueError(
                f"Expected order to be a permutation of range({features}); got {order}."
            )
        self.order = order
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))

        rank = np.argsort(order)
        degrees = [np.arange(width) * features // width for width in hidden_dims]
        masks = [degrees[0][:, None] > rank]
        masks += [b[:, None] >= a for a, b in zip(degrees[:-1], degrees[1:], strict=True)]
        masks += [np.tile(rank[:, None] >= degrees[-1], (num_outputs, 1))]
        self.layers = nn.ModuleList(MaskedLinear(m.shape[1], m.shape[0], m) for m in masks)
        self.context_layer = None
        if context_dim is not None:
            positive_int("context_dim", context_dim)
            self.context_layer = nn.Linear(context_dim, hidden_dims[0], bias=False)
            nn.init.xavier_uniform_(self.context_layer.weight)
        with torch.no_grad():
            # A small last layer starts every transform made of this network near the identity.
            self.layers[-1].weight.mul_(0.1)

    def _first(self, z: Tensor, context: Tensor | None) -> Tensor:
        hidden = self.layers[0](z)
        if self.context_layer is not None:
            # On the context's own batch: with K particles it is K times smaller than z's.
            hidden = hidden + self.context_layer(context)
        return hidden

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs of shape ``(*batch, num_outputs, D)`` for ``z`` of shape ``(*batch, D)``."""
        activate, _ = ACTIVATIONS[self.activation]
        hidden = self._first(z, context)
        for layer in self.layers[1:]:
            hidden = layer(activate(hidden))
        return hidden.unflatten(-1, (self.num_outputs, self.features))

    def jacobian(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Outputs and their Jacobian in ``z``, in forward mode.

        :math:`J \leftarrow W_1`, then :math:`J \leftarrow W_l\, (\phi'(a_{l-1}) \odot J)`: the
        cost of ``D`` forward passes.

        Returns:
            The outputs ``(*batch, num_outputs, D)``, and their derivatives
            ``(*batch, num_outputs, D, D)`` where ``[..., o, i, j]`` is that of output ``o`` of
            feature ``i`` in feature ``j``.
        """
        activate, derivative = ACTIVATIONS[self.activation]
        hidden = self._first(z, context)
        jacobian = self.layers[0].masked_weight
        for layer in self.layers[1:]:
            jacobian = layer.masked_weight @ (derivative(hidden).unsqueeze(-1) * jacobian)
            hidden = layer(activate(hidden))
        shape = (self.num_outputs, self.features)
        return hidden.unflatten(-1, shape), jacobian.unflatten(-2, shape)
