"""A sigmoid belief net of binary images in Pyro: Bernoulli latents, one layer or two.

Digits of scikit-learn by default, 24 bits a layer, every map linear:

    python examples/belief_net_pyro.py --estimator rebar --num-layers 2

With `--dataset mnist --data-dir DIR` these are the linear nets of 200 units of Tucker, Mnih,
Maddison, Lawson and Sohl-Dickstein (2017, arXiv 1703.07370) on statically binarised MNIST.
"""

import time
from collections import deque

import data
import numpy as np
import pyro
import pyro.distributions as dist
import report
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from tqdm import tqdm

from pyro_vae_ext.diagnostics import log_evidence, to_arviz
from pyro_vae_ext.elbos import (
    ImportanceWeightedELBO,
    TraceDisARM_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
)

OBJECTIVES = {
    "reinforce": lambda: TraceNVIL_ELBO(baselines=()),
    "nvil": lambda: TraceNVIL_ELBO(baselines=("learned",), hidden_dims=()),
    "leave-one-out": lambda: TraceNVIL_ELBO(2, baselines=("leave_one_out",)),
    "rebar": TraceREBAR_ELBO,
    "relax": TraceRELAX_ELBO,
    "disarm": TraceDisARM_ELBO,
    "vimco": lambda: ImportanceWeightedELBO(2, gradient="vimco"),
}


def linear(width_in, width_out):
    """A linear map with Glorot's initial weights."""
    layer = nn.Linear(width_in, width_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def bits(logits):
    """One layer of independent bits."""
    return dist.Bernoulli(logits=logits).to_event(1)


def build(args, images):
    """Model, guide, and a function that returns the means of prior samples.

    The layers are called `h1` (next to the pixels), `h2`, ...
    """
    width = 24 if args.dataset == "digits" else 200
    widths = (images.train.shape[1], *[width] * args.num_layers)
    centre = torch.from_numpy(images.centre)
    up = [linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    down = [linear(b, a) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    if args.dataset == "mnist":
        down[0].bias.data = centre.clamp(1e-3, 1 - 1e-3).logit()

    def pixel_logits():
        """The latent layers from the top down, and the logits of the pixels."""
        logits = pyro.param("prior", torch.zeros(width))
        for layer in range(args.num_layers, 0, -1):
            pyro.module(f"down{layer}", down[layer - 1])
            h = pyro.sample(f"h{layer}", bits(logits))
            logits = down[layer - 1](h)
        return logits

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", bits(pixel_logits()), obs=x)

    def guide(x):
        # The learned baseline of NVIL reads the pixels; the other objectives pass this over.
        infer = {"baseline_input": x}
        h = x - centre
        with pyro.plate("data", len(x)):
            for layer in range(1, args.num_layers + 1):
                pyro.module(f"up{layer}", up[layer - 1])
                h = pyro.sample(f"h{layer}", bits(up[layer - 1](h)), infer=infer)

    @torch.no_grad()
    def prior_means(num_samples):
        with pyro.plate("data", num_samples):
            return torch.sigmoid(pixel_logits())

    return model, guide, prior_means


def binarise(images, rows):
    """Rows of bits, drawn anew if the data are intensities."""
    return torch.bernoulli(rows) if images.dynamic else rows.float()


def train(args, images, model, guide, elbo):
    """Train in place with the host's SVI; return the mean bound of the last 1,000 steps."""
    rng = np.random.default_rng(args.seed)
    rows = torch.from_numpy(images.train)
    optim = pyro.optim.Adam({"lr": args.learning_rate})
    svi = SVI(model, guide, optim, elbo)
    bounds = deque(maxlen=1000)
    bar = tqdm(range(args.num_steps), desc=report.belief_net_title("pyro", args))
    for step in bar:
        batch = binarise(images, rows[rng.integers(len(rows), size=args.batch_size)])
        for adam in optim.optim_objs.values():
            adam.param_groups[0]["lr"] = args.learning_rate * report.cosine(step, args.num_steps)
        bounds.append(-svi.step(batch) / len(batch))
        if step % 100 == 99:
            bar.set_postfix(bound=f"{np.mean(bounds):.2f}", refresh=False)
    return float(np.mean(bounds))


@torch.no_grad()
def mean_elbo(args, images, pair, rows, size=1000):
    """ELBO per row, whatever the objective was; rows of intensities are binarised anew."""
    elbo = Trace_ELBO()
    total = 0.0
    for _ in range(args.num_evaluations):
        total -= sum(elbo.loss(*pair, binarise(images, part)) for part in rows.split(size))
    return total / args.num_evaluations / len(rows)


def main(args):
    """Train, evaluate, write the files; return the row of results."""
    report.belief_net_defaults(args)
    images = data.images(args)
    start = time.perf_counter()
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    model, guide, prior_means = build(args, images)
    elbo = OBJECTIVES[args.estimator]()
    # Declares what the objective learns for itself: temperatures, baselines, ...
    tunable = guide if args.estimator == "vimco" else elbo.tunable(guide)
    running = train(args, images, model, tunable, elbo)
    seconds = time.perf_counter() - start

    pair, x = (model, guide), torch.from_numpy(images.test)
    log_px = [log_evidence(*pair, part, num_samples=100) for part in x.split(1000)]
    row = {
        "backend": "Pyro",
        "data": args.dataset,
        "layers": args.num_layers,
        "estimator": args.estimator,
        "training ELBO": mean_elbo(args, images, pair, torch.from_numpy(images.train)),
        "last 1000 steps": running,
        "test bound, 100 samples": float(torch.cat(log_px).mean()),
        "seconds": seconds,
    }

    stem = report.belief_net_stem("pyro", args)
    report.write_row(stem.with_suffix(".json"), row)
    draws = to_arviz(*pair, x[:20], num_samples=250)
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
    result = main(report.belief_net_parser(__doc__).parse_args())
    print(report.table([result], report.NET_COLUMNS))
