"""Autoregressive likelihoods as ordinary distributions of the host."""

from numpyro_vae_ext.likelihoods.made import MADE
from numpyro_vae_ext.likelihoods.pixelcnn import PixelCNN
from numpyro_vae_ext.likelihoods.recurrent import Recurrent

__all__ = ["MADE", "PixelCNN", "Recurrent"]
