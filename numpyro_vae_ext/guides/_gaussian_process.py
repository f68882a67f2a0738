r"""Gaussian processes conditioned on given pairs of inputs and outputs.

With the kernel :math:`k`, sources :math:`s` and targets :math:`t`, the process at inputs
:math:`x` has the mean :math:`K_{xs} K_{ss}^{-1} t` and the covariance
:math:`K_{xx} - K_{xs} K_{ss}^{-1} K_{sx}`. A small multiple of the kernel's own size on the
diagonals of :math:`K_{ss}` and :math:`K_{xx}`, a white noise that belongs to the process, keeps
the Cholesky factor and the variance away from zero in the working precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from numpyro_vae_ext._checks import is_traced

Kernel = Callable[[jax.Array, jax.Array], jax.Array]


def squared_exponential(a: jax.Array, b: jax.Array) -> jax.Array:
    r"""Kernel :math:`\exp(-\tfrac12 \|a - b\|^2)`.

    Args:
        a: ``(*batch, n, input_dim)``.
        b: ``(*batch, m, input_dim)``.

    Returns:
        ``(*batch, n, m)``.
    """
    squares = (a**2).sum(-1)[..., :, None] + (b**2).sum(-1)[..., None, :]
    # Inputs far from the origin may round to a distance below 0.
    return jnp.exp(jnp.minimum(a @ b.mT - 0.5 * squares, 0.0))


@dataclass
class Process:
    """A process conditioned on its sources, every output with the same kernel.

    Attributes:
        kernel: The kernel of unit length scales and amplitude.
        sources: ``(*batch, num_inducing, input_dim)``.
        log_lengthscale: ``(*batch, input_dim)``.
        log_amplitude: ``(*batch,)``.
        jitter: White noise relative to the kernel's own diagonal.
    """

    kernel: Kernel
    sources: jax.Array
    log_lengthscale: jax.Array
    log_amplitude: jax.Array
    jitter: float

    def __post_init__(self) -> None:
        """Factorise: the only step that is cubic in the number of sources."""
        self._inverse = jnp.exp(-self.log_lengthscale)[..., None, :]
        self._scaled = self.sources * self._inverse
        matrix = self.kernel(self._scaled, self._scaled)
        self._noise = self.jitter * jnp.diagonal(matrix, axis1=-2, axis2=-1).mean(-1)
        self._factor = jnp.linalg.cholesky(matrix + _diagonal(self._noise, matrix))
        # A traced value cannot be looked at without a data-dependent branch in the step.
        if not is_traced(self._factor) and bool(jnp.isnan(self._factor).any()):
            name = getattr(self.kernel, "__name__", type(self.kernel).__name__)
            raise ValueError(
                f"Expected a positive definite kernel; got {name}, which is not so on "
                f"{matrix.shape[-1]} sources with jitter={self.jitter:g}. Raise jitter, or check "
                "the kernel and its parameters."
            )

    def weights(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        r"""What the targets are multiplied by, and the variance, at ``inputs``.

        Args:
            inputs: ``(*batch, n, input_dim)``.

        Returns:
            :math:`K_{ss}^{-1} K_{sx}` of shape ``(*batch, num_inducing, n)``, and the diagonal of
            the conditional covariance, ``(*batch, n)``.
        """
        scaled = inputs * self._inverse
        solved, weights = self._solve(scaled)
        prior: jax.Array | float = 1.0
        if self.kernel is not squared_exponential:
            single = scaled[..., None, :]
            prior = self.kernel(single, single)[..., 0, 0]
        # Never below the noise, whatever the rounding.
        rest = jnp.maximum(prior - (solved**2).sum(-2), 0.0)
        variance = rest + self._noise[..., None]
        return weights, jnp.exp(2.0 * self.log_amplitude)[..., None] * variance

    def covariance(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same with the whole covariance, ``(*batch, n, n)``."""
        scaled = inputs * self._inverse
        solved, weights = self._solve(scaled)
        matrix = self.kernel(scaled, scaled) - solved.mT @ solved
        matrix = matrix + _diagonal(self._noise, matrix)
        return weights, jnp.exp(2.0 * self.log_amplitude)[..., None, None] * matrix

    def _solve(self, scaled: jax.Array) -> tuple[jax.Array, jax.Array]:
        cross = self.kernel(self._scaled, scaled)
        batch = jnp.broadcast_shapes(cross.shape[:-2], self._factor.shape[:-2])
        factor = jnp.broadcast_to(self._factor, (*batch, *self._factor.shape[-2:]))
        cross = jnp.broadcast_to(cross, (*batch, *cross.shape[-2:]))
        solved = solve_triangular(factor, cross, lower=True)
        return solved, solve_triangular(factor, solved, lower=True, trans=1)


def _diagonal(noise: jax.Array, matrix: jax.Array) -> jax.Array:
    return noise[..., None, None] * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
