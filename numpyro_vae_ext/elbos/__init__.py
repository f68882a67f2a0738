"""Objectives for :class:`numpyro.infer.SVI`: subclasses of the host's ``ELBO``."""

from numpyro_vae_ext.elbos.importance_weighted import ImportanceWeightedELBO

__all__ = ["ImportanceWeightedELBO"]
