r"""The contract of an autoregressive likelihood.

A likelihood is an :class:`flax.nnx.Module` with parameters, made once, and called to give a
distribution::

    decoder = nnx_module("decoder", module)      # module = MADE((8, 8), context_dim=10, ...)
    numpyro.sample("x", decoder(z), obs=x)       # batch_shape z.shape[:-1], event_shape (8, 8)

With :math:`x_1, \dots, x_D` the elements in the order of the likelihood,

.. math:: \log p(x \mid z) = \sum_i \log p(x_i \mid x_{<i}, z) ,

one parallel pass for all terms of the density, and one element after the other for a sample. All
state is parameters, so a likelihood needs no mutable site.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from jax import lax
from numpyro.distributions import constraints
from tqdm.auto import tqdm

from numpyro_vae_ext._checks import check_context, is_traced, positive_int, widths
from numpyro_vae_ext.likelihoods._outputs import Output

_BLOCKS = 24  # between two looks at the progress bar; each is one call of a compiled function

Carry = TypeVar("Carry")


class Likelihood(nnx.Module):
    """Base of the likelihoods; a member defines its parallel pass and its cached sampler.

    Attributes:
        shape: shape of a value.
        num_elements: number of elements of a value.
        context_dim: width of the context, or None.
        covariate_dim: width of the covariates, or None.
        output: what an element is.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        context_dim: int | None,
        covariate_dim: int | None,
        output: Output,
    ) -> None:
        self.shape = widths("shape", shape if isinstance(shape, Sequence) else (shape,))
        if not self.shape:
            raise ValueError("Expected a shape of at least one dimension; got ().")
        self.num_elements = math.prod(self.shape)
        self.context_dim = None if context_dim is None else positive_int("context_dim", context_dim)
        self.covariate_dim = (
            None if covariate_dim is None else positive_int("covariate_dim", covariate_dim)
        )
        self.output = output

    @property
    def conditioning_dim(self) -> int:
        """Width of what :meth:`_conditioning` gives; 0 for a likelihood without conditioning."""
        return (self.context_dim or 0) + (self.covariate_dim or 0)

    @property
    def dtype(self) -> Any:
        """The floating-point type of the parameters, and so of noise and samples."""
        return jnp.result_type(*jax.tree.leaves(self))

    @abstractmethod
    def _params(self, inputs: jax.Array, conditioned: Any) -> jax.Array:
        """Numbers of all elements in one pass, an element's from those before it.

        Args:
            inputs: Encoded values, ``(*batch, *shape, num_inputs)``.
            conditioned: What the member made of the conditioning, once for all passes; a pytree.

        Returns:
            ``(*batch, *shape, num_params)``, ``batch`` broadcast with that of ``conditioned``.
        """

    @abstractmethod
    def _draw(self, noise: jax.Array, conditioned: Any) -> jax.Array:
        """The value ``(*batch, *shape)`` that ``noise`` ``(*batch, *shape, num_noise)`` makes.

        Element by element, by :func:`sequential`; what an element leaves unchanged is not computed
        again.
        """

    def _log_prob(
        self, inputs: jax.Array, conditioned: Any, density: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """The log-density ``(*batch,)``, where ``density`` gives it from :meth:`_params`."""
        return density(self._params(inputs, conditioned))

    def _sample(self, key: jax.Array, shape: tuple[int, ...], conditioned: Any) -> jax.Array:
        """A value of the given shape ``(*batch, *shape)``."""
        return self._draw(self.output.noise(key, shape, self.dtype), conditioned)

    def _conditioning(self, context: Any, covariates: Any) -> jax.Array | None:
        """Context and covariates, checked and side by side; None for a likelihood without."""
        where = f" at {type(self).__name__}"
        context = check_context(context, self.context_dim, where, owner="likelihood")
        covariates = check_context(
            covariates, self.covariate_dim, where, "covariates", "likelihood"
        )
        if context is None or covariates is None:
            return covariates if context is None else context
        batch = jnp.broadcast_shapes(context.shape[:-1], covariates.shape[:-1])
        parts = [jnp.broadcast_to(part, (*batch, part.shape[-1])) for part in (context, covariates)]
        return jnp.concatenate(parts, axis=-1)


class Autoregressive(dist.Distribution):
    """The distribution of a likelihood at one conditioning.

    Args:
        likelihood: The module.
        conditioned: What the module made of the conditioning; its arrays broadcast on the left.
        batch_shape: Left dimensions of the conditioning.
        present: Boolean, broadcastable with ``(*batch_shape, *event_shape)``: False for elements
            that are not there. They add nothing, and no other element sees them.
        validate_args: Whether to check arguments; the host's default if None.
    """

    arg_constraints: dict[str, Any] = {}
    pytree_data_fields = ("likelihood", "conditioned", "present")

    def __init__(
        self,
        likelihood: Likelihood,
        conditioned: Any,
        batch_shape: Sequence[int] = (),
        present: jax.Array | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.likelihood = likelihood
        self.conditioned = conditioned
        self.present = present
        super().__init__(tuple(batch_shape), likelihood.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the elements, as a constraint on events."""
        return constraints.independent(self.likelihood.output.support, self.event_dim)

    @property
    def has_rsample(self) -> bool:
        """Whether a gradient flows through samples."""
        return self.likelihood.output.has_rsample

    def expand(self, batch_shape: Sequence[int]) -> Autoregressive:
        """The same distribution over a wider batch, without the host's wrapper around it."""
        return Autoregressive(
            self.likelihood, self.conditioned, batch_shape, self.present, self._validate_args
        )

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Log-density ``(*batch,)`` of values ``(*batch, *event_shape)``."""
        self._check_value(value)
        value, output = jnp.asarray(value), self.likelihood.output
        if self.present is not None:
            value = jnp.where(self.present, value, jnp.zeros((), value.dtype))
        inputs = output.encode(value, self.likelihood.dtype)
        if self.present is not None:
            inputs = inputs * self.present[..., None]

        def density(params: jax.Array) -> jax.Array:
            terms = output.log_prob(params, value)
            if self.present is not None:
                terms = jnp.where(self.present, terms, 0.0)
            return terms.sum(axis=tuple(range(-self.event_dim, 0)))

        log_prob = self.likelihood._log_prob(inputs, self.conditioned, density)
        return jnp.broadcast_to(log_prob, jnp.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Samples ``(*sample_shape, *batch, *event_shape)``."""
        if any(size < 1 for size in sample_shape):
            raise ValueError(f"Expected a sample shape of positive sizes; got {sample_shape}.")
        likelihood, conditioned = self.likelihood, self.conditioned
        if not self.has_rsample:
            likelihood, conditioned = lax.stop_gradient((likelihood, conditioned))
        value = likelihood._sample(key, self.shape(sample_shape), conditioned)
        if self.present is None:
            return value
        return jnp.where(self.present, value, jnp.zeros((), value.dtype))

    def _validate_sample(self, value: Any) -> Any:
        # The host's wrappers ask; :meth:`log_prob` looks for itself.
        return self.support(value)

    def _check_value(self, value: Any) -> None:
        shape, name = jnp.shape(value), type(self.likelihood).__name__
        if shape[-self.event_dim :] != self.event_shape:
            sizes = ", ".join(map(str, self.event_shape))
            raise ValueError(
                f"Expected values of shape (..., {sizes}) at {name}.log_prob; got shape {shape}."
            )
        if is_traced(value) or is_traced(self.present):
            return
        value, output = np.asarray(value), self.likelihood.output
        bad = ~output.valid(value)
        if self.present is not None:
            bad = bad & np.asarray(self.present)
        if bad.any():
            # The present elements may vary over a wider batch than the value: its own index.
            index = tuple(int(i) for i in np.argwhere(bad)[0])[bad.ndim - value.ndim :]
            index = tuple(i if n > 1 else 0 for i, n in zip(index, value.shape, strict=True))
            raise ValueError(
                f"Expected values in {output.describe} at {name}.log_prob; got "
                f"{value[index].item()} at position {index}."
            )


def sequential(
    step: Callable[..., Carry], module: Likelihood, carry: Carry, num_steps: int, *operands: Any
) -> Carry:
    """``carry = step(module, index, carry, *operands)`` for every ``index`` below ``num_steps``.

    Called with known numbers, it runs in compiled blocks with a progress bar; the compiled
    function is kept, so that ``step`` must be a function at module level. Under a transformation
    of JAX it is one loop, differentiable both ways.

    Args:
        step: a pure function that keeps the carry's shapes and types; ``index`` is traced.
        module: the likelihood.
        carry: pytree of arrays.
        num_steps: number of steps.
        *operands: pytrees of arrays that the steps read.
    """
    if any(map(is_traced, jax.tree.leaves((module, carry, operands)))) or _tracing():
        body = partial(_body, step, module, operands)
        return lax.fori_loop(0, num_steps, body, carry)
    size = -(-num_steps // _BLOCKS)
    with tqdm(total=num_steps, desc="sampling", delay=2, leave=False) as bar:
        for start in range(0, num_steps, size):
            stop = min(start + size, num_steps)
            carry = jax.block_until_ready(_block(step, module, carry, start, stop, operands))
            bar.update(stop - start)
    return carry


def _body(
    step: Callable[..., Carry], module: Likelihood, operands: Any, index: Any, carry: Carry
) -> Carry:
    return step(module, index, carry, *operands)


@partial(jax.jit, static_argnums=0)
def _block(
    step: Callable[..., Carry],
    module: Likelihood,
    carry: Carry,
    start: Any,
    stop: Any,
    operands: Any,
) -> Carry:
    # The bounds are traced: blocks of any place and size are one program.
    return lax.fori_loop(start, stop, partial(_body, step, module, operands), carry)


def _tracing() -> bool:
    """Whether a transformation is under way, in which even known numbers are to be traced."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)
