"""Diagnostics against closed forms."""

from __future__ import annotations

import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import poutine
from reference import conjugate as oracle
from scipy import stats
from test_pyro.models import amortised, conjugate, family, shaken

from pyro_vae_ext import _trace
from pyro_vae_ext.diagnostics import active_units, log_evidence, to_arviz


def pair(rows: int = 6, dim: int = 2, name: str = "IAF"):
    x, mu = torch.randn(rows, dim), torch.full((dim,), 0.2)
    posterior = shaken(family(name, latent_dim=dim, context_dim=dim), 0.05)
    # Wider than the posterior, so that the weights have light tails.
    (posterior if name == "MeanField" else posterior.base).log_scale.bias.data += 0.5
    return conjugate(x, mu), amortised(posterior, x), x


@pytest.mark.parametrize("case", CASES["diagnostics"]["log_evidence"])
def test_log_evidence_shape_and_chunks(case: dict) -> None:
    model, guide, x = pair()
    found = log_evidence(model, guide, **case)
    assert found.shape == (len(x),) and not found.requires_grad
    assert torch.isfinite(found).all()


def test_log_evidence_is_the_evidence() -> None:
    """Its exponential is an unbiased estimate of p(x): 4 standard errors over 16 estimates."""
    model, guide, x = pair(name="MeanField")
    options = {"num_samples": 2_000, "chunk_size": 700, "progress_bar": False}
    found = torch.stack([log_evidence(model, guide, **options) for _ in range(16)]).exp()
    truth = torch.as_tensor(oracle.log_evidence(x.cpu().numpy(), 0.2)).exp().to(found)
    error = found.std(0) / 4.0
    assert ((found.mean(0) - truth).abs() < 4 * error).all()
    assert (error < 0.05 * truth).all()


def test_log_evidence_in_chunks_is_one_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming over chunks of any size, the last one ragged, gives the mean of all weights."""
    model, guide, _ = pair(name="MeanField")
    noise, taken = torch.randn(50, 6, 2), 0

    def draw(shape, **kwargs):
        nonlocal taken
        part = noise[taken : taken + shape[0]] if len(shape) == 3 else noise[:1]
        taken += len(part) if len(shape) == 3 else 0
        return part.reshape(shape)

    monkeypatch.setattr(torch, "randn", draw)
    results = []
    for chunk_size in (50, 7, 1):
        taken = 0
        results.append(log_evidence(model, guide, num_samples=50, chunk_size=chunk_size))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_log_evidence_bounds_its_memory_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a chunk_size, a chunk's widest site has no more numbers than allowed, if it can."""
    model, guide, x = pair(rows=6, dim=2)
    sizes: list[int] = []
    run = _trace.run

    def counted(*args, num_particles: int, **kwargs):
        sizes.append(num_particles)
        return run(*args, num_particles=num_particles, **kwargs)

    monkeypatch.setattr(_trace, "run", counted)
    for most, expected in ((2**24, [7]), (12 * 3, [3, 3, 1]), (5, [1] * 7)):
        monkeypatch.setattr(_trace, "MOST_NUMBERS", most)
        log_evidence(model, guide, num_samples=7, progress_bar=False)
        assert sizes == expected
        sizes.clear()


def test_log_evidence_of_a_discrete_latent() -> None:
    """No gradient, no need of a reparameterised sampler."""
    x = torch.tensor([0.3, -1.0])

    def model() -> None:
        with pyro.plate("data", 2):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("data", 2):
            pyro.sample("b", dist.Bernoulli(0.5))

    found = log_evidence(model, guide, num_samples=20_000, chunk_size=5_000, progress_bar=False)
    density = stats.norm.pdf(x.cpu().numpy()[:, None], [0.0, 1.0]) @ [0.7, 0.3]
    np.testing.assert_allclose(found.cpu().numpy(), np.log(density), atol=0.03)


def test_log_evidence_of_a_subsample_shares_its_rows() -> None:
    x = 10.0 * torch.arange(8.0)[:, None]
    posterior = family("MeanField", latent_dim=1, context_dim=1)
    with torch.no_grad():
        posterior.loc.weight.fill_(0.5)
        posterior.log_scale.weight.zero_()
    model, guide = conjugate(x, torch.zeros(1), 3), amortised(posterior, x, 3)
    found = log_evidence(model, guide, num_samples=4_000, chunk_size=500, progress_bar=False)
    every = oracle.log_evidence(x.cpu().numpy(), 0.0)
    # Each estimate belongs to one row, not to a mixture of rows over chunks.
    assert all(np.abs(value - every).min() < 0.5 for value in found.cpu().numpy())


