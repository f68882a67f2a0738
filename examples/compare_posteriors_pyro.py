"""Five guides of nine posteriors against their reference draws, in Pyro.

The guides are made from the model: `AutoPosterior` with a family, or the host's full-rank
Normal. All of them start at the mode, in the scale of the curvature there. Without
`--data-dir` it is the eight schools alone, against NUTS.

    python examples/compare_posteriors_pyro.py --data-dir posteriordb --num-steps 4000
"""

import time
from functools import partial

import numpy as np
import posterior_data
import posterior_report as shared
import pyro
import torch
from posterior_models_pyro import MODELS
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import LocScaleReparam
from report import cosine
from tqdm import tqdm

from pyro_vae_ext.diagnostics import log_evidence, to_arviz
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import IAF, VGP, AutoPosterior, Auxiliary, MeanField


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
    values = {site: torch.as_tensor(value) for site, value in posterior.start.items()}
    strategy = init_to_value(values=values)
    # Without the number of plates the host would draw from the flat priors to find it.
    parts, potential, transforms, _ = initialize_model(
        MODELS[name], model_kwargs=kwargs, init_strategy=strategy, max_plate_nesting=0
    )
    parts = {site: parts[site] for site in values}
    if posterior.scale is not None:
        return values, parts, np.diag(posterior.scale**2)
    sizes = [part.numel() for part in parts.values()]

    def named(vector):
        pieces = zip(parts.items(), vector.split(sizes), strict=True)
        return {site: piece.reshape(part.shape) for (site, part), piece in pieces}

    def value_and_gradient(x):
        vector = torch.tensor(x, requires_grad=True)
        value = potential(named(vector))
        return value.item(), torch.autograd.grad(value, vector)[0].numpy()

    first = torch.cat([part.reshape(-1) for part in parts.values()]).detach().numpy()
    mode, covariance = shared.laplace(value_and_gradient, first)
    found = named(torch.from_numpy(mode))
    return {site: transforms[site].inv(found[site]) for site in values}, found, covariance


def make_guide(label, model, values, parts, covariance, kwargs):
    """The guide, called once, so that it has its parameters."""
    strategy = init_to_value(values=values)
    if label == "full-rank":
        guide = AutoMultivariateNormal(model, init_loc_fn=strategy)
        guide(**kwargs)
        factor = torch.linalg.cholesky(torch.from_numpy(covariance))
        guide.scale = factor.diagonal().clone()
        guide.scale_tril = factor / guide.scale[:, None].detach()
        return guide
    begin = shared.diagonal_start(parts, covariance)
    guide = AutoPosterior(model, families(covariance)[label], start=begin)
    guide(**kwargs)
    return guide


def train(title, model, guide, used, kwargs):
    """Train the guide's parameters."""
    elbo = ImportanceWeightedELBO(used.num_particles, gradient=used.gradient)
    loss_fn = elbo(model, guide)
    loss_fn(**kwargs)
    parameters = [p for p in loss_fn.parameters() if p.requires_grad]
    optim = torch.optim.Adam(parameters, lr=used.rate)
    factor = partial(cosine, num_steps=used.num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, factor)
    bound = 0.0
    bar = tqdm(range(used.num_steps), desc=title)
    for step in bar:
        optim.zero_grad()
        loss = loss_fn(**kwargs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        if torch.isfinite(norm):
            optim.step()
        schedule.step()
        bound += (-loss.item() - bound) / min(step + 1, 500)
        if step % 100 == 99:
            bar.set_postfix(bound=f"{bound:.2f}", refresh=False)


def fit(args, name, label, kwargs, truth, begin):
    """Train one guide of one posterior; return its row of the table and its draws."""
    model, used = MODELS[name], shared.training(args, label)
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    before = time.perf_counter()
    guide = make_guide(label, model, *begin, kwargs)
    train(f"pyro {name} {label}", model, guide, used, kwargs)
    seconds = time.perf_counter() - before

    number = args.num_evaluation_samples
    options = {"chunk_size": 2_000, **kwargs}
    log_px = log_evidence(model, guide, num_samples=number, **options)
    options = {"num_chains": 4, **options}
    many = to_arviz(model, guide, num_samples=number // 4, posterior_predictive=False, **options)
    some = to_arviz(model, guide, num_samples=min(number // 4, 500), **options)
    some.to_netcdf(
        args.output_dir / f"posteriors_pyro_{name}_{label.lower()}.nc", engine="h5netcdf"
    )
    log_weights, draws = shared.weights_and_draws(many)
    columns = posterior_data.quantities(name, draws, kwargs)
    line = shared.row("Pyro", name, label, used, log_weights, log_px, columns, truth, seconds)
    return line, columns


def nuts(args, name, kwargs):
    """Draws of NUTS where there are no reference draws: the eight schools, not centred."""
    number = 20 if args.smoke_test else 4_000
    centred = poutine.reparam(MODELS[name], config={"theta": LocScaleReparam(0.0)})
    mcmc = MCMC(
        NUTS(centred, target_accept_prob=0.95, jit_compile=True, ignore_jit_warnings=True),
        warmup_steps=min(number, 1_000),
        num_samples=number,
    )
    mcmc.run(**kwargs)
    draws = mcmc.get_samples()
    draws["theta"] = draws["mu"][:, None] + draws["tau"][:, None] * draws["theta_decentered"]
    draws = {site: draws[site] for site in posterior_data.POSTERIORS[name].start}
    return posterior_data.quantities(name, draws, kwargs)


def main(args):
    """Compare the guides, write the files; return the rows of results."""
    shared.settle(args)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    rows = []
    for name in args.posteriors:
        arguments = posterior_data.arguments(name, args.data_dir)
        kwargs = {key: torch.as_tensor(value) for key, value in arguments.items()}
        truth = posterior_data.reference(name, args.data_dir) or nuts(args, name, kwargs)
        begin = start(name, kwargs)
        fits = {shared.REFERENCE: truth}
        for label in args.guides:
            line, fits[label] = fit(args, name, label, kwargs, truth, begin)
            rows.append(line)
        shared.write(args, "pyro", name, rows, fits)
    return rows


if __name__ == "__main__":
    print(shared.table(main(shared.parser(__doc__).parse_args())))
