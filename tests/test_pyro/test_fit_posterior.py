"""A posterior in one call: closed forms, modes, what is refused, what comes after."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive
from reference import starts as reference

from pyro_vae_ext import _trace
from pyro_vae_ext._flat import flat_model
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import IAF, AutoPosterior, Auxiliary, MeanField
from pyro_vae_ext.training import PosteriorResult, fit_posterior, pathfinder
from pyro_vae_ext.training._posterior import PosteriorTrainer

SMALL = partial(IAF, num_flows=2, hidden_dims=(8,))
QUICK = {"num_steps": 400, "learning_rates": 0.01, "progress_bar": False}


def given(x):
    return torch.as_tensor(x, dtype=torch.get_default_dtype())


def run(model, *args, **options) -> PosteriorResult:
    pyro.set_rng_seed(0)
    return fit_posterior(model, *args, **{**QUICK, **options})


def regression(x, y=None):
    """A linear regression whose evidence is known, with scales over three decades."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 3.0).to_event(1))
    pyro.deterministic("slope", 2 * beta)
    pyro.sample("y", dist.Normal(beta @ x.T, 0.5).to_event(1), obs=y)


def rows():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 6)) @ (np.eye(6) + 0.5) * np.logspace(0, 2, 6)
    return x, x @ (rng.normal(size=6) / np.logspace(0, 2, 6)) + 0.5 * rng.normal(size=30)


def data():
    return tuple(torch.as_tensor(part) for part in rows())


def closed_form():
    """Mean, standard deviations and log evidence."""
    x, y = rows()
    covariance = np.linalg.inv(x.T @ x / 0.25 + np.eye(6) / 9)
    marginal = 9 * x @ x.T + 0.25 * np.eye(30)
    log_det = np.linalg.slogdet(2 * np.pi * marginal)[1]
    evidence = -0.5 * (y @ np.linalg.solve(marginal, y) + log_det)
    return covariance @ x.T @ y / 0.25, np.sqrt(np.diagonal(covariance)), evidence


@pytest.fixture(scope="module")
def fitted() -> Iterator[PosteriorResult]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield run(regression, *data(), family=SMALL)
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("exact")
def test_regression_is_fitted(fitted) -> None:
    """Bound, evidence, means and standard deviations, all in closed form."""
    mean, scale, evidence = closed_form()
    found = fitted.diagnosis
    assert evidence - 0.05 < found.elbo < evidence + 3 * found.elbo_error
    np.testing.assert_allclose(found.log_evidence, evidence, atol=0.01)
    draws = fitted.guide.sample_posterior(sample_shape=(20_000,))["beta"].numpy()
    np.testing.assert_allclose((draws.mean(0) - mean) / scale, 0, atol=0.05)
    np.testing.assert_allclose(draws.std(0) / scale, 1, atol=0.05)
    history = fitted.history
    assert set(history.seconds) == {"pathfinder", "compilation", "race", "training", "diagnosis"}
    assert history.num_draws == 64 * len(history.step_elbos)
    assert history.restarts == [max(history.elbo)]


@pytest.mark.usefixtures("exact")
def test_guide_works_as_any_other(fitted) -> None:
    """Without the data, with new rows, as a module, and in an SVI that goes on from it."""
    mean, scale, _ = closed_form()
    guide, params = copy.deepcopy(fitted.guide), fitted.params
    np.testing.assert_allclose((guide.median()["beta"].numpy() - mean) / scale, 0, atol=0.1)
    low, high = guide.quantiles([0.159, 0.841])["beta"].numpy()
    np.testing.assert_allclose((high - low) / (2 * scale), 1, atol=0.1)
    x, y = data()
    assert guide(x, y)["beta"].shape == (6,)
    many = Predictive(regression, guide=guide, num_samples=50, parallel=True)
    assert many(x[:4])["y"].shape == (50, 4)
    saved = AutoPosterior(regression, SMALL, start=fitted.start)
    pyro.clear_param_store()
    saved(x, y)
    saved.load_state_dict(guide.state_dict())
    pyro.clear_param_store()
    elbo = ImportanceWeightedELBO(num_outer=200, gradient="stl")
    svi = SVI(regression, saved, pyro.optim.Adam({"lr": 1e-4}), elbo)
    np.testing.assert_allclose(-svi.evaluate_loss(x, y), fitted.diagnosis.elbo, atol=0.05)
    store = pyro.get_param_store()
    assert set(store) == set(params)
    assert all(torch.equal(store[name], params[name]) for name in params)
    svi.step(x, y)
    name = "AutoPosterior.latent$$$step.loc"
    assert not torch.equal(store[name], params[name])


