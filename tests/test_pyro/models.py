"""Models with a known evidence, and guides that shake the families off their start."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from cases import resolved

from pyro_vae_ext import guides


def shaken(module: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """The module with noise on every parameter: far from the identity and from symmetry."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def family(name: str, **kwargs) -> torch.nn.Module:
    return getattr(guides, name)(**resolved(guides, kwargs))


def conjugate(x: torch.Tensor, mu: torch.Tensor, batch_size: int | None = None):
    """z ~ N(mu, I), x ~ N(z, I) for every row, as a model."""

    def model() -> None:
        with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    return model


def amortised(posterior: torch.nn.Module, x: torch.Tensor, batch_size: int | None = None):
    """The family on the data itself as context."""

    def guide() -> None:
        pyro.module("posterior", posterior)
        with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
            posterior("z", x[rows])

    return guide


def standard_errors(draws: torch.Tensor, truth: float) -> float:
    """How many standard errors the mean of ``draws`` is above the truth."""
    return ((draws.mean() - truth) / (draws.std() / math.sqrt(len(draws)))).item()


def wide_reverse(posterior: torch.nn.Module, by: float) -> None:
    """Make the reverse model wider: estimates of light tails."""
    reverse = posterior.reverse
    is_flow = hasattr(reverse, "nets")
    with torch.no_grad():
        bias = reverse.nets[0].layers[-1].bias if is_flow else reverse.log_scale.bias
        # Of a flow the second half of the outputs.
        bias[len(bias) // 2 if is_flow else 0 :] += by
