"""Guides, objectives and diagnostics that extend Pyro's own inference engines."""

from pyro_vae_ext import diagnostics, elbos, guides, nn

__all__ = ["diagnostics", "elbos", "guides", "nn"]
__version__ = "0.1.0"
