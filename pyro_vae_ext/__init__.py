"""Guides, objectives and diagnostics that extend Pyro's own inference engines."""

from pyro_vae_ext import (
    diagnostics,
    distributions,
    elbos,
    guides,
    handlers,
    likelihoods,
    nn,
    priors,
    training,
)

__all__ = [
    "diagnostics",
    "distributions",
    "elbos",
    "guides",
    "handlers",
    "likelihoods",
    "nn",
    "priors",
    "training",
]
__version__ = "0.1.0"
