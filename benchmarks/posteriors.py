"""`fit_posterior` on nine posteriors of posteriordb, against reference draws and the hosts' guides.

    python benchmarks/posteriors.py --backend numpyro --data-dir posteriordb --seeds 0 1 2 3 4
    python benchmarks/posteriors.py --backend pyro --data-dir posteriordb
    python benchmarks/posteriors.py --data-dir posteriordb --methods pathfinder hosts nuts
    python benchmarks/posteriors.py --backend numpyro --regression 10 20 35 100
    python benchmarks/posteriors.py --backend numpyro --energies --family VGP --temper

A row is a fit with all defaults: the worst error of a mean in the posterior's standard deviations,
the worst ratio of standard deviations (always above 1), k-hat of 20,000 draws, the bound, steps,
seconds by part and draws a second of race and training. `smoothed` are error and ratio after
importance resampling. `pathfinder` is `training.pathfinder` alone, its 4,000 resampled draws;
`hosts` are NumPyro's AutoNormal, AutoMultivariateNormal, AutoIAFNormal and
AutoBNAFNormal, 10,000 steps of Adam, 16 draws, at the better of 1e-2 and 1e-3 by
the final loss; `nuts` is NUTS with 1,000 warmup steps and 1,000 or 10,000 draws in one chain,
compilation in its seconds. Data and draws are those that `examples/posterior_data.py` names. With
`--regression` the rows are linear regressions whose evidence is known, by size, with `--energies`
the densities of `examples/targets.py`, and the bound is given in nats below the evidence.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import posterior_data
import targets

EVALUATED = 20_000
NUTS_DRAWS = (1000, 10_000)


def compared(name, draws, arguments, truth):
    """Worst error of a mean, worst ratio of standard deviations, and whose it is."""
    found = posterior_data.quantities(name, draws, arguments)
    errors = {k: abs(found[k].mean() - truth[k].mean()) / truth[k].std() for k in truth}
    ratios = {k: found[k].std() / truth[k].std() for k in truth}
    ratios = {k: max(x, 1 / x) if x > 0 else np.inf for k, x in ratios.items()}
    worst = max(ratios, key=ratios.get)
    return max(errors.values()), ratios[worst], worst


def regression(size):
    """Design, outcome and log evidence of a regression with a unit Normal prior and noise."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal((40, size)) * np.logspace(-0.5, 0.5, size)
    y = x @ rng.standard_normal(size) + rng.standard_normal(40)
    marginal = x @ x.T + np.eye(40)
    log_det = np.linalg.slogdet(2 * np.pi * marginal)[1]
    return x, y, -0.5 * (y @ np.linalg.solve(marginal, y) + log_det)


class NumPyro:
    """Fits in NumPyro, in double precision."""

    def __init__(self):
        import jax
        import posterior_models_numpyro

        import numpyro_vae_ext  # noqa: F401  (before JAX computes: it asks for threads)

        jax.config.update("jax_enable_x64", True)
        self.models = posterior_models_numpyro.MODELS
        self.device = jax.devices()[0].device_kind

    def values(self, arguments):
        import jax.numpy as jnp

        return tuple(jnp.asarray(value) for value in arguments.values())

    def fit(self, model, values, family, seed, options):
        """Result, draws, and draws resampled by importance."""
        import jax

        from numpyro_vae_ext.training import fit_posterior

        key, one, two = jax.random.split(jax.random.key(seed), 3)
        found = fit_posterior(key, model, *values, progress_bar=False, **family, **options)
        ask = found.guide.sample_posterior
        draws = ask(one, found.params, sample_shape=(EVALUATED,))
        again = ask(two, found.params, *values, sample_shape=(4000,), num_importance=25)
        return found, draws, again

    def families(self, name):
        from numpyro_vae_ext.guides import VGP, Auxiliary, MeanField

        given = {"MeanField": MeanField, "VGP": VGP, "Auxiliary": Auxiliary}
        return {"family": given[name]} if name in given else {}

    def linear(self):
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def model(x, y):
            beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)

        return model

    def energy(self, target):
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        def model():
            prior = dist.ImproperUniform(dist.constraints.real_vector, (), (target.dim,))
            z = numpyro.sample("z", prior)
            numpyro.factor("energy", target.log_density(z, jnp))

        return model

    def hosts(self, model, values, seed):
        """By guide: draws and seconds at the better of two rates."""
        import jax
        import optax
        from numpyro.infer import SVI, Trace_ELBO, autoguide

        for name in ("Normal", "MultivariateNormal", "IAFNormal", "BNAFNormal"):
            best = None
            for rate in (1e-2, 1e-3):
                before = time.perf_counter()
                guide = getattr(autoguide, f"Auto{name}")(model)
                svi = SVI(model, guide, optax.adam(rate), Trace_ELBO(num_particles=16))
                keys = jax.random.split(jax.random.key(seed))
                result = svi.run(keys[0], 10_000, *values, progress_bar=False, stable_update=True)
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
        import jax

        from numpyro_vae_ext.training import pathfinder

        before = time.perf_counter()
        options = {"num_samples": 4000, "progress_bar": False}
        found = pathfinder(jax.random.key(seed), model, *values, **options)
        return found, time.perf_counter() - before

    def nuts(self, model, values, seed, num_draws):
        """Draws and seconds, with compilation."""
        import jax
        from numpyro.infer import MCMC, NUTS

        before = time.perf_counter()
        chain = MCMC(NUTS(model), num_warmup=1000, num_samples=num_draws, progress_bar=False)
        chain.run(jax.random.key(seed), *values)
        draws = jax.block_until_ready(chain.get_samples())
        return draws, time.perf_counter() - before


