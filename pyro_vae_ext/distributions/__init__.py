"""Distributions that a method here needs and the host lacks."""

from pyro_vae_ext.distributions.one_hot_categorical import OneHotCategorical
from pyro_vae_ext.distributions.relaxed_one_hot_categorical import RelaxedOneHotCategorical

__all__ = ["OneHotCategorical", "RelaxedOneHotCategorical"]
