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

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]


def squared_exponential(a: Tensor, b: Tensor) -> Tensor:
    r"""Kernel :math:`\exp(-\tfrac12 \|a - b\|^2)`.

    Args:
        a: ``(*batch, n, input_dim)``.
        b: ``(*batch, m, input_dim)``.

    Returns:
        ``(*batch, n, m)``.
    """
    squares = a.square().sum(-1).unsqueeze(-1) + b.square().sum(-1).unsqueeze(-2)
    # Inputs far from the origin may round to a distance below 0.
    return (a @ b.mT - 0.5 * squares).clamp(max=0.0).exp()


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
    sources: Tensor
    log_lengthscale: Tensor
    log_amplitude: Tensor
    jitter: float

    def __post_init__(self) -> None:
        """Factorise: the only step that is cubic in the number of sources."""
        self._inverse = (-self.log_lengthscale).exp().unsqueeze(-2)
        self._scaled = self.sources * self._inverse
        matrix = self.kernel(self._scaled, self._scaled)
        self._noise = self.jitter * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
        try:
            self._factor = torch.linalg.cholesky(matrix + _diagonal(self._noise, matrix))
        except torch.linalg.LinAlgError as error:
            name = getattr(self.kernel, "__name__", type(self.kernel).__name__)
            raise ValueError(
                f"Expected a positive definite kernel; got {name}, which is not so on "
                f"{matrix.shape[-1]} sources with jitter={self.jitter:g}. Raise jitter, or check "
                "the kernel and its parameters."
            ) from error

    def weights(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        r"""What the targets are multiplied by, and the variance, at ``inputs``.

        Args:
            inputs: ``(*batch, n, input_dim)``.

        Returns:
            :math:`K_{ss}^{-1} K_{sx}` of shape ``(*batch, num_inducing, n)``, and the diagonal of
            the conditional covariance, ``(*batch, n)``.
        """
        scaled = inputs * self._inverse
        solved, weights = self._solve(scaled)
        prior: Tensor | float = 1.0
        if self.kernel is not squared_exponential:
            single = scaled.unsqueeze(-2)
            prior = self.kernel(single, single)[..., 0, 0]
        # Never below the noise, whatever the rounding.
        rest = (prior - solved.square().sum(-2)).clamp(min=0.0)
        variance = rest + self._noise.unsqueeze(-1)
        return weights, (2.0 * self.log_amplitude).exp().unsqueeze(-1) * variance

    def covariance(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the whole covariance, ``(*batch, n, n)``."""
        scaled = inputs * self._inverse
        solved, weights = self._solve(scaled)
        matrix = self.kernel(scaled, scaled) - solved.mT @ solved
        matrix = matrix + _diagonal(self._noise, matrix)
        return weights, (2.0 * self.log_amplitude).exp()[..., None, None] * matrix

    def _solve(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        cross = self.kernel(self._scaled, scaled)
        solved = torch.linalg.solve_triangular(self._factor, cross, upper=False)
        return solved, torch.linalg.solve_triangular(self._factor.mT, solved, upper=True)


def _diagonal(noise: Tensor, matrix: Tensor) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return noise[..., None, None] * eye