class Pyro:
    """Fits in Pyro, in double precision."""

    def __init__(self):
        import posterior_models_pyro
        import torch

        torch.set_default_dtype(torch.float64)
        self.models = posterior_models_pyro.MODELS

    def values(self, arguments):
        import torch

        return tuple(
            torch.as_tensor(value) if isinstance(value, np.ndarray) else value
            for value in arguments.values()
        )

    def fit(self, model, values, family, seed, options):
        import pyro
        import torch

        from pyro_vae_ext.training import fit_posterior

        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        found = fit_posterior(model, *values, progress_bar=False, **family, **options)
        with torch.no_grad():
            draws = found.guide.sample_posterior(sample_shape=(EVALUATED,))
            again = found.guide.sample_posterior(*values, sample_shape=(4000,), num_importance=25)
        return found, draws, again

    def families(self, name):
        from pyro_vae_ext.guides import VGP, Auxiliary, MeanField

        given = {"MeanField": MeanField, "VGP": VGP, "Auxiliary": Auxiliary}
        return {"family": given[name]} if name in given else {}

    def energy(self, target):
        import pyro
        import pyro.distributions as dist
        import torch

        def model():
            prior = dist.ImproperUniform(dist.constraints.real_vector, (), (target.dim,))
            z = pyro.sample("z", prior)
            pyro.factor("energy", target.log_density(z, torch))

        return model

    def linear(self):
        import pyro
        import pyro.distributions as dist
        import torch

        def model(x, y):
            beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)

        return model


def seconds_of(history):
    parts = " ".join(f"{k} {v:.1f}" for k, v in history.seconds.items())
    return f"{parts} s, {history.draws_per_second:.0f} draws/s"


def show_fit(title, backend, model, values, args, seed, compare):
    """Fit and print a row."""
    family = backend.families(args.family)
    options = {"temper": True} if args.temper else {}
    found, draws, again = backend.fit(model, values, family, seed, options)
    told, history = found.diagnosis, found.history
    print(
        f"{title:22s} {args.family:9s} seed {seed}: {compare(draws, told)}k-hat {told.khat:.2f}, "
        f"smoothed {compare(again, told)}bound {told.elbo:.3f}, evidence {told.log_evidence:.3f}, "
        f"{len(history.step_elbos)} steps, {history.stopped}, {seconds_of(history)}",
        flush=True,
    )


def main(args):
    backend = {"numpyro": NumPyro, "pyro": Pyro}[args.backend]()
    for size in args.regression:
        x, y, evidence = regression(size)
        for seed in args.seeds:
            show_fit(
                f"regression {size}",
                backend,
                backend.linear(),
                backend.values({"x": x, "y": y}),
                args,
                seed,
                lambda draws, told, evidence=evidence: f"{evidence - told.elbo:.4f} nats below, ",
            )
    for name in () if args.energies is None else args.energies or targets.TARGETS:
        log_z, truth = targets.exact(name)
        for seed in args.seeds:
            show_fit(
                name,
                backend,
                backend.energy(targets.TARGETS[name]),
                (),
                args,
                seed,
                lambda draws, told, name=name, log_z=log_z, truth=truth: (
                    f"{log_z - told.elbo:.4f} nats below, {targets.TARGETS[name].what} "
                    f"{targets.TARGETS[name].number(np.asarray(draws['z'])):.3f} ({truth:.3f}), "
                ),
            )
    for name in [] if args.regression or args.energies is not None else args.posteriors:
        arguments = posterior_data.arguments(name, args.data_dir)
        values, model = backend.values(arguments), backend.models[name]
        truth = posterior_data.reference(name, args.data_dir)

        def compare(draws, told=None, name=name, arguments=arguments, truth=truth):
            draws = {site: np.asarray(value) for site, value in draws.items()}
            error, ratio, worst = compared(name, draws, arguments, truth)
            return f"error {error:.3f}, ratio {ratio:.3f} ({worst}), "

        for seed in args.seeds:
            if "fit" in args.methods:
                show_fit(name, backend, model, values, args, seed, compare)
            if "pathfinder" in args.methods:
                found, seconds = backend.pathfinder(model, values, seed)
                told = f"k-hat {found.khat:.2f}, bound {found.elbo:.3f}, {seconds:.1f} s"
                print(f"{name:22s} Pathfinder, resampled {compare(found.resampled)}{told}")
            if "hosts" in args.methods:
                for label, loss, draws, seconds in backend.hosts(model, values, seed):
                    print(
                        f"{name:22s} {label:22s} {compare(draws)}loss {loss:.3f}, {seconds:.1f} s"
                    )
            if "nuts" in args.methods:
                for num_draws in NUTS_DRAWS:
                    draws, seconds = backend.nuts(model, values, seed, num_draws)
                    print(f"{name:22s} NUTS, {num_draws:6d}: {compare(draws)}{seconds:.1f} s")
            sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("numpyro", "pyro"), default="numpyro")
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--family", default="IAF")
    parser.add_argument("--temper", action="store_true")
    parser.add_argument("--methods", nargs="+", default=["fit"])
    parser.add_argument("--posteriors", nargs="+", default=list(posterior_data.POSTERIORS))
    parser.add_argument("--energies", nargs="*", choices=list(targets.TARGETS), metavar="TARGET")
    parser.add_argument("--regression", type=int, nargs="*", default=[])
    main(parser.parse_args())
