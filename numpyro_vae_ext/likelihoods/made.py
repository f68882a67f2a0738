"""The masked autoencoder for distribution estimation, as a likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax, random

from numpyro_vae_ext._checks import is_traced, one_of, positive_int, widths
from numpyro_vae_ext.likelihoods._base import Autoregressive, Likelihood, sequential
from numpyro_vae_ext.likelihoods._outputs import make_output
from numpyro_vae_ext.nn._activations import ACTIVATIONS

_glorot = jax.nn.initializers.glorot_uniform()


class MADE(Likelihood):
    r"""A masked perceptron: one dense net for all conditionals of a value of any shape.

    .. math::
        h_1 = \phi\bigl((W_1 \odot M_1)\, e(x) + V c + b_1\bigr), \qquad
        h_l = \phi\bigl((W_l \odot M_l)\, h_{l-1} + b_l\bigr), \qquad
        \theta = (W_{L+1} \odot M_{L+1})\, h_L + b_{L+1}

    .. math:: \log p(x \mid c) = \sum_i \log p\bigl(x_i \mid \theta_i(x_{<i}, c)\bigr)

    with :math:`c` the context and the covariates, and :math:`e` the encoding of the output: the
    number itself, categories one-hot. Of :math:`D` elements, :math:`r_i` is the rank of element
    :math:`i` in the order. Each hidden unit has a degree in :math:`0, \dots, D - 1`, in a layer of
    width :math:`H` unit :math:`h` the degree :math:`\lfloor h D / H \rfloor`. A unit of degree
    :math:`d` sees the elements with :math:`r_i < d` and the earlier units of degree at most
    :math:`d`; :math:`\theta_i` sees the units of degree at most :math:`r_i`. Units of degree 0 see
    the conditioning alone. With ``residual=True`` the layers after the first are blocks
    :math:`h + (W' \odot M)\, \phi((W \odot M)\, \phi(h) + b) + b'`, all units of the degrees of
    the first layer.

    Several masks share the weights of one net. Masks after the first draw the order (with
    ``order_agnostic=True``) and the degrees at random, once for all. Training takes another mask
    each step, ``decoder(z, mask_index=step % num_masks)``, where the index may be traced; without
    an index the distribution is the ensemble :math:`\frac{1}{M} \sum_m p_m(x \mid c)`, a density
    of its own, at the cost of ``num_masks`` nets.

    A sample is drawn element by element, and computes each hidden unit once: the work of one pass.

    Args:
        shape: shape of a value; an int for a vector.
        context_dim: width of the context, or None for a likelihood without one.
        covariate_dim: width of the covariates, or None for a likelihood without them.
        hidden_dims: widths of the hidden layers, at least one.
        output: ``"bernoulli"``, ``"categorical"``, ``"normal"``, ``"logistic_mixture"`` or
            ``"discretized_logistic_mixture"``.
        num_categories: number of values of an element, where they are integers from 0.
        num_components: number of logistic distributions in a mixture.
        order: the flattened elements from first to last; row by row if None.
        num_masks: number of masks `M`.
        order_agnostic: whether masks after the first have orders of their own.
        mask_seed: seed of the masks after the first.
        residual: whether the layers after the first are residual blocks.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.
        rngs: source of the initial weights. The last layer starts at a tenth of Glorot's scale.
        param_dtype: type of the parameters, JAX's default float if None.

    Raises:
        ValueError: if a width or a number is too small, the order is no permutation, an option is
            unknown, or the hidden layers of a residual net differ; at the call, if the
            conditioning is missing, unexpected, of another width or NaN, or ``mask_index`` is out
            of range; at ``log_prob``, if a value is outside of the support.
        TypeError: at the call, if the conditioning is not floating-point, or ``mask_index`` is no
            integer.

    References:
        Germain, Gregor, Murray and Larochelle (2015), MADE, arXiv 1502.03509, eq. 8-13 (the
        masks), sec. 4.2-4.3 (other orders and other masks). Nash and Durkan (2019), Autoregressive
        Energy Machines, arXiv 1904.05626 (residual blocks with masks).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> decoder = MADE((4, 4), context_dim=2, hidden_dims=(32,), rngs=nnx.Rngs(0))
        >>> images = decoder(jnp.ones((5, 2)))
        >>> x = images.sample(jax.random.key(0))
        >>> x.shape, images.log_prob(x).shape
        ((5, 4, 4), (5,))
    """

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
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        super().__init__(
            shape, context_dim, covariate_dim, make_output(output, num_categories, num_components)
        )
        features = self.num_elements
        self.hidden_dims = widths("hidden_dims", hidden_dims)
        if not self.hidden_dims:
            raise ValueError("Expected at least one hidden layer; got hidden_dims=().")
        if residual and len(set(self.hidden_dims)) > 1:
            raise ValueError(
                f"Expected equal hidden_dims under residual=True; got {self.hidden_dims}. Every "
                "block adds to what it is given."
            )
        self.order = tuple(range(features)) if order is None else tuple(int(i) for i in order)
        if sorted(self.order) != list(range(features)):
            raise ValueError(
                f"Expected order to be a permutation of range({features}); got {self.order}."
            )
        self.num_masks = positive_int("num_masks", num_masks)
        self.order_agnostic = bool(order_agnostic)
        self.mask_seed = positive_int("mask_seed", mask_seed, minimum=0)
        self.residual = bool(residual)
        self.activation = one_of("activation", activation, tuple(ACTIVATIONS))

        dtype = jnp.result_type(float) if param_dtype is None else param_dtype
        sizes = [features * self.output.num_inputs, self.hidden_dims[0]]
        for width in self.hidden_dims[1:]:
            sizes += [width, width] if residual else [width]
        sizes += [features * self.output.num_params]
        layers = [
            nnx.Linear(a, b, kernel_init=_glorot, param_dtype=dtype, rngs=rngs)
            for a, b in zip(sizes, sizes[1:], strict=False)
        ]
        layers[-1].kernel = nnx.Param(0.1 * layers[-1].kernel[...])
        self.layers = nnx.List(layers)
        self.context_layer = (
            nnx.Linear(
                self.conditioning_dim,
                self.hidden_dims[0],
                use_bias=False,
                kernel_init=_glorot,
                param_dtype=dtype,
                rngs=rngs,
            )
            if self.conditioning_dim
            else None
        )

    def __call__(
        self, context: Any = None, covariates: Any = None, *, mask_index: Any = None
    ) -> Autoregressive:
        """The distribution given the conditioning.

        Args:
            context: ``(*batch, context_dim)``, or None for a likelihood without a context.
            covariates: ``(*batch, covariate_dim)``, or None; broadcasts with the context.
            mask_index: The mask to use, an integer that may be traced; the mixture over all masks
                if None.

        Returns:
            A distribution over values of shape ``shape``, one per row of the conditioning.
        """
        conditioning = self._conditioning(context, covariates)
        index = self._checked_index(mask_index)
        if conditioning is None or self.context_layer is None:
            return Autoregressive(self, (None, index))
        return Autoregressive(
            self, (self.context_layer(conditioning), index), conditioning.shape[:-1]
        )

    def _checked_index(self, index: Any) -> Any:
        if index is None:
            return None
        if jnp.shape(index) or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
            raise TypeError(f"Expected mask_index to be an int; got {type(index).__name__}.")
        if not is_traced(index) and not 0 <= index < self.num_masks:
            raise ValueError(f"Expected mask_index in [0, {self.num_masks - 1}]; got {index}.")
        return None if self.num_masks == 1 else jnp.asarray(index)

    @property
    def _masks(self) -> _Masks:
        return _masks(
            self.hidden_dims,
            self.order,
            self.num_masks,
            self.order_agnostic,
            self.mask_seed,
            self.residual,
        )

    def _params(self, inputs: jax.Array, conditioned: Any) -> jax.Array:
        shift, index = conditioned
        activate, _ = ACTIVATIONS[self.activation]
        ranks, *degrees = (_at(table, index) for table in self._masks.levels)
        seen = jnp.repeat(ranks, self.output.num_inputs)
        scored = jnp.repeat(ranks, self.output.num_params)

        batch = inputs.shape[: -len(self.shape) - 1]
        hidden = _masked(
            self.layers[0], inputs.reshape(*batch, -1), seen[:, None] < degrees[0][None, :]
        )
        if shift is not None:
            hidden = hidden + shift
        for layer, (below, above) in enumerate(zip(degrees, degrees[1:], strict=False)):
            mask = below[:, None] <= above[None, :]
            if self.residual:
                inner = _masked(self.layers[2 * layer + 1], activate(hidden), mask)
                hidden = hidden + _masked(self.layers[2 * layer + 2], activate(inner), mask)
            else:
                hidden = _masked(self.layers[layer + 1], activate(hidden), mask)
        params = _masked(self.layers[-1], activate(hidden), degrees[-1][:, None] <= scored[None, :])
        return params.reshape(*params.shape[:-1], *self.shape, self.output.num_params)

    def _log_prob(
        self, inputs: jax.Array, conditioned: Any, density: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        shift, index = conditioned
        if index is not None or self.num_masks == 1:
            return density(self._params(inputs, conditioned))
        terms = lax.map(
            lambda mask: density(self._params(inputs, (shift, mask))), jnp.arange(self.num_masks)
        )
        return jax.nn.logsumexp(terms, axis=0) - math.log(self.num_masks)

    def _sample(self, key: jax.Array, shape: tuple[int, ...], conditioned: Any) -> jax.Array:
        shift, index = conditioned
        if index is not None or self.num_masks == 1:
            return super()._sample(key, shape, conditioned)
        # A program per mask and all samples, not one per sample: an array has one size.
        key, key_mask = random.split(key)
        noise = self.output.noise(key, shape, self.dtype)
        batch = shape[: -len(self.shape)]
        chosen = random.randint(key_mask, batch, 0, self.num_masks)
        chosen = chosen.reshape(batch + (1,) * len(self.shape))
        value = jnp.zeros(shape, self.output.value_dtype(self.dtype))
        for mask in range(self.num_masks):
            drawn = self._draw(noise, (shift, jnp.asarray(mask)))
            value = jnp.where(chosen == mask, drawn, value)
        return value

    def _draw(self, noise: jax.Array, conditioned: Any) -> jax.Array:
        shift, index = conditioned
        batch = noise.shape[: -len(self.shape) - 1]
        noise = noise.reshape(*batch, self.num_elements, -1)
        masks = self._masks
        plan = _at(masks.orders, index), [_at(table, index) for table in masks.groups]
        inputs, outputs, dtype = self.output.num_inputs, self.output, noise.dtype
        buffers = [jnp.zeros((*batch, self.num_elements * inputs), dtype)]
        buffers += [jnp.zeros((*batch, layer.in_features), dtype) for layer in self.layers[1:]]
        value = jnp.zeros((*batch, self.num_elements), outputs.value_dtype(dtype))
        value, _ = sequential(_step, self, (value, buffers), self.num_elements, noise, shift, plan)
        return value.reshape(*batch, *self.shape)


class _Masks(NamedTuple):
    """All masks of a net, by what the entries of each come from.

    Attributes:
        orders: elements from first to last, ``(M, D)``.
        levels: ranks of the elements, ``(M, D)``, then degrees of each hidden layer, ``(M, H)``.
        groups: units of each degree for each hidden layer, ``(M, D, G)``, filled up with ``H``.
    """

    orders: np.ndarray
    levels: tuple[np.ndarray, ...]
    groups: tuple[np.ndarray, ...]


@lru_cache(maxsize=64)
def _masks(
    hidden_dims: tuple[int, ...],
    order: tuple[int, ...],
    num_masks: int,
    order_agnostic: bool,
    seed: int,
    residual: bool,
) -> _Masks:
    features = len(order)
    orders, levels = [np.asarray(order)], [[np.arange(h) * features // h for h in hidden_dims]]
    for mask in range(1, num_masks):
        rng = np.random.default_rng((seed, mask))
        orders.append(rng.permutation(features) if order_agnostic else orders[0])
        degrees: list[np.ndarray] = []
        for width in hidden_dims:
            low = degrees[-1].min() if degrees else 0
            # The units of a residual net are the same ones in all layers.
            again = residual and degrees
            degrees.append(degrees[0] if again else rng.integers(low, features, size=width))
        levels.append(degrees)
    tables = [np.stack(layer) for layer in zip(*levels, strict=True)]
    ranks = np.argsort(np.stack(orders), axis=1)
    groups = tuple(_by_degree(table, features) for table in tables)
    return _Masks(np.stack(orders), (ranks, *tables), groups)


def _by_degree(degrees: np.ndarray, features: int) -> np.ndarray:
    """The units of each degree, ``(M, D, G)``; the largest group says how many columns."""
    counts = np.stack([np.bincount(row, minlength=features) for row in degrees])
    width = degrees.shape[1]
    groups = np.full((*counts.shape, counts.max()), width)
    for row, found in zip(degrees, groups, strict=True):
        for unit, degree in enumerate(row):
            place = np.argmax(found[degree] == width)
            found[degree, place] = unit
    return groups


def _at(table: np.ndarray, index: Any) -> jax.Array:
    return jnp.asarray(table[0] if index is None else jnp.asarray(table)[index])


def _masked(layer: nnx.Linear, x: jax.Array, mask: jax.Array) -> jax.Array:
    bias: Any = layer.bias
    return x @ jnp.where(mask, layer.kernel[...], 0.0) + bias[...]


def _step(
    module: MADE, index: Any, carry: Any, noise: jax.Array, shift: jax.Array | None, plan: Any
) -> Any:
    """Draw the element of rank ``index``, computing the units of that degree and no others.

    The buffers hold what each layer reads, activated, with zeros for all that is not known yet.
    Everything known may be seen, so no mask is needed.
    """
    value, buffers = carry
    order, groups = plan
    activate, _ = ACTIVATIONS[module.activation]
    outputs, layers = module.output, module.layers

    def units(layer: nnx.Linear, known: jax.Array, at: jax.Array) -> jax.Array:
        kernel: Any = layer.kernel
        bias: Any = layer.bias
        columns = kernel[...].at[:, at].get(mode="fill", fill_value=0)
        return known @ columns + bias[...].at[at].get(mode="fill", fill_value=0)

    def put(buffer: jax.Array, at: jax.Array, hidden: jax.Array) -> jax.Array:
        return buffer.at[..., at].set(activate(hidden), mode="drop")

    known = [buffers[0]]
    at = groups[0][index]
    hidden = units(layers[0], known[0], at)
    if shift is not None:
        hidden = hidden + shift.at[..., at].get(mode="fill", fill_value=0)
    known.append(put(buffers[1], at, hidden))
    for place in range(1, len(layers) - 1):
        if module.residual and place % 2 == 0:
            hidden = hidden + units(layers[place], known[place], at)
            known.append(put(buffers[place + 1], at, hidden))
        else:
            at = at if module.residual else groups[place][index]
            inner = units(layers[place], known[place], at)
            known.append(put(buffers[place + 1], at, inner))

    element = order[index]
    numbers = element * outputs.num_params + jnp.arange(outputs.num_params)
    params = units(layers[-1], known[-1], numbers)
    drawn = outputs.draw(params, jnp.take(noise, element, axis=-2))
    entered = element * outputs.num_inputs + jnp.arange(outputs.num_inputs)
    known[0] = known[0].at[..., entered].set(outputs.encode(drawn, params.dtype))
    return value.at[..., element].set(drawn), known
