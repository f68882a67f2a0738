"""Variational autoencoders and amortised inference for NumPyro.

The subpackages are :mod:`~numpyro_vae_ext.guides` (guide families),
:mod:`~numpyro_vae_ext.elbos` (objectives for :class:`numpyro.infer.SVI`),
:mod:`~numpyro_vae_ext.likelihoods` (autoregressive distributions),
:mod:`~numpyro_vae_ext.priors` (learned priors),
:mod:`~numpyro_vae_ext.handlers` (effect handlers),
:mod:`~numpyro_vae_ext.distributions` (what the host lacks),
:mod:`~numpyro_vae_ext.diagnostics` (what a trained guide is worth) and
:mod:`~numpyro_vae_ext.nn` (the masked layers that the families share).
"""

from numpyro_vae_ext import (
    _threads,  # noqa: F401  (before the first computation)
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
