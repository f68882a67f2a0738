"""Five guides of nine posteriors against their reference draws, in NumPyro.

The guides are made from the model: `AutoPosterior` with a family, or the host's full-rank
Normal. All of them start at the mode, in the scale of the curvature there. Without
`--data-dir` it is the eight schools alone, against NUTS.

    python examples/compare_posteriors_numpyro.py --data-dir posteriordb
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import posterior_data
import posterior_report as shared
from flax import nnx
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, init_to_value
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import initialize_model
from posterior_models_numpyro import MODELS
from tqdm import tqdm

from numpyro_vae_ext.diagnostics import log_evidence, to_arviz
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import IAF, VGP, AutoPosterior, Auxiliary, MeanField

BLOCK = 100  # steps between two looks at the progress bar


def families(covariance):
    """The families, by name. The VGP starts with the correlations of the Normal at the mode."""
    sources, targets = shared.inducing(covariance)
    return {
        "MeanField": MeanField,
        "IAF": partial(IAF, num_flows=8),
        "Auxiliary": partial(Auxiliary, latent_family=IAF, reverse_family=IAF),
        "VGP": partial(VGP, sources=sources, targets=targets, jitter=1e-6),
    }


def start(name, kwargs):
    """Values to start from, the same unconstrained, and a covariance around them."""
    posterior = posterior_data.POSTERIORS[name]
    values = {site: jnp.asarray(value) for site, value in posterior.start.items()}
    strategy = init_to_value(values=values)
    key = jax.random.key(0)
    info = initialize_model(key, MODELS[name], init_strategy=strategy, model_kwargs=kwargs)
    parts = {site: info.param_info.z[site] for site in values}
    if posterior.scale is not None:
        return values, parts, np.diag(posterior.scale**2)
    ends = np.cumsum([part.size for part in parts.values()])

    def named(vector):
        pieces = zip(parts.items(), jnp.split(vector, ends[:-1]), strict=True)
        return {site: piece.reshape(part.shape) for (site, part), piece in pieces}

    potential = jax.jit(jax.value_and_grad(lambda vector: info.potential_fn(named(vector))))
    first = np.concatenate([np.ravel(part) for part in parts.values()])
    mode, covariance = shared.laplace(lambda x: [np.asarray(out) for out in potential(x)], first)
    parts = named(jnp.asarray(mode))
    found = info.postprocess_fn(parts)
    return {site: found[site] for site in values}, parts, covariance


def make_guide(label, model, values, parts, covariance, seed):
    """The guide, and values of its parameters where they do not start at their defaults."""
    strategy = init_to_value(values=values)
    if label == "full-rank":
        factor = jnp.linalg.cholesky(jnp.asarray(covariance))
        guide = AutoMultivariateNormal(model, init_loc_fn=strategy)
        return guide, {"auto_scale_tril": factor}
    begin = shared.diagonal_start(parts, covariance)
    family = families(covariance)[label]
    return AutoPosterior(model, family, start=begin, rngs=nnx.Rngs(seed)), None


def train(title, rng_key, model, guide, first, used, kwargs):
    """Train and return the guide's parameters."""
    elbo = ImportanceWeightedELBO(used.num_particles, gradient=used.gradient)
    schedule = optax.cosine_decay_schedule(used.rate, used.num_steps, alpha=0.01)
    optim = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))
    svi = SVI(model, guide, optim, elbo)
    state = svi.init(rng_key, init_params=first, **kwargs)
    block = min(BLOCK, used.num_steps)

    @jax.jit
    def run(state):
        # A step with a loss that is not finite leaves the state as it was.
        return jax.lax.scan(lambda s, _: svi.stable_update(s, **kwargs), state, length=block)

    with tqdm(total=used.num_steps, desc=title) as bar:
        for _ in range(used.num_steps // block):
            state, losses = run(state)
            bar.update(block)
            bar.set_postfix(bound=f"{-losses.mean():.2f}", refresh=False)
    return svi.get_params(state)


def fit(args, name, label, kwargs, truth, begin):
    """Train one guide of one posterior; return its row of the table and its draws."""
    model, used = MODELS[name], shared.training(args, label)
    keys = jax.random.split(jax.random.key(args.seed), 4)
    before = time.perf_counter()
    guide, first = make_guide(label, model, *begin, args.seed)
    params = train(f"numpyro {name} {label}", keys[0], model, guide, first, used, kwargs)
    seconds = time.perf_counter() - before

    number = args.num_evaluation_samples
    options = {"params": params, "chunk_size": 1_000, **kwargs}
    log_px = log_evidence(keys[1], model, guide, num_samples=number, **options)
    options = {"num_chains": 4, **options}
    many = to_arviz(
        keys[2], model, guide, num_samples=number // 4, posterior_predictive=False, **options
    )
    some = to_arviz(keys[3], model, guide, num_samples=min(number // 4, 500), **options)
    path = args.output_dir / f"posteriors_numpyro_{name}_{label.lower()}.nc"
    some.to_netcdf(path, engine="h5netcdf")
    log_weights, draws = shared.weights_and_draws(many)
    columns = posterior_data.quantities(name, draws, kwargs)
    line = shared.row("NumPyro", name, label, used, log_weights, log_px, columns, truth, seconds)
    return line, columns


def nuts(args, name, kwargs):
    """Draws of NUTS where there are no reference draws: the eight schools, not centred."""
    number = 50 if args.smoke_test else 2_500
    kernel = NUTS(
        handlers.reparam(MODELS[name], config={"theta": LocScaleReparam(0.0)}),
        target_accept_prob=0.95,
    )
    mcmc = MCMC(
        kernel,
        num_warmup=min(number, 1_000),
        num_samples=number,
        num_chains=4,
        chain_method="sequential",
    )
    mcmc.run(jax.random.key(args.seed + 1), **kwargs)
    draws = mcmc.get_samples()
    draws = {site: draws[site] for site in posterior_data.POSTERIORS[name].start}
    return posterior_data.quantities(name, draws, kwargs)


def main(args):
    """Compare the guides, write the files; return the rows of results."""
    shared.settle(args)
    jax.config.update("jax_enable_x64", True)
    rows = []
    for name in args.posteriors:
        arguments = posterior_data.arguments(name, args.data_dir)
        kwargs = {key: jnp.asarray(value) for key, value in arguments.items()}
        truth = posterior_data.reference(name, args.data_dir) or nuts(args, name, kwargs)
        begin = start(name, kwargs)
        fits = {shared.REFERENCE: truth}
        for label in args.guides:
            line, fits[label] = fit(args, name, label, kwargs, truth, begin)
            rows.append(line)
        shared.write(args, "numpyro", name, rows, fits)
    return rows


if __name__ == "__main__":
    print(shared.table(main(shared.parser(__doc__).parse_args())))
