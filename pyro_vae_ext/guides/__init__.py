"""Guide families: modules that are called as a statement inside a guide."""

from pyro_vae_ext.guides.auto_amortized import AutoAmortized
from pyro_vae_ext.guides.auto_posterior import AutoPosterior
from pyro_vae_ext.guides.auxiliary import Auxiliary
from pyro_vae_ext.guides.iaf import IAF
from pyro_vae_ext.guides.mean_field import MeanField
from pyro_vae_ext.guides.vgp import VGP

__all__ = ["AutoAmortized", "AutoPosterior", "Auxiliary", "IAF", "MeanField", "VGP"]
