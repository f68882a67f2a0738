"""A variational autoencoder of binary images in Pyro.

Digits of scikit-learn by default: one stochastic layer of ten latents, trained on the
importance-weighted bound with `--num-particles` samples (the ELBO with one).

    python examples/vae_pyro.py --guide IAF --num-particles 5 --gradient dreg

With `--dataset mnist --data-dir DIR` it is the one-layer set-up of Burda, Grosse and
Salakhutdinov (2016, arXiv 1509.00519, section 5) on statically binarised MNIST.
"""

import time

import data
import numpy as np
import pyro
import pyro.distributions as dist
import report
import torch
from pyro.infer import SVI
from torch import nn
from tqdm import tqdm

from pyro_vae_ext import guides
from pyro_vae_ext.diagnostics import active_units, log_evidence, to_arviz
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.training import compile, fit


def mlp(*widths, linear_output=False):
    """Dense layers with a tanh after each, the last one excepted if `linear_output`."""
    layers = []
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.Tanh()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*(layers[:-1] if linear_output else layers))


def build(args, images):
    """Model, guide, and the decoder's mean of prior samples."""
    width, latent_dim = (100, 10) if args.dataset == "digits" else (200, 50)
    num_pixels = images.train.shape[1]
    centre = torch.from_numpy(images.centre)
    encoder = mlp(num_pixels, width, width)
    decoder = mlp(latent_dim, width, width, num_pixels, linear_output=True)
    if args.dataset == "mnist":
        decoder[-1].bias.data = centre.clamp(1e-3, 1 - 1e-3).logit()
    family = getattr(guides, args.guide)
    posterior = family(latent_dim, context_dim=width)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.module("posterior", posterior)
        with pyro.plate("data", len(x)):
            posterior("z", encoder(x - centre))

    @torch.no_grad()
    def prior_means(num_samples):
        return torch.sigmoid(decoder(torch.randn(num_samples, latent_dim)))

    return model, guide, prior_means


def train(args, images, svi):
    """Train in place."""
    if args.dataset == "mnist":
        # Static bits: shuffled epochs.
        rows, rate = torch.from_numpy(images.train).float(), rates(args, len(images.train))
        options = {"num_epochs": args.max_epochs, "batch_size": args.batch_size}
        schedules = {"learning_rate": rate}
        fit(svi, rows, **options, schedules=schedules, compile=not args.smoke_test)
        return
    # Bits drawn anew in every batch.
    if not args.smoke_test:
        svi = compile(svi)
    rng, rows = np.random.default_rng(args.seed), torch.from_numpy(images.train)
    num_steps = args.num_steps or 20_000
    bar = tqdm(range(num_steps), desc=report.vae_title("pyro", args))
    bound = 0.0
    for step in bar:
        for adam_of_one in svi.optim.optim_objs.values():
            adam_of_one.param_groups[0]["lr"] = 2e-3 * report.cosine(step, num_steps)
        batch = torch.bernoulli(rows[rng.integers(len(rows), size=50)])
        bound += (-float(svi.step(batch)) / len(batch) - bound) / min(step + 1, 500)
        if step % 100 == 99:
            bar.set_postfix(bound=f"{bound:.2f}", refresh=False)


def rates(args, num_rows):
    """Learning rate on MNIST as a function of the step."""
    steps, stages = -(-num_rows // args.batch_size), report.stages(args.max_epochs)

    def rate(step):
        epoch = step / steps
        if args.schedule == "cosine":
            return 1e-3 * report.cosine(epoch, args.max_epochs)
        return next((rate for end, rate in stages if epoch < end), stages[-1][1])

    return rate


def main(args):
    """Train, evaluate, write the files; return the row of results."""
    if args.smoke_test:
        args.num_steps, args.max_epochs, args.num_evaluation_samples = 20, 1, 20
    images = data.images(args)
    start = time.perf_counter()
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    model, guide, prior_means = build(args, images)
    elbo = ImportanceWeightedELBO(args.num_particles, gradient=args.gradient)
    adam = {"lr": 2e-3} if args.dataset == "digits" else {"lr": 1e-3, "eps": 1e-4}
    train(args, images, SVI(model, guide, pyro.optim.Adam(adam), elbo))
    seconds = time.perf_counter() - start

    x = torch.from_numpy(images.test)
    parts = x.split(1000)
    with torch.no_grad():
        bound = -sum(elbo.loss(model, guide, part) for part in parts for _ in range(5))
    log_px = [
        log_evidence(model, guide, part, num_samples=args.num_evaluation_samples) for part in parts
    ]
    units = active_units(model, guide, x[:1000])
    row = {
        "backend": "Pyro",
        "data": args.dataset,
        "guide": args.guide,
        "objective": report.objective_name(args.num_particles, args.gradient),
        "bound": bound / 5 / len(x),
        "NLL": -float(torch.cat(log_px).mean()),
        "active units": int(units.count),
        "seconds": seconds,
    }

    stem = report.vae_stem("pyro", args)
    report.write_row(stem.with_suffix(".json"), row)
    draws = to_arviz(model, guide, x[:20], num_samples=250)
    draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    arrays = {
        "shape": images.shape,
        "data": images.test[:20],
        "reconstruction": draws["posterior_predictive"]["x"].mean(("chain", "draw")).values,
        "prior": prior_means(40).numpy(),
    }
    np.savez(stem.with_suffix(".npz"), **arrays)
    report.vae_picture(stem.with_suffix(".png"), arrays)
    return row


if __name__ == "__main__":
    print(report.table([main(report.vae_parser(__doc__).parse_args())]))
