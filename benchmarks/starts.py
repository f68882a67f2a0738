"""`AutoPosterior(model, MeanField)` against the host's AutoNormal from the same far start.

    python benchmarks/starts.py --backend numpyro
    python benchmarks/starts.py --backend pyro
    python benchmarks/starts.py --backend numpyro --normals

`regression` is that of the Pyro example `svi_torch.py`: a slope, an intercept and a scale, 10,000
data drawn from the model, Adam 1e-2. `far` has two numbers with prior sd 500 and 100 data of sd 1
near 2500 each, Adam 1e-1. Both guides start at the same values with the same `init_scale` of 0.1;
one draw a step. A row is a guide: the loss, a mean over 64 draws, after 100, 300 and 1,000 steps,
mean and standard deviation over the seeds.

With `--normals` the targets are Normals, 50 numbers with scales over four decades and 200 over
three, all correlations .9. A row is a start: the divergence of an IAF from the target, before and
after 3,000 steps on the plain ELBO of 16 draws, "stl", Adam 3e-3 with a cosine schedule.
"""

import argparse
import functools
from types import SimpleNamespace

import numpy as np

CHECKS, DRAWS, SCALE = (100, 300, 1000), 64, 0.1
GUIDES = ("host", "MeanField", "IAF")
NORMALS = {50: 4.0, 200: 3.0}  # numbers, and decades of their scales


def regression():
    """Covariates and data, and what the posterior is found from."""
    rng = np.random.default_rng(20200723)
    x = rng.standard_normal(10_000)
    coefficient, bias, scale = rng.standard_normal(), rng.standard_normal(), 0.5
    return x, bias + coefficient * x + scale * rng.standard_normal(len(x))


def far():
    """Two rows of data."""
    return 2500.0 + np.random.default_rng(0).standard_normal((2, 100))


def normal(size):
    """Location and Cholesky factor of a target."""
    scales = np.logspace(-NORMALS[size] / 2, NORMALS[size] / 2, size)
    covariance = scales[:, None] * (0.9 + 0.1 * np.eye(size)) * scales
    return np.random.default_rng(size).standard_normal(size) * scales, np.linalg.cholesky(
        covariance
    )


def starts(size):
    """Starts of a target, by name."""
    loc, root = normal(size)
    rng = np.random.default_rng(1)
    scales = np.linalg.norm(root, axis=1)
    # The factor of a covariance that was estimated from twice as many draws as numbers.
    draws = rng.standard_normal((2 * size, size)) @ root.T
    estimate = np.linalg.cholesky(draws.T @ draws / len(draws))
    made = {
        "exact": (loc, root),
        "estimated": (loc + root @ rng.standard_normal(size) / np.sqrt(size), estimate),
        "scales alone": (loc, np.diag(scales)),
    }
    return {
        name: SimpleNamespace(loc=loc, scale_tril=root, sites={"z": (size,)})
        for name, (loc, root) in made.items()
    }


class NumPyro:
    """The programs in NumPyro."""

    def __init__(self):
        import jax
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        self.jax = jax
        x, y = map(jnp.asarray, regression())
        rows = jnp.asarray(far())

        def line():
            coefficient = numpyro.sample("coeff", dist.Normal(0.0, 1.0))
            bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
            scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
            with numpyro.plate("data", len(x)):
                numpyro.sample("obs", dist.Normal(bias + coefficient * x, scale), obs=y)

        def pair():
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 500.0).to_event(1))
            with numpyro.plate("data", rows.shape[1]):
                numpyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=rows.T)

        values = {"coeff": jnp.zeros(()), "bias": jnp.zeros(()), "scale": jnp.ones(())}
        self.cases = {
            "regression": (line, values, 1e-2),
            "far": (pair, {"z": jnp.zeros(2)}, 1e-1),
        }

    def guide(self, kind, model, values):
        from numpyro.infer import autoguide, init_to_value

        from numpyro_vae_ext import guides

        options = {"init_loc_fn": init_to_value(values=values), "init_scale": SCALE}
        if kind == "host":
            return autoguide.AutoNormal(model, **options)
        return guides.AutoPosterior(model, getattr(guides, kind), **options)

    def losses(self, kind, case, seed):
        import numpyro

        jax, (model, values, rate) = self.jax, self.cases[case]
        elbo = numpyro.infer.Trace_ELBO()
        guide = self.guide(kind, model, values)
        svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(rate), elbo)
        state = svi.init(jax.random.key(seed))
        many = numpyro.infer.Trace_ELBO(DRAWS)
        look = jax.jit(lambda p: many.loss(jax.random.key(9), p, model, guide))
        step = functools.partial(jax.lax.scan, lambda s, _: svi.update(s))
        run, done, found = jax.jit(step, static_argnames="length"), 0, []
        for check in CHECKS:
            state, _ = run(state, None, length=check - done)
            done = check
            found.append(float(look(svi.get_params(state))))
        return found

    def divergences(self, size, start, steps):
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist
        import optax

        from numpyro_vae_ext.elbos import ImportanceWeightedELBO
        from numpyro_vae_ext.guides import IAF, AutoPosterior

        jax, (loc, root) = self.jax, map(jnp.asarray, normal(size))

        def model():
            numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root))

        guide = AutoPosterior(model, IAF, start=start)
        elbo, many = ImportanceWeightedELBO(1, gradient="stl"), numpyro.infer.Trace_ELBO(1000)
        svi = numpyro.infer.SVI(model, guide, optax.sgd(0.0), elbo)
        params = svi.get_params(jax.jit(svi.init)(jax.random.key(0)))
        optim = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

        def loss(params, key):
            losses = jax.vmap(lambda key: elbo.loss(key, params, model, guide))
            return losses(jax.random.split(key, 16)).mean()

        def step(state, key):
            params, moments = state
            updates, moments = optim.update(jax.grad(loss)(params, key), moments)
            return (optax.apply_updates(params, updates), moments), None

        @jax.jit
        def run(params):
            keys = jax.random.split(jax.random.key(1), steps)
            return jax.lax.scan(step, (params, optim.init(params)), keys)[0][0]

        look = jax.jit(lambda params: many.loss(jax.random.key(9), params, model, guide))
        return float(look(params)), float(look(run(params)))


