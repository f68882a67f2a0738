"""`fit` of both backends on one problem without noise: the same parameters and the same history."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import optax
import pyro
import pyro.distributions as pdist
import pytest
import torch
from numpyro.infer import SVI as TheirSVI
from pyro.infer import SVI as OurSVI

import numpyro_vae_ext.elbos
import numpyro_vae_ext.training
import pyro_vae_ext.elbos
import pyro_vae_ext.training

ROWS, DIM = 23, 3


def pyro_svi(num_rows: int) -> OurSVI:
    pyro.clear_param_store()

    def model(x: torch.Tensor, y: torch.Tensor, **schedules: Any) -> None:
        w = pyro.sample("w", pdist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        noise = pyro.param("noise", torch.tensor(0.7), constraint=pdist.constraints.positive)
        with pyro.plate("data", num_rows, subsample_size=len(x)):
            pyro.sample("y", pdist.Normal(x @ w, noise), obs=y)

    def guide(x: torch.Tensor, y: torch.Tensor, weight: Any = 1.0) -> None:
        # A point, with a divergence that the schedule weighs.
        loc = pyro.param("loc", torch.full((DIM,), 0.1))
        pyro.sample("w", pdist.Delta(loc, weight * loc).to_event(1))

    adam = pyro.optim.Adam({"lr": 0.05})
    return OurSVI(model, guide, adam, pyro_vae_ext.elbos.ImportanceWeightedELBO())


def numpyro_svi(num_rows: int) -> TheirSVI:
    def model(x: jax.Array, y: jax.Array, **schedules: Any) -> None:
        w = numpyro.sample("w", ndist.Normal(jnp.zeros(DIM), 1.0).to_event(1))
        noise = numpyro.param("noise", jnp.array(0.7), constraint=ndist.constraints.positive)
        with numpyro.plate("data", num_rows, subsample_size=len(x)):
            numpyro.sample("y", ndist.Normal(x @ w, noise), obs=y)

    def guide(x: jax.Array, y: jax.Array, weight: Any = 1.0) -> None:
        loc = numpyro.param("loc", jnp.full((DIM,), 0.1))
        numpyro.sample("w", ndist.Delta(loc, weight * loc.sum(), event_dim=1))

    adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.05)
    return TheirSVI(model, guide, adam, numpyro_vae_ext.elbos.ImportanceWeightedELBO())


@pytest.mark.parametrize("batch_size", [None, 5])
def test_same_training(batch_size: int | None) -> None:
    """With a ragged batch, schedules, validation, and rows that must be skipped."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, DIM))
    y = x @ [0.5, -1.0, 2.0] + 0.3 * rng.normal(size=ROWS)
    bad = y.copy()
    if batch_size is not None:
        bad[7] = np.nan
    options = {
        "num_epochs": 4,
        "batch_size": batch_size,
        "shuffle": False,
        "validation_every": 2,
        "progress_bar": False,
        "schedules": {"weight": lambda t: 0.1 * (t + 1), "learning_rate": lambda t: 0.1 / (t + 1)},
    }

    def torch_data(y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(x), torch.tensor(y)

    with pytest.warns(UserWarning, match="Skipped step 1") if batch_size else nullcontext():
        ours = pyro_vae_ext.training.fit(
            pyro_svi(ROWS),
            torch_data(bad),
            compile=False,
            validation_data=torch_data(y),
            **options,
        )
    with pytest.warns(UserWarning, match="Skipped step 1") if batch_size else nullcontext():
        theirs = numpyro_vae_ext.training.fit(
            jax.random.key(0),
            numpyro_svi(ROWS),
            (jnp.asarray(x), jnp.asarray(bad)),
            validation_data=(jnp.asarray(x), jnp.asarray(y)),
            **options,
        )
    assert set(ours.params) == set(theirs.params) == {"loc", "noise"}
    for name, value in ours.params.items():
        np.testing.assert_allclose(value.numpy(), theirs.params[name], rtol=1e-9)
    for name in ("loss", "validation_loss", "step_losses"):
        np.testing.assert_allclose(
            getattr(ours.history, name), getattr(theirs.history, name), rtol=1e-9
        )
    assert ours.history.skipped == theirs.history.skipped
    assert [(row.step, row.site, row.reason) for row in ours.history.skipped] == (
        [(1 + 5 * epoch, "y", "data") for epoch in range(4)] if batch_size else []
    )
    assert np.isfinite(ours.history.validation_loss).tolist() == [False, True, False, True]
