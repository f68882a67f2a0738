"""The importance-weighted bound of 1,000 data at several batch sizes and particle layouts.

    python benchmarks/bounds.py

A conjugate model whose evidence is known: `z ~ N(0, I)`, `x ~ N(z, I)`, K = 20, the prior as the
guide. Every cell is a mean over draws with its standard error; none may be below the exact
`-log p(x)`, and all cells of one objective must agree.
"""

import argparse
import math

import numpy as np

NUM_DATA, NUM_PARTICLES, BATCHES = 1000, 20, (1000, 100, 10)
LAYOUTS = {
    "vectorised": {},
    "looped": {"vectorize_particles": False},
    "chunks of 7": {"chunk_size": 7},
}


def data():
    rng = np.random.default_rng(0)
    return math.sqrt(2.0) * rng.standard_normal((NUM_DATA, 1))


def exact(x):
    return float(np.sum(0.25 * x**2 + 0.5 * math.log(4.0 * math.pi)))


def pyro_losses(x, draws):
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import RenyiELBO

    from pyro_vae_ext.elbos import ImportanceWeightedELBO

    x = torch.tensor(x)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)

    def model(size):
        with pyro.plate("data", NUM_DATA, subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    def guide(size):
        with pyro.plate("data", NUM_DATA, subsample_size=size):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    objectives = {
        f"Pyro, {name}": ImportanceWeightedELBO(NUM_PARTICLES, **layout)
        for name, layout in LAYOUTS.items()
    }
    objectives["Pyro's RenyiELBO(alpha=0), vectorised"] = RenyiELBO(
        alpha=0, num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1
    )
    for name, elbo in objectives.items():
        yield (
            name,
            [[float(elbo.loss(model, guide, n)) for _ in range(draws)] for n in BATCHES],
        )


def numpyro_losses(x, draws):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from numpyro_vae_ext.elbos import ImportanceWeightedELBO

    jax.config.update("jax_enable_x64", True)
    x = jnp.asarray(x)

    def programs(size):
        def model():
            with numpyro.plate("data", NUM_DATA, subsample_size=size) as rows:
                z = numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))
                numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

        def guide():
            with numpyro.plate("data", NUM_DATA, subsample_size=size):
                numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))

        return model, guide

    for name, layout in LAYOUTS.items():
        elbo = ImportanceWeightedELBO(NUM_PARTICLES, **layout)
        rows = []
        for size in BATCHES:
            model, guide = programs(size)
            loss = jax.jit(lambda key, e=elbo, m=model, g=guide: e.loss(key, {}, m, g))
            keys = jax.random.split(jax.random.key(size), draws)
            rows.append([float(loss(key)) for key in keys])
        yield f"NumPyro, {name}", rows


def main(args):
    x = data()
    print(f"exact -log p(x): {exact(x):.1f}")
    print(f"{'objective':40s}" + "".join(f"{f'batch {n}':>18s}" for n in BATCHES))
    for losses in (pyro_losses, numpyro_losses):
        for name, rows in losses(x, args.draws):
            cells = [
                f"{np.mean(row):.1f} ± {np.std(row, ddof=1) / math.sqrt(len(row)):.1f}"
                for row in rows
            ]
            print(f"{name:40s}" + "".join(f"{cell:>18s}" for cell in cells), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400, help="draws per cell")
    main(parser.parse_args())
