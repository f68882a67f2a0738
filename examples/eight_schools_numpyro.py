"""The eight schools in NumPyro: one global guide over all ten parameters, against NUTS.

The guide draws a vector `(mu, log tau, theta)` from a family without a context at an
auxiliary site and hands its parts to the model's sites as point masses, as the host's
own automatic guides do. The centred model makes a funnel of `log tau` and `theta`:
`MeanField` with the ELBO misses it, `IAF` with the importance-weighted bound bends.

    python examples/eight_schools_numpyro.py
"""

import time

import data
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import report
from flax import nnx
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import MCMC, NUTS, SVI
from numpyro.infer.reparam import LocScaleReparam
from tqdm import tqdm

from numpyro_vae_ext.diagnostics import log_evidence, to_arviz
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import IAF, MeanField


def model(error, effect):
    """The centred model: `theta_j ~ N(mu, tau)`, `effect_j ~ N(theta_j, error_j)`."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    schools = jnp.ones(len(error))
    theta = numpyro.sample("theta", dist.Normal(mu * schools, tau).to_event(1))
    numpyro.sample("effect", dist.Normal(theta, error).to_event(1), obs=effect)


def make_guide(family):
    """A guide over the unconstrained vector `(mu, log tau, theta_1..theta_8)`."""

    def guide(error, effect):
        posterior = nnx_module("posterior", family)
        with handlers.infer_config(config_fn=lambda site: {"is_auxiliary": True}):
            vector = posterior("vector")
        log_tau = vector[1]
        numpyro.sample("mu", dist.Delta(vector[0]))
        numpyro.sample("tau", dist.Delta(jnp.exp(log_tau), log_density=-log_tau))
        numpyro.sample("theta", dist.Delta(vector[2:], event_dim=1))

    return guide


def fit(args, rng_key, name, error, effect, schools):
    """Train the guide called `name`; return its row of results and its ArviZ object."""
    num_particles, gradient, rate = report.SCHOOLS_OBJECTIVES[name]
    start = time.perf_counter()
    keys = jax.random.split(rng_key, 5)
    rngs = nnx.Rngs(args.seed)
    family = (
        IAF(10, hidden_dims=(64,), num_flows=4, rngs=rngs)
        if name == "IAF"
        else MeanField(10, rngs=rngs)
    )
    guide = make_guide(family)
    elbo = ImportanceWeightedELBO(num_particles, gradient=gradient)
    schedule = optax.cosine_decay_schedule(rate, args.num_steps, alpha=0.01)
    svi = SVI(model, guide, optax.adam(schedule), elbo)
    state = svi.init(keys[0], error, effect)

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: svi.update(s, error, effect), state, length=100)

    title = f"numpyro schools {name} {report.objective_name(num_particles, gradient)}"
    with tqdm(total=args.num_steps, desc=title) as bar:
        for _ in range(args.num_steps // 100):
            state, losses = run(state)
            bar.update(100)
            bar.set_postfix(bound=f"{-losses.mean():.2f}", refresh=False)
    params = svi.get_params(state)
    seconds = time.perf_counter() - start

    loss = jax.jit(lambda key: elbo.loss(key, params, model, guide, error, effect))
    bound = -np.mean([loss(key) for key in jax.random.split(keys[1], 200)])
    log_px = log_evidence(
        keys[2],
        model,
        guide,
        error,
        effect,
        params=params,
        num_samples=args.num_evaluation_samples,
    )
    draws = to_arviz(
        keys[3],
        model,
        guide,
        error,
        effect,
        params=params,
        num_samples=1000,
        coords={"school": schools},
        dims={"theta": ["school"], "effect": ["school"]},
    )
    row = {
        "backend": "NumPyro",
        "data": "eight schools",
        "guide": name,
        "objective": report.objective_name(num_particles, gradient),
        "bound": float(bound),
        "NLL": -float(log_px),
        "seconds": seconds,
    }
    return row, draws


def nuts(args, rng_key, error, effect):
    """Draws of NUTS from the non-centred form of the same model."""
    start = time.perf_counter()
    kernel = NUTS(
        handlers.reparam(model, config={"theta": LocScaleReparam(0.0)}),
        target_accept_prob=0.95,
    )
    mcmc = MCMC(
        kernel,
        num_warmup=args.num_draws,
        num_samples=args.num_draws,
        num_chains=4,
        chain_method="sequential",
    )
    mcmc.run(rng_key, error, effect)
    draws = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
    row = {"backend": "NumPyro", "data": "eight schools", "guide": "NUTS"}
    return {**row, "seconds": time.perf_counter() - start}, draws


def main(args):
    """Fit both guides and NUTS, write the files; return the rows of results."""
    schools = data.eight_schools()
    args.num_steps, args.num_draws = args.num_steps or 5_000, 1000
    if args.smoke_test:
        args.num_steps, args.num_draws, args.num_evaluation_samples = 100, 50, 100
    error, effect = jnp.asarray(schools.error), jnp.asarray(schools.effect)
    keys = jax.random.split(jax.random.key(args.seed), 3)
    rows, fits = [], {}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stem = args.output_dir / "eight_schools_numpyro"
    for key, name in zip(keys[:2], report.SCHOOLS_OBJECTIVES, strict=True):
        row, draws = fit(args, key, name, error, effect, schools.schools)
        draws.to_netcdf(f"{stem}_{name.lower()}.nc", engine="h5netcdf")
        rows.append(row)
        fits[name] = report.posterior_draws(draws)
    row, fits["NUTS"] = nuts(args, keys[2], error, effect)
    rows.append(row)
    report.write_row(stem.with_suffix(".json"), rows)
    np.savez(stem.with_suffix(".npz"), **report.flatten(fits))
    report.schools_picture(stem.with_suffix(".png"), fits, schools.schools)
    return rows


if __name__ == "__main__":
    print(report.table(main(report.fit_parser(__doc__).parse_args())))
