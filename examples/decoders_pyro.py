"""Factorised and autoregressive decoders of binary digits in Pyro: are the latents used?

The set-up of `vae_pyro.py` with another decoder: MADE, Recurrent (`--window`) or PixelCNN
(`--receptive-field`), fed by the same two layers on the latents. `--kl-annealing` and `--free-bits`
keep the latents of a decoder that could do without them.

    python examples/decoders_pyro.py --decoder PixelCNN --receptive-field 3
    python examples/decoder_report.py results

The second command makes the table and the picture of all runs of a folder.
"""

import time

import data
import decoder_report
import numpy as np
import pyro
import pyro.distributions as dist
import report
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from tqdm import tqdm
from vae_pyro import mlp

from pyro_vae_ext import guides, likelihoods
from pyro_vae_ext.diagnostics import latent_utilisation, log_evidence, to_arviz
from pyro_vae_ext.elbos import TraceFreeBits_ELBO
from pyro_vae_ext.handlers import kl_weight

WIDTH = 100


class Factorised(nn.Module):
    """The plain decoder, called as the autoregressive ones are: pixels independent given z."""

    def __init__(self, shape, context_dim):
        super().__init__()
        self.shape = shape
        self.logits = mlp(context_dim, shape[0] * shape[1], linear_output=True)

    def forward(self, context):
        return dist.Bernoulli(logits=self.logits(context).unflatten(-1, self.shape)).to_event(2)


def build(args, images):
    """Model, guide, and a program that samples images from the prior."""
    latent_dim, shape = args.latent_dim, images.shape
    context_dim = WIDTH if latent_dim else None
    centre = torch.from_numpy(images.centre)
    if args.decoder == "factorised":
        decoder = Factorised(shape, context_dim)
    else:
        options = decoder_report.options(args)
        decoder = getattr(likelihoods, args.decoder)(shape, context_dim, **options)
    if latent_dim:
        features = mlp(latent_dim, WIDTH, WIDTH)
        encoder = mlp(images.train.shape[1], WIDTH, WIDTH)
        posterior = guides.MeanField(latent_dim, context_dim=WIDTH)

    def images_given_z():
        pyro.module("decoder", decoder)
        if not latent_dim:
            return decoder()
        pyro.module("features", features)
        z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim), 1.0).to_event(1))
        return decoder(features(z))

    def model(x, weight=None):
        with pyro.plate("data", len(x)):
            pyro.sample("x", images_given_z(), obs=x.unflatten(-1, shape))

    def guide(x, weight=None):
        if not latent_dim:
            return
        pyro.module("encoder", encoder)
        pyro.module("posterior", posterior)
        with pyro.plate("data", len(x)):
            posterior("z", encoder(x - centre))

    @torch.no_grad()
    def prior_samples(num_rows):
        with pyro.plate("data", num_rows):
            return pyro.sample("x", images_given_z())

    return model, guide, prior_samples


def train(args, images, model, guide):
    """Train in place with the host's SVI."""
    if args.free_bits:
        elbo = TraceFreeBits_ELBO(free_bits=args.free_bits)
    else:
        elbo = Trace_ELBO()
    if args.kl_annealing:
        model, guide = (kl_weight(f, weight=lambda x, weight: weight) for f in (model, guide))
    optim = pyro.optim.Adam({"lr": 2e-3})
    svi = SVI(model, guide, optim, elbo)
    rng = np.random.default_rng(args.seed)
    rows = torch.from_numpy(images.train)
    weights = decoder_report.annealed(args, np.arange(args.num_steps))
    bound = 0.0
    bar = tqdm(weights, desc=decoder_report.title("pyro", args))
    for step, weight in enumerate(bar):
        factor = report.cosine(step, args.num_steps)
        for adam_of_one in optim.optim_objs.values():
            adam_of_one.param_groups[0]["lr"] = 2e-3 * factor
        batch = torch.bernoulli(rows[rng.integers(len(rows), size=50)])
        bound += (-svi.step(batch, float(weight)) / len(batch) - bound) / min(step + 1, 500)
        if step % 100 == 99:
            bar.set_postfix(bound=f"{bound:.2f}", refresh=False)


def main(args):
    """Train, evaluate, write the files; return the row of results."""
    decoder_report.defaults(args)
    images = data.images(args)
    start = time.perf_counter()
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    model, guide, prior_samples = build(args, images)
    train(args, images, model, guide)
    seconds = time.perf_counter() - start

    x = torch.from_numpy(images.test)
    num_samples = args.num_evaluation_samples if args.latent_dim else 1
    log_px = log_evidence(model, guide, x, num_samples=num_samples, chunk_size=20)
    use = None
    if args.latent_dim:
        use = latent_utilisation(model, guide, x, num_samples=args.num_utilisation_samples)
    stem = decoder_report.stem("pyro", args)
    row = decoder_report.write("Pyro", stem, args, log_px.numpy(), use, seconds)
    decoder_report.picture(stem.with_suffix(".png"), images, prior_samples(40).numpy())
    if args.latent_dim:
        draws = to_arviz(model, guide, x[:20], num_samples=20)
        draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    return row


if __name__ == "__main__":
    print(decoder_report.table([main(decoder_report.parser(__doc__).parse_args())]))
