"""Effect handlers: a program in, another program out."""

from pyro_vae_ext.handlers.kl_weight import kl_weight
from pyro_vae_ext.handlers.relax import relax

__all__ = ["kl_weight", "relax"]
