"""Pathfinder from the same random numbers: the same paths, Normals and draws in both."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from test_parity.test_auto import COUNTS, model_in_numpyro, model_in_pyro

import numpyro_vae_ext.training
import pyro_vae_ext.training


def test_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    make = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda *_: make(0))
    options = {"num_paths": 3, "num_samples": 100, "progress_bar": False}
    ours = pyro_vae_ext.training.pathfinder(model_in_pyro, torch.tensor(COUNTS), **options)
    theirs = numpyro_vae_ext.training.pathfinder(
        jax.random.key(0), model_in_numpyro, jax.numpy.asarray(COUNTS), **options
    )
    assert ours.reasons == theirs.reasons == ("converged",) * 3
    assert ours.sites == theirs.sites
    np.testing.assert_array_equal(ours.num_iterations, theirs.num_iterations)
    for name in ("loc", "scale_tril", "elbos", "log_weights", "khats", "log_evidence"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-6)
    for site, draws in ours.resampled.items():
        np.testing.assert_allclose(draws, theirs.resampled[site], atol=1e-6)
