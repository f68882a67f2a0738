"""Masked layers that guide families and likelihoods share."""

from pyro_vae_ext.nn.masked import MaskedLinear, MaskedMLP

__all__ = ["MaskedLinear", "MaskedMLP"]
