"""Pathfinder: closed forms, hard densities, several modes, what it refuses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_vae_ext.training import pathfinder

KEY = random.key(0)


def run(model, *args, **options):
    return pathfinder(KEY, model, *args, progress_bar=False, **options)


def badly_scaled(size: int, decades: float, correlation: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Cholesky factor of a Normal with equal correlations and unequal scales."""
    scales = np.logspace(-decades / 2, decades / 2, size)
    equal = np.full((size, size), correlation) + (1 - correlation) * np.eye(size)
    return 3 * scales, np.linalg.cholesky(equal) * scales[:, None]


@pytest.mark.usefixtures("exact")
def test_normal_is_found() -> None:
    """A Normal over four decades: its evidence, its mean and its covariance."""
    loc, tril = badly_scaled(12, 4, 0.9)

    def model(x):
        numpyro.factor("constant", 2.5)
        numpyro.sample("z", dist.MultivariateNormal(x, scale_tril=tril))

    found = run(model, jnp.asarray(loc), num_paths=3, num_samples=200)
    assert found.converged.all() and found.reasons == ("converged",) * 3
    np.testing.assert_allclose(found.elbo, 2.5, atol=1e-3)
    np.testing.assert_allclose(found.log_evidence, 2.5, atol=1e-3)
    width = np.sqrt((tril**2).sum(1))
    np.testing.assert_allclose((found.loc - loc) / width, 0, atol=1e-5)
    np.testing.assert_allclose(found.scale_tril / width[:, None], tril / width[:, None], atol=1e-5)
    assert found.sites == {"z": (12,)}
