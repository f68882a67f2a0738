"""Dense layers with a fixed sparsity pattern, and the autoregressive net that they make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from numpyro_vae_ext._checks import one_of, positive_int, widths
from numpyro_vae_ext.nn._activations import ACTIVATIONS

_glorot = jax.nn.initializers.glorot_uniform()


@lru_cache(maxsize=256)
def _unpack(packed: bytes, shape: tuple[int, int]) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=shape[0] * shape[1])
    return bits.reshape(shape).astype(bool)


class MaskedLinear(nnx.Module):
    r"""A dense layer whose weight is multiplied by a fixed 0/1 mask.

    .. math:: y = (W \odot M)\, x + b

    Args:
        in_features: width of the input.
        out_features: width of the output.
        mask: which weights are kept, of shape ``(out_features, in_features)``, boolean.
        rngs: source of the initial weights (Glorot uniform; the bias starts at 0).
        param_dtype: type of the parameters, JAX's default float if None.

    Raises:
        ValueError: if the mask has another shape.

    References:
        Germain, Gregor, Murray and Larochelle (2015), MADE, arXiv 1502.03509, eq. 7.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = MaskedLinear(2, 3, [[1, 0], [0, 1], [1, 1]], rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((5, 2))).shape
        (5, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: Any,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        self.in_features = positive_int("in_features", in_features)
        self.out_features = positive_int("out_features", out_features)
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != (out_features, in_features):
            raise ValueError(
                f"Expected a mask of shape {(out_features, in_features)}; got {mask.shape}."
            )
        # Bytes are hashable and compare fast, so the mask is a constant of the graph; an array
        # attribute would be state, which `nnx_module` turns into a mutable site.
        self._packed_mask = np.packbits(mask).tobytes()
        dtype = jnp.result_type(float) if param_dtype is None else param_dtype
        self.kernel = nnx.Param(_glorot(rngs.params(), (in_features, out_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype))

    @property
    def mask(self) -> np.ndarray:
        """The mask, of shape ``(out_features, in_features)``."""
        return _unpack(self._packed_mask, (self.out_features, self.in_features))

    @property
    def masked_weight(self) -> jax.Array:
        """The masked weight, of shape ``(in_features, out_features)`` as Flax lays it out."""
        return jnp.where(self.mask.T, self.kernel[...], 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs ``(*batch, out_features)`` of inputs ``(*batch, in_features)``."""
        return x @ self.masked_weight + self.bias[...]


class MaskedMLP(nnx.Module):
    r"""A perceptron whose output :math:`i` depends on earlier inputs and on a context only.

    Every hidden unit :math:`h` of a layer of width :math:`H` has the degree
    :math:`\lfloor hD/H \rfloor`. With :math:`r_j` the rank of input :math:`j` in ``order``, a unit
    of degree :math:`d` sees the inputs with :math:`r_j < d` and the earlier units of degree at
    most :math:`d`; the outputs for feature :math:`i` see the units of degree at most
    :math:`r_i`. Units of degree 0 see the context alone.

    Args:
        features: number of inputs, `D`.
        hidden_dims: widths of the hidden layers, at least one.
        num_outputs: outputs per feature.
        context_dim: width of the context, or None for a net without one.
        order: the features from first to last; ``0..D-1`` if None.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.
        rngs: source of the initial weights. The last layer starts at a tenth of Glorot's scale.
        param_dtype: type of the parameters, JAX's default float if None.

    Raises:
        ValueError: if there is no hidden layer, a width is below 1, the order is no permutation
            or the activation is unknown.

    References:
        Germain, Gregor, Murray and Larochelle (2015), MADE, arXiv 1502.03509, eq. 12-13 (the
        masks); Kingma et al. (2016), arXiv 1606.04934, sec. 3 (the context).

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> net = MaskedMLP(3, (16,), 2, context_dim=4, rngs=nnx.Rngs(0))
        >>> net(jnp.ones((7, 5, 3)), jnp.ones((5, 4))).shape  # the context is per datum
        (7, 5, 2, 3)
    """

    def __init__(
        self,
        features: int,
        hidden_dims: Sequence[int],
        num_outputs: int,
        *,
        context_dim: int | None = None,
        order: Sequence[int] | None = None,
        activation: str = "elu",
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        self.features = positive_int("features", features)
        self.num_outputs = positive_int("num_outputs", num_outputs)
        hidden_dims = widths("hidden_dims", hidden_dims)
        if not hidden_dims:
            raise ValueError("Expected at least one hidden layer; got hidden_dims=().")
        self.order = tuple(range(features)) if order is None else tuple(int(i) for i in order)
        if sorted(self.order) != list(range(features)):
            raise ValueError(
                f"Expected order to be a permutation of range({features}); got {self.order}."
            )
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))
        dtype = jnp.result_type(float) if param_dtype is None else param_dtype

        rank = np.argsort(self.order)
        degrees = [np.arange(width) * features // width for width in hidden_dims]
        masks = [rank[None, :] < degrees[0][:, None]]
        masks += [a[None, :] <= b[:, None] for a, b in zip(degrees, degrees[1:], strict=False)]
        masks += [np.tile(degrees[-1][None, :] <= rank[:, None], (self.num_outputs, 1))]
        layers = [
            MaskedLinear(mask.shape[1], mask.shape[0], mask, rngs=rngs, param_dtype=dtype)
            for mask in masks
        ]
        layers[-1].kernel = nnx.Param(0.1 * layers[-1].kernel[...])
        self.layers = nnx.List(layers)
        self.context_layer = (
            None
            if context_dim is None
            else nnx.Linear(
                positive_int("context_dim", context_dim),
                hidden_dims[0],
                use_bias=False,
                kernel_init=_glorot,
                param_dtype=dtype,
                rngs=rngs,
            )
        )

    def __call__(self, z: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Outputs of shape ``(*batch, num_outputs, D)`` at ``z`` of shape ``(*batch, D)``.

        The context, of shape ``(*context_batch, context_dim)``, broadcasts against the batch; its
        layer runs on the context's own batch, so particles share that work.
        """
        activate, _ = ACTIVATIONS[self.activation]
        hidden = self._first(z, context)
        for layer in self.layers[1:]:
            hidden = layer(activate(hidden))
        return hidden.reshape(*hidden.shape[:-1], self.num_outputs, self.features)

    def jacobian(
        self, z: jax.Array, context: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        r"""Outputs, and their derivatives in ``z`` of shape ``(*batch, num_outputs, D, D)``.

        Forward mode by hand, :math:`J_l = W_l (\phi'(a_{l-1}) \odot J_{l-1})`: the cost of ``D``
        further forward passes, without a pass of automatic differentiation.
        """
        activate, slope = ACTIVATIONS[self.activation]
        hidden = self._first(z, context)
        # Kept as (*batch, input, unit), so that each layer is one matrix product.
        slopes = self.layers[0].masked_weight
        for layer in self.layers[1:]:
            slopes = (slopes * slope(hidden)[..., None, :]) @ layer.masked_weight
            hidden = layer(activate(hidden))
        batch = hidden.shape[:-1]
        outputs = hidden.reshape(*batch, self.num_outputs, self.features)
        slopes = slopes.reshape(*batch, self.features, self.num_outputs, self.features)
        return outputs, jnp.moveaxis(slopes, -3, -1)

    def _first(self, z: jax.Array, context: jax.Array | None) -> jax.Array:
        hidden = self.layers[0](z)
        if self.context_layer is not None and context is not None:
            hidden = hidden + self.context_layer(context)
        return hidden
