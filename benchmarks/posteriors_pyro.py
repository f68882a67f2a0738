"""Fits of `posteriors.py` in Pyro: ours, the host's guides and its NUTS."""

import sys
import time

import numpy as np
import posterior_models_pyro
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, autoguide
from torch.distributions import biject_to

from pyro_vae_ext.guides import VGP, Auxiliary, MeanField
from pyro_vae_ext.training import fit_posterior, pathfinder

EVALUATED = 20_000  # draws
STEPS, PARTICLES, RATES = 10_000, 16, (1e-2, 1e-3)  # of the host's guides


def uniform(fn, sample_shape=()):
    """A value on the support of a distribution of Pyro, from numbers between -2 and 2."""
    transform = biject_to(fn.support)
    shape = transform.inverse_shape(fn.shape(sample_shape))
    return transform(4 * torch.rand(shape) - 2)


class Backend:
    """Fits in Pyro, in double precision."""

    nuts_draws = (1000,)

    def __init__(self):
        torch.set_default_dtype(torch.float64)
        self.models = posterior_models_pyro.MODELS

    def values(self, arguments):
        return tuple(
            torch.as_tensor(value) if isinstance(value, np.ndarray) else value
            for value in arguments.values()
        )

    def fit(self, model, values, family, seed, options):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        found = fit_posterior(model, *values, progress_bar=False, **family, **options)
        with torch.no_grad():
            draws = found.guide.sample_posterior(sample_shape=(EVALUATED,))
            again = found.guide.sample_posterior(*values, sample_shape=(4000,), num_importance=25)
        return found, draws, again

    def hosts(self, model, values, seed):
        """By guide: the loss, and draws and seconds at the better of two rates."""
        dist.ImproperUniform.sample = uniform  # a guide draws first values
        for name in ("Normal", "MultivariateNormal", "IAFNormal"):
            best = None
            for rate in RATES:
                pyro.clear_param_store()
                pyro.set_rng_seed(seed)
                before = time.perf_counter()
                guide = getattr(autoguide, f"Auto{name}")(model)
                elbo = Trace_ELBO(
                    num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0
                )
                svi = SVI(model, guide, pyro.optim.Adam({"lr": rate}), elbo)
                try:
                    losses = [svi.step(*values) for _ in range(STEPS)]
                except ValueError as error:  # the host's word for a scale that is not finite
                    print(f"Auto{name} at {rate}: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                seconds = time.perf_counter() - before
                loss = float(np.mean(losses[-500:]))
                if best is None or not loss >= best[0]:
                    ask = Predictive(model, guide=guide, num_samples=EVALUATED, parallel=True)
                    with torch.no_grad():
                        best = (loss, ask(*values), seconds)
            if best is not None:
                yield f"Auto{name}", *best

    def pathfinder(self, model, values, seed):
        """Result and seconds of Pathfinder alone."""
        pyro.set_rng_seed(seed)
        before = time.perf_counter()
        found = pathfinder(model, *values, num_samples=4000, progress_bar=False)
        return found, time.perf_counter() - before

    def nuts(self, model, values, seed, num_draws, most_seconds):
        """Draws and seconds."""
        dist.ImproperUniform.sample = uniform  # so does a chain
        pyro.set_rng_seed(seed)
        before = time.perf_counter()

        def look(kernel, samples, stage, i):
            if time.perf_counter() - before > most_seconds:
                raise TimeoutError(f"at number {i} of {stage.lower()}")

        chain = MCMC(
            NUTS(model),
            num_samples=num_draws,
            warmup_steps=1000,
            disable_progbar=True,
            hook_fn=look,
        )
        chain.run(*values)
        return chain.get_samples(), time.perf_counter() - before

    def families(self, name):
        given = {"MeanField": MeanField, "VGP": VGP, "Auxiliary": Auxiliary}
        return {"family": given[name]} if name in given else {}

    def energy(self, target):
        def model():
            prior = dist.ImproperUniform(dist.constraints.real_vector, (), (target.dim,))
            z = pyro.sample("z", prior)
            pyro.factor("energy", target.log_density(z, torch))

        return model

    def linear(self):
        def model(x, y):
            beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)

        return model
