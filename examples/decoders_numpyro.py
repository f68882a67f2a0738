"""Factorised and autoregressive decoders of binary digits in NumPyro: are the latents used?

The set-up of `vae_numpyro.py` with another decoder: MADE, Recurrent (`--window`) or PixelCNN
(`--receptive-field`), fed by the same two layers on the latents. `--kl-annealing` and `--free-bits`
keep the latents of a decoder that could do without them.

    python examples/decoders_numpyro.py --decoder PixelCNN --receptive-field 3
    python examples/decoder_report.py results

The second command makes the table and the picture of all runs of a folder.
"""

import time

import data
import decoder_report
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
from vae_numpyro import MLP

from numpyro_vae_ext import guides, likelihoods
from numpyro_vae_ext.diagnostics import latent_utilisation, log_evidence, to_arviz
from numpyro_vae_ext.elbos import TraceFreeBits_ELBO
from numpyro_vae_ext.handlers import kl_weight

WIDTH = 100


class Factorised(nnx.Module):
    """The plain decoder, called as the autoregressive ones are: pixels independent given z."""

    def __init__(self, shape, context_dim, *, rngs):
        self.shape = shape
        self.logits = nnx.Linear(
            context_dim,
            shape[0] * shape[1],
            kernel_init=nnx.initializers.glorot_uniform(),
            rngs=rngs,
        )

    def __call__(self, context):
        logits = self.logits(context).reshape(*context.shape[:-1], *self.shape)
        return dist.Bernoulli(logits=logits).to_event(2)


def build(args, images):
    """Model, guide, and a program that samples images from the prior."""
    rngs = nnx.Rngs(args.seed)
    latent_dim, shape = args.latent_dim, images.shape
    context_dim = WIDTH if latent_dim else None
    if args.decoder == "factorised":
        decoder = Factorised(shape, context_dim, rngs=rngs)
    else:
        options = decoder_report.options(args)
        decoder = getattr(likelihoods, args.decoder)(shape, context_dim, **options, rngs=rngs)
    if latent_dim:
        features = MLP((latent_dim, WIDTH, WIDTH), rngs=rngs)
        encoder = MLP((images.train.shape[1], WIDTH, WIDTH), rngs=rngs)
        posterior = guides.MeanField(latent_dim, context_dim=WIDTH, rngs=rngs)

    def images_given_z(num_rows):
        decode = nnx_module("decoder", decoder)
        if not latent_dim:
            return decode()
        expand = nnx_module("features", features)
        prior = dist.Normal(0.0, 1.0).expand([latent_dim]).to_event(1)
        return decode(expand(numpyro.sample("z", prior)))

    def model(x, weight=None):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", images_given_z(len(x)), obs=x.reshape(-1, *shape))

    def guide(x, weight=None):
        if not latent_dim:
            return
        encode = nnx_module("encoder", encoder)
        draw = nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x)):
            draw("z", encode(x - images.centre))

    def prior_samples(num_rows):
        with numpyro.plate("data", num_rows):
            return numpyro.sample("x", images_given_z(num_rows))

    return model, guide, prior_samples


def train(args, images, model, guide, rng_key):
    """Parameters after training: one compiled scan for every 500 steps."""
    if args.free_bits:
        elbo = TraceFreeBits_ELBO(free_bits=args.free_bits)
    else:
        elbo = Trace_ELBO()
    if args.kl_annealing:
        # The weight is an argument of the programs: it changes without another compilation.
        model, guide = (kl_weight(f, weight=lambda x, weight: weight) for f in (model, guide))
    schedule = optax.cosine_decay_schedule(2e-3, args.num_steps, alpha=0.01)
    svi = SVI(model, guide, optax.adam(schedule), elbo)
    rng = np.random.default_rng(args.seed)
    train_rows = jnp.asarray(images.train)

    def binarise(key, rows):
        batch = train_rows[rows]
        return (jax.random.uniform(key, batch.shape) < batch).astype(jnp.float32)

    @jax.jit
    def run(state, keys, rows, weights):
        def step(state, xs):
            key, rows, weight = xs
            return svi.update(state, binarise(key, rows), weight)

        return jax.lax.scan(step, state, (keys, rows, weights))

    state = None
    with tqdm(total=args.num_steps, desc=decoder_report.title("numpyro", args)) as bar:
        for start in range(0, args.num_steps, 500):
            steps = np.arange(start, min(start + 500, args.num_steps))
            rows = rng.integers(len(images.train), size=(len(steps), 50))
            weights = decoder_report.annealed(args, steps).astype(np.float32)
            rng_key, key = jax.random.split(rng_key)
            keys = jax.random.split(key, len(steps))
            if state is None:
                state = svi.init(key, binarise(key, rows[0]), weights[0])
            state, losses = run(state, keys, jnp.asarray(rows), jnp.asarray(weights))
            bar.update(len(steps))
            bar.set_postfix(bound=f"{-losses.mean() / 50:.2f}", refresh=False)
    return svi.get_params(state)


def main(args):
    """Train, evaluate, write the files; return the row of results."""
    decoder_report.defaults(args)
    images = data.images(args)
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(args.seed), 6)
    model, guide, prior_samples = build(args, images)
    params = train(args, images, model, guide, keys[0])
    seconds = time.perf_counter() - start

    x = jnp.asarray(images.test)
    log_px = log_evidence(
        keys[1],
        model,
        guide,
        x,
        params=params,
        num_samples=args.num_evaluation_samples if args.latent_dim else 1,
    )
    use = None
    if args.latent_dim:
        use = latent_utilisation(
            keys[2], model, guide, x, params=params, num_samples=args.num_utilisation_samples
        )
    sample = handlers.substitute(handlers.seed(prior_samples, keys[3]), data=params)
    stem = decoder_report.stem("numpyro", args)
    row = decoder_report.write("NumPyro", stem, args, np.asarray(log_px), use, seconds)
    decoder_report.picture(stem.with_suffix(".png"), images, np.asarray(sample(40)))
    if args.latent_dim:
        draws = to_arviz(keys[4], model, guide, x[:20], params=params, num_samples=20)
        draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    return row


if __name__ == "__main__":
    print(decoder_report.table([main(decoder_report.parser(__doc__).parse_args())]))
