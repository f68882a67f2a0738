"""Distributions that a method here needs and the host lacks."""

from numpyro_vae_ext.distributions.one_hot_categorical import OneHotCategorical
from numpyro_vae_ext.distributions.relaxed_one_hot_categorical import RelaxedOneHotCategorical

__all__ = ["OneHotCategorical", "RelaxedOneHotCategorical"]
