"""Guide families: modules that are called as a sample statement inside a guide.

Every family is swapped for another by its constructor alone::

    posterior = IAF(latent_dim=10, context_dim=100, rngs=nnx.Rngs(0))

    def guide(x):
        encode, post = nnx_module("encoder", encoder), nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x)):
            post("z", encode(x))
"""

from numpyro_vae_ext.guides.auto_amortized import AutoAmortized
from numpyro_vae_ext.guides.auto_posterior import AutoPosterior
from numpyro_vae_ext.guides.auxiliary import Auxiliary
from numpyro_vae_ext.guides.iaf import IAF
from numpyro_vae_ext.guides.mean_field import MeanField
from numpyro_vae_ext.guides.vgp import VGP

__all__ = ["AutoAmortized", "AutoPosterior", "Auxiliary", "IAF", "MeanField", "VGP"]
