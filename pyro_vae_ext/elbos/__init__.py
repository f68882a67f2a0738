"""Objectives for Pyro's SVI."""

from pyro_vae_ext.elbos.disarm import TraceDisARM_ELBO
from pyro_vae_ext.elbos.free_bits import TraceFreeBits_ELBO
from pyro_vae_ext.elbos.importance_weighted import ImportanceWeightedELBO
from pyro_vae_ext.elbos.nvil import TraceNVIL_ELBO
from pyro_vae_ext.elbos.rebar import TraceREBAR_ELBO
from pyro_vae_ext.elbos.relax import TraceRELAX_ELBO

__all__ = [
    "ImportanceWeightedELBO",
    "TraceDisARM_ELBO",
    "TraceFreeBits_ELBO",
    "TraceNVIL_ELBO",
    "TraceREBAR_ELBO",
    "TraceRELAX_ELBO",
]
