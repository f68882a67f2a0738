"""A variational autoencoder of binary images in NumPyro, on several devices and processes.

The digits of `vae_numpyro.py` with the rows of a batch over a mesh of devices:

    python examples/distributed_numpyro.py --num-devices 4 --guide IAF --num-particles 5

`--num-devices` makes that many devices out of one CPU; GPUs are taken as they are. With several
processes, each one loads its own rows (here two of them, on one machine):

    for i in 0 1; do python examples/distributed_numpyro.py --coordinator localhost:8476 \
        --num-processes 2 --process-id $i & done; wait

`--batch-size` counts the rows of all devices together. The noise comes from one key, and is the
same for any number of devices.
"""

import socket
import subprocess
import sys
import time
from functools import partial

import data
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import report
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI
from tqdm import tqdm
from vae_numpyro import MLP

from numpyro_vae_ext import guides
from numpyro_vae_ext.diagnostics import active_units, log_evidence, to_arviz
from numpyro_vae_ext.elbos import ImportanceWeightedELBO


def build(args, images):
    """Model, guide, and a program that returns the means of prior samples."""
    width, latent_dim = (100, 10) if args.dataset == "digits" else (200, 50)
    num_rows, num_pixels = images.train.shape
    rngs = nnx.Rngs(args.seed)
    encoder = MLP((num_pixels, width, width), rngs=rngs)
    decoder = MLP((latent_dim, width, width, num_pixels), rngs=rngs, linear_output=True)
    posterior = getattr(guides, args.guide)(latent_dim, context_dim=width, rngs=rngs)

    def model(x):
        decode = nnx_module("decoder", decoder)
        # len(x) counts the rows of all devices: a sharded array has its global shape.
        with numpyro.plate("data", num_rows, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([latent_dim]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = nnx_module("encoder", encoder)
        draw = nnx_module("posterior", posterior)
        with numpyro.plate("data", num_rows, subsample_size=len(x)):
            draw("z", encode(x - images.centre))

    def prior_means(num_samples):
        decode = nnx_module("decoder", decoder)
        prior = dist.Normal(0.0, 1.0).expand([num_samples, latent_dim])
        return jax.nn.sigmoid(decode(numpyro.sample("z", prior)))

    return model, guide, prior_means


def batches(args, images, sharding):
    """`(steps, rows, pixels)` of some steps at a time, of which each process loads its part."""
    rank, num_processes = jax.process_index(), jax.process_count()
    mine = images.train[rank::num_processes][: len(images.train) // num_processes]
    size = args.batch_size // num_processes
    steps_per_epoch = len(mine) // size
    rng = np.random.default_rng((args.seed, rank))
    for _ in range(args.max_epochs):
        # The few rows that are left over are others in each epoch.
        order = rng.permutation(len(mine))[: steps_per_epoch * size]
        rows = mine[order.reshape(steps_per_epoch, size)].astype(np.float32)
        yield jax.make_array_from_process_local_data(sharding, rows)


def train(args, images, svi, mesh):
    """Train on all devices; parameters as arrays of this process."""
    everywhere = NamedSharding(mesh, P())

    @partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def run(state, first, rows):
        def step(state, xs):
            number, batch = xs
            if images.dynamic:
                key = jax.random.fold_in(jax.random.key(args.seed), number)
                batch = jax.random.bernoulli(key, batch).astype(batch.dtype)
            return svi.update(state, batch)

        return jax.lax.scan(step, state, (first + jnp.arange(len(rows)), rows))

    @partial(jax.jit, out_shardings=everywhere)
    def init():
        rows = jnp.zeros((args.batch_size, images.train.shape[1]))
        return svi.init(jax.random.key(args.seed + 1), rows)

    state = init()
    title = f"{report.vae_title('numpyro', args)} x {mesh.size}"
    step = 0
    with tqdm(total=args.max_epochs, desc=title, disable=jax.process_index() > 0) as bar:
        for rows in batches(args, images, NamedSharding(mesh, P(None, "data"))):
            state, losses = run(state, step, rows)
            step += len(losses)
            bar.update()
            if bar.n % 10 == 0 or bar.n == bar.total:
                bound = -np.asarray(losses).mean() / len(images.train)
                bar.set_postfix(bound=f"{bound:.2f}", refresh=False)
    # Every device has a whole copy.
    copies = jax.tree.map(lambda leaf: leaf.addressable_data(0), state)
    return svi.get_params(copies)


def log_evidence_of_all(key, model, guide, x, params, num_samples):
    """One number for each row of `x`, computed on all devices of all processes."""
    local = Mesh(np.array(jax.local_devices()), ("data",))
    # Equal shares for all devices: the first rows once more at the end, and dropped again.
    share = -(-len(x) // jax.device_count()) * jax.local_device_count()
    mine = (jax.process_index() * share + np.arange(share)) % len(x)
    values = []
    for part in np.split(mine, range(len(local.devices) * 250, share, len(local.devices) * 250)):
        found = log_evidence(
            jax.random.fold_in(key, part[0]),
            model,
            guide,
            jax.device_put(x[part], NamedSharding(local, P("data"))),
            params=jax.device_put(params, NamedSharding(local, P())),
            num_samples=num_samples,
            progress_bar=jax.process_index() == 0,
        )
        values.append(np.asarray(found))
    gathered = multihost_utils.process_allgather(np.concatenate(values), tiled=True)
    return np.asarray(gathered)[: len(x)]


def main(args):
    """Train, evaluate, write the files; return the row of results on the first process."""
    if args.smoke_test:
        args.max_epochs, args.num_evaluation_samples = 3, 20
    # Before any device is touched, both of them.
    jax.config.update("jax_num_cpu_devices", args.num_devices)
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    if args.batch_size % mesh.size:
        raise ValueError(
            f"Expected --batch-size to be a multiple of {mesh.size} devices; got {args.batch_size}."
        )
    images = data.images(args)
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(args.seed), 6)
    model, guide, prior_means = build(args, images)
    elbo = ImportanceWeightedELBO(args.num_particles, gradient=args.gradient)
    num_steps = args.max_epochs * (len(images.train) // args.batch_size)
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps, alpha=0.01))
    params = train(args, images, SVI(model, guide, adam, elbo), mesh)
    seconds = time.perf_counter() - start

    bound, log_px = (
        log_evidence_of_all(key, model, guide, images.test, params, num_samples).mean()
        for key, num_samples in zip(
            keys, (args.num_particles, args.num_evaluation_samples), strict=False
        )
    )
    if jax.process_index() > 0:
        return None
    x = jnp.asarray(images.test)
    row = {
        "backend": "NumPyro",
        "data": args.dataset,
        "guide": args.guide,
        "objective": report.objective_name(args.num_particles, args.gradient),
        "bound": float(bound),
        "NLL": -float(log_px),
        "active units": int(active_units(keys[2], model, guide, x[:1000], params=params).count),
        "seconds": seconds,
        "processes": jax.process_count(),
        "devices": mesh.size,
    }

    stem = report.vae_stem("numpyro", args)
    stem = stem.with_name(f"sharded{jax.process_count()}x{jax.local_device_count()}_{stem.name}")
    report.write_row(stem.with_suffix(".json"), row)
    draws = to_arviz(keys[3], model, guide, x[:20], params=params, num_samples=250)
    draws.to_netcdf(str(stem.with_suffix(".nc")), engine="h5netcdf")
    means = handlers.substitute(handlers.seed(prior_means, keys[4]), data=params)
    arrays = {
        "shape": images.shape,
        "data": images.test[:20],
        "reconstruction": draws["posterior_predictive"]["x"].mean(("chain", "draw")).values,
        "prior": np.asarray(means(40)),
    }
    np.savez(stem.with_suffix(".npz"), **arrays)
    report.vae_picture(stem.with_suffix(".png"), arrays)
    return row


def smoke_test_of_two_processes():
    """Run this script as two processes of two devices; they end before this returns."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    group = ("--num-devices", "2", "--coordinator", address, "--num-processes", "2")
    processes = [
        subprocess.Popen([sys.executable, *sys.argv, *group, "--process-id", str(rank)])
        for rank in range(2)
    ]
    if any([process.wait() for process in processes]):
        sys.exit("Expected two processes to succeed.")


def parse_args():
    """Options; `--batch-size` and `--max-epochs` hold for both data sets here."""
    parser = report.vae_parser(__doc__)
    parser.add_argument("--num-devices", type=int, default=4, help="of one process, on a CPU")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.set_defaults(max_epochs=700, batch_size=48)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()
    if args.smoke_test and not args.coordinator:
        smoke_test_of_two_processes()
    row = main(args)
    if row is not None:
        print(report.table([row]))
