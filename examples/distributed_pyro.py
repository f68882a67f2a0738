"""A variational autoencoder of binary images in Pyro, on several processes.

The digits of `vae_pyro.py` with `DistributedDataParallel` around the bound as a module:

    torchrun --nproc-per-node 2 examples/distributed_pyro.py --guide IAF --num-particles 5

One process per device: NCCL where CUDA is, gloo on CPUs. Without `torchrun` the script starts
two processes by itself. `--batch-size` counts the rows of all processes together.
"""

import gc
import os
import subprocess
import sys
import time

import data
import numpy as np
import pyro
import pyro.distributions as dist
import report
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm
from vae_pyro import mlp

from pyro_vae_ext import guides
from pyro_vae_ext.diagnostics import active_units, log_evidence, to_arviz
from pyro_vae_ext.elbos import ImportanceWeightedELBO


class Model(nn.Module):
    """Program of the model, which holds the decoder."""

    def __init__(self, num_rows, latent_dim, width, num_pixels):
        super().__init__()
        self.num_rows, self.latent_dim = num_rows, latent_dim
        self.decoder = mlp(latent_dim, width, width, num_pixels, linear_output=True)

    def forward(self, x):
        # The size of the whole data set, on every process: each gradient is one of all rows.
        with pyro.plate("data", self.num_rows, subsample_size=len(x)):
            prior = dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    @torch.no_grad()
    def prior_means(self, num_samples):
        device = next(self.parameters()).device
        z = torch.randn(num_samples, self.latent_dim, device=device)
        return torch.sigmoid(self.decoder(z))


class Guide(nn.Module):
    """Program of the guide, which holds the encoder and the posterior."""

    def __init__(self, num_rows, posterior, width, centre):
        super().__init__()
        self.num_rows, self.posterior = num_rows, posterior
        self.encoder = mlp(len(centre), width, width)
        self.register_buffer("centre", torch.from_numpy(centre))

    def forward(self, x):
        with pyro.plate("data", self.num_rows, subsample_size=len(x)):
            self.posterior("z", self.encoder(x - self.centre))


def build(args, images, num_rows):
    """Model and guide as modules."""
    width, latent_dim = (100, 10) if args.dataset == "digits" else (200, 50)
    posterior = getattr(guides, args.guide)(latent_dim, context_dim=width)
    model = Model(num_rows, latent_dim, width, images.train.shape[1])
    return model, Guide(num_rows, posterior, width, images.centre)


def start_processes():
    """Join the process group that torchrun describes, and return this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def train(args, images, bound, device):
    """Train in place; `bound(x)` is the negative bound of the data set, estimated from `x`."""
    rank, num_processes = distributed.get_rank(), distributed.get_world_size()
    rows = TensorDataset(torch.from_numpy(images.train))
    # Equal rows on every process, so that the mean of their gradients is that of all rows
    # together; the few rows that are left over are others in each epoch.
    sampler = DistributedSampler(rows, seed=args.seed, drop_last=True)
    loader = DataLoader(rows, batch_size=args.batch_size // num_processes, sampler=sampler)
    num_steps = args.max_epochs * len(loader)

    # Only now: the networks begin equal, the noise is another one on every process.
    pyro.set_rng_seed(1000 * args.seed + rank)
    parallel = DistributedDataParallel(bound)
    optimiser = torch.optim.Adam(parallel.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps, eta_min=2e-5)
    title = f"{report.vae_title('pyro', args)} x {num_processes}"
    with tqdm(total=num_steps, desc=title, disable=rank > 0) as bar:
        for epoch in range(args.max_epochs):
            sampler.set_epoch(epoch)
            for (batch,) in loader:
                batch = batch.to(device, torch.float32)
                x = torch.bernoulli(batch) if images.dynamic else batch
                optimiser.zero_grad()
                loss = parallel(x)
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
            bar.set_postfix(bound=f"{-loss.item() / len(images.train):.2f}", refresh=False)


def gather(values, num_rows):
    """Values of rows `rank, rank + processes, ...` of every process, in order on all of them."""
    whole = values.new_zeros(num_rows)
    whole[distributed.get_rank() :: distributed.get_world_size()] = values
    distributed.all_reduce(whole)
    return whole


def main(args):
    """Train, evaluate, write the files; return the row of results on the first process."""
    if args.smoke_test:
        args.max_epochs, args.num_evaluation_samples = 5, 20
    device = start_processes()
    rank, num_processes = distributed.get_rank(), distributed.get_world_size()
    images = data.images(args)
    start = time.perf_counter()
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    model, guide = build(args, images, num_rows=len(images.train))
    elbo = ImportanceWeightedELBO(args.num_particles, gradient=args.gradient)
    train(args, images, elbo(model, guide).to(device), device)
    seconds = time.perf_counter() - start

    # Every process evaluates its own test rows; log_evidence gives one number for each.
    x = torch.from_numpy(images.test).to(device)
    bound, log_px = (
        gather(
            torch.cat(
                [
                    log_evidence(model, guide, part, num_samples=k, progress_bar=rank == 0)
                    for part in x[rank::num_processes].split(1000)
                ]
            ),
            len(x),
        ).mean()
        for k in (args.num_particles, args.num_evaluation_samples)
    )
    # Nothing below is collective. DDP lies in reference cycles and holds on to the group: left to
    # the end of the interpreter, gloo's threads abort the process every few runs.
    gc.collect()
    distributed.destroy_process_group()
    if rank > 0:
        return None
    row = {
        "backend": "Pyro",
        "data": args.dataset,
        "guide": args.guide,
        "objective": report.objective_name(args.num_particles, args.gradient),
        "bound": bound.item(),
        "NLL": -log_px.item(),
        "active units": int(active_units(model, guide, x[:1000]).count),
        "seconds": seconds,
        "processes": num_processes,
    }
    write(args, images, model, guide, row, f"ddp{num_processes}")
    return row


def write(args, images, model, guide, row, prefix):
    """The files of one run."""
    stem = report.vae_stem("pyro", args)
    stem = stem.with_name(f"{prefix}_{stem.name}")
    report.write_row(stem.with_suffix(".json"), row)
    x = torch.from_numpy(images.test[:20]).to(next(model.parameters()).device)
    draws = to_arviz(model, guide, x, num_samples=250)
    draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    arrays = {
        "shape": images.shape,
        "data": images.test[:20],
        "reconstruction": draws["posterior_predictive"]["x"].mean(("chain", "draw")).values,
        "prior": model.prior_means(40).cpu().numpy(),
    }
    np.savez(stem.with_suffix(".npz"), **arrays)
    report.vae_picture(stem.with_suffix(".png"), arrays)


def parse_args():
    """Options; `--batch-size` and `--max-epochs` hold for both data sets here."""
    parser = report.vae_parser(__doc__)
    parser.set_defaults(max_epochs=700, batch_size=50)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    if distributed.is_torchelastic_launched():
        row = main(args)
        if row is not None:
            print(report.table([row]))
    else:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        sys.exit(subprocess.call([sys.executable, *torchrun, __file__, *sys.argv[1:]]))
