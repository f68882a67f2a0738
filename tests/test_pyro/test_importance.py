"""Importance weights of pairs whose evidence and tails are known."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from reference import conjugate as oracle
from test_pyro.models import conjugate, family

from pyro_vae_ext.diagnostics import importance, log_evidence


def pair(x: torch.Tensor, spread: float, batch_size: int | None = None):
    """A conjugate model and its posterior, the variance times ``spread``: k = 1 - spread."""

    def guide() -> None:
        with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
            law = dist.Normal(0.5 * x[rows], (0.5 * spread) ** 0.5)
            pyro.sample("z", law.to_event(1))

    return conjugate(x, torch.zeros(x.shape[-1]), batch_size), guide


def truth(x: torch.Tensor) -> np.ndarray:
    return oracle.log_evidence(x.cpu().numpy(), 0.0)


@pytest.mark.parametrize("case", CASES["diagnostics"]["importance"])
def test_evidence_is_that_of_log_evidence(case: dict) -> None:
    """The same seed draws the same weights."""
    model, guide = pair(torch.randn(5, 2), 0.8)
    results = []
    for function in (importance, log_evidence):
        pyro.set_rng_seed(3)
        results.append(function(model, guide, **case))
    found, expected = results
    np.testing.assert_allclose(found.log_evidence, expected.cpu().numpy(), rtol=1e-5)
    assert found.log_weights.shape == (case["num_samples"], 5)
    assert found.khat.shape == found.good.shape == found.ess.shape == (5,)
    assert found.plates == ("data",)
    assert found.num_samples == case["num_samples"]


@pytest.mark.parametrize("spread", [0.9, 0.6])
def test_shape_and_evidence_are_the_true_ones(spread: float) -> None:
    """Rows have weights of one law, k = 1 - spread, but for their constants."""
    x = torch.randn(40, 1)
    found = importance(*pair(x, spread), num_samples=4_000)
    assert abs(found.khat.mean() - (1 - spread)) < 0.1
    assert found.good.sum() >= 38
    scores = (found.smoothed - truth(x)) / found.smoothed_error
    assert np.nanmax(np.abs(scores)) < 4
    assert found.ess.max() <= 4_000 and found.ess.min() > 1_000
    assert (found.elbo < found.smoothed).all()


def test_exact_guide_has_equal_weights(dtype: str) -> None:
    if dtype != "float64":
        pytest.skip("exact to float64 only")
    x = torch.randn(3, 2)
    found = importance(*pair(x, 1.0), num_samples=300)
    np.testing.assert_allclose(found.smoothed, truth(x))
    np.testing.assert_allclose(found.ess, 300.0)
    assert (found.smoothed_error < 1e-12).all()


def test_joint_weight() -> None:
    x, posterior = torch.randn(3, 2), family("MeanField", latent_dim=2)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        pyro.module("posterior", posterior)
        posterior("z")

    found = importance(model, guide, num_samples=2_000)
    assert found.khat.shape == () and found.plates == ()
    expected = oracle.global_log_evidence(x.cpu().numpy(), 0.0)
    assert abs(found.smoothed - expected) < 4 * found.smoothed_error
    assert bool(found.good)


def test_discrete_latent_has_no_tail() -> None:
    """Two weights, each of them of more draws than the tail has."""
    x = torch.tensor([0.3, 2.5])

    def model() -> None:
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2.0 * b, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(0.5))

    found = importance(model, guide, num_samples=500)
    assert found.khat.tolist() == [-np.inf, -np.inf] and found.good.all()
    parts = [dist.Normal(m, 1.0).log_prob(x).cpu().numpy() for m in (0.0, 2.0)]
    expected = np.logaddexp(*parts) - np.log(2)
    assert (np.abs(found.smoothed - expected) < 4 * found.smoothed_error).all()


def test_subsample_has_its_own_rows() -> None:
    x = 10.0 * torch.arange(6.0)[:, None]
    found = importance(*pair(x, 0.9, 2), num_samples=200, chunk_size=70)
    every = truth(x)
    rows = [int(np.argmin(np.abs(every - value))) for value in found.smoothed]
    assert len(set(rows)) == 2
    np.testing.assert_allclose(found.smoothed, every[rows], atol=0.1)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        importance(*pair(torch.zeros(2, 1), 0.9), num_samples=4, chunk_size=2, progress_bar=shown)
        assert ("importance" in capsys.readouterr().err) == shown


def test_bad_input() -> None:
    def model() -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("broken", torch.where(z > 0, torch.inf, 0.0))

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(0.0, torch.ones(2)))

    with pytest.raises(ValueError, match="Expected log-weights below infinity; got inf at"):
        importance(model, guide, num_samples=20)
    for name in ("num_samples", "chunk_size"):
        with pytest.raises(ValueError, match=f"Expected {name} >= 1; got 0."):
            importance(model, guide, **{name: 0})
