"""The variational mixture of posteriors as a prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae_ext._checks import positive_int, widths
from pyro_vae_ext.priors._base import Law, LawDistribution

# Standard deviation of pseudo-inputs that are neither given nor bounded.
_NOISE = 0.01


class VampPrior(nn.Module):
    r"""Variational mixture of posteriors: the guide at learned pseudo-inputs.

    .. math:: p(z) = \frac1K \sum_{k=1}^{K} q(z \mid \mathrm{encoder}(u_k))

    The module holds the pseudo-inputs :math:`u_k` alone. It is called with the guide's own
    posterior, any family that takes a context, and the guide's own encoder: both stay registered
    as they are, once, and their parameters get the gradient of the prior as well as that of the
    guide, under every gradient estimator.

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

    Raises:
        ValueError: If a width or number is not positive, the pseudo-inputs have another shape, or
            the bounds are no interval; at a call, if the posterior takes no context or the encoder
            does not return one for each pseudo-input.

    References:
        Tomczak and Welling, 2018, *VAE with a VampPrior*, arXiv:1705.07120, sec. 3.

    Example:
        >>> import pyro, torch
        >>> from pyro_vae_ext.guides import IAF
        >>> posterior, encoder = IAF(2, context_dim=5), torch.nn.Linear(6, 5)
        >>> prior = VampPrior(input_shape=6, num_pseudo_inputs=20, bounds=(0.0, 1.0))
        >>> with pyro.plate("data", 7):
        ...     z = pyro.sample("z", prior(posterior, encoder))
        >>> z.shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        input_shape: int | Sequence[int],
        *,
        num_pseudo_inputs: int = 100,
        pseudo_inputs: Any = None,
        bounds: tuple[float, float] | None = None,
        num_samples: int = 10,
    ) -> None:
        super().__init__()
        shape = input_shape if isinstance(input_shape, Sequence) else (input_shape,)
        self.input_shape = widths("input_shape", shape)
        self.num_samples = positive_int("num_samples", num_samples)
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"Expected bounds (low, high) with low < high; got {bounds}.")
        self.bounds = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        if pseudo_inputs is None:
            num_pseudo_inputs = positive_int("num_pseudo_inputs", num_pseudo_inputs)
            size = (num_pseudo_inputs, *self.input_shape)
            if bounds is None:
                pseudo_inputs = _NOISE * torch.randn(size)
            else:
                pseudo_inputs = bounds[0] + (bounds[1] - bounds[0]) * torch.rand(size)
        start = torch.as_tensor(pseudo_inputs, dtype=torch.get_default_dtype())
        if start.dim() == 0 or len(start) == 0 or start.shape[1:] != self.input_shape:
            wanted = ", ".join(map(str, ("num_pseudo_inputs", *self.input_shape)))
            raise ValueError(
                f"Expected pseudo_inputs of shape ({wanted}); got shape {tuple(start.shape)}."
            )
        self.num_pseudo_inputs = len(start)
        self.pseudo_inputs = nn.Parameter(start.detach().clone())

    def forward(
        self, posterior: Callable[..., Any], encoder: Callable[..., Any] | None = None
    ) -> TorchDistribution:
        """The prior as a distribution, ``batch_shape ()`` and ``event_shape (latent_dim,)``.

        Args:
            posterior: The family that the guide uses.
            encoder: Maps ``(K, *input_shape)`` to contexts ``(K, context_dim)``, as it does in the
                guide; None if the pseudo-inputs are contexts themselves.

        Raises:
            ValueError: If the posterior takes no context, or the encoder does not return one for
                each pseudo-input.
        """
        if getattr(posterior, "context_dim", None) is None:
            raise ValueError(
                "Expected a posterior with a context at VampPrior; got "
                f"{type(posterior).__name__} without one. Build the family with the width of the "
                "encoder's output as context_dim."
            )
        inputs: Tensor = self.pseudo_inputs
        if self.bounds is not None:
            inputs = inputs.clamp(*self.bounds)
        context = inputs if encoder is None else encoder(inputs)
        if context.dim() != 2 or len(context) != len(inputs):
            raise ValueError(
                f"Expected one context for each of {len(inputs)} pseudo-inputs at VampPrior; got "
                f"shape {tuple(context.shape)}. Pass the encoder of the guide."
            )
        return LawDistribution(_Components(posterior, context, self.num_samples))


class _Components(Law):
    """The law of one :class:`VampPrior` at the contexts ``(K, context_dim)``."""

    def __init__(self, posterior: Any, context: Tensor, num_samples: int) -> None:
        self.posterior = posterior
        self.context = context
        self.num_samples = num_samples
        self.event_size = posterior.latent_dim

    def log_prob(self, value: Tensor) -> Tensor:
        log_q = self.posterior(
            "z", self.context, value=value.unsqueeze(-2), num_samples=self.num_samples
        )
        return log_q.logsumexp(-1) - math.log(len(self.context))

    def draw(self, shape: torch.Size) -> Tensor:
        chosen = torch.randint(len(self.context), shape, device=self.context.device)
        # The posterior's sites are inside of the draw and no sites of the program.
        with poutine.block():
            return self.posterior("z", self.context[chosen])
