"""The recurrent likelihood: a GRU or an LSTM over the positions of a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from numpyro_vae_ext._checks import one_of, positive_int
from numpyro_vae_ext.likelihoods._base import Autoregressive, Likelihood, sequential
from numpyro_vae_ext.likelihoods._outputs import make_output

CELLS = ("gru", "lstm")
_glorot = jax.nn.initializers.glorot_uniform()
_orthogonal = jax.nn.initializers.orthogonal()


class _Layer(nnx.Module):
    """One layer: the formulas and the two biases of torch's cells.

    Flax's GRU cell has no bias inside of its reset gate. Gates stand side by side in the last
    axis: reset, update, new; or input, forget, cell, output.
    """

    def __init__(
        self, cell: str, in_features: int, hidden_dim: int, rngs: nnx.Rngs, dtype: Any
    ) -> None:
        self.cell = cell
        self.hidden_dim = hidden_dim
        num_gates = {"gru": 3, "lstm": 4}[cell]

        def linear(width: int, init: Any) -> nnx.Linear:
            def of_gates(key: jax.Array, shape: Any, dtype: Any = None, **_: Any) -> jax.Array:
                keys = jax.random.split(key, num_gates)
                return jnp.concatenate([init(k, (width, hidden_dim), dtype) for k in keys], -1)

            size = num_gates * hidden_dim
            return nnx.Linear(width, size, kernel_init=of_gates, param_dtype=dtype, rngs=rngs)

        self.input = linear(in_features, _glorot)
        self.hidden = linear(hidden_dim, _orthogonal)
        if cell == "lstm":
            # Open at the start, so that the gradient reaches far back.
            forget = jnp.repeat(jnp.asarray([0.0, 1.0, 0.0, 0.0], dtype), hidden_dim)
            self.input.bias = nnx.Param(forget / 2)
            self.hidden.bias = nnx.Param(forget / 2)

    def start(self, batch: Sequence[int], dtype: Any) -> tuple[jax.Array, ...]:
        """The state before the first position."""
        return (jnp.zeros((*batch, self.hidden_dim), dtype),) * (2 if self.cell == "lstm" else 1)

    def step(self, state: tuple[jax.Array, ...], projected: jax.Array) -> tuple[jax.Array, ...]:
        """The next state, its output first; ``projected`` is the input after its dense layer."""
        recurrent = self.hidden(state[0])
        if self.cell == "gru":
            a_r, a_z, a_n = jnp.split(projected, 3, -1)
            b_r, b_z, b_n = jnp.split(recurrent, 3, -1)
            update = jax.nn.sigmoid(a_z + b_z)
            new = jnp.tanh(a_n + jax.nn.sigmoid(a_r + b_r) * b_n)
            return ((1.0 - update) * new + update * state[0],)
        i, f, g, o = jnp.split(projected + recurrent, 4, -1)
        memory = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(memory), memory

    def run(self, projected: jax.Array) -> jax.Array:
        """Outputs ``(T, *batch, hidden_dim)`` of all positions, the loop over the states alone."""

        def advance(state: tuple[jax.Array, ...], given: jax.Array) -> Any:
            state = self.step(state, given)
            return state, state[0]

        start = self.start(projected.shape[1:-1], projected.dtype)
        return jax.lax.scan(advance, start, projected)[1]


class Recurrent(Likelihood):
    r"""Recurrent autoregressive density, :math:`p(x \mid c) = \prod_t p(x_t \mid x_{<t}, c)`.

    The elements of a value, in raster order, are cut into :math:`T` positions of
    :math:`E = \prod` ``shape[-block_dims:]`` elements each, a single one by default. The elements
    of one position are independent given the past; all of the past is seen, through the state of
    the network:

    .. math:: h_t = \mathrm{cell}\bigl((x_{t-1}, \dots, x_{t-k}, c_t),\, h_{t-1}\bigr), \qquad
              p(x_t \mid x_{<t}, c) = \prod_{e=1}^E p(x_{te};\, (W h_t + b)_e)

    with :math:`k` = ``window``, zeros before the first position and :math:`h_0 = 0`. The
    conditioning :math:`c_t`, context and covariates, enters every step. The log-density is one
    pass of the network over all positions; a sample is one step of it per position.

    Args:
        shape: Shape of a value, or its length.
        context_dim: Width of the context; None for a density without one.
        covariate_dim: Width of the covariates; None for a density without them.
        cell: ``"gru"`` or ``"lstm"``.
        hidden_dim: Width of the state of each layer.
        num_layers: Number of layers.
        window: Number of the preceding positions that enter a step directly.
        block_dims: Number of last dimensions of ``shape`` that make up one position.
        context_per_step: Whether the context has one row per position.
        output: Density of an element: ``"bernoulli"``, ``"categorical"``, ``"normal"``,
            ``"logistic_mixture"`` or ``"discretized_logistic_mixture"``.
        num_categories: Number of values of an element of a categorical or discretized output.
        num_components: Number of components of a mixture.
        rngs: Source of the initial weights.
        param_dtype: Type of the parameters, JAX's default float if None.

    Shape:
        Called with a context ``(*batch, context_dim)``, or ``(*batch, T, context_dim)`` under
        ``context_per_step``, covariates ``(*batch, covariate_dim)``, and a boolean ``mask``
        ``(*batch, T)``; the distribution has the batch shape ``batch`` and the event shape
        ``shape``.

    Raises:
        ValueError: If an argument is out of its range; at the call, if the conditioning or the
            mask has another shape than expected.
        TypeError: At the call, if the conditioning is not floating-point or the mask not boolean.

    References:
        Cho et al., 2014, *Learning Phrase Representations using RNN Encoder-Decoder*,
        arXiv:1406.1078 (the GRU, here with torch's reset gate after the recurrent matrix);
        Hochreiter and Schmidhuber, 1997, *Long Short-Term Memory*; Bowman et al., 2016,
        *Generating Sentences from a Continuous Space*, arXiv:1511.06349 (such a decoder's use of
        its latents).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> decoder = Recurrent((6, 3), context_dim=2, block_dims=1, hidden_dim=8, rngs=nnx.Rngs(0))
        >>> lengths = jnp.array([6, 4, 1])
        >>> p = decoder(jnp.zeros((3, 2)), mask=jnp.arange(6) < lengths[:, None])
        >>> x = p.sample(jax.random.key(0))
        >>> x.shape, p.log_prob(x).shape
        ((3, 6, 3), (3,))
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        context_dim: int | None = None,
        *,
        covariate_dim: int | None = None,
        cell: str = "gru",
        hidden_dim: int = 100,
        num_layers: int = 1,
        window: int = 1,
        block_dims: int = 0,
        context_per_step: bool = False,
        output: str = "bernoulli",
        num_categories: int = 256,
        num_components: int = 5,
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        super().__init__(
            shape, context_dim, covariate_dim, make_output(output, num_categories, num_components)
        )
        self.cell = one_of("cell", cell, CELLS)
        self.hidden_dim = positive_int("hidden_dim", hidden_dim)
        num_layers = positive_int("num_layers", num_layers)
        self.window = positive_int("window", window)
        if isinstance(block_dims, bool) or not 0 <= block_dims < len(self.shape):
            raise ValueError(
                f"Expected block_dims from 0 to {len(self.shape) - 1}; got {block_dims}."
            )
        if context_per_step and context_dim is None:
            raise ValueError("Expected a context_dim under context_per_step=True; got None.")
        self.context_per_step = context_per_step
        self.position_shape = self.shape[: len(self.shape) - block_dims]
        self.num_positions = math.prod(self.position_shape)
        self.block_size = self.num_elements // self.num_positions

        dtype = jnp.result_type(float) if param_dtype is None else param_dtype
        width = self.window * self.block_size * self.output.num_inputs + self.conditioning_dim
        inputs = [width, *[hidden_dim] * (num_layers - 1)]
        self.layers = nnx.List(_Layer(cell, size, hidden_dim, rngs, dtype) for size in inputs)
        self.head = nnx.Linear(
            hidden_dim,
            self.block_size * self.output.num_params,
            kernel_init=_small_glorot,
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, context: Any = None, covariates: Any = None, *, mask: Any = None
    ) -> Autoregressive:
        """The density given the conditioning.

        Args:
            context: ``(*batch, context_dim)``, or ``(*batch, T, context_dim)`` under
                ``context_per_step``.
            covariates: ``(*batch, covariate_dim)``, or one row per position as well under
                ``context_per_step``: ``(*batch, T, covariate_dim)``.
            mask: Boolean, ``(*batch, T)``: True where a position is present. What is absent has
                no density, is seen as zeros, and is 0 in a sample. For sequences of different
                lengths: ``jnp.arange(T) < length[:, None]``.

        Returns:
            A distribution of batch shape ``batch``, all inputs broadcast, and event ``shape``.

        Raises:
            ValueError: If the conditioning is missing, unexpected, of another shape, or NaN, or
                the mask has another shape.
            TypeError: If the conditioning is not floating-point or the mask not boolean.
        """
        if self.context_per_step:
            context, covariates = self._per_step(context, covariates)
        conditioning = self._conditioning(context, covariates)
        if conditioning is not None and not self.context_per_step:
            conditioning = conditioning[..., None, :]
        batch_shape = () if conditioning is None else conditioning.shape[:-2]
        present = None
        if mask is not None:
            mask = self._checked_mask(mask)
            batch_shape = jnp.broadcast_shapes(batch_shape, mask.shape[:-1])
            block = [1] * (len(self.shape) - len(self.position_shape))
            present = mask.reshape(*mask.shape[:-1], *self.position_shape, *block)
        return Autoregressive(self, (conditioning, mask), batch_shape, present=present)

    def _per_step(self, context: Any, covariates: Any) -> tuple[Any, Any]:
        """The conditioning with a dimension for the positions, ``(*batch, T or 1, width)``."""
        if context is None:
            return context, covariates
        shape = jnp.shape(context)
        if len(shape) < 2 or shape[-2] != self.num_positions:
            raise ValueError(
                f"Expected a context of shape (..., {self.num_positions}, {self.context_dim}) at "
                f"Recurrent; got shape {shape}. Give one row per position, or use "
                "context_per_step=False."
            )
        if covariates is None or jnp.shape(covariates)[-1:] != (self.covariate_dim,):
            return context, covariates  # no covariates, or none that fit
        given, batch = jnp.shape(covariates)[:-1], shape[:-2]
        per_step = given[-1:] in ((1,), (self.num_positions,))
        # A row per sequence wherever that fits as it is: sizes may be equal by chance.
        if len(given) <= len(batch) and (len(given) < 2 or _fits(given, batch)):
            per_step = False
        elif not per_step and not _fits(given, batch, widen=True):
            raise ValueError(
                f"Expected covariates of shape (..., {self.num_positions}, {self.covariate_dim}) "
                f"at Recurrent; got shape {jnp.shape(covariates)}. Give one row per position, or "
                "one per sequence."
            )
        return context, covariates if per_step else jnp.asarray(covariates)[..., None, :]

    def _checked_mask(self, mask: Any) -> jax.Array:
        mask = jnp.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(
                f"Expected a boolean mask at Recurrent; got {mask.dtype}. Compare with 0, or pass "
                "arange(T) < length."
            )
        if mask.shape[-1:] != (self.num_positions,):
            raise ValueError(
                f"Expected a mask of shape (..., {self.num_positions}) at Recurrent; got shape "
                f"{mask.shape}."
            )
        return mask

    def _project(self, past: jax.Array | None, conditioning: jax.Array | None) -> jax.Array:
        """Part of the first layer's dense map: of the preceding positions, or of the rest."""
        dense = self.layers[0].input
        split = dense.kernel.shape[0] - self.conditioning_dim
        if past is not None:
            return past @ dense.kernel[:split]
        bias: Any = dense.bias
        if conditioning is None:
            return bias[...]
        return conditioning @ dense.kernel[split:] + bias[...]

    def _params(self, inputs: jax.Array, conditioned: Any) -> jax.Array:
        conditioning, _ = conditioned
        num_positions = self.num_positions
        encoded = inputs.reshape(*inputs.shape[: -len(self.shape) - 1], num_positions, -1)
        pad = [(0, 0)] * (encoded.ndim - 2) + [(self.window, 0), (0, 0)]
        earlier = jnp.pad(encoded, pad)
        # The nearest first, as in `_draw_position`.
        starts = range(self.window - 1, -1, -1)
        past = jnp.concatenate([earlier[..., i : i + num_positions, :] for i in starts], -1)
        if conditioning is not None:
            rank = max(past.ndim, conditioning.ndim)
            past, conditioning = _steps_first(past, rank), _steps_first(conditioning, rank)
        else:
            past = _steps_first(past, past.ndim)
        # Each part on a batch of its own.
        projected = self._project(past, None) + self._project(None, conditioning)
        outputs = self.layers[0].run(projected)
        for layer in list(self.layers)[1:]:
            outputs = layer.run(layer.input(outputs))
        params = jnp.moveaxis(self.head(outputs), 0, -2)
        return params.reshape(*params.shape[:-2], *self.shape, self.output.num_params)

    def _draw(self, noise: jax.Array, conditioned: Any) -> jax.Array:
        conditioning, mask = conditioned
        batch = noise.shape[: -len(self.shape) - 1]
        noise = noise.reshape(*batch, self.num_positions, self.block_size, noise.shape[-1])
        noise = jnp.moveaxis(noise, -3, 0)
        values = jnp.zeros(noise.shape[:-1], self.output.value_dtype(noise.dtype))
        states = tuple(layer.start(batch, noise.dtype) for layer in self.layers)
        width = self.block_size * self.output.num_inputs
        past = jnp.zeros((*batch, self.window, width), noise.dtype)
        projected = self._project(None, conditioning)
        carry = (states, past, values)
        _, _, values = sequential(
            _draw_position, self, carry, self.num_positions, noise, projected, mask
        )
        return jnp.moveaxis(values, 0, -2).reshape(*batch, *self.shape)


def _draw_position(
    module: Recurrent,
    index: jax.Array,
    carry: Any,
    noise: jax.Array,
    projected: jax.Array,
    mask: jax.Array | None,
) -> Any:
    """One position of a sample: ``carry`` holds the states, the past positions and the values."""
    states, past, values = carry
    if projected.ndim > 1:
        steps = projected.shape[-2]
        projected = jax.lax.dynamic_index_in_dim(projected, index % steps, -2, keepdims=False)
    given = module._project(past.reshape(*past.shape[:-2], -1), None) + projected
    new = []
    for number, (layer, state) in enumerate(zip(module.layers, states, strict=True)):
        new.append(layer.step(state, layer.input(given) if number else given))
        given = new[-1][0]
    params = module.head(given).reshape(*given.shape[:-1], *values.shape[-1:], -1)
    value = module.output.draw(params, noise[index])
    encoded = module.output.encode(value, past.dtype).reshape(*given.shape[:-1], -1)
    if mask is not None:
        present = jax.lax.dynamic_index_in_dim(mask, index, -1)
        value = jnp.where(present, value, jnp.zeros((), value.dtype))
        encoded = jnp.where(present, encoded, 0.0)
    past = jnp.concatenate([encoded[..., None, :], past[..., :-1, :]], -2)
    return tuple(new), past, values.at[index].set(value)


def _steps_first(steps: jax.Array, rank: int) -> jax.Array:
    """``(*batch, T, width)`` as ``(T, *batch, width)`` with ``rank`` dimensions in all.

    While the rows are short: behind the dense layer there is far more to move.
    """
    wide = steps.reshape((1,) * (rank - steps.ndim) + steps.shape)
    return jnp.moveaxis(wide, -2, 0)


def _fits(shape: Sequence[int], batch: Sequence[int], *, widen: bool = False) -> bool:
    """Whether ``shape`` broadcasts with ``batch``, and unless ``widen`` leaves it as it is."""
    ends = zip(reversed(shape), reversed(batch), strict=False)
    return all(size in (1, whole) or (widen and whole == 1) for size, whole in ends)


def _small_glorot(key: jax.Array, shape: Sequence[int], dtype: Any = None, **_: Any) -> jax.Array:
    return 0.1 * _glorot(key, tuple(shape), dtype)
