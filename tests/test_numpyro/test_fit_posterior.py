"""A posterior in one call: closed forms, modes, what is refused, what comes after."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints
from numpyro.infer import SVI, Predictive
from reference import starts as reference

from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import IAF, MeanField
from numpyro_vae_ext.training import fit_posterior, pathfinder

KEY = random.key(0)
SMALL = partial(IAF, num_flows=1, hidden_dims=(8,))
QUICK = {"num_steps": 400, "learning_rates": 0.01, "progress_bar": False}


def regression(x, y=None):
    """A linear regression whose evidence is known, with scales over three decades."""
    prior = dist.Normal(jnp.zeros(x.shape[1]), 3.0).to_event(1)
    beta = numpyro.sample("beta", prior)
    numpyro.deterministic("slope", 2 * beta)
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ beta, 0.5), obs=y)


def data():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 6)) @ (np.eye(6) + 0.5) * np.logspace(0, 2, 6)
    return x, x @ (rng.normal(size=6) / np.logspace(0, 2, 6)) + 0.5 * rng.normal(size=30)


def closed_form():
    """Mean, standard deviations and log evidence."""
    x, y = data()
    covariance = np.linalg.inv(x.T @ x / 0.25 + np.eye(6) / 9)
    marginal = 9 * x @ x.T + 0.25 * np.eye(30)
    log_det = np.linalg.slogdet(2 * np.pi * marginal)[1]
    evidence = -0.5 * (y @ np.linalg.solve(marginal, y) + log_det)
    return covariance @ x.T @ y / 0.25, np.sqrt(np.diagonal(covariance)), evidence


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True):
        yield fit_posterior(KEY, regression, *data(), family=SMALL, **QUICK)


@pytest.mark.usefixtures("exact")
def test_regression_is_fitted(fitted) -> None:
    """Bound, evidence, means and standard deviations, all in closed form."""
    mean, scale, evidence = closed_form()
    found = fitted.diagnosis
    assert evidence - 0.05 < found.elbo < evidence + 3 * found.elbo_error
    np.testing.assert_allclose(found.log_evidence, evidence, atol=0.01)
    draws = fitted.guide.sample_posterior(KEY, fitted.params, sample_shape=(20_000,))["beta"]
    np.testing.assert_allclose((draws.mean(0) - mean) / scale, 0, atol=0.05)
    np.testing.assert_allclose(draws.std(0) / scale, 1, atol=0.05)
    history = fitted.history
    assert set(history.seconds) == {"pathfinder", "compilation", "race", "training", "diagnosis"}
    assert history.num_draws == 64 * len(history.step_elbos)
    assert history.restarts == [max(history.elbo)]


@pytest.mark.usefixtures("exact")
def test_guide_works_as_any_other(fitted) -> None:
    """Without the data, with new rows, and in an SVI that goes on from its parameters."""
    mean, scale, _ = closed_form()
    guide, params = fitted.guide, fitted.params
    np.testing.assert_allclose((guide.median(params)["beta"] - mean) / scale, 0, atol=0.1)
    x, y = data()
    many = Predictive(regression, guide=guide, params=params, num_samples=50)
    assert many(KEY, x[:4])["y"].shape == (50, 4)
    elbo = ImportanceWeightedELBO(num_outer=200, gradient="stl")
    svi = SVI(regression, guide, optax.adam(1e-4), elbo)
    state = svi.init(KEY, x, y, init_params=params)
    np.testing.assert_allclose(-svi.evaluate(state, x, y), fitted.diagnosis.elbo, atol=0.05)
    jax.tree.map(np.testing.assert_array_equal, svi.get_params(state), params)


def normal():
    numpyro.sample("z", dist.Normal(0.0, 1.0))


def test_same_key_same_result() -> None:
    """Bit for bit, the race included."""
    options = {**QUICK, "num_steps": 1200, "learning_rates": (0.01, 0.02), "family": MeanField}
    one, two = (fit_posterior(KEY, normal, **options) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert one.diagnosis == two.diagnosis
    np.testing.assert_array_equal(one.history.step_elbos, two.history.step_elbos)


def two_modes():
    """Half the mass at each of two unit Normals, six apart; the evidence is 1."""
    z = numpyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    ends = jnp.array([[-3.0, 0.0], [3.0, 0.0]])
    parts = dist.Normal(ends, 1.0).to_event(1).log_prob(z)
    numpyro.factor("density", jax.nn.logsumexp(parts) - jnp.log(2.0))


def test_tempering_finds_both_modes() -> None:
    """Half the draws at each; the start at one of them has but one, and is told so."""
    options = {**QUICK, "num_steps": 3000, "family": partial(IAF, num_flows=4, hidden_dims=(16,))}
    found = fit_posterior(KEY, two_modes, temper=True, **options)
    draws = found.guide.sample_posterior(KEY, found.params, sample_shape=(4000,))["z"]
    assert 0.4 < (draws[:, 0] > 0).mean() < 0.6
    assert found.diagnosis.num_modes == 2
    assert abs(found.diagnosis.log_evidence) < 0.05
    one = fit_posterior(KEY, two_modes, start=found.start, **{**QUICK, "family": MeanField})
    assert one.start is found.start
    assert one.diagnosis.elbo < -0.5
    assert one.diagnosis.advice.endswith("fit with temper=True.")


def test_restarts_keep_the_best() -> None:
    found = fit_posterior(KEY, two_modes, num_restarts=2, family=MeanField, **QUICK)
    bounds = found.history.restarts
    assert len(bounds) == 2
    assert max(found.history.elbo) == max(bounds) > min(bounds)


def test_steps_without_a_density_change_nothing() -> None:
    """A density that is no number where one draw in twenty falls."""

    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("hole", jnp.where(jnp.abs(z) > 3.0, jnp.nan, 0.0))

    found = fit_posterior(KEY, model, family=MeanField, num_particles=16, **QUICK)
    assert 3 < found.history.num_skipped < 100
    assert found.diagnosis.elbo == -np.inf
    assert found.diagnosis.advice.startswith("The model has no density at ")
    draws = found.guide.sample_posterior(KEY, found.params, sample_shape=(4000,))["z"]
    np.testing.assert_allclose([draws.mean(), draws.std()], [0, 1], atol=0.1)


def improper():
    numpyro.sample("loc", dist.Normal(0.0, 1.0))
    numpyro.sample("free", dist.ImproperUniform(constraints.real, (), ()))


def discrete():
    numpyro.sample("k", dist.Bernoulli(0.5))


def nowhere():
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.factor("never", jnp.log(-jnp.exp(z)))


REFUSED = {
    "improper": (improper, {"num_steps": 4000}, ValueError, "end along site 'free'. Give it"),
    "discrete": (discrete, {}, ValueError, "latent sites under fit_posterior; got site 'k'"),
    "no latent": (lambda: None, {}, ValueError, "Expected at least one continuous latent site"),
    "no density": (nowhere, {}, ValueError, "by site 'never'. Change init_radius,"),
    "start": (normal, {"start": reference.start()}, ValueError, "Expected start to be of this"),
    "budget": (normal, {"learning_rates": (0.1, 0.01)}, ValueError, "to race 2 learning rates;"),
    "rates": (normal, {"learning_rates": -1.0}, ValueError, "Expected learning_rates > 0; got"),
    "temper": (normal, {"temper": 1}, TypeError, "Expected temper to be a bool; got int."),
    "restarts": (normal, {"num_restarts": 0}, ValueError, "Expected num_restarts >= 1; got 0."),
    "particles": (normal, {"num_particles": 0}, ValueError, "Expected num_particles >= 1; got 0."),
    "samples": (normal, {"num_samples": 0}, ValueError, "Expected num_samples >= 1; got 0."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fitted_is_refused(name: str) -> None:
    model, options, error, text = REFUSED[name]
    with pytest.raises(error, match=re.escape(text)):
        fit_posterior(KEY, model, **{**QUICK, "family": MeanField, **options})


def test_progress_and_plot(capsys) -> None:
    """Bars on standard error; a figure of the bounds."""
    pytest.importorskip("matplotlib").use("Agg")
    options = {**QUICK, "num_steps": 200, "progress_bar": True}
    found = fit_posterior(KEY, normal, family=MeanField, **options)
    assert "fit_posterior" in capsys.readouterr().err
    axes = found.history.plot()
    assert axes.get_ylabel() == "bound (nats)"
    assert len(axes.lines) >= 2
    assert pathfinder.__name__ in found.history.seconds
