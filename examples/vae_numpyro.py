"""A variational autoencoder of binary images in NumPyro.

Digits of scikit-learn by default: one stochastic layer of ten latents, trained on the
importance-weighted bound with `--num-particles` samples (the ELBO with one).

    python examples/vae_numpyro.py --guide IAF --num-particles 5 --gradient dreg

With `--dataset mnist --data-dir DIR` it is the one-layer set-up of Burda, Grosse and
Salakhutdinov (2016, arXiv 1509.00519, section 5) on statically binarised MNIST.
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
from numpyro.infer import SVI
from tqdm import tqdm

from numpyro_vae_ext import guides
from numpyro_vae_ext.diagnostics import active_units, log_evidence, to_arviz
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.training import fit


class MLP(nnx.Module):
    """Dense layers with a tanh after each, the last one excepted if `linear_output`."""

    def __init__(self, widths, *, rngs, linear_output=False):
        glorot = nnx.initializers.glorot_uniform()
        self.layers = nnx.List(
            nnx.Linear(width_in, width_out, kernel_init=glorot, rngs=rngs)
            for width_in, width_out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.linear_output = linear_output

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        x = self.layers[-1](x)
        return x if self.linear_output else jnp.tanh(x)


def build(args, images):
    """Model, guide, and a program that returns the means of prior samples."""
    width, latent_dim = (100, 10) if args.dataset == "digits" else (200, 50)
    num_pixels = images.train.shape[1]
    rngs = nnx.Rngs(args.seed)
    encoder = MLP((num_pixels, width, width), rngs=rngs)
    decoder = MLP((latent_dim, width, width, num_pixels), rngs=rngs, linear_output=True)
    if args.dataset == "mnist":
        mean = jnp.clip(images.centre, 1e-3, 1 - 1e-3)
        decoder.layers[-1].bias[...] = jnp.log(mean) - jnp.log1p(-mean)
    family = getattr(guides, args.guide)
    posterior = family(latent_dim, context_dim=width, rngs=rngs)

    def model(x):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([latent_dim]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = nnx_module("encoder", encoder)
        draw = nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x)):
            draw("z", encode(x - images.centre))

    def prior_means(num_samples):
        decode = nnx_module("decoder", decoder)
        prior = dist.Normal(0.0, 1.0).expand([num_samples, latent_dim])
        return jax.nn.sigmoid(decode(numpyro.sample("z", prior)))

    return model, guide, prior_means


def optimiser(args, images):
    """Adam with the data set's schedule."""
    if args.dataset == "digits":
        num_steps = args.num_steps or 20_000
        return optax.adam(optax.cosine_decay_schedule(2e-3, num_steps, alpha=0.01))
    steps = -(-len(images.train) // args.batch_size)
    if args.schedule == "cosine":
        cosine = optax.cosine_decay_schedule(1e-3, steps * args.max_epochs, alpha=0.01)
        return optax.adam(cosine, eps=1e-4)
    ends, rates = zip(*report.stages(args.max_epochs), strict=True)
    schedule = optax.join_schedules(
        [optax.constant_schedule(rate) for rate in rates],
        [round(end * steps) for end in ends[:-1]],
    )
    return optax.adam(schedule, eps=1e-4)


def train(args, images, svi, rng_key):
    """Parameters after training."""
    if args.dataset == "mnist":
        # Static bits: shuffled epochs.
        rows = jnp.asarray(images.train, jnp.float32)
        options = {"num_epochs": args.max_epochs, "batch_size": args.batch_size}
        return fit(rng_key, svi, rows, **options).params
    # Bits drawn anew in every batch; one compiled scan over the steps of every chunk.
    intensities, rng = jnp.asarray(images.train), np.random.default_rng(args.seed)

    def binarise(key, rows):
        return jax.random.bernoulli(key, intensities[rows]).astype(jnp.float32)

    @jax.jit
    def run(state, keys, rows):
        return jax.lax.scan(lambda state, xs: svi.update(state, binarise(*xs)), state, (keys, rows))

    init_key, key = jax.random.split(rng_key)
    state = svi.init(init_key, binarise(init_key, np.arange(50)))
    num_steps = args.num_steps or 20_000
    with tqdm(total=num_steps, desc=report.vae_title("numpyro", args)) as bar:
        for start in range(0, num_steps, 500):
            count = min(500, num_steps - start)
            rows = rng.integers(len(images.train), size=(count, 50))
            keys = jax.random.split(jax.random.fold_in(key, start), count)
            state, losses = run(state, keys, rows)
            bar.update(count)
            bar.set_postfix(bound=f"{-losses.mean() / 50:.2f}", refresh=False)
    return svi.get_params(state)


def main(args):
    """Train, evaluate, write the files; return the row of results."""
    if args.smoke_test:
        args.num_steps, args.max_epochs, args.num_evaluation_samples = 20, 1, 20
    images = data.images(args)
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(args.seed), 10)
    model, guide, prior_means = build(args, images)
    elbo = ImportanceWeightedELBO(args.num_particles, gradient=args.gradient)
    svi = SVI(model, guide, optimiser(args, images), elbo)
    params = train(args, images, svi, keys[0])
    seconds = time.perf_counter() - start

    x = jnp.asarray(images.test)
    parts = np.split(x, range(1000, len(x), 1000))
    loss = jax.jit(lambda key, part: elbo.loss(key, params, model, guide, part))
    bound = -sum(float(loss(key, part)) for part in parts for key in keys[1:6]) / 5 / len(x)
    log_px = [
        log_evidence(
            jax.random.fold_in(keys[6], i),
            model,
            guide,
            part,
            params=params,
            num_samples=args.num_evaluation_samples,
        )
        for i, part in enumerate(parts)
    ]
    units = active_units(keys[7], model, guide, x[:1000], params=params)
    row = {
        "backend": "NumPyro",
        "data": args.dataset,
        "guide": args.guide,
        "objective": report.objective_name(args.num_particles, args.gradient),
        "bound": bound,
        "NLL": -float(np.concatenate(log_px).mean()),
        "active units": int(units.count),
        "seconds": seconds,
    }

    stem = report.vae_stem("numpyro", args)
    report.write_row(stem.with_suffix(".json"), row)
    draws = to_arviz(keys[8], model, guide, x[:20], params=params, num_samples=250)
    draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    arrays = {
        "shape": images.shape,
        "data": images.test[:20],
        "reconstruction": draws["posterior_predictive"]["x"].mean(("chain", "draw")).values,
        "prior": np.asarray(
            handlers.substitute(handlers.seed(prior_means, keys[9]), data=params)(40)
        ),
    }
    np.savez(stem.with_suffix(".npz"), **arrays)
    report.vae_picture(stem.with_suffix(".png"), arrays)
    return row


if __name__ == "__main__":
    print(report.table([main(report.vae_parser(__doc__).parse_args())]))
