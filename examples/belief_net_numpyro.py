"""A sigmoid belief net of binary images in NumPyro: Bernoulli latents, one layer or two.

Digits of scikit-learn by default, 24 bits a layer, every map linear:

    python examples/belief_net_numpyro.py --estimator rebar --num-layers 2

With `--dataset mnist --data-dir DIR` these are the linear nets of 200 units of Tucker, Mnih,
Maddison, Lawson and Sohl-Dickstein (2017, arXiv 1703.07370) on statically binarised MNIST.
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
from numpyro.infer import SVI, Trace_ELBO
from tqdm import tqdm

from numpyro_vae_ext.diagnostics import log_evidence, to_arviz
from numpyro_vae_ext.elbos import (
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


def linear(width_in, width_out, rngs):
    """A linear map with Glorot's initial weights."""
    glorot = nnx.initializers.glorot_uniform()
    return nnx.Linear(width_in, width_out, kernel_init=glorot, rngs=rngs)


def bits(logits):
    """One layer of independent bits."""
    return dist.Bernoulli(logits=logits).to_event(1)


def build(args, images):
    """Model, guide, and a program that returns the means of prior samples.

    The layers are called `h1` (next to the pixels), `h2`, ...
    """
    width = 24 if args.dataset == "digits" else 200
    widths = (images.train.shape[1], *[width] * args.num_layers)
    rngs = nnx.Rngs(args.seed)
    up = [linear(a, b, rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    down = [linear(b, a, rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    if args.dataset == "mnist":
        mean = jnp.clip(images.centre, 1e-3, 1 - 1e-3)
        down[0].bias[...] = jnp.log(mean) - jnp.log1p(-mean)

    def pixel_logits():
        """The latent layers from the top down, and the logits of the pixels."""
        logits = numpyro.param("prior", jnp.zeros(width))
        for layer in range(args.num_layers, 0, -1):
            h = numpyro.sample(f"h{layer}", bits(logits))
            logits = nnx_module(f"down{layer}", down[layer - 1])(h)
        return logits

    def model(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", bits(pixel_logits()), obs=x)

    def guide(x):
        # The learned baseline of NVIL reads the pixels; the other objectives pass this over.
        infer = {"baseline_input": x}
        h = x - images.centre
        with numpyro.plate("data", len(x)):
            for layer in range(1, args.num_layers + 1):
                logits = nnx_module(f"up{layer}", up[layer - 1])(h)
                h = numpyro.sample(f"h{layer}", bits(logits), infer=infer)

    def prior_means(num_samples):
        with numpyro.plate("data", num_samples):
            return jax.nn.sigmoid(pixel_logits())

    return model, guide, prior_means


def binarise(images, key, rows):
    """Rows of bits, drawn anew if the data are intensities."""
    if images.dynamic:
        return (jax.random.uniform(key, rows.shape) < rows).astype(jnp.float32)
    return rows.astype(jnp.float32)


def train(args, images, svi, rng_key, chunk=500):
    """Parameters after training, and the mean bound of the last 1,000 steps."""
    train_rows = jnp.asarray(images.train)

    def draw(key):
        rows_key, bits_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (args.batch_size,), 0, len(train_rows))
        return binarise(images, bits_key, train_rows[rows])

    @jax.jit
    def run(state, keys):
        return jax.lax.scan(lambda state, key: svi.update(state, draw(key)), state, keys)

    init_key, batch_key, rng_key = jax.random.split(rng_key, 3)
    state = svi.init(init_key, jax.jit(draw)(batch_key))
    bounds = []
    with tqdm(total=args.num_steps, desc=report.belief_net_title("numpyro", args)) as bar:
        for start in range(0, args.num_steps, chunk):
            size = min(chunk, args.num_steps - start)
            state, losses = run(state, jax.random.split(jax.random.fold_in(rng_key, start), size))
            bounds = [*bounds[1 - 1000 // chunk :], -losses / args.batch_size]
            bar.update(size)
            bar.set_postfix(bound=f"{bounds[-1].mean():.2f}", refresh=False)
    return svi.get_params(state), float(jnp.concatenate(bounds).mean())


def mean_elbo(args, images, params, pair, rows, rng_key, size=1000):
    """ELBO per row, whatever the objective was; rows of intensities are binarised anew."""
    elbo = Trace_ELBO()

    @jax.jit
    def run(key, rows):
        bits_key, key = jax.random.split(key)
        return -elbo.loss(key, params, *pair, binarise(images, bits_key, rows))

    total = 0.0
    for i in range(args.num_evaluations):
        for start in range(0, len(rows), size):
            key = jax.random.fold_in(jax.random.fold_in(rng_key, i), start)
            total += float(run(key, rows[start : start + size]))
    return total / args.num_evaluations / len(rows)


def main(args):
    """Train, evaluate, write the files; return the row of results."""
    report.belief_net_defaults(args)
    images = data.images(args)
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(args.seed), 6)
    model, guide, prior_means = build(args, images)
    elbo = OBJECTIVES[args.estimator]()
    # Declares what the objective learns for itself: temperatures, baselines, ...
    tunable = guide if args.estimator == "vimco" else elbo.tunable(guide)
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.num_steps, alpha=0.01)
    svi = SVI(model, tunable, optax.adam(schedule), elbo)
    params, running = train(args, images, svi, keys[0])
    seconds = time.perf_counter() - start

    pair, x = (model, guide), jnp.asarray(images.test)
    parts = [x[i : i + 1000] for i in range(0, len(x), 1000)]
    log_px = [
        log_evidence(jax.random.fold_in(keys[1], i), *pair, part, params=params, num_samples=100)
        for i, part in enumerate(parts)
    ]
    train_rows = jnp.asarray(images.train)
    row = {
        "backend": "NumPyro",
        "data": args.dataset,
        "layers": args.num_layers,
        "estimator": args.estimator,
        "training ELBO": mean_elbo(args, images, params, pair, train_rows, keys[2]),
        "last 1000 steps": running,
        "test bound, 100 samples": float(np.concatenate(log_px).mean()),
        "seconds": seconds,
    }

    stem = report.belief_net_stem("numpyro", args)
    report.write_row(stem.with_suffix(".json"), row)
    draws = to_arviz(keys[4], *pair, x[:20], params=params, num_samples=250)
    draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    prior = handlers.substitute(handlers.seed(prior_means, keys[5]), data=params)
    arrays = {
        "shape": images.shape,
        "data": images.test[:20],
        "reconstruction": draws["posterior_predictive"]["x"].mean(("chain", "draw")).values,
        "prior": np.asarray(jax.jit(prior, static_argnums=0)(40)),
    }
    np.savez(stem.with_suffix(".npz"), **arrays)
    report.vae_picture(stem.with_suffix(".png"), arrays)
    return row


if __name__ == "__main__":
    result = main(report.belief_net_parser(__doc__).parse_args())
    print(report.table([result], report.NET_COLUMNS))