def two_modes(away=2.0):
    """Half the mass at each end, in the first of two numbers; the evidence is 1."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    ends = z.new_tensor([[-away, 0.0], [away, 0.0]])
    parts = dist.Normal(ends, 0.7).to_event(1).log_prob(z)
    pyro.factor("density", parts.logsumexp(-1) - np.log(2.0))


def test_tempering_finds_both_modes() -> None:
    """Half the draws at each; the start at one of them has but one, and is told so."""
    family = partial(IAF, num_flows=2, hidden_dims=(32,))
    found = run(two_modes, temper=True, family=family, num_steps=1200)
    draws = found.guide.sample_posterior(sample_shape=(4000,))["z"]
    assert 0.4 < (draws[:, 0] > 0).double().mean() < 0.6
    assert found.diagnosis.num_modes == 2
    assert abs(found.diagnosis.log_evidence) < 0.05
    one = run(two_modes, start=found.start, family=MeanField)
    assert one.start is found.start
    assert one.diagnosis.elbo < -0.5
    assert one.diagnosis.advice.endswith("fit with temper=True.")


def test_restarts_keep_the_best() -> None:
    found = run(two_modes, 5.0, num_restarts=3, family=MeanField, num_steps=200)
    bounds = found.history.restarts
    assert len(set(bounds)) == 3
    assert max(found.history.elbo) == max(bounds)


def test_same_seed_same_result() -> None:
    """Bit for bit, from torch's generator alone."""
    options = {"family": SMALL, "num_steps": 200}
    first = run(two_modes, **options)
    np.random.seed(1)
    again = run(two_modes, **options)
    assert again.params.keys() == first.params.keys()
    for name, value in again.params.items():
        assert torch.equal(value, first.params[name]), name
    assert again.diagnosis == first.diagnosis
    np.testing.assert_array_equal(again.history.step_elbos, first.history.step_elbos)


def hole():
    """A density that is no number where about one step in twenty falls."""
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.factor("hole", 0.0 * (3.0 - z.abs()).sqrt())


def test_steps_without_a_density_change_nothing() -> None:
    found = run(hole, family=MeanField, num_particles=16)
    assert 3 < found.history.num_skipped < 100
    draws = found.guide.sample_posterior(sample_shape=(4000,))["z"]
    np.testing.assert_allclose([draws.mean(), draws.std()], [0, 1], atol=0.1)


def normal():
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))


@pytest.mark.parametrize("case", CASES["training"]["fit_posterior"])
def test_race(case: dict) -> None:
    """Rates race from the same start with the same noise; the first of equals wins."""
    found = run(normal, family=MeanField, **case)
    rates = case["learning_rates"]
    history = found.history
    if isinstance(rates, float):
        assert history.race == {}
    else:
        # The start is the posterior: every path gradient is 0.
        assert list(history.race) == list(rates)
        np.testing.assert_allclose(list(history.race.values()), 0, atol=1e-4)
        assert history.num_draws == 8 * (len(history.step_elbos) + 150)
    assert history.learning_rate[0] == np.atleast_1d(rates)[0]
    assert history.elbo[0] == pytest.approx(0, abs=1e-4)
    assert found.diagnosis.log_evidence == pytest.approx(0, abs=1e-4)


def trainer(model, *args, family=SMALL, num_particles=8) -> tuple[PosteriorTrainer, AutoPosterior]:
    pyro.set_rng_seed(0)
    flat = flat_model(model, args, {})
    start = pathfinder(model, *args, num_paths=1, num_samples=10, progress_bar=False)
    guide = AutoPosterior(model, family, start=start)
    guide(*args)
    return PosteriorTrainer(flat, guide, num_particles), guide


def advance(made: PosteriorTrainer, power: float = 1.0) -> np.ndarray:
    return made.advance(0.01, np.full(5, power), 1 / np.arange(1, 6))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", [SMALL, partial(Auxiliary, hidden_dims=(4,))])
def test_bound_is_that_of_the_pair(family) -> None:
    """Log-weights in the coordinates of the start are those of model and guide."""
    made, guide = trainer(regression, *data(), family=family)
    advance(made)
    look = made.look()
    again = made.look()
    np.testing.assert_array_equal(look.log_weights, again.log_weights)
    made.finish()
    with torch.no_grad():
        elbo = ImportanceWeightedELBO(num_outer=4000)
        weights = elbo.log_weights(regression, guide, *data())
    error = (look.log_weights.var() / 1000 + weights.var() / 4000) ** 0.5
    assert abs(look.log_weights.mean() - weights.mean()) < 4 * error


