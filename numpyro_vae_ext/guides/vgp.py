"""The variational Gaussian process family."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from flax import nnx

from numpyro_vae_ext._checks import one_of, positive_int, widths
from numpyro_vae_ext.guides._base import GuideFamily, param_dtype_or_default
from numpyro_vae_ext.guides._gaussian_process import Kernel, Process, squared_exponential
from numpyro_vae_ext.guides._hierarchy import (
    AUXILIARY,
    built_direct,
    drawn,
    joined,
    keys_for,
    reverse_factor,
)
from numpyro_vae_ext.guides._normal import CarryingNormal
from numpyro_vae_ext.guides._reverse_flow import ReverseFlow
from numpyro_vae_ext.guides.mean_field import MeanField
from numpyro_vae_ext.nn._scales import head_bounded

_LENGTHSCALE = 1.0  # at the start, in units of a standard Normal's own size
_small_glorot = jax.nn.initializers.variance_scaling(0.01, "fan_avg", "uniform")
_SCALE = 0.3  # of z around the process at the start, where the process has an output of its own


class VGP(GuideFamily):
    r"""Variational Gaussian process: a random nonlinear map of random inputs.

    .. math::
        \xi \sim N(0, I), \qquad
        f_i(\xi) \sim GP(0, K) \mid \{(s_n, t_{n,i})\}_{n \le m}, \qquad
        z_i \sim N(\mu_i(c) + f_i(\xi),\, \sigma_i(c)^2)

    The variational data :math:`(s, t)` bend the inputs' Normal into any density. The process has
    the identity as its mean function, so that far from the sources the map falls back to
    :math:`\xi`, or with ``mean="zero"`` to 0. The kernel is
    :math:`K(x, y) = \alpha^2\, k(x / \ell, y / \ell)` with a length scale per input (ARD). Process
    and likelihood are Gaussian: with the process's mean :math:`m(\xi)` and variance
    :math:`v(\xi)`, :math:`q(z_i \mid \xi, c) = N(\mu_i + m_i,\, v + \sigma_i^2)` is drawn as one.
    The paper's reverse model :math:`r(\xi \mid z, c)\, r(f \mid \xi, z, c)` has a second factor
    whose optimum is known, :math:`q(f \mid \xi, z, c)`; with it :math:`f` cancels draw by draw,
    and the guide's log-density is

    .. math:: \log q(\xi) + \log q(z \mid \xi, c) - \log r(\xi \mid z, c).

    The sites are ``{name}_xi`` (auxiliary), ``{name}``, and the factor ``{name}_reverse``. It
    starts near the identity: targets are equal to sources.

    The Cholesky factor costs :math:`O(m^3)` once per run of the guide, whatever the number of rows
    and of vectorised particles, and every draw :math:`O(m^2)`; with ``amortize="all"`` each row of
    the context has sources and a factor of its own, :math:`O(m^3)` per row.

    Args:
        latent_dim: Dimension of the latent vector :math:`z`.
        context_dim: Width of the context, or None for a global posterior.
        input_dim: Dimension of the latent input :math:`\xi`; ``latent_dim`` by default.
        num_inducing: Number :math:`m` of variational data.
        sources: First values of :math:`s`, ``(m, input_dim)``; centred standard Normal draws by
            default.
        targets: First values of :math:`t`, ``(m, latent_dim)``; the sources by default.
        kernel: :math:`k`, called with ``(*batch, n, input_dim)`` and ``(*batch, m, input_dim)``
            for ``(*batch, n, m)``; the squared-exponential one by default. The parameters of a
            kernel that is an ``nnx.Module`` are trained as well.
        jitter: White noise of the process, relative to the kernel's diagonal.
        mean: Mean function of the process before it is conditioned: ``"identity"`` (coordinate i
            of :math:`\xi` for output i, 0 for outputs beyond ``input_dim``) or ``"zero"``.
        amortize: What linear heads on the context move: ``"none"`` (the default without a
            context), ``"targets"`` (the default with one), or ``"all"``, which is targets,
            sources and kernel parameters. The location and the scale of :math:`z` and the reverse
            model see the context at any rate.
        reverse_family: Builds :math:`r(\xi \mid z, c)`, ``(latent_dim, context_dim) -> family``
            with ``rngs`` and ``param_dtype``, which must have a density of its own. By
            default a masked autoregressive flow of two steps without a context, and a mean-field
            network with one.
        hidden_dims: Widths of the hidden layers of the default reverse model.
        activation: Their activation, ``"elu"``, ``"relu"`` or ``"tanh"``.
        rngs: Source of the initial weights.
        param_dtype: Type of the parameters, JAX's default float if None.

    Raises:
        ValueError: If a width or number is not positive, there are not as many targets as
            sources, they have other widths, an option is unknown, something is to be amortised
            without a context; at a call, if the kernel is not positive definite
            (under ``jit`` the density is NaN instead).
        TypeError: If a function builds no family, or one without a density of its own.

    References:
        Tran, Ranganath and Blei, 2016, *The Variational Gaussian Process*, arXiv:1511.06499,
        sec. 2.2 (the process), sec. 3.1 (the reverse model), sec. 3.2 (inference networks).
        Salimbeni and Deisenroth, 2017, *Doubly Stochastic Variational Inference for Deep Gaussian
        Processes*, arXiv:1705.08933 (the mean function).

    Example:
        >>> import jax.numpy as jnp, numpyro
        >>> from flax import nnx
        >>> posterior = VGP(latent_dim=3, context_dim=5, num_inducing=20, rngs=nnx.Rngs(0))
        >>> with numpyro.handlers.seed(rng_seed=0), numpyro.plate("data", 7):
        ...     z = posterior("z", jnp.zeros((7, 5)))
        ...     log_q = posterior.log_prob(z, jnp.zeros((7, 5)), num_samples=50)
        >>> z.shape, log_q.shape
        ((7, 3), (7,))
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        *,
        input_dim: int | None = None,
        num_inducing: int = 50,
        sources: Any = None,
        targets: Any = None,
        kernel: Kernel | None = None,
        jitter: float = 1e-4,
        mean: str = "identity",
        amortize: str | None = None,
        reverse_family: Callable[..., Any] | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        activation: str = "elu",
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        super().__init__(latent_dim, context_dim)
        self.input_dim = latent_dim if input_dim is None else positive_int("input_dim", input_dim)
        default = "none" if context_dim is None else "targets"
        self.amortize = one_of("amortize", amortize or default, ("none", "targets", "all"))
        if context_dim is None and self.amortize != "none":
            raise ValueError(
                f"Expected amortize='none' without a context; got '{amortize}'. Build the family "
                "with the width of the encoder's output as context_dim."
            )
        if not jitter > 0.0:
            raise ValueError(f"Expected jitter > 0; got {jitter}.")
        self.jitter = jitter
        self.mean = one_of("mean", mean, ("identity", "zero"))
        self.kernel = squared_exponential if kernel is None else kernel
        dtype = param_dtype_or_default(param_dtype)
        if sources is None:
            shape = (positive_int("num_inducing", num_inducing), self.input_dim)
            sources = jax.random.normal(rngs.params(), shape, dtype)
            sources = sources - sources.mean(0)
        sources = _matrix("sources", sources, self.input_dim, dtype)
        shared = min(latent_dim, self.input_dim)
        if targets is None:
            targets = jnp.pad(sources[:, :shared], ((0, 0), (0, latent_dim - shared)))
        targets = _matrix("targets", targets, latent_dim, dtype)
        if len(targets) != len(sources):
            raise ValueError(
                f"Expected as many targets as sources; got {len(targets)} targets and "
                f"{len(sources)} sources."
            )
        self.num_inducing = len(sources)
        self.sources = nnx.Param(sources)
        self.targets = nnx.Param(targets)
        scale = math.log(_LENGTHSCALE * self.input_dim**0.5)
        self.log_lengthscale = nnx.Param(jnp.full((self.input_dim,), scale, dtype))
        self.log_amplitude = nnx.Param(jnp.zeros((), dtype))
        self.base = MeanField(latent_dim, context_dim, rngs=rngs, param_dtype=dtype)
        start = self.base.log_scale if context_dim is None else self.base.log_scale.bias
        start[...] = start[...].at[:shared].add(math.log(_SCALE))

        def head(width: int) -> nnx.Linear:
            return nnx.Linear(
                context_dim or 0,
                width,
                use_bias=False,
                kernel_init=_small_glorot,
                param_dtype=dtype,
                rngs=rngs,
            )

        if self.amortize != "none":
            self.targets_head = head(self.num_inducing * latent_dim)
        if self.amortize == "all":
            self.sources_head = head(self.num_inducing * self.input_dim)
            self.kernel_head = head(self.input_dim + 1)
        hidden_dims = widths("hidden_dims", hidden_dims)
        # For rows from an encoder the flow ended no higher.
        default_reverse = ReverseFlow if context_dim is None else MeanField
        default_family = partial(default_reverse, hidden_dims=hidden_dims, activation=activation)
        width = latent_dim + (context_dim or 0)
        self.reverse = built_direct(
            "reverse_family", reverse_family or default_family, self.input_dim, width, rngs, dtype
        )

    def conditional(self, inputs: Any, context: Any = None) -> tuple[jax.Array, jax.Array]:
        r"""Mean and covariance of the process :math:`f` at several inputs.

        Args:
            inputs: ``(*batch, n, input_dim)``.
            context: ``(*batch, context_dim)``, or None for a family without a context.

        Returns:
            The mean ``(*batch, n, latent_dim)`` and the covariance ``(*batch, n, n)``, which all
            outputs share, the process's white noise on its diagonal.

        Raises:
            ValueError: If inputs or context have another width, or the kernel is not positive
                definite.
            TypeError: If the context is not of a floating-point type.
        """
        context = self._checked(context, " at conditional")
        inputs = jnp.asarray(inputs)
        if inputs.ndim < 2 or inputs.shape[-1] != self.input_dim:
            raise ValueError(
                f"Expected inputs of shape (*batch, n, {self.input_dim}) at conditional; got "
                f"shape {inputs.shape}."
            )
        process, targets = self._process(context)
        weights, covariance = process.covariance(inputs)
        return self._before(inputs) + weights.mT @ targets, covariance

    def _process(self, context: Any) -> tuple[Process, jax.Array]:
        """The process, and how far its targets are from its mean function."""
        sources, targets = self.sources[...], self.targets[...]
        log_lengthscale, log_amplitude = self.log_lengthscale[...], self.log_amplitude[...]
        if self.amortize != "none":
            moved = self.targets_head(context)
            targets = targets + moved.reshape(*moved.shape[:-1], *targets.shape)
        if self.amortize == "all":
            moved = self.sources_head(context)
            sources = sources + moved.reshape(*moved.shape[:-1], *sources.shape)
            shape = head_bounded(self.kernel_head(context))
            log_lengthscale = log_lengthscale + shape[..., :-1]
            log_amplitude = log_amplitude + shape[..., -1]
        process = Process(self.kernel, sources, log_lengthscale, log_amplitude, self.jitter)
        return process, targets - self._before(sources)

    def _before(self, inputs: jax.Array) -> jax.Array:
        """The mean function, ``(*batch, latent_dim)`` of inputs ``(*batch, input_dim)``."""
        shared = min(self.latent_dim, self.input_dim) if self.mean == "identity" else 0
        rest = [(0, 0)] * (inputs.ndim - 1) + [(0, self.latent_dim - shared)]
        return jnp.pad(inputs[..., :shared], rest)

    def _law(self, context: jax.Array | None) -> _Law:
        return _Law(self, context, *self._process(context), *self.base.loc_and_log_scale(context))

    def _sample(self, name: str, context: jax.Array | None, infer: Any) -> jax.Array:
        law = self._law(context)
        xi = numpyro.sample(f"{name}_xi", law.inputs().to_event(1), infer=AUXILIARY)
        value = numpyro.sample(name, law.given(xi).to_event(1), infer=infer)
        reverse_factor(name, self.reverse.log_prob(xi, joined(value, context)))
        return value

    def _log_prob(
        self, value: jax.Array, context: Any, num_samples: int, rng_key: jax.Array | None
    ) -> jax.Array:
        r"""Importance sampling under the reverse model, as in :class:`Auxiliary`.

        Its exponential is an unbiased estimate of :math:`q(z \mid c)`.
        """
        (key,) = keys_for("VGP", rng_key, 1)
        law = self._law(context)
        xi, log_reverse = drawn(self.reverse.distribution(joined(value, context)), key, num_samples)
        log_inputs = law.inputs().to_event(1).log_prob(xi)
        log_joint = log_inputs + law.given(xi).to_event(1).log_prob(value)
        log_weights = log_joint - log_reverse
        return jax.nn.logsumexp(log_weights, 0) - math.log(num_samples)


