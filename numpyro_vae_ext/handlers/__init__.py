"""Effect handlers: a program in, another program out."""

from numpyro_vae_ext.handlers.kl_weight import kl_weight
from numpyro_vae_ext.handlers.relax import relax

__all__ = ["kl_weight", "relax"]
