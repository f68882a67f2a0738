"""Masked layers that guide families and likelihoods share.

Every layer is an :class:`flax.nnx.Module` whose masks are constants of the program, not state:
under :func:`numpyro.contrib.module.nnx_module` a masked net is all parameters and needs no
mutable site.
"""

from numpyro_vae_ext.nn.masked import MaskedLinear, MaskedMLP

__all__ = ["MaskedLinear", "MaskedMLP"]
