"""Effect handlers: a program in, another program out."""

from numpyro_vae_ext.handlers.relax import relax

__all__ = ["relax"]
