"""Log evidence, active units and ArviZ objects of pairs whose truth is known."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import CASES
from flax import nnx
from numpyro.contrib.module import nnx_module
from reference import conjugate as oracle
from test_numpyro import models
from test_numpyro.models import family, module_params, normal, shaken

from numpyro_vae_ext import _trace
from numpyro_vae_ext.diagnostics import active_units, log_evidence, to_arviz
from numpyro_vae_ext.elbos import ImportanceWeightedELBO

KEY = jax.random.key(4)
ROWS = 5


def pair(name: str = "IAF", shake: float = 0.1):
    posterior = shaken(family(name, latent_dim=2, context_dim=2), shake)
    params = module_params(posterior=posterior)
    return models.conjugate, models.amortised(posterior), params, normal(ROWS, 2, seed=5)


def auxiliary_pair():
    """A pair with an auxiliary site, a deterministic one, a matrix-valued one and a factor."""

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(2))
            numpyro.deterministic("twice", 2 * z)
            numpyro.factor("nothing", 0.0 * z.sum((-1, -2)))
            numpyro.sample("x", dist.Normal(z[..., 0], 1.0).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            side = numpyro.sample("side", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            loc = jnp.stack([0.5 * x, 0 * x, 0 * x], -1) + 0.0 * side[:, None, None]
            numpyro.factor("reverse", -dist.Normal(0.0, 1.0).log_prob(side))
            numpyro.sample("z", dist.Normal(loc, 0.9).to_event(2))

    return model, guide, {}, normal(ROWS, 2, seed=5)


@pytest.mark.parametrize("case", CASES["diagnostics"]["log_evidence"])
def test_log_evidence_is_the_bound_of_its_particles(exact: None, case: dict) -> None:
    """The same number for every chunk size, and shape per datum."""
    model, guide, params, x = pair()
    found = log_evidence(KEY, model, guide, x, params=params, **case)
    assert found.shape == (ROWS,) and not found.weak_type
    elbo = ImportanceWeightedELBO(1)
    size = min(case.get("chunk_size", 100), case["num_samples"])
    keys = jax.random.split(KEY, -(-case["num_samples"] // size) * size)[: case["num_samples"]]
    weights = jnp.stack([elbo.log_weights(k, params, model, guide, x)[0] for k in keys])
    expected = jax.nn.logsumexp(weights, 0) - np.log(case["num_samples"])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_log_evidence_reaches_the_truth(name: str) -> None:
    # Shaken by .1 the flow has weights of k-hat .7 on one row, which no mean gets near to.
    model, guide, params, x = pair(name, 0.05)
    found = log_evidence(KEY, model, guide, x, params=params, num_samples=20_000, chunk_size=2_000)
    np.testing.assert_allclose(found, oracle.log_evidence(np.asarray(x), 0.0), atol=0.05)


def test_log_evidence_of_a_joint_weight() -> None:
    posterior = shaken(family("IAF", latent_dim=2), 0.1)
    x = 0.3 * normal(3, 2)
    guide, params = models.one_posterior(posterior), module_params(posterior=posterior)
    found = log_evidence(KEY, models.one_latent, guide, x, params=params, num_samples=20_000)
    np.testing.assert_allclose(found, oracle.global_log_evidence(np.asarray(x), 0.0), atol=0.05)


def test_log_evidence_of_a_discrete_latent() -> None:
    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(2.0 * b, 1.0), obs=x)

    def guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("b", dist.Bernoulli(logits=x))

    x = normal(4)
    found = log_evidence(KEY, model, guide, x, params={}, num_samples=10_000, chunk_size=5_000)
    terms = [np.log(p) + dist.Normal(m, 1.0).log_prob(x) for p, m in ((0.7, 0.0), (0.3, 2.0))]
    np.testing.assert_allclose(found, np.logaddexp(*terms), atol=0.05)


def test_log_evidence_of_a_subsample() -> None:
    """All chunks see the same rows, whose evidence it is."""
    model, guide, params, x = pair()
    x = x + 10.0 * jnp.arange(ROWS)[:, None]
    found = log_evidence(KEY, model, guide, x, 2, params=params, num_samples=50, chunk_size=7)
    truth = oracle.log_evidence(np.asarray(x), 0.0)
    full = log_evidence(KEY, model, guide, x, params=params, num_samples=50)
    assert found.shape == (2,)
    rows = [int(np.argmin(np.abs(np.asarray(full) - f))) for f in np.asarray(found)]
    assert len(set(rows)) == 2 and np.isfinite(truth[rows]).all()


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, guide, params, x = pair("MeanField")
    for shown in (True, False):
        log_evidence(
            KEY, model, guide, x, params=params, num_samples=4, chunk_size=2, progress_bar=shown
        )
        assert ("log evidence" in capsys.readouterr().err) == shown


def test_log_evidence_bounds_its_memory_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a chunk_size, a chunk's widest site has no more numbers than allowed, if it can."""
    model, guide, params, x = pair("MeanField")
    widest = x.size
    for most, expected in ((2**24, 100), (3 * widest + 1, 3), (widest - 1, 1)):
        monkeypatch.setattr(_trace, "MOST_NUMBERS", most)
        pair_ = _trace.Pair(model, guide, (x,), {})
        assert _trace.chunk_sizes(KEY, params, pair_)[0] == expected
    monkeypatch.setattr(_trace, "MOST_NUMBERS", 3 * widest)
    found = []
    for at_a_time, side_by_side in ((2 * widest, 2), (1, 1), (2**30, 2**30 // widest)):
        monkeypatch.setattr(_trace, "NUMBERS_AT_A_TIME", {jax.default_backend(): at_a_time})
        assert _trace.chunk_sizes(KEY, params, pair_)[1] == side_by_side
        found.append(log_evidence(KEY, model, guide, x, params=params, num_samples=7))
        assert "| 3/3 [" in capsys.readouterr().err
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


@pytest.mark.parametrize("case", CASES["diagnostics"]["active_units"])
def test_active_units_of_a_known_guide(case: dict) -> None:
    """One unit follows the data, one is noise; the noise does not count, however few the draws."""
    x = normal(400, 2)

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            loc = jnp.stack([0.5 * x[:, 0], 0 * x[:, 0]], -1)
            numpyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    found = active_units(KEY, model, guide, x, params={}, **case)
    assert found.count == 1
    np.testing.assert_array_equal(found.active["z"], [True, False])
    truth = [0.25 * np.var(np.asarray(x[:, 0]), ddof=1), 0.0]
    np.testing.assert_allclose(found.variance["z"], truth, atol=0.02)


def test_active_units_has_no_monte_carlo_bias() -> None:
    """With two draws a plain variance would be near 1/2; the mean of ours is 0."""

    def program(x: jax.Array, observed: bool) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            if observed:
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, found = normal(1000), []
    for key in jax.random.split(KEY, 4):
        units = active_units(
            key,
            lambda x: program(x, True),
            lambda x: program(x, False),
            x,
            params={},
            num_samples=2,
        )
        found.append(float(units.variance["z"][0]))
    assert abs(np.mean(found)) < 4 / np.sqrt(4 * 1000)


def test_active_units_flattens_and_leaves_auxiliaries_out() -> None:
    model, guide, params, x = auxiliary_pair()
    found = active_units(KEY, model, guide, x, params=params, num_samples=400)
    assert set(found.variance) == {"z"} and found.variance["z"].shape == (6,)


def test_active_units_needs_rows() -> None:
    posterior = family("MeanField", latent_dim=2)
    with pytest.raises(ValueError, match="inside a data plate of at least 2 rows; got {}"):
        active_units(
            KEY,
            models.one_latent,
            models.one_posterior(posterior),
            normal(3, 2),
            params=module_params(posterior=posterior),
        )


@pytest.mark.parametrize("case", CASES["diagnostics"]["to_arviz"])
def test_to_arviz_groups_and_dims(case: dict) -> None:
    pytest.importorskip("arviz")
    model, guide, params, x = auxiliary_pair()
    found = to_arviz(KEY, model, guide, x, params=params, **case)
    shape = (case["num_chains"], case["num_samples"])
    posterior = found["posterior"]
    assert set(posterior.data_vars) == {"twice", "z"}
    np.testing.assert_allclose(posterior["twice"], 2 * posterior["z"], rtol=1e-6)
    assert posterior["twice"].dims == ("chain", "draw", "data", "twice_dim_0", "twice_dim_1")
    assert posterior["z"].dims == ("chain", "draw", "data", "z_dim_0", "z_dim_1")
    assert posterior["z"].shape == (*shape, ROWS, 2, 3)
    weight = found["sample_stats"]["log_weight"]
    assert weight.dims == ("chain", "draw", "data") and weight.shape == (*shape, ROWS)
    np.testing.assert_array_equal(found["observed_data"]["x"], x)
    assert found["observed_data"]["x"].dims == ("data", "x_dim_0")
    groups = getattr(found, "children", None) or found.groups()
    predicted = case.get("posterior_predictive", True)
    assert any("posterior_predictive" in group for group in groups) == predicted
    if predicted:
        new = found["posterior_predictive"]
        assert set(new.data_vars) == {"x"} and new["x"].shape == (*shape, ROWS, 2)
    # The weights are those of these very draws.
    z = np.asarray(posterior["z"])
    law = dist.Normal(np.stack([0.5 * x, 0 * x, 0 * x], -1), 0.9).to_event(2)
    expected = dist.Normal(z, 1.0).log_prob(0.0).sum((-1, -2)) - law.log_prob(z)
    expected = expected + dist.Normal(z[..., 0], 1.0).log_prob(x).sum(-1)
    np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-4)


def test_to_arviz_predicts_from_its_draws() -> None:
    pytest.importorskip("arviz")
    model, guide, params, x = pair("MeanField")
    found = to_arviz(
        KEY,
        model,
        guide,
        x,
        params=params,
        num_samples=300,
        num_chains=2,
        chunk_size=256,
        progress_bar=False,
        coords={"data": list("abcde")},
        dims={"x": ["data", "side"]},
    )
    error = np.asarray(found["posterior_predictive"]["x"]) - np.asarray(found["posterior"]["z"])
    assert abs(error.mean()) < 0.1 and abs(error.std() - 1.0) < 0.1
    draws = np.asarray(found["posterior"]["z"]).reshape(600, -1)
    assert len(np.unique(draws[:, 0])) == 600
    assert list(found["posterior"].coords["data"].values) == list("abcde")
    assert found["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "side")


def test_to_arviz_of_a_global_posterior() -> None:
    pytest.importorskip("arviz")
    posterior = family("IAF", latent_dim=2)
    found = to_arviz(
        KEY,
        models.one_latent,
        models.one_posterior(posterior),
        normal(3, 2),
        params=module_params(posterior=posterior),
        num_samples=4,
        num_chains=2,
    )
    assert found["posterior"]["z"].dims == ("chain", "draw", "z_dim_0")
    assert found["sample_stats"]["log_weight"].dims == ("chain", "draw")


def test_to_arviz_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    model, guide, params, x = pair()
    with pytest.raises(ImportError, match=r"Install vae-ext\[arviz\]"):
        to_arviz(KEY, model, guide, x, params=params)


def test_plates_come_first_wherever_they_stand() -> None:
    pytest.importorskip("arviz")

    def program(observed: bool) -> None:
        with numpyro.plate("rows", 3, dim=-3), numpyro.plate("columns", 2, dim=-1):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
            if observed:
                numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=jnp.ones((3, 1, 2, 4)))

    programs = (lambda: program(True)), (lambda: program(False))
    found = to_arviz(KEY, *programs, params={}, num_samples=2, num_chains=1)
    assert found["posterior"]["z"].dims == ("chain", "draw", "rows", "columns", "z_dim_0")
    assert found["observed_data"]["x"].shape == (3, 2, 4)
    assert active_units(KEY, *programs, params={}, num_samples=4).variance["z"].shape == (4,)


def test_mutable_state_among_the_params() -> None:
    class Centred(nnx.Module):
        def __init__(self) -> None:
            self.mean = nnx.BatchStat(jnp.ones(2))
            self.weight = nnx.Param(jnp.full(2, 0.5))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.weight[...] * (x - self.mean[...])

    encoder = Centred()

    def guide(x: jax.Array) -> None:
        net = nnx_module("encoder", encoder)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(net(x), 0.7).to_event(1))

    x = normal(ROWS, 2)
    params = {
        "encoder$params": {"weight": jnp.full(2, 0.5)},
        "encoder$state": {"state": {"mean": jnp.zeros(2)}},
    }
    found = log_evidence(KEY, models.conjugate, guide, x, params=params, num_samples=2_000)
    np.testing.assert_allclose(found, oracle.log_evidence(np.asarray(x), 0.0), atol=0.01)


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (log_evidence, {"num_samples": 0}, "Expected num_samples >= 1; got 0."),
        (log_evidence, {"chunk_size": 0}, "Expected chunk_size >= 1; got 0."),
        (active_units, {"num_samples": 1}, "Expected num_samples >= 2; got 1."),
        (to_arviz, {"num_samples": 0}, "Expected num_samples >= 1; got 0."),
        (to_arviz, {"num_chains": 0}, "Expected num_chains >= 1; got 0."),
        (to_arviz, {"chunk_size": 0}, "Expected chunk_size >= 1; got 0."),
    ],
)
def test_bad_numbers(function, arguments: dict, text: str) -> None:
    if function is to_arviz:
        pytest.importorskip("arviz")
    model, guide, params, x = pair()
    with pytest.raises(ValueError, match=text):
        function(KEY, model, guide, x, params=params, **arguments)


@pytest.mark.parametrize("function", [log_evidence, active_units, to_arviz])
def test_missing_data_are_told(function) -> None:
    if function is to_arviz:
        pytest.importorskip("arviz")
    model, _, _, x = pair()

    def guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="Expected observed data without NaN at site 'x'"):
        function(KEY, model, guide, x.at[0, 0].set(jnp.nan), params={})