class Pyro:
    """The programs in Pyro."""

    def __init__(self):
        import pyro
        import pyro.distributions as dist
        import torch

        torch.set_default_dtype(torch.float64)
        self.pyro, self.torch = pyro, torch
        x, y = map(torch.as_tensor, regression())
        rows = torch.as_tensor(far())

        def line():
            coefficient = pyro.sample("coeff", dist.Normal(0.0, 1.0))
            bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(bias + coefficient * x, scale), obs=y)

        def pair():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 500.0).to_event(1))
            with pyro.plate("data", rows.shape[1]):
                pyro.sample("obs", dist.Normal(z, 1.0).to_event(1), obs=rows.T)

        values = {"coeff": torch.zeros(()), "bias": torch.zeros(()), "scale": torch.ones(())}
        self.cases = {
            "regression": (line, values, 1e-2),
            "far": (pair, {"z": torch.zeros(2)}, 1e-1),
        }

    def guide(self, kind, model, values):
        from pyro.infer.autoguide import AutoNormal, init_to_value

        from pyro_vae_ext import guides

        # The host's guide trains what it is given, in place.
        values = {name: value.clone() for name, value in values.items()}
        options = {"init_loc_fn": init_to_value(values=values), "init_scale": SCALE}
        if kind == "host":
            return AutoNormal(model, **options)
        return guides.AutoPosterior(model, getattr(guides, kind), **options)

    def losses(self, kind, case, seed):
        pyro, (model, values, rate) = self.pyro, self.cases[case]
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = self.guide(kind, model, values)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": rate}), pyro.infer.Trace_ELBO())
        many, found = pyro.infer.Trace_ELBO(DRAWS), []
        for step in range(1, max(CHECKS) + 1):
            svi.step()
            if step in CHECKS:
                with self.torch.random.fork_rng():
                    pyro.set_rng_seed(9)
                    found.append(many.loss(model, guide))
        return found


def main(args):
    if args.backend == "numpyro":
        import jax

        jax.config.update("jax_enable_x64", True)
    backend = {"numpyro": NumPyro, "pyro": Pyro}[args.backend]()
    if args.normals:
        print(f"{'numbers':>8}  {'start':<14}  before    after")
        for size in args.sizes:
            for name, start in starts(size).items():
                before, after = backend.divergences(size, start, args.steps)
                print(f"{size:>8}  {name:<14}  {before:<8.3f}  {after:.3f}", flush=True)
        return
    print(f"{'case':<11} {'guide':<10}" + "".join(f"{check:>22}" for check in CHECKS))
    for case in backend.cases:
        for kind in GUIDES:
            found = np.array([backend.losses(kind, case, seed) for seed in range(args.seeds)])
            cells = (
                f"{m:.1f} +- {s:.1f}" for m, s in zip(found.mean(0), found.std(0), strict=True)
            )
            print(f"{case:<11} {kind:<10}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("numpyro", "pyro"), default="numpyro")
    parser.add_argument("--normals", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(NORMALS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if options.normals and options.backend != "numpyro":
        parser.error("--normals is for --backend numpyro")
    main(options)