@pytest.mark.usefixtures("exact")
def test_power_is_that_of_the_model() -> None:
    """A guide that is the start has a share of the bound that is the power."""
    made, _ = trainer(regression, *data(), family=MeanField)
    bounds = {}
    start = made.save()
    for power in (1.0, 0.3, 0.0):
        made.restore(start)
        bounds[power] = advance(made, power)[0]
    assert bounds[1.0] == pytest.approx(closed_form()[2], abs=0.01)
    assert bounds[0.3] == pytest.approx(0.3 * bounds[1.0], rel=1e-9)
    assert bounds[0.0] == pytest.approx(0, abs=1e-9)


@pytest.mark.usefixtures("exact")
def test_graph_takes_the_same_steps() -> None:
    """As those that Python takes, at any power; so do chunks of them."""
    made, _ = trainer(regression, *data())
    assert made._graph is not None
    start = made.save()
    for power in (1.0, 0.3):
        made.restore(start)
        graph, bounds = made._graph, advance(made, power)
        after = made.save()
        made.restore(start)
        made._graph = None
        np.testing.assert_allclose(advance(made, power), bounds, rtol=1e-9)
        torch.testing.assert_close(made.save().numbers, after.numbers, rtol=1e-9, atol=1e-12)
        made._graph = graph


@pytest.mark.usefixtures("exact")
def test_going_back_and_looking_leave_no_trace() -> None:
    made, _ = trainer(regression, *data())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    start = made.save()
    bounds = advance(made)
    made.restore(start)
    made.look()
    made.draw(10)
    np.testing.assert_array_equal(advance(made), bounds)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("exact")
def test_memory_is_bounded(monkeypatch) -> None:
    """A few draws at a time give the bound of all."""
    whole, _ = trainer(regression, *data())
    monkeypatch.setattr(_trace, "MOST_NUMBERS", 1500)
    parts, _ = trainer(regression, *data(), num_particles=60)
    assert parts._elbo.chunk_size == 50
    assert len(parts.look().log_weights) == 1000
    a, b = whole.look().log_weights, parts.look().log_weights
    np.testing.assert_allclose(a.mean(), b.mean(), atol=4 * a.std() / 500**0.5)
    advance(parts)


def branches():
    """A model that looks at its numbers, and draws others besides."""
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.factor("sign", z * 0.0 + torch.rand(()) if bool(z > 0) else 0.0 * z)


def test_model_that_is_no_graph() -> None:
    """Every row for itself, in Python."""
    made, _ = trainer(branches, family=MeanField, num_particles=4)
    assert made._graph is None
    assert np.isfinite(advance(made)).all()


def test_store_is_left_alone() -> None:
    """The model's parameters stay, and so does the guide of an earlier fit; nothing is traced."""

    def model(size):
        mean = pyro.param("mean", torch.full((size,), 2.0))
        pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))

    options = {"family": MeanField, "num_steps": 200}
    pyro.param("other", torch.ones(2))
    with poutine.trace(param_only=False) as tracer:
        first = run(model, 2, **options)
        assert torch.equal(pyro.param("mean"), torch.full((2,), 2.0))
        del pyro.get_param_store()["mean"]
        second = run(model, 3, **options)
    assert set(tracer.trace.nodes) <= {"_INPUT", "_RETURN", "mean", "other"}
    store = pyro.get_param_store()
    assert set(store) == {"mean", "other", *second.params}
    assert torch.equal(store["other"], torch.ones(2))
    for fitted, size in ((first, 2), (second, 3)):
        mean = fitted.guide.median()["z"]
        np.testing.assert_allclose(mean.numpy(), np.full(size, 2.0), atol=0.05)
    known = store["AutoPosterior.latent$$$family.loc"].unconstrained()
    assert second.guide.latent.family.loc is known
    with pytest.raises(ValueError, match="Expected start to be of this model"):
        run(model, 3, start=first.start, **options)
    assert set(store) == {"mean", "other", *second.params}


def improper():
    pyro.sample("loc", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("free", dist.ImproperUniform(constraints.real, (), ()))


def discrete():
    pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))


def nowhere():
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.factor("never", torch.log(-torch.exp(z)))


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
        run(model, **{"family": MeanField, **options})


def test_progress_and_plot(capsys) -> None:
    """Bars on standard error; a figure of the bounds."""
    pytest.importorskip("matplotlib").use("Agg")
    found = run(normal, family=MeanField, num_steps=200, progress_bar=True)
    assert "fit_posterior" in capsys.readouterr().err
    axes = found.history.plot()
    assert axes.get_ylabel() == "bound (nats)"
    assert len(axes.lines) >= 2
    assert pathfinder.__name__ in found.history.seconds
