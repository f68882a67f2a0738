"""Objectives for Pyro's SVI."""

from pyro_vae_ext.elbos.importance_weighted import ImportanceWeightedELBO

__all__ = ["ImportanceWeightedELBO"]
