"""Bach's chorales in NumPyro: a recurrent likelihood with a latent variable per step.

The chords are `Recurrent` over the steps, the 88 keys of a step independent given the past and the
latents; these are standard Normal, one vector per step, and the guide's context comes from a
recurrent network that reads the sequence in both directions. Sequences have different lengths: the
padding is masked. The parameters are those of the epoch with the best bound on the validation part.

    python examples/chorales_numpyro.py --data-dir DIR
    python examples/chorales_numpyro.py --data-dir DIR --latent-dim 0

DIR holds `polyphonic_jsb.npz`, see `data.jsb_chorales`; without it the data are made up. All
numbers are nats per step: sums over the test sequences, divided by the number of their steps.
"""

import time

import chorale_report
import data
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from tqdm import tqdm

from numpyro_vae_ext import guides
from numpyro_vae_ext.diagnostics import log_evidence, to_arviz
from numpyro_vae_ext.handlers import kl_weight
from numpyro_vae_ext.likelihoods import Recurrent


class Encoder(nnx.Module):
    """A context for every step from the whole sequence, past and future."""

    def __init__(self, width, *, rngs):
        self.forward = nnx.GRUCell(88, width, rngs=rngs)
        self.backward = nnx.GRUCell(88, width, rngs=rngs)

    def __call__(self, x, mask):
        def read(cell, reverse):
            def step(state, given):
                row, present = given
                # The padding leaves the state as it is: the backward one starts at the last chord.
                state = jnp.where(present[:, None], cell(state, row)[0], state)
                return state, state

            start = jnp.zeros((len(x), cell.hidden_features))
            steps = (jnp.moveaxis(x, 1, 0), mask.T)
            return jnp.moveaxis(jax.lax.scan(step, start, steps, reverse=reverse)[1], 0, 1)

        return jnp.concatenate([read(self.forward, False), read(self.backward, True)], -1)


def build(args, chorales):
    """Model, guide, and a program that samples sequences."""
    latent_dim, rngs = args.latent_dim, nnx.Rngs(args.seed)
    num_steps = chorales.train[0].shape[1]
    decoder = Recurrent(
        (num_steps, 88),
        latent_dim or None,
        cell=args.cell,
        hidden_dim=args.hidden_dim,
        block_dims=1,
        context_per_step=latent_dim > 0,
        rngs=rngs,
    )
    decoder.head.bias[...] = jnp.asarray(chorale_report.key_logits(chorales))
    if latent_dim:
        encoder = Encoder(args.hidden_dim, rngs=rngs)
        family = getattr(guides, args.guide)
        posterior = family(latent_dim, context_dim=2 * args.hidden_dim, rngs=rngs)

    # Two plates: the latents are per sequence and step, a sequence of chords is one event.
    def chords(mask):
        decode = nnx_module("decoder", decoder)
        context = None
        if latent_dim:
            prior = dist.Normal(0.0, 1.0).expand([latent_dim]).to_event(1)
            with numpyro.plate("step", num_steps, dim=-1), handlers.mask(mask=mask):
                z = numpyro.sample("z", prior)
            context = z[..., None, :, :]
        return decode(context, mask=mask[:, None])

    def model(x, lengths, weight=1.0):
        mask = jnp.arange(num_steps) < lengths[:, None]
        with numpyro.plate("chorale", len(x), dim=-2):
            numpyro.sample("x", chords(mask), obs=x[:, None])

    def guide(x, lengths, weight=1.0):
        if not latent_dim:
            return
        encode = nnx_module("encoder", encoder)
        draw = nnx_module("posterior", posterior)
        mask = jnp.arange(num_steps) < lengths[:, None]
        with numpyro.plate("chorale", len(x), dim=-2), numpyro.plate("step", num_steps, dim=-1):
            with handlers.mask(mask=mask):
                draw("z", encode(x, mask))

    def prior_samples(num_rows):
        with numpyro.plate("chorale", num_rows, dim=-2):
            mask = jnp.ones((num_rows, num_steps), bool)
            return numpyro.sample("x", chords(mask)).squeeze(-3)

    return model, guide, prior_samples


