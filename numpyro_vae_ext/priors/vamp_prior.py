"""The variational mixture of posteriors as a prior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx

from numpyro_vae_ext._checks import positive_int, widths
from numpyro_vae_ext.priors._base import Law, LawDistribution, param_dtype_or_default

# Standard deviation of pseudo-inputs that are neither given nor bounded.
_NOISE = 0.01


class VampPrior(nnx.Module):
    r"""Variational mixture of posteriors: the guide at learned pseudo-inputs.

    .. math:: p(z) = \frac1K \sum_{k=1}^{K} q(z \mid \mathrm{encoder}(u_k))

    The module holds the pseudo-inputs :math:`u_k` alone. It is called with the guide's own
    posterior, any family that takes a context, and the guide's own encoder, as ``nnx_module``
    returns them under the names that they have in the guide: both stay registered as they are,
    once, and their parameters get the gradient of the prior as well as that of the guide, under
    every gradient estimator.

    A family with a density of its own is scored exactly. For a hierarchical one (``Auxiliary``,
    ``VGP``) each :math:`q(z \mid \cdot)` is an importance-sampling estimate, unbiased, so that
    importance weights have the evidence as their mean and every bound remains one; the bound is
    looser the more the estimate varies. A value costs :math:`K` densities of the family, times
    ``num_samples`` for a hierarchical one.

    Args:
        input_shape: Shape of one pseudo-input, that of a datum as the encoder sees it.
        num_pseudo_inputs: Number :math:`K`; not used if they are given.
        pseudo_inputs: First values, ``(K, *input_shape)``, such as rows of the data; by default
            uniform within ``bounds``, or Normal of standard deviation 0.01 without bounds.
        bounds: Lowest and highest value of an element, beyond which it is clipped and gets no
            gradient; None for no bounds.
        num_samples: Samples behind the density of a hierarchical family.
        rngs: Source of the initial pseudo-inputs; not used if they are given.
        param_dtype: Type of the parameters, JAX's default float if None.

    Raises:
        ValueError: If a width or number is not positive, the pseudo-inputs have another shape, or
            the bounds are no interval; at a call, if the posterior takes no context or the encoder
            does not return one for each pseudo-input.

    References:
        Tomczak and Welling, 2018, *VAE with a VampPrior*, arXiv:1705.07120, sec. 3.

    Example:
        >>> import numpyro
        >>> from flax import nnx
        >>> from numpyro.contrib.module import nnx_module
        >>> from numpyro_vae_ext.guides import IAF
        >>> rngs = nnx.Rngs(0)
        >>> posterior, encoder = IAF(2, context_dim=5, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)
        >>> prior = VampPrior(6, num_pseudo_inputs=20, bounds=(0.0, 1.0), rngs=rngs)
        >>> def model():
        ...     family, encode = nnx_module("posterior", posterior), nnx_module("encoder", encoder)
        ...     law = nnx_module("prior", prior)(family, encode)
        ...     with numpyro.plate("data", 7):
        ...         return numpyro.sample("z", law)
        >>> numpyro.handlers.seed(model, 0)().shape
        (7, 2)
    """

    def __init__(
        self,
        input_shape: int | Sequence[int],
        *,
        num_pseudo_inputs: int = 100,
        pseudo_inputs: Any = None,
        bounds: tuple[float, float] | None = None,
        num_samples: int = 10,
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        shape = input_shape if isinstance(input_shape, Sequence) else (input_shape,)
        self.input_shape = widths("input_shape", shape)
        self.num_samples = positive_int("num_samples", num_samples)
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"Expected bounds (low, high) with low < high; got {bounds}.")
        self.bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        dtype = param_dtype_or_default(param_dtype)
        if pseudo_inputs is None:
            num_pseudo_inputs = positive_int("num_pseudo_inputs", num_pseudo_inputs)
            size, key = (num_pseudo_inputs, *self.input_shape), rngs.params()
            if bounds is None:
                pseudo_inputs = _NOISE * jax.random.normal(key, size, dtype)
            else:
                pseudo_inputs = jax.random.uniform(key, size, dtype, *bounds)
        start = jnp.asarray(pseudo_inputs, dtype)
        if start.ndim == 0 or len(start) == 0 or start.shape[1:] != self.input_shape:
            wanted = ", ".join(map(str, ("num_pseudo_inputs", *self.input_shape)))
            raise ValueError(
                f"Expected pseudo_inputs of shape ({wanted}); got shape {start.shape}."
            )
        self.num_pseudo_inputs = len(start)
        self.pseudo_inputs = nnx.Param(start)

    def __call__(
        self,
        posterior: Callable[..., Any],
        encoder: Callable[..., Any] | None = None,
        *,
        rng_key: jax.Array | None = None,
    ) -> dist.Distribution:
        """The prior as a distribution, ``batch_shape ()`` and ``event_shape (latent_dim,)``.

        Args:
            posterior: The family that the guide uses, as ``nnx_module`` returns it.
            encoder: Maps ``(K, *input_shape)`` to contexts ``(K, context_dim)``, as it does in the
                guide; None if the pseudo-inputs are contexts themselves.
            rng_key: Key of the samples behind the density of a hierarchical family; by default
                that of the surrounding ``seed`` handler.

        Raises:
            ValueError: If the posterior takes no context, or the encoder does not return one for
                each pseudo-input.
        """
        # What nnx_module returns has no attributes: a family without a context then says so itself.
        if getattr(posterior, "context_dim", 1) is None:
            raise ValueError(
                "Expected a posterior with a context at VampPrior; got "
                f"{type(posterior).__name__} without one. Build the family with the width of the "
                "encoder's output as context_dim."
            )
        inputs = self.pseudo_inputs[...]
        if self.bounds is not None:
            low, high = self.bounds
            # Plain clipping would halve the gradient, or cut it, at the bounds themselves.
            inside = (low <= inputs) & (inputs <= high)
            inputs = jnp.where(inside, inputs, jnp.clip(inputs, low, high))
        context = inputs if encoder is None else encoder(inputs)
        if context.ndim != 2 or len(context) != len(inputs):
            raise ValueError(
                f"Expected one context for each of {len(inputs)} pseudo-inputs at VampPrior; got "
                f"shape {context.shape}. Pass the encoder of the guide."
            )
        if rng_key is None:
            with warnings.catch_warnings():
                # The host warns where there is no handler; most families need no key.
                warnings.simplefilter("ignore", UserWarning)
                rng_key = numpyro.prng_key()
        if not isinstance(posterior, nnx.Module):
            posterior = _as_pytree(posterior)
        width = _latent_dim(posterior, context)
        return LawDistribution(_Components(posterior, context, rng_key, self.num_samples, width))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Components(Law):
    """The law of one :class:`VampPrior` at the contexts ``(K, context_dim)``."""

    posterior: Any
    context: jax.Array
    rng_key: jax.Array | None
    num_samples: int = field(metadata={"static": True})
    event_size: int = field(metadata={"static": True})

    def log_prob(self, value: jax.Array) -> jax.Array:
        log_q = self.posterior(
            "z",
            self.context,
            value=value[..., None, :],
            num_samples=self.num_samples,
            rng_key=self.rng_key,
        )
        return jax.nn.logsumexp(log_q, -1) - math.log(len(self.context))

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        key_of_rows, key_of_values = jax.random.split(key)
        chosen = jax.random.randint(key_of_rows, shape, 0, len(self.context))
        # The posterior's sites are inside of the draw and no sites of the program.
        with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=key_of_values):
            return self.posterior("z", self.context[chosen])


def _as_pytree(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; parameters that ``nnx_module`` has bound to it are its leaves."""
    if isinstance(function, partial):
        return jax.tree_util.Partial(function.func, *function.args, **function.keywords)
    return jax.tree_util.Partial(function)


def _latent_dim(posterior: Any, context: jax.Array) -> int:
    """Width of the values of a posterior that may be no more than a function."""
    if hasattr(posterior, "latent_dim"):
        return posterior.latent_dim

    def zeros(site: Any) -> Any:
        return jnp.zeros(site["fn"].shape()) if site["type"] == "sample" else None

    # Nothing is drawn: the shape is all that is asked for.
    with numpyro.handlers.block(), numpyro.handlers.substitute(substitute_fn=zeros):
        return posterior("z", context[:1]).shape[-1]
