"""Training an IAF under every gradient against the exact evidence of a linear regression.

    python benchmarks/path_gradients.py --backend numpyro
    python benchmarks/path_gradients.py --backend numpyro --along --dims 20

D coefficients with a standard Normal prior, 50 data of sd 0.5, `AutoPosterior(model, IAF)`, Adam,
3,000 steps. A row is a run: nats above the exact negative log-evidence, mean of the last 100 steps;
the steps that were not finite; `reparam` and `stl` at one particle, `reparam` and `dreg` at eight.

With `--along` the flow alone is the guide. Along a training it prints the spread of the gradient of
one particle (root of its summed variances) in "reparam" and in "stl", and the condition of the
flow's Jacobian over draws: median, 99 % quantile, largest.
"""

import argparse
import copy
import functools

import numpy as np

NUM_DATA, NOISE = 50, 0.5
CELLS = (("reparam", 1), ("stl", 1), ("reparam", 8), ("dreg", 8))
CHECKS, DRAWS = (0, 100, 300, 1000, 3000), 200


def regression(dim):
    """Data, and the exact negative log-evidence."""
    rng = np.random.default_rng(dim)
    x = rng.standard_normal((NUM_DATA, dim))
    y = x @ np.linspace(-1, 1, dim) + NOISE * rng.standard_normal(NUM_DATA)
    covariance = x @ x.T + NOISE**2 * np.eye(NUM_DATA)
    _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    return x, y, 0.5 * (log_det + y @ np.linalg.solve(covariance, y))


class NumPyro:
    """The same programs in NumPyro."""

    def __init__(self, dim, update):
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist
        from flax import nnx
        from numpyro.contrib.module import nnx_module

        from numpyro_vae_ext.guides import IAF, AutoPosterior

        x, y, self.exact = regression(dim)
        x, y = jnp.asarray(x), jnp.asarray(y)

        def model():
            w = numpyro.sample("w", dist.Normal(jnp.zeros(dim), 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(x @ w, NOISE).to_event(1), obs=y)

        self.model = model
        self.auto = lambda: AutoPosterior(model, functools.partial(IAF, update=update))
        self.family = IAF(dim, update=update, rngs=nnx.Rngs(0))
        self.guide = lambda: nnx_module("posterior", self.family)("w")

    def losses(self, rate, gradient, particles, steps, seed):
        import jax
        import optax
        from numpyro.infer import SVI

        from numpyro_vae_ext.elbos import ImportanceWeightedELBO

        loss = ImportanceWeightedELBO(particles, gradient=gradient)
        svi = SVI(self.model, self.auto(), optax.adam(rate), loss)
        return np.asarray(svi.run(jax.random.key(seed), steps, progress_bar=False).losses)

    def along(self, rate, gradient, particles, steps, seed):
        """The step, the spread in "reparam" and in "stl", and the conditions of 200 draws."""
        import jax
        import optax
        from flax import nnx
        from numpyro.infer import SVI

        from numpyro_vae_ext.elbos import ImportanceWeightedELBO

        svi = SVI(
            self.model,
            self.guide,
            optax.adam(rate),
            ImportanceWeightedELBO(particles, gradient=gradient),
        )
        keys = jax.random.split(jax.random.key(seed + 1), DRAWS)

        @functools.partial(jax.jit, static_argnums=0)
        def spread(name, params):
            elbo = ImportanceWeightedELBO(1, gradient=name)
            one = jax.grad(lambda params, key: elbo.loss(key, params, self.model, self.guide))
            leaves = jax.tree.leaves(jax.vmap(one, (None, 0))(params, keys))
            return sum(leaf.var(0).sum() for leaf in leaves) ** 0.5

        @jax.jit
        def jacobians(params, noise):
            graph, _, rest = nnx.split(self.family, nnx.Param, ...)
            family = nnx.merge(graph, nnx.State(params["posterior$params"]), rest)
            forward = family.distribution().transform.forward
            return jax.vmap(jax.jacfwd(lambda noise: forward(noise)[0]))(noise)

        state = svi.init(jax.random.key(seed))
        run = jax.jit(
            lambda state, count: jax.lax.fori_loop(
                0, count, lambda _, state: svi.update(state)[0], state
            )
        )
        noise = jax.random.normal(keys[0], (DRAWS, self.family.latent_dim))
        done = 0
        for check in (c for c in CHECKS if c <= steps):
            state, done = run(state, check - done), check
            params = svi.get_params(state)
            spreads = [float(spread(name, params)) for name in ("reparam", "stl")]
            yield check, spreads, np.linalg.cond(np.asarray(jacobians(params, noise)))


class Pyro:
    """The same programs in Pyro."""

    def __init__(self, dim, update):
        import pyro
        import pyro.distributions as dist
        import torch

        from pyro_vae_ext.guides import IAF, AutoPosterior

        pyro.set_rng_seed(0)
        x, y, self.exact = regression(dim)
        x, y = (torch.tensor(part, dtype=torch.get_default_dtype()) for part in (x, y))

        def model():
            w = pyro.sample("w", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(w @ x.T, NOISE).to_event(1), obs=y)

        self.model = model
        self.auto = lambda: AutoPosterior(model, functools.partial(IAF, update=update))
        self.family = IAF(dim, update=update)
        self.start = copy.deepcopy(self.family.state_dict())
        self.guide = lambda: self.family("w")

    def losses(self, rate, gradient, particles, steps, seed):
        import pyro
        import torch

        from pyro_vae_ext.elbos import ImportanceWeightedELBO

        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = self.auto()
        elbo = ImportanceWeightedELBO(particles, gradient=gradient)(self.model, guide)
        elbo()
        adam = torch.optim.Adam(guide.parameters(), rate)
        return np.array([self._step(elbo, adam) for _ in range(steps)])

    def along(self, rate, gradient, particles, steps, seed):
        """The step, the spread in "reparam" and in "stl", and the conditions of 200 draws."""
        import pyro
        import torch

        from pyro_vae_ext.elbos import ImportanceWeightedELBO

        pyro.set_rng_seed(seed)
        self.family.load_state_dict(self.start)
        weights = list(self.family.parameters())
        elbo = ImportanceWeightedELBO(particles, gradient=gradient)(self.model, self.guide)
        adam = torch.optim.Adam(weights, rate)

        def spread(name):
            loss = ImportanceWeightedELBO(1, gradient=name)(self.model, self.guide)
            found = [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss(), weights)])
                for _ in range(DRAWS)
            ]
            return float(torch.stack(found).var(0, correction=0).sum().sqrt())

        def value(noise):
            # The rows are independent: the sum's Jacobian is that of every row.
            return self.family.distribution().transform.forward(noise)[0].sum(0)

        done = 0
        for check in (c for c in CHECKS if c <= steps):
            for _ in range(check - done):
                self._step(elbo, adam)
            done = check
            noise = torch.randn(DRAWS, self.family.latent_dim)
            jacobians = torch.autograd.functional.jacobian(value, noise).movedim(1, 0)
            yield check, [spread("reparam"), spread("stl")], np.linalg.cond(jacobians.numpy())

    def _step(self, elbo, adam):
        loss = elbo()
        loss.backward()
        adam.step()
        adam.zero_grad()
        return float(loss.detach())


