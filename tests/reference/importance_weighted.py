"""Importance-weighted bound and its three gradients.

All gradients are those of the *bound* (an ascent direction); the loss has the opposite
sign. With `w~_k = w_k / sum_j w_j` per datum:

- reparam: `sum_k w~_k d log w_k / d phi`, the total derivative;
- stl: `sum_k w~_k (d log w_k / d z_k) d z_k / d phi`, the path alone;
- dreg: `sum_k w~_k^2 (d log w_k / d z_k) d z_k / d phi`.

The model's parameters get `sum_k w~_k d log w_k / d theta` under all three.

References:
    Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, arXiv
    1509.00519, section 3.
    Roeder, Wu and Duvenaud (2017), Sticking the Landing, arXiv 1703.09194, section 3.
    Tucker, Lawson, Gu and Maddison (2019), Doubly Reparameterized Gradient Estimators,
    arXiv 1810.04152, sections 3-4.
"""

import numpy as np
from scipy.special import logsumexp, softmax

from . import complex_step

GRADIENTS = ("reparam", "stl", "dreg")


def bound(log_weights, scale=1.0):
    """`scale * sum_n (logsumexp_k log w_kn - log K)` of weights `(K, *plates)`."""
    log_mean = logsumexp(log_weights, axis=0) - np.log(len(log_weights))
    return scale * np.sum(log_mean)


def normalised_weights(log_weights):
    """`w~`, summing to 1 over the first axis."""
    return softmax(log_weights, axis=0)


def coefficients(log_weights, gradient):
    """Coefficient of each particle in the model's and in the guide's gradient."""
    weights = normalised_weights(log_weights)
    return weights, weights**2 if gradient == "dreg" else weights


def gradients(log_joint, sample, log_q, noise, theta, phi, gradient, scale=1.0):
    """Gradients for any reparameterised guide and given noise.

    Args:
        log_joint: `(z, theta, phi) -> (K, *plates)`, `log p(x, z)`; `phi` is handed over
            for parameters that the model shares with the guide.
        sample: `(noise, phi) -> z`.
        log_q: `(z, phi) -> (K, *plates)`, at any `z`, analytic in both arguments.
        noise: the draws, `K` first.
        theta: dictionary of arrays, parameters of the model alone.
        phi: dictionary of arrays, parameters of the guide.
        gradient: `"reparam"`, `"stl"` or `"dreg"`.
        scale: the common scale of all sites.

    Returns:
        The bound and the dictionaries of its gradients in `theta` and in `phi`.
    """
    z = sample(noise, phi)
    log_weights = log_joint(z, theta, phi) - log_q(z, phi)
    model, guide = coefficients(log_weights, gradient)

    def weighted(coefficient, values):
        return scale * np.sum(coefficient * values)

    def path(moved):
        moved_z = sample(noise, moved)
        density = moved if gradient == "reparam" else phi
        return weighted(guide, log_joint(moved_z, theta, phi) - log_q(moved_z, density))

    grad_theta = complex_step.gradient(
        lambda moved: weighted(model, log_joint(z, moved, phi)), theta
    )
    grad_phi = complex_step.gradient(path, phi)
    shared = complex_step.gradient(lambda moved: weighted(model, log_joint(z, theta, moved)), phi)
    grad_phi = {name: grad_phi[name] + shared[name] for name in phi}
    return bound(log_weights, scale), grad_theta, grad_phi


def linear_gaussian(noise, x, parameters, gradient="reparam"):
    """Bound and closed-form gradients of `z ~ N(mu, I)`, `x ~ N(z, I)`,
    `q(z | x) = N(A x + b, diag(sigma)^2)`.

    With `z = A x + b + sigma eps`: `d log p / d z = mu + x - 2 z`, `d log q / d z =
    -eps / sigma`, and along the path `log q` is `-sum log sigma - eps^2 / 2`.

    Args:
        noise: `(K, N, D)`.
        x: `(N, D)`.
        parameters: `mu (D,)`, `A (D, D)`, `b (D,)`, `log_scale (D,)`.
        gradient: `"reparam"`, `"stl"` or `"dreg"`.

    Returns:
        The bound and a dictionary of gradients, named and shaped as `parameters`.
    """
    mu, log_scale = parameters["mu"], parameters["log_scale"]
    sigma = np.exp(log_scale)
    z = x @ parameters["A"].T + parameters["b"] + sigma * noise
    log_weights = np.sum(
        -0.5 * (z - mu) ** 2
        - 0.5 * (x - z) ** 2
        + 0.5 * noise**2
        + log_scale
        - 0.5 * np.log(2.0 * np.pi),
        axis=-1,
    )
    model, guide = (c[..., None] for c in coefficients(log_weights, gradient))
    path = mu + x - 2.0 * z
    entropy = 1.0
    if gradient != "reparam":
        path = path + noise / sigma
        entropy = 0.0
    per_row = np.sum(guide * path, axis=0)
    return bound(log_weights), {
        "mu": np.sum(model * (z - mu), axis=(0, 1)),
        "A": per_row.T @ x,
        "b": per_row.sum(0),
        "log_scale": np.sum(guide * (path * sigma * noise + entropy), axis=(0, 1)),
    }
