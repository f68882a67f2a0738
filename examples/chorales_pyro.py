"""Bach's chorales in Pyro: a recurrent likelihood with a latent variable per step.

The chords are `Recurrent` over the steps, the 88 keys of a step independent given the past and the
latents; these are standard Normal, one vector per step, and the guide's context comes from a
recurrent network that reads the sequence in both directions. Sequences have different lengths: the
padding is masked. The parameters are those of the epoch with the best bound on the validation part.

    python examples/chorales_pyro.py --data-dir DIR
    python examples/chorales_pyro.py --data-dir DIR --latent-dim 0

DIR holds `polyphonic_jsb.npz`, see `data.jsb_chorales`; without it the data are made up. All
numbers are nats per step: sums over the test sequences, divided by the number of their steps.
"""

import copy
import time

import chorale_report
import data
import numpy as np
import pyro
import pyro.distributions as dist
import report
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from tqdm import tqdm

from pyro_vae_ext import guides
from pyro_vae_ext.diagnostics import log_evidence, to_arviz
from pyro_vae_ext.handlers import kl_weight
from pyro_vae_ext.likelihoods import Recurrent


class Encoder(nn.Module):
    """A context for every step from the whole sequence, past and future."""

    def __init__(self, width):
        super().__init__()
        self.rnn = nn.GRU(88, width, batch_first=True, bidirectional=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        hidden, _ = nn.utils.rnn.pad_packed_sequence(
            self.rnn(packed)[0], batch_first=True, total_length=x.shape[1]
        )
        return hidden


def build(args, chorales):
    """The networks, model, guide, and a function that samples sequences."""
    latent_dim, nets = args.latent_dim, nn.ModuleDict()
    num_steps = chorales.train[0].shape[1]
    nets["decoder"] = decoder = Recurrent(
        (num_steps, 88),
        latent_dim or None,
        cell=args.cell,
        hidden_dim=args.hidden_dim,
        block_dims=1,
        context_per_step=latent_dim > 0,
    )
    decoder.head.bias.data = torch.from_numpy(chorale_report.key_logits(chorales))
    if latent_dim:
        nets["encoder"] = Encoder(args.hidden_dim)
        family = getattr(guides, args.guide)
        nets["posterior"] = family(latent_dim, context_dim=2 * args.hidden_dim)

    # Two plates: the latents are per sequence and step, a sequence of chords is one event.
    def chords(mask):
        pyro.module("decoder", decoder)
        context = None
        if latent_dim:
            with pyro.plate("step", num_steps, dim=-1), poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim), 1.0).to_event(1))
            context = z.unsqueeze(-3)
        return decoder(context, mask=mask.unsqueeze(-2))

    def model(x, lengths, weight=1.0):
        mask = torch.arange(num_steps) < lengths[:, None]
        with pyro.plate("chorale", len(x), dim=-2):
            pyro.sample("x", chords(mask), obs=x.unsqueeze(-3))

    def guide(x, lengths, weight=1.0):
        if not latent_dim:
            return
        pyro.module("encoder", nets["encoder"])
        pyro.module("posterior", nets["posterior"])
        mask = torch.arange(num_steps) < lengths[:, None]
        with pyro.plate("chorale", len(x), dim=-2), pyro.plate("step", num_steps, dim=-1):
            with poutine.mask(mask=mask):
                nets["posterior"]("z", nets["encoder"](x, lengths))

    @torch.no_grad()
    def prior_samples(num_rows):
        with pyro.plate("chorale", num_rows, dim=-2):
            mask = torch.ones(num_rows, num_steps, dtype=torch.bool)
            return pyro.sample("x", chords(mask)).squeeze(-3)

    return nets, model, guide, prior_samples


@torch.no_grad()
def per_step(pair, x, lengths, num_evaluations=1):
    """The evidence lower bound per step."""
    elbo = Trace_ELBO()
    total = sum(-elbo.loss(*pair, x, lengths) for _ in range(num_evaluations))
    return total / num_evaluations / int(lengths.sum())


def train(args, chorales, nets, model, guide):
    """Train in place; return the epoch whose parameters are kept, the best on validation data."""
    # The weight is an argument of the programs, as a function of which the handler takes it.
    weighted = [kl_weight(f, weight=lambda x, lengths, weight: weight) for f in (model, guide)]
    optim = pyro.optim.Adam({"lr": args.learning_rate})
    svi = SVI(*weighted, optim, Trace_ELBO())
    rng = np.random.default_rng(args.seed)
    (x, lengths), valid = (map(torch.from_numpy, part) for part in chorales[:2])
    valid = tuple(valid)
    best, best_epoch, kept, step = -np.inf, 0, None, 0
    bar = tqdm(range(args.max_epochs), desc=chorale_report.title("pyro", args))
    for epoch in bar:
        order = chorale_report.batches(rng, len(x), args.batch_size)
        for adam in optim.optim_objs.values():
            adam.param_groups[0]["lr"] = args.learning_rate * report.cosine(epoch, args.max_epochs)
        loss = 0.0
        for rows in order:
            weight = chorale_report.annealed(args, step, len(order))
            loss += svi.step(x[rows], lengths[rows], weight) / int(lengths[rows].sum())
            step += 1
        bound = per_step((model, guide), *valid)
        bar.set_postfix(train=f"{-loss / len(order):.2f}", valid=f"{bound:.2f}")
        if bound > best:
            best, best_epoch, kept = bound, epoch + 1, copy.deepcopy(nets.state_dict())
    nets.load_state_dict(kept)
    return best_epoch


def main(args):
    """Train, evaluate, write the files; return the row of results."""
    chorale_report.defaults(args)
    chorales = data.chorales(args)
    start = time.perf_counter()
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    pyro.enable_validation(False)
    nets, model, guide, prior_samples = build(args, chorales)
    best_epoch = train(args, chorales, nets, model, guide)
    seconds = time.perf_counter() - start

    x, lengths = map(torch.from_numpy, chorales.test)
    bound = per_step((model, guide), x, lengths, num_evaluations=5)
    num_samples = args.num_evaluation_samples if args.latent_dim else 1
    log_px = [
        log_evidence(model, guide, *part, num_samples=num_samples, chunk_size=20)
        for part in zip(x.split(11), lengths.split(11), strict=True)
    ]
    result = {
        "best epoch": best_epoch,
        "bound per step": bound,
        "log p per step": float(torch.cat(log_px).sum()) / int(lengths.sum()),
        "seconds": seconds,
    }
    if args.latent_dim:
        without = [kl_weight(f, weight=0.0) for f in (model, guide)]
        result["KL per step"] = per_step(without, x, lengths, num_evaluations=5) - bound
    samples = prior_samples(2).numpy()
    row, stem = chorale_report.finish("Pyro", args, chorales, result, samples)
    if args.latent_dim:
        draws = to_arviz(model, guide, x[:4], lengths[:4], num_samples=5)
        draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    return row


if __name__ == "__main__":
    print(chorale_report.table([main(chorale_report.parser(__doc__).parse_args())]))
