"""Objectives for :class:`numpyro.infer.SVI`: subclasses of the host's ``ELBO``.

For discrete latent sites there are estimators of the gradient of the evidence lower bound; wrap
the guide with the objective's own ``tunable``::

    elbo = TraceREBAR_ELBO()
    svi = SVI(model, elbo.tunable(guide), optax.adam(1e-3), elbo)
"""

from numpyro_vae_ext.elbos.disarm import TraceDisARM_ELBO
from numpyro_vae_ext.elbos.free_bits import TraceFreeBits_ELBO
from numpyro_vae_ext.elbos.importance_weighted import ImportanceWeightedELBO
from numpyro_vae_ext.elbos.nvil import TraceNVIL_ELBO
from numpyro_vae_ext.elbos.rebar import TraceREBAR_ELBO
from numpyro_vae_ext.elbos.relax import TraceRELAX_ELBO

__all__ = [
    "ImportanceWeightedELBO",
    "TraceDisARM_ELBO",
    "TraceFreeBits_ELBO",
    "TraceNVIL_ELBO",
    "TraceREBAR_ELBO",
    "TraceRELAX_ELBO",
]
