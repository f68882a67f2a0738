"""Guide families: modules that are called as a statement inside a guide."""

from pyro_vae_ext.guides.iaf import IAF
from pyro_vae_ext.guides.mean_field import MeanField

__all__ = ["IAF", "MeanField"]
