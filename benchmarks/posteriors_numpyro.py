"""Fits of `posteriors.py` in NumPyro: ours, the host's guides and its NUTS."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import posterior_models_numpyro
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, autoguide

# Before JAX computes: it asks for threads.
from numpyro_vae_ext.guides import VGP, Auxiliary, MeanField
from numpyro_vae_ext.training import fit_posterior, pathfinder

EVALUATED = 20_000  # draws
STEPS, PARTICLES, RATES = 10_000, 16, (1e-2, 1e-3)  # of the host's guides


class Backend:
    """Fits in NumPyro, in double precision."""

    nuts_draws = (1000, 10_000)

    def __init__(self):
        jax.config.update("jax_enable_x64", True)
        self.models = posterior_models_numpyro.MODELS

    def values(self, arguments):
        return tuple(jnp.asarray(value) for value in arguments.values())

    def fit(self, model, values, family, seed, options):
        """Result, draws, and draws resampled by importance."""
        key, one, two = jax.random.split(jax.random.key(seed), 3)
        found = fit_posterior(key, model, *values, progress_bar=False, **family, **options)
        ask = found.guide.sample_posterior
        draws = ask(one, found.params, sample_shape=(EVALUATED,))
        again = ask(two, found.params, *values, sample_shape=(4000,), num_importance=25)
        return found, draws, again

    def families(self, name):
        given = {"MeanField": MeanField, "VGP": VGP, "Auxiliary": Auxiliary}
        return {"family": given[name]} if name in given else {}

    def linear(self):
        def model(x, y):
            beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)

        return model

    def energy(self, target):
        def model():
            prior = dist.ImproperUniform(dist.constraints.real_vector, (), (target.dim,))
            z = numpyro.sample("z", prior)
            numpyro.factor("energy", target.log_density(z, jnp))

        return model

    def hosts(self, model, values, seed):
        """By guide: draws and seconds at the better of two rates."""
        for name in ("Normal", "MultivariateNormal", "IAFNormal", "BNAFNormal"):
            best = None
            for rate in RATES:
                before = time.perf_counter()
                guide = getattr(autoguide, f"Auto{name}")(model)
                elbo = Trace_ELBO(num_particles=PARTICLES)
                svi = SVI(model, guide, optax.adam(rate), elbo)
                keys = jax.random.split(jax.random.key(seed))
                result = svi.run(keys[0], STEPS, *values, progress_bar=False, stable_update=True)
                seconds = time.perf_counter() - before
                loss = float(np.mean(result.losses[-500:]))
                if best is None or not loss >= best[0]:
                    draws = guide.sample_posterior(
                        keys[1], result.params, *values, sample_shape=(EVALUATED,)
                    )
                    best = (loss, draws, seconds)
            yield f"Auto{name}", *best

    def pathfinder(self, model, values, seed):
        """Result and seconds of Pathfinder alone."""
        before = time.perf_counter()
        options = {"num_samples": 4000, "progress_bar": False}
        found = pathfinder(jax.random.key(seed), model, *values, **options)
        return found, time.perf_counter() - before

    def nuts(self, model, values, seed, num_draws, most_seconds):
        """Draws and seconds, with compilation; a compiled chain cannot be given up."""
        before = time.perf_counter()
        chain = MCMC(NUTS(model), num_warmup=1000, num_samples=num_draws, progress_bar=False)
        chain.run(jax.random.key(seed), *values)
        draws = jax.block_until_ready(chain.get_samples())
        return draws, time.perf_counter() - before
