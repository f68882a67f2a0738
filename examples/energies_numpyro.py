"""Densities with a known normaliser, fitted by every guide family in NumPyro.

The Kullback-Leibler divergence of a guide is the log normaliser minus its ELBO. The four energies
of Rezende and Mohamed (2015, arXiv 1505.05770), the funnel, a banana, a mixture.

    python examples/energies_numpyro.py --targets U1 mixture
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import report
import targets
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI
from tqdm import tqdm

from numpyro_vae_ext import guides
from numpyro_vae_ext.elbos import ImportanceWeightedELBO


def fit(args, name, guide_name):
    """Train one guide on one target; return its log-weights and its draws."""
    target = targets.TARGETS[name]
    family = getattr(guides, guide_name)(
        target.dim, **targets.OPTIONS.get(guide_name, {}), rngs=nnx.Rngs(args.seed)
    )

    def model(temperature):
        with numpyro.plate("draws", args.batch_size):
            flat = dist.ImproperUniform(dist.constraints.real_vector, (), (target.dim,))
            z = numpyro.sample("z", flat)
            numpyro.factor("energy", temperature * target.log_density(z, jnp))

    def guide(temperature):
        draw = nnx_module("family", family)
        with numpyro.plate("draws", args.batch_size):
            return draw("z")

    rate = optax.cosine_decay_schedule(targets.RATES[guide_name], args.num_steps, alpha=0.01)
    adam = optax.chain(optax.clip_by_global_norm(100.0 * args.batch_size), optax.adam(rate))
    svi = SVI(model, guide, adam, ImportanceWeightedELBO())
    state = svi.init(jax.random.key(args.seed), 1.0)
    run = jax.jit(lambda state, steps: jax.lax.scan(svi.update, state, steps))
    steps = np.array_split(targets.schedule(target, args.num_steps), max(args.num_steps // 500, 1))
    with tqdm(steps, desc=f"numpyro {name} {guide_name}") as bar:
        for part in bar:
            state, losses = run(state, jnp.asarray(part))
            bar.set_postfix(bound=f"{-losses.mean() / args.batch_size:.2f}", refresh=False)
    params = svi.get_params(state)

    @jax.jit
    def evaluate(key):
        elbo = ImportanceWeightedELBO(10)
        seeded = numpyro.handlers.seed(numpyro.handlers.substitute(guide, params), key)
        return elbo.log_weights(key, params, model, guide, 1.0), seeded(1.0)

    parts = [evaluate(key) for key in jax.random.split(jax.random.key(1), args.num_evaluations)]
    log_weights = np.concatenate([np.asarray(weights).ravel() for weights, _ in parts])
    return log_weights, np.concatenate([np.asarray(draws) for _, draws in parts])


def main(args):
    """Fit all guides to all targets, write the files; return the rows of results."""
    args.num_evaluations = 2 if args.smoke_test else 100
    if args.smoke_test:
        args.num_steps, args.targets = 10, ["U1"]
    rows, fits = [], {}
    for name in args.targets:
        for guide in args.guides:
            start = time.perf_counter()
            log_weights, fits[name, guide] = fit(args, name, guide)
            seconds = time.perf_counter() - start
            rows.append(
                targets.row("NumPyro", name, guide, log_weights, fits[name, guide], seconds)
            )
    targets.write(args, "numpyro", rows, fits)
    return rows


if __name__ == "__main__":
    rows = main(targets.parser(__doc__).parse_args())
    print(report.table(rows, targets.COLUMNS, 3))
