"""Importance weights of pairs whose evidence and tails are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import CASES
from reference import conjugate as oracle
from test_numpyro import models
from test_numpyro.models import family, module_params, normal

from numpyro_vae_ext.diagnostics import importance, log_evidence

KEY = jax.random.key(4)


def scaled_guide(spread: float):
    """The posterior of ``models.conjugate`` with its variance times ``spread``: k = 1 - spread."""

    def guide(x: jax.Array, batch_size: int | None = None) -> None:
        with numpyro.plate("data", len(x), subsample_size=batch_size):
            batch = numpyro.subsample(x, event_dim=1)
            law = dist.Normal(0.5 * batch, (0.5 * spread) ** 0.5)
            numpyro.sample("z", law.to_event(1))

    return guide


@pytest.mark.parametrize("case", CASES["diagnostics"]["importance"])
def test_evidence_is_that_of_log_evidence(exact: None, case: dict) -> None:
    """The same key draws the same weights, in chunks of whatever size."""
    x, options = normal(5, 2), {**case, "params": {}}
    found = importance(KEY, models.conjugate, scaled_guide(0.8), x, **options)
    whole = {**options, "chunk_size": case["num_samples"]}
    expected = log_evidence(KEY, models.conjugate, scaled_guide(0.8), x, **whole)
    np.testing.assert_allclose(found.log_evidence, expected, rtol=1e-12)
    assert found.log_weights.shape == (case["num_samples"], 5)
    assert found.khat.shape == found.good.shape == found.ess.shape == (5,)
    assert found.plates == ("data",)
    assert found.num_samples == case["num_samples"]


@pytest.mark.parametrize("spread", [0.9, 0.6])
def test_shape_and_evidence_are_the_true_ones(spread: float) -> None:
    """Rows have weights of one law, k = 1 - spread, but for their constants."""
    x = normal(40, 1)
    found = importance(KEY, models.conjugate, scaled_guide(spread), x, params={}, num_samples=4_000)
    assert abs(found.khat.mean() - (1 - spread)) < 0.1
    assert found.good.sum() >= 38
    scores = (found.smoothed - oracle.log_evidence(np.asarray(x), 0.0)) / found.smoothed_error
    assert np.nanmax(np.abs(scores)) < 4
    assert found.ess.max() <= 4_000 and found.ess.min() > 1_000
    assert (found.elbo < found.smoothed).all()


def test_exact_guide_has_equal_weights(exact: None) -> None:
    x = normal(3, 2)
    found = importance(KEY, models.conjugate, scaled_guide(1.0), x, params={}, num_samples=300)
    np.testing.assert_allclose(found.smoothed, oracle.log_evidence(np.asarray(x), 0.0))
    np.testing.assert_allclose(found.ess, 300.0)
    assert (found.smoothed_error < 1e-12).all()


def test_joint_weight() -> None:
    posterior = family("MeanField", latent_dim=2)
    guide, params = models.one_posterior(posterior), module_params(posterior=posterior)
    x = normal(3, 2)
    found = importance(KEY, models.one_latent, guide, x, params=params, num_samples=2_000)
    assert found.khat.shape == () and found.plates == ()
    truth = oracle.global_log_evidence(np.asarray(x), 0.0)
    assert abs(found.smoothed - truth) < 4 * found.smoothed_error
    assert bool(found.good)


def test_discrete_latent_has_no_tail() -> None:
    """Two weights, one of them of more draws than the tail has; a sampled row of each two."""

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(2.0 * b, 1.0), obs=x)

    def guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("b", dist.Bernoulli(0.5 * jnp.ones(len(x))))

    x = jnp.array([0.3, 2.5])
    found = importance(KEY, model, guide, x, params={}, num_samples=500)
    assert found.khat.tolist() == [-np.inf, -np.inf] and found.good.all()
    truth = np.logaddexp(*(dist.Normal(m, 1.0).log_prob(x) for m in (0.0, 2.0))) - np.log(2)
    assert (np.abs(found.smoothed - truth) < 4 * found.smoothed_error).all()


def test_subsample_has_its_own_rows() -> None:
    x = 10.0 * jnp.arange(6.0)[:, None]
    found = importance(
        KEY, models.conjugate, scaled_guide(0.9), x, 2, params={}, num_samples=200, chunk_size=70
    )
    truth = oracle.log_evidence(np.asarray(x), 0.0)
    rows = [int(np.argmin(np.abs(truth - value))) for value in found.smoothed]
    assert len(set(rows)) == 2
    np.testing.assert_allclose(found.smoothed, truth[rows], atol=0.1)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        importance(
            KEY,
            models.conjugate,
            scaled_guide(0.9),
            normal(2, 1),
            params={},
            num_samples=4,
            chunk_size=2,
            progress_bar=shown,
        )
        assert ("importance" in capsys.readouterr().err) == shown


def test_bad_input() -> None:
    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.factor("broken", jnp.where(z > 0, jnp.nan, 0.0))

    def guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.0, jnp.ones(len(x))))

    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="Expected log-weights below infinity; got nan at"):
        importance(KEY, model, guide, x, params={}, num_samples=20)
    for name in ("num_samples", "chunk_size"):
        with pytest.raises(ValueError, match=f"Expected {name} >= 1; got 0."):
            importance(KEY, model, guide, x, params={}, **{name: 0})
