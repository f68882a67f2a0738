"""How the noise of the gradients grows or falls with the number of particles.

The linear Gaussian experiment of Rainforth et al. (2018, arXiv 1802.04537, section 4):
`z ~ N(mu, I)`, `x ~ N(z, I)`, `q(z | x) = N(A x + b, 2/3 I)`, parameters 0.01 off the
optimum. The signal-to-noise ratio of the model's gradient grows as `sqrt(K)`, that of the
guide's reparameterised gradient falls as `1 / sqrt(K)`; the `"stl"` and `"dreg"` gradients
turn the fall into growth.

    python examples/signal_to_noise.py --backend numpyro

Ratios are per datum, `sqrt(sum E[g]^2 / sum Var[g])` over data and coordinates, with the
squared mean corrected for its Monte Carlo noise. The mean of the reparameterised gradient
is taken from the doubly reparameterised one, which has the same expectation and far less
noise. The gradient in a datum's `A x + b` stands for those in `b` and in `A`, which it
gives by a sum and an outer product with the datum.
"""

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import report
from tqdm import tqdm

NUM_PARTICLES = (8, 16, 32, 64, 128)
GRADIENTS = ("reparam", "stl", "dreg")
LOG_SCALE = 0.5 * np.log(2.0 / 3.0)


class Problem(NamedTuple):
    """Data, the model's `mu` and the guide's `A x + b`, each `(N, D)`."""

    x: np.ndarray
    mu: np.ndarray
    location: np.ndarray


def problem(seed, num_data, dim=20, offset=0.01):
    """Data of the model and parameters `offset` away from the optimum."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(dim) + np.sqrt(2.0) * rng.standard_normal((num_data, dim))
    best = x.mean(0)
    mu = best + offset * rng.standard_normal(dim)
    matrix = 0.5 * np.eye(dim) + offset * rng.standard_normal((dim, dim))
    shift = 0.5 * best + offset * rng.standard_normal(dim)
    arrays = (x, np.broadcast_to(mu, x.shape), x @ matrix.T + shift)
    return Problem(*(array.astype(np.float32) for array in arrays))


def moments_pyro(data, num_particles, gradient, repetitions, seed):
    """Mean and variance of the gradients in `mu` and `location`, `(2, N, D)` each."""
    import pyro
    import pyro.distributions as dist
    import torch

    from pyro_vae_ext.elbos import ImportanceWeightedELBO
    from pyro_vae_ext.guides import MeanField

    pyro.set_rng_seed(seed)
    pyro.enable_validation(False)
    dim = data.x.shape[1]
    x = torch.from_numpy(data.x)
    mu, location = (torch.tensor(a, requires_grad=True) for a in data[1:])
    posterior = MeanField(dim, context_dim=dim)
    with torch.no_grad():
        posterior.loc.weight.copy_(torch.eye(dim))
        posterior.log_scale.weight.zero_()
        posterior.log_scale.bias.fill_(LOG_SCALE)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            posterior("z", location)

    elbo = ImportanceWeightedELBO(num_particles, gradient=gradient)
    total, total_squared = 0.0, 0.0
    for _ in range(repetitions):
        loss = elbo.differentiable_loss(model, guide, x)
        draw = torch.stack(torch.autograd.grad(loss, (mu, location))).double()
        total, total_squared = total + draw, total_squared + draw**2
    return finish(total.numpy(), total_squared.numpy(), repetitions)


def moments_numpyro(data, num_particles, gradient, repetitions, seed):
    """Mean and variance of the gradients in `mu` and `location`, `(2, N, D)` each."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from flax import nnx
    from numpyro.contrib.module import nnx_module

    from numpyro_vae_ext.elbos import ImportanceWeightedELBO
    from numpyro_vae_ext.guides import MeanField

    dim = data.x.shape[1]
    posterior = MeanField(dim, context_dim=dim, rngs=nnx.Rngs(0))
    posterior.loc.kernel[...] = jnp.eye(dim)
    posterior.log_scale.kernel[...] = jnp.zeros((dim, dim))
    posterior.log_scale.bias[...] = jnp.full(dim, LOG_SCALE)

    def model(x):
        mu = numpyro.param("mu", data.mu)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        location = numpyro.param("location", data.location)
        with numpyro.plate("data", len(x)):
            nnx_module("posterior", posterior)("z", location)

    elbo = ImportanceWeightedELBO(num_particles, gradient=gradient)
    x = jnp.asarray(data.x)
    params = {
        "mu": jnp.asarray(data.mu),
        "location": jnp.asarray(data.location),
        "posterior$params": nnx.to_pure_dict(nnx.state(posterior, nnx.Param)),
    }

    # The parameters are arguments: XLA's CPU compiler gets products with closed-over constant
    # matrices whose entries are all equal wrong (seen with jaxlib 0.10.2).
    @jax.jit
    def draw(params, key):
        grads = jax.grad(lambda p: elbo.loss(key, p, model, guide, x))(params)
        return jnp.stack([grads["mu"], grads["location"]])

    total, total_squared = 0.0, 0.0
    for key in jax.random.split(jax.random.key(seed), repetitions):
        gradients = np.asarray(draw(params, key), np.float64)
        total, total_squared = total + gradients, total_squared + gradients**2
    return finish(total, total_squared, repetitions)