class _Law(NamedTuple):
    """The conditional laws of one :class:`VGP` at one context."""

    family: VGP
    context: jax.Array | None
    process: Process
    targets: jax.Array
    loc: jax.Array
    log_scale: jax.Array

    def inputs(self) -> Any:
        """The Normal of the latent inputs."""
        batch = () if self.context is None else self.context.shape[:-1]
        zeros = jnp.zeros((*batch, self.family.input_dim), self.loc.dtype)
        return CarryingNormal(zeros, zeros)

    def given(self, xi: jax.Array) -> Any:
        """The Normal of z at inputs ``(*batch, input_dim)``, one draw of the process a row."""
        # All rows of one process are the columns of one solve.
        rows = self.process.sources.ndim - 2
        batch = xi.shape[:-1]
        kept = batch[len(batch) - rows :]
        columns = jnp.moveaxis(xi.reshape(-1, *kept, xi.shape[-1]), 0, -2)
        weights, variance = self.process.weights(columns)
        weights = jnp.moveaxis(weights, -1, 0).reshape(*batch, -1)
        variance = jnp.moveaxis(variance, -1, 0).reshape(*batch, 1)
        mean = jnp.einsum("...m,...md->...d", weights, self.targets)
        total = variance + jnp.exp(2.0 * self.log_scale)
        mean = mean + self.family._before(xi)
        return CarryingNormal(self.loc + mean, 0.5 * jnp.log(total))


def _matrix(name: str, values: Any, width: int, dtype: Any) -> jax.Array:
    matrix = jnp.asarray(values, dtype)
    if matrix.ndim != 2 or matrix.shape[1] != width or len(matrix) == 0:
        raise ValueError(
            f"Expected {name} of shape (num_inducing, {width}); got shape {matrix.shape}."
        )
    return matrix
