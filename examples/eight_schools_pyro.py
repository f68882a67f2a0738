"""The eight schools in Pyro: one global guide over all ten parameters, against NUTS.

The guide draws a vector `(mu, log tau, theta)` from a family without a context at an
auxiliary site and hands its parts to the model's sites as point masses, as the host's
own automatic guides do. The centred model makes a funnel of `log tau` and `theta`:
`MeanField` with the ELBO misses it, `IAF` with the importance-weighted bound bends.

    python examples/eight_schools_pyro.py
"""

import time

import data
import numpy as np
import pyro
import pyro.distributions as dist
import report
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI
from pyro.infer.reparam import LocScaleReparam
from tqdm import tqdm

from pyro_vae_ext.diagnostics import log_evidence, to_arviz
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import IAF, MeanField


def model(error, effect):
    """The centred model: `theta_j ~ N(mu, tau)`, `effect_j ~ N(theta_j, error_j)`."""
    mu = pyro.sample("mu", dist.Normal(error.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(error.new_tensor(5.0)))
    # Unsqueezed, so that a batch of particles on the left stays on the left.
    mean = mu.unsqueeze(-1) * torch.ones_like(error)
    theta = pyro.sample("theta", dist.Normal(mean, tau.unsqueeze(-1)).to_event(1))
    pyro.sample("effect", dist.Normal(theta, error).to_event(1), obs=effect)


def make_guide(family):
    """A guide over the unconstrained vector `(mu, log tau, theta_1..theta_8)`."""

    def guide(error, effect):
        pyro.module("posterior", family)
        with poutine.infer_config(config_fn=lambda site: {"is_auxiliary": True}):
            vector = family("vector")
        log_tau = vector[..., 1]
        pyro.sample("mu", dist.Delta(vector[..., 0]))
        pyro.sample("tau", dist.Delta(log_tau.exp(), log_density=-log_tau))
        pyro.sample("theta", dist.Delta(vector[..., 2:], event_dim=1))

    return guide


def fit(args, name, error, effect, schools):
    """Train the guide called `name`; return its row of results and its ArviZ object."""
    num_particles, gradient, rate = report.SCHOOLS_OBJECTIVES[name]
    start = time.perf_counter()
    pyro.clear_param_store()
    family = IAF(10, hidden_dims=(64,), num_flows=4) if name == "IAF" else MeanField(10)
    guide = make_guide(family)
    elbo = ImportanceWeightedELBO(num_particles, gradient=gradient)
    optim = pyro.optim.Adam({"lr": rate})
    svi = SVI(model, guide, optim, elbo)
    title = f"pyro schools {name} {report.objective_name(num_particles, gradient)}"
    bound = 0.0
    bar = tqdm(range(args.num_steps), desc=title)
    for step in bar:
        for adam_of_one in optim.optim_objs.values():
            factor = report.cosine(step, args.num_steps)
            adam_of_one.param_groups[0]["lr"] = rate * factor
        bound += (-svi.step(error, effect) - bound) / min(step + 1, 500)
        if step % 100 == 99:
            bar.set_postfix(bound=f"{bound:.2f}", refresh=False)
    seconds = time.perf_counter() - start

    with torch.no_grad():
        bound = -np.mean([elbo.loss(model, guide, error, effect) for _ in range(200)])
    log_px = log_evidence(model, guide, error, effect, num_samples=args.num_evaluation_samples)
    draws = to_arviz(
        model,
        guide,
        error,
        effect,
        num_samples=1000,
        coords={"school": schools},
        dims={"theta": ["school"], "effect": ["school"]},
    )
    row = {
        "backend": "Pyro",
        "data": "eight schools",
        "guide": name,
        "objective": report.objective_name(num_particles, gradient),
        "bound": float(bound),
        "NLL": -float(log_px),
        "seconds": seconds,
    }
    return row, draws


def nuts(args, error, effect):
    """Draws of NUTS from the non-centred form of the same model."""
    start = time.perf_counter()
    non_centred = poutine.reparam(model, config={"theta": LocScaleReparam(0.0)})
    mcmc = MCMC(
        NUTS(non_centred, target_accept_prob=0.95, jit_compile=True, ignore_jit_warnings=True),
        warmup_steps=args.num_draws // 2,
        num_samples=args.num_draws,
    )
    mcmc.run(error, effect)
    draws = {name: value.numpy() for name, value in mcmc.get_samples().items()}
    draws["theta"] = draws["mu"][:, None] + draws["tau"][:, None] * draws["theta_decentered"]
    row = {"backend": "Pyro", "data": "eight schools", "guide": "NUTS"}
    return {**row, "seconds": time.perf_counter() - start}, draws


def main(args):
    """Fit both guides and NUTS, write the files; return the rows of results."""
    schools = data.eight_schools()
    args.num_steps, args.num_draws = args.num_steps or 5_000, 2000
    if args.smoke_test:
        args.num_steps, args.num_draws, args.num_evaluation_samples = 20, 20, 100
    error, effect = torch.from_numpy(schools.error), torch.from_numpy(schools.effect)
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    rows, fits = [], {}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stem = args.output_dir / "eight_schools_pyro"
    for name in report.SCHOOLS_OBJECTIVES:
        row, draws = fit(args, name, error, effect, schools.schools)
        draws.to_netcdf(f"{stem}_{name.lower()}.nc", engine="h5netcdf")
        rows.append(row)
        fits[name] = report.posterior_draws(draws)
    row, fits["NUTS"] = nuts(args, error, effect)
    rows.append(row)
    report.write_row(stem.with_suffix(".json"), rows)
    np.savez(stem.with_suffix(".npz"), **report.flatten(fits))
    report.schools_picture(stem.with_suffix(".png"), fits, schools.schools)
    return rows


if __name__ == "__main__":
    print(report.table(main(report.fit_parser(__doc__).parse_args())))