def main(args):
    backend = {"numpyro": NumPyro, "pyro": Pyro}[args.backend]
    for dim in args.dims:
        for update in args.updates:
            programs = backend(dim, update)
            print(f"D = {dim}, {update}: exact -log evidence {programs.exact:.2f}", flush=True)
            if args.along:
                for gradient, particles in (("reparam", 1), ("stl", 1)):
                    print(f"  trained with {gradient}, Adam {args.rates[-1]}")
                    print("  step | spread of reparam, of stl | condition: median, 99 %, largest")
                    run = programs.along(
                        args.rates[-1], gradient, particles, args.steps, args.seeds[0]
                    )
                    for step, spreads, conditions in run:
                        middle, high = np.quantile(conditions, (0.5, 0.99))
                        print(
                            f"  {step} | {spreads[0]:.3g}, {spreads[1]:.3g} | "
                            f"{middle:.3g}, {high:.3g}, {conditions.max():.3g}",
                            flush=True,
                        )
                continue
            for rate in args.rates:
                for gradient, particles in CELLS:
                    above, bad = [], 0
                    for seed in args.seeds:
                        losses = programs.losses(rate, gradient, particles, args.steps, seed)
                        above.append(losses[-100:].mean() - programs.exact)
                        bad += int((~np.isfinite(losses)).sum())
                    cells = ", ".join(f"{x:.2f}" for x in above)
                    print(
                        f"  Adam {rate:g}, K = {particles}, {gradient:7}: {cells}; "
                        f"not finite: {bad}",
                        flush=True,
                    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("pyro", "numpyro"), required=True)
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 20, 35, 100])
    parser.add_argument("--updates", nargs="+", default=["affine", "gated"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--along", action="store_true", help="spreads and conditions instead")
    main(parser.parse_args())
