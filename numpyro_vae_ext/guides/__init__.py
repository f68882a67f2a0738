"""Guide families: modules that are called as a sample statement inside a guide.

Every family is swapped for another by its constructor alone::

    posterior = IAF(latent_dim=10, context_dim=100, rngs=nnx.Rngs(0))

    def guide(x):
        encode, post = nnx_module("encoder", encoder), nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x)):
            post("z", encode(x))
"""

from numpyro_vae_ext.guides.iaf import IAF
from numpyro_vae_ext.guides.mean_field import MeanField

__all__ = ["IAF", "MeanField"]
