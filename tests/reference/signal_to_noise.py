"""Signal-to-noise ratio of the gradients of the importance-weighted bound.

The linear Gaussian experiment: `z ~ N(mu, I)`, `x ~ N(z, I)`, `q(z | x) = N(A x + b,
2/3 I)` with the parameters 0.01 off the optimum `mu = mean(x)`, `A = I / 2`,
`b = mu / 2`.

The ratio is taken per datum and pooled over data and coordinates,
`sqrt(sum E[g]^2 / sum Var[g])`: the ratio of the summed gradient, times a constant, but
free of the sign changes that the sum over data has near the optimum. Two things make it
cheap. The plain Monte Carlo mean of the reparameterised gradient of the guide drowns in
its own noise, but the doubly reparameterised gradient has the same expectation and a far
smaller variance, so its mean stands for both. And the squared mean is corrected for the
Monte Carlo variance that it carries. A hundred repetitions over 1,024 data then do the
work of 4e5.

References:
    Rainforth, Kosiorek, Le, Maddison, Igl, Wood and Teh (2018), Tighter Variational
    Bounds are Not Necessarily Better, arXiv 1802.04537, theorem 1 and section 4.
"""

from typing import NamedTuple

import numpy as np

from . import importance_weighted

NUM_PARTICLES = (8, 16, 32, 64, 128)
LOG_SCALE = 0.5 * np.log(2.0 / 3.0)


class Problem(NamedTuple):
    """Data `(N, D)` and the parameters, 0.01 off the optimum."""

    x: np.ndarray
    mu: np.ndarray
    A: np.ndarray
    b: np.ndarray


def problem(seed=0, num_data=1024, dim=20, offset=0.01):
    """Data of the model and parameters at `offset` from the optimum."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(dim) + np.sqrt(2.0) * rng.standard_normal((num_data, dim))
    mu = x.mean(0)
    return Problem(
        x=x,
        mu=mu + offset * rng.standard_normal(dim),
        A=0.5 * np.eye(dim) + offset * rng.standard_normal((dim, dim)),
        b=0.5 * mu + offset * rng.standard_normal(dim),
    )


def per_datum_gradients(noise, data, gradient):
    """Gradients `(N, D)` of each datum's bound in `mu` and in `b`, noise `(K, N, D)`.

    The gradient in `A` is the outer product of the one in `b` with the datum.
    """
    sigma = np.exp(LOG_SCALE)
    z = data.x @ data.A.T + data.b + sigma * noise
    log_weights = 0.5 * np.sum(noise**2 - (z - data.mu) ** 2 - (data.x - z) ** 2, axis=-1)
    model, guide = importance_weighted.coefficients(log_weights, gradient)
    path = data.mu + data.x - 2.0 * z
    if gradient != "reparam":
        path = path + noise / sigma
    return (
        np.einsum("kn,knd->nd", model, z - data.mu),
        np.einsum("kn,knd->nd", guide, path),
    )


def moments(draws):
    """Mean and unbiased variance over the first axis of an iterable of arrays."""
    total = total_squared = count = 0
    for draw in draws:
        total, total_squared, count = total + draw, total_squared + draw**2, count + 1
    mean = total / count
    return mean, (total_squared - count * mean**2) / (count - 1)


def pooled_ratio(variance, mean, mean_variance, num_repetitions):
    """`sqrt(sum E[g]^2 / sum Var[g])`, the squared mean corrected for its own noise.

    Args:
        variance: variance of the gradient whose ratio is asked for.
        mean: Monte Carlo mean of an unbiased estimate of the same gradient.
        mean_variance: single-draw variance of that estimate.
        num_repetitions: draws behind `mean`.
    """
    signal = np.sum(mean**2 - mean_variance / num_repetitions)
    return np.sqrt(signal / np.sum(variance))


def ratios(seed=0, num_repetitions=100, num_particles=NUM_PARTICLES, **kwargs):
    """Ratios over `num_particles` for `theta`, `reparam`, `stl` and `dreg`."""
    data = problem(seed, **kwargs)
    rng = np.random.default_rng(seed + 1)
    result = {name: [] for name in ("theta", *importance_weighted.GRADIENTS)}
    for count in num_particles:

        def draws(count=count):
            for _ in range(num_repetitions):
                noise = rng.standard_normal((count, *data.x.shape), dtype=np.float32)
                pairs = [
                    per_datum_gradients(noise, data, gradient)
                    for gradient in importance_weighted.GRADIENTS
                ]
                yield np.stack([pairs[0][0], *(guide for _, guide in pairs)])

        means, variances = moments(draws())
        theta, reparam, stl, dreg = zip(means, variances, strict=True)
        for name, (_, variance), (mean, mean_variance) in (
            ("theta", theta, theta),
            ("reparam", reparam, dreg),
            ("stl", stl, stl),
            ("dreg", dreg, dreg),
        ):
            ratio = pooled_ratio(variance, mean, mean_variance, num_repetitions)
            result[name].append(ratio)
    return {name: np.array(values) for name, values in result.items()}


def slopes(ratios, num_particles=NUM_PARTICLES):
    """Log-log slope of each ratio over all of `num_particles` and over the last octave."""
    log_k = np.log(num_particles)
    return {
        name: (
            np.polyfit(log_k, np.log(values), 1)[0],
            np.log(values[-1] / values[-2]) / (log_k[-1] - log_k[-2]),
        )
        for name, values in ratios.items()
    }
