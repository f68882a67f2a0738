"""The report of both backends from the same weights, draws and other rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import pytest
import torch
from numpyro.contrib.module import nnx_module
from test_parity.bridge import families

from numpyro_vae_ext.diagnostics import _utilisation as theirs_numbers
from numpyro_vae_ext.diagnostics import latent_utilisation as numpyro_utilisation
from pyro_vae_ext.diagnostics import _utilisation as our_numbers
from pyro_vae_ext.diagnostics import latent_utilisation as pyro_utilisation

ROWS, DRAWS = 5, 8


@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_same_report(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ours, theirs = families(name, latent_dim=2, context_dim=3, hidden_dims=(6,))
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(ROWS, 3)), rng.normal(size=(3, 2))
    noise = rng.normal(size=(2, DRAWS, ROWS, 2))
    shifts = rng.permuted(np.tile(np.arange(1, ROWS), (DRAWS, 1)), axis=1)
    order = rng.permutation(ROWS)
    for module in (our_numbers, theirs_numbers):
        monkeypatch.setattr(module, "other_rows", lambda *_: shifts[:, :3])
        monkeypatch.setattr(module, "row_order", lambda *_: order)

    def pyro_model() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", pdist.Normal(torch.zeros(2), 1.0).to_event(1))
            law = pdist.Normal(z @ torch.tensor(weight).T, 0.7)
            pyro.sample("x", law.to_event(1), obs=torch.tensor(x))

    def pyro_guide() -> None:
        with pyro.plate("data", ROWS):
            ours("z", torch.tensor(x))

    def numpyro_model() -> None:
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", ndist.Normal(z @ weight.T, 0.7).to_event(1), obs=x)

    def numpyro_guide() -> None:
        post = nnx_module("posterior", theirs)
        with numpyro.plate("data", ROWS):
            post("z", x)

    calls = 0

    def in_torch(shape: tuple, **_: object) -> torch.Tensor:
        nonlocal calls
        if shape[0] != DRAWS:
            return torch.zeros(shape)
        calls += 1
        return torch.tensor(noise[calls - 1]).reshape(shape)

    traced = 0

    def in_jax(key: jax.Array, shape: tuple = (), dtype: object = float) -> jax.Array:
        nonlocal traced
        # Traced one after the other: a look at the sites, the draws, those from the prior.
        traced, place = traced + 1, traced - 1
        if place < 0:
            return jnp.zeros(shape)

        def look_up(keys: np.ndarray) -> np.ndarray:
            return noise[place].reshape(keys.shape[:-1] + shape)

        like = jax.ShapeDtypeStruct(shape, jnp.float64)
        data = jax.random.key_data(key)
        return jax.pure_callback(look_up, like, data, vmap_method="broadcast_all")

    options = {"num_samples": DRAWS, "num_contrasts": 3, "progress_bar": False}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", in_torch)
        patch.setattr(torch.distributions.normal, "_standard_normal", in_torch)
        found = pyro_utilisation(pyro_model, pyro_guide, **options)
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "normal", in_jax)
        expected = numpyro_utilisation(
            jax.random.key(0), numpyro_model, numpyro_guide, params={}, **options
        )
    a, b = found.table, expected.table
    assert a[["quantity", "site", "dimension"]].equals(b[["quantity", "site", "dimension"]])
    columns = ["estimate", "standard_error"]
    np.testing.assert_allclose(a[columns], b[columns], rtol=1e-9, atol=1e-9)
    assert a["estimate"].abs().min() > 1e-3, "nothing to compare"
