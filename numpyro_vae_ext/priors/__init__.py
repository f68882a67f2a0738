"""Learned priors of latent variables as ordinary distributions of the host."""

from numpyro_vae_ext.priors.flow_prior import FlowPrior
from numpyro_vae_ext.priors.mixture import Mixture
from numpyro_vae_ext.priors.vamp_prior import VampPrior

__all__ = ["FlowPrior", "Mixture", "VampPrior"]