@pytest.mark.parametrize("case", CASES["diagnostics"]["active_units"])
def test_active_units(case: dict) -> None:
    """Posterior means with variance 1, 0.25 and 0 over the data; noise does not count."""
    x = torch.randn(4000, 3)
    slopes = torch.tensor([1.0, 0.5, 0.0])

    def model() -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def guide() -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x[:, 0], 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(slopes * x + 0.0 * a.unsqueeze(-1), 1.0).to_event(1))

    found = active_units(model, guide, **case)
    assert found.count == 2 and set(found.active) == {"z"}
    assert found.active["z"].tolist() == [True, True, False]
    expected = (slopes * x).var(0)
    # An estimate by means of draws alone would be 1/S too large in every dimension.
    torch.testing.assert_close(found.variance["z"], expected, rtol=0.05, atol=0.004)


@pytest.mark.parametrize("case", CASES["diagnostics"]["to_arviz"])
def test_to_arviz_groups(case: dict) -> None:
    x = torch.randn(6, 3)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.sum(-1, keepdim=True) + w.unsqueeze(-1)
            pyro.deterministic("twice", 2.0 * z, event_dim=1)
            pyro.sample("x", dist.Normal(loc.expand(loc.shape[:-1] + (3,)), 1.0).to_event(1), obs=x)
            pyro.factor("factor", torch.zeros(6))

    posterior = family("IAF", latent_dim=2)

    def guide() -> None:
        pyro.sample("w", dist.Normal(torch.tensor(0.1), 1.0))
        with pyro.plate("data", 6):
            pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            posterior("z")

    result = to_arviz(model, guide, **case)
    chains, draws = case["num_chains"], case["num_samples"]
    posterior_group = result["posterior"]
    assert set(posterior_group.data_vars) == {"twice", "w", "z"}
    np.testing.assert_allclose(posterior_group["twice"], 2 * posterior_group["z"], rtol=1e-6)
    assert posterior_group["twice"].dims == ("chain", "draw", "data", "twice_dim_0")
    assert posterior_group["w"].dims == ("chain", "draw")
    assert posterior_group["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert posterior_group["z"].shape == (chains, draws, 6, 2)
    assert result["sample_stats"]["log_weight"].dims == ("chain", "draw")
    np.testing.assert_allclose(result["observed_data"]["x"].values, x.cpu().numpy())
    assert set(result["observed_data"].data_vars) == {"x"}
    assert len(np.unique(posterior_group["w"].values)) == chains * draws
    if case.get("posterior_predictive", True):
        assert result["posterior_predictive"]["x"].shape == (chains, draws, 6, 3)
        assert result["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "x_dim_0")
    else:
        assert "posterior_predictive" not in (
            result.groups() if callable(result.groups) else result.groups
        )


def test_to_arviz_numbers() -> None:
    """log_weight belongs to its draw; predictive data follow the draws; k-hat can be had."""
    model, guide, x = pair(rows=4)
    result = to_arviz(model, guide, num_samples=500, num_chains=2, chunk_size=300)
    z = torch.as_tensor(result["posterior"]["z"].values)
    weights = result["sample_stats"]["log_weight"]
    assert weights.dims == ("chain", "draw", "data")
    log_p = oracle.log_joint(z.numpy(), x.cpu().numpy(), 0.2)
    distribution = poutine.trace(guide).get_trace().nodes["z"]["fn"]
    found = log_p - distribution.log_prob(z.to(x)).detach().cpu().numpy()
    np.testing.assert_allclose(weights.values, found, rtol=1e-3, atol=1e-3)
    evidence = np.log(np.exp(weights.values).mean((0, 1)))
    np.testing.assert_allclose(evidence, oracle.log_evidence(x.cpu().numpy(), 0.2), atol=0.3)
    new = result["posterior_predictive"]["x"].values
    error = (new - z.numpy()).std()
    assert error == pytest.approx(1.0, abs=0.05)
    assert np.isfinite(arviz.psislw(weights.values.reshape(1000, 4).T)[1]).all()


def test_to_arviz_names() -> None:
    model, guide, _ = pair(rows=3)
    coords = {"data": ["a", "b", "c"], "axis": ["north", "east"]}
    result = to_arviz(
        model, guide, num_samples=4, num_chains=1, coords=coords, dims={"z": ["data", "axis"]}
    )
    assert result["posterior"]["z"].sel(data="b", axis="east").shape == (1, 4)
    assert math.isfinite(float(result["posterior"]["z"].sel(data="b", axis="east")[0, 0]))