def per_step(pair):
    """The evidence lower bound per step, as a compiled function of key, parameters and data."""
    elbo = Trace_ELBO()

    @jax.jit
    def bound(rng_key, params, x, lengths):
        return -elbo.loss(rng_key, params, *pair, x, lengths) / lengths.sum()

    return bound


def train(args, chorales, model, guide, rng_key):
    """Parameters of the best epoch on validation data, and which it was."""
    # The weight is an argument of the programs: it changes without another compilation.
    weighted = [kl_weight(f, weight=lambda x, lengths, weight: weight) for f in (model, guide)]
    rng = np.random.default_rng(args.seed)
    (x, lengths), valid = (tuple(map(jnp.asarray, part)) for part in chorales[:2])
    num_batches = max(1, len(x) // args.batch_size)
    rate = optax.cosine_decay_schedule(args.learning_rate, args.max_epochs, alpha=0.01)
    svi = SVI(*weighted, optax.adam(lambda step: rate(step // num_batches)), Trace_ELBO())

    @jax.jit
    def run(state, order, weights):
        def step(state, xs):
            rows, weight = xs
            state, loss = svi.update(state, x[rows], lengths[rows], weight)
            return state, loss / lengths[rows].sum()

        return jax.lax.scan(step, state, (order, weights))

    keys = jax.random.split(rng_key, args.max_epochs + 1)
    state = svi.init(keys[-1], x[:2], lengths[:2], 1.0)
    validate = per_step((model, guide))
    best, best_epoch, kept = -np.inf, 0, None
    bar = tqdm(range(args.max_epochs), desc=chorale_report.title("numpyro", args))
    for epoch in bar:
        order = chorale_report.batches(rng, len(x), args.batch_size)
        steps = epoch * num_batches + np.arange(num_batches)
        weights = [chorale_report.annealed(args, step, num_batches) for step in steps]
        state, losses = run(state, jnp.asarray(order), jnp.asarray(weights))
        params = svi.get_params(state)
        bound = float(validate(keys[epoch], params, *valid))
        bar.set_postfix(train=f"{-losses.mean():.2f}", valid=f"{bound:.2f}")
        if bound > best:
            best, best_epoch, kept = bound, epoch + 1, params
    return kept, best_epoch


def main(args):
    """Train, evaluate, write the files; return the row of results."""
    chorale_report.defaults(args)
    chorales = data.chorales(args)
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(args.seed), 6)
    model, guide, prior_samples = build(args, chorales)
    params, best_epoch = train(args, chorales, model, guide, keys[0])
    seconds = time.perf_counter() - start

    x, lengths = map(jnp.asarray, chorales.test)

    def mean_per_step(pair):
        evaluate = per_step(pair)
        return float(np.mean([evaluate(key, params, x, lengths) for key in keys_of_bound]))

    keys_of_bound = jax.random.split(keys[1], 5)
    bound = mean_per_step((model, guide))
    num_samples = args.num_evaluation_samples if args.latent_dim else 1
    log_px = [
        log_evidence(
            jax.random.fold_in(keys[2], start),
            model,
            guide,
            x[start : start + 11],
            lengths[start : start + 11],
            params=params,
            num_samples=num_samples,
            chunk_size=20,
        )
        for start in range(0, len(x), 11)
    ]
    result = {
        "best epoch": best_epoch,
        "bound per step": bound,
        "log p per step": float(np.concatenate(log_px).sum()) / int(lengths.sum()),
        "seconds": seconds,
    }
    if args.latent_dim:
        without = [kl_weight(f, weight=0.0) for f in (model, guide)]
        result["KL per step"] = mean_per_step(without) - bound
    sample = handlers.substitute(handlers.seed(prior_samples, keys[3]), data=params)
    row, stem = chorale_report.finish("NumPyro", args, chorales, result, np.asarray(sample(2)))
    if args.latent_dim:
        draws = to_arviz(keys[4], model, guide, x[:4], lengths[:4], params=params, num_samples=5)
        draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    return row


if __name__ == "__main__":
    print(chorale_report.table([main(chorale_report.parser(__doc__).parse_args())]))
