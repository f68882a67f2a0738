"""What the hierarchical families share: their parts, and vectors put side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from pyro_vae_ext.guides._base import DirectFamily, GuideFamily

# Of a site that belongs to the guide alone.
AUXILIARY: Any = {"is_auxiliary": True}


def joined(*parts: Tensor | None) -> Tensor:
    """Vectors of one batch, broadcast and put side by side; those that are None left out."""
    given = [part for part in parts if part is not None]
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in given))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in given], -1)


def built(name: str, family: Callable[..., Any], latent_dim: int, context_dim: int | None) -> Any:
    """The part that ``family`` builds for the argument called ``name``."""
    # An instance of a family can be called, too, but builds nothing.
    builds = callable(family) and not isinstance(family, nn.Module)
    part = family(latent_dim, context_dim) if builds else family
    if not builds or not isinstance(part, GuideFamily):
        raise TypeError(
            f"Expected a guide family from {name}(latent_dim, context_dim); got "
            f"{type(part).__name__}. Pass IAF, MeanField, or a function that builds one."
        )
    if (part.latent_dim, part.context_dim) != (latent_dim, context_dim):
        raise ValueError(
            f"Expected {name} to build a family of latent_dim={latent_dim} and "
            f"context_dim={context_dim}; got {part.latent_dim} and {part.context_dim}. Pass both "
            "on as they come."
        )
    return part


def built_direct(
    name: str, family: Callable[..., Any], latent_dim: int, context_dim: int | None
) -> DirectFamily:
    """The same for a part whose density must be known."""
    part = built(name, family, latent_dim, context_dim)
    if not isinstance(part, DirectFamily):
        raise TypeError(
            f"Expected a family with a density of its own from {name}; got "
            f"{type(part).__name__}. Pass IAF, MeanField, or a function that builds one."
        )
    return part


def reverse_factor(name: str, log_reverse: Tensor) -> None:
    """The factor by which a reverse model enters the guide of the site ``name``."""
    # Outside of inference a factor has no meaning, and the host would warn of it.
    if am_i_wrapped():
        pyro.factor(f"{name}_reverse", -log_reverse, has_rsample=True)
