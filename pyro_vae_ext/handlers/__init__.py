"""Effect handlers: a program in, another program out."""

from pyro_vae_ext.handlers.relax import relax

__all__ = ["relax"]
