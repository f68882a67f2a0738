"""Autoregressive likelihoods as ordinary distributions of the host."""

from pyro_vae_ext.likelihoods.made import MADE
from pyro_vae_ext.likelihoods.pixelcnn import PixelCNN
from pyro_vae_ext.likelihoods.recurrent import Recurrent

__all__ = ["MADE", "PixelCNN", "Recurrent"]