def finish(total, total_squared, repetitions):
    """Mean and unbiased variance from sums."""
    mean = total / repetitions
    return mean, (total_squared - repetitions * mean**2) / (repetitions - 1)


def ratios(backend, num_particles=NUM_PARTICLES, num_data=256, repetitions=100, seed=0):
    """Signal-to-noise ratios over `num_particles`, one array per gradient."""
    moments = {"pyro": moments_pyro, "numpyro": moments_numpyro}[backend]
    data = problem(seed, num_data)
    result = {name: [] for name in ("theta", *GRADIENTS)}
    with tqdm(total=len(num_particles) * len(GRADIENTS), desc=backend) as bar:
        for count in num_particles:
            found = {}
            for gradient in GRADIENTS:
                found[gradient] = moments(data, count, gradient, repetitions, seed + 1)
                bar.update()
            (mean, noise), (_, variance) = found["dreg"], found["reparam"]
            cases = {"theta": (*(m[0] for m in found["reparam"]), found["reparam"][1][0])}
            cases["reparam"] = (mean[1], noise[1], variance[1])
            for gradient in ("stl", "dreg"):
                mean, variance = found[gradient]
                cases[gradient] = (mean[1], variance[1], variance[1])
            for name, (mean, noise, variance) in cases.items():
                signal = np.sum(mean**2 - noise / repetitions)
                result[name].append(np.sqrt(signal / variance.sum()))
    return {name: np.array(values) for name, values in result.items()}


def slopes(ratios, num_particles):
    """Log-log slope over all of `num_particles` and over the last octave."""
    log_k = np.log(num_particles)
    return {
        name: (
            float(np.polyfit(log_k, np.log(values), 1)[0]),
            float(np.log(values[-1] / values[-2]) / (log_k[-1] - log_k[-2])),
        )
        for name, values in ratios.items()
    }


def picture(path, results, num_particles):
    """Ratios against the number of particles, one panel per backend."""
    colours = {"theta": "#333333", "reparam": "#c0392b", "stl": "#2f6fb0", "dreg": "#3a9a5b"}
    figure, panels = plt.subplots(
        1, len(results), figsize=(4.4 * len(results), 3.4), layout="constrained", squeeze=False
    )
    for axes, (backend, ratios) in zip(panels[0], results.items(), strict=True):
        for name, values in ratios.items():
            label = f"{name} ({slopes(ratios, num_particles)[name][0]:+.2f})"
            axes.loglog(num_particles, values, "o-", color=colours[name], label=label)
        axes.set_xticks(num_particles, num_particles)
        axes.minorticks_off()
        axes.set_xlabel("particles K")
        axes.set_ylabel("signal-to-noise ratio")
        axes.set_title(backend, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8, title="gradient (slope)", title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(args):
    """Print the slopes, draw the picture; return the ratios of every backend."""
    num_data, repetitions = (8, 20) if args.smoke_test else (args.num_data, args.repetitions)
    counts = NUM_PARTICLES[:2] if args.smoke_test else NUM_PARTICLES
    backends = report.BACKENDS if args.backend == "installed" else (args.backend,)
    results = {
        backend: ratios(backend, counts, num_data, repetitions, args.seed) for backend in backends
    }
    print(f"{'backend':8}  {'gradient':8}  {'slope':>6}  {'last octave':>11}")
    for backend, found in results.items():
        for name, (slope, last) in slopes(found, counts).items():
            print(f"{backend:8}  {name:8}  {slope:+6.3f}  {last:+11.3f}")
    picture(args.output_dir / "signal_to_noise.png", results, counts)
    return results


if __name__ == "__main__":
    parser = report.parser(__doc__)
    parser.add_argument("--backend", choices=("installed", "pyro", "numpyro"), default="installed")
    parser.add_argument("--num-data", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=100)
    main(parser.parse_args())
