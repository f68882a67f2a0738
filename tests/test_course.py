"""The course of a fit, with a trainer in closed form: one text in both packages, tested once."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from numpyro_vae_ext.training import PosteriorHistory
from numpyro_vae_ext.training._course import (
    BLOCK,
    RACE,
    STAGES,
    WINDOW,
    Course,
    Look,
    check_steps,
    checked_rates,
)
from numpyro_vae_ext.training._diagnosis import count_modes, diagnose, pooled


class Descent:
    """Steps down the gradient of a quadratic bound, whose mean parameter is watched.

    Args:
        away: Distance of the start.
        decay: Share of the distance that a step at rate 1 takes.
        bound: The bound at a parameter.
    """

    def __init__(self, away=10.0, decay=1.0, bound=lambda x: -0.5 * x**2) -> None:
        self.state = (np.float64(away), np.float64(away))
        self.decay, self.bound = decay, bound
        self.noise = np.random.default_rng(0).standard_normal(1000)
        self.rates: list[float] = []
        self.powers: list[np.ndarray] = []

    def advance(self, rate, powers, shares):
        x, mean = self.state
        bounds = []
        for share in shares:
            x = self.move(x, rate)
            mean += share * (x - mean)
            bounds.append(self.bound(x))
        self.state = (x, mean)
        self.rates.append(rate)
        self.powers.append(powers)
        return np.array(bounds)

    def move(self, x, rate):
        return x - rate * self.decay * x

    def look(self):
        mean = self.state[1]
        return Look(np.full(1000, self.bound(mean)), (mean + self.noise)[:, None])

    def settle(self):
        self.state = (self.state[1], self.state[1])

    def save(self):
        return self.state

    def restore(self, saved):
        self.state = saved


def course(trainer, history=None, **options):
    given = {"num_steps": 10_000, "rates": (0.01,), "temper": False, "where": lambda i: f"s{i}"}
    return Course(
        trainer,
        PosteriorHistory() if history is None else history,
        on_block=lambda *_: None,
        **{**given, **options},
    )


def test_race_goes_on_from_the_best_rate() -> None:
    """Of rates that are as good, the first; the losers leave no trace but their bounds."""
    trainer, history = Descent(), PosteriorHistory()
    run = course(trainer, history, rates=(1e-4, 0.02, 1e-3))
    assert run.race() == 0.02
    assert list(history.race) == [1e-4, 0.02, 1e-3]
    np.testing.assert_allclose(trainer.state[0], 10 * 0.98**RACE)
    np.testing.assert_allclose(history.step_elbos[-1], -0.5 * trainer.state[0] ** 2)
    assert (run.steps, len(history.step_elbos), run.steps_in_all) == (RACE, RACE, 3 * RACE)
    at_its_end = Descent(away=0.0)
    assert course(at_its_end, rates=(0.5, 0.01)).race() == 0.5


def test_stages_end_when_nothing_is_gained() -> None:
    """The rates fall, and the end comes long before the budget's."""
    trainer, history = Descent(), PosteriorHistory()
    course(trainer, history).train(0.01)
    assert history.stopped == "converged"
    assert sorted(set(trainer.rates), reverse=True) == [0.01 * share for share in STAGES]
    assert trainer.rates == sorted(trainer.rates, reverse=True)
    assert history.steps[-1] < 5000
    assert history.elbo[-1] > -1e-3
    assert len(history.step_elbos) == history.steps[-1] == len(trainer.rates) * BLOCK


def test_mean_parameters_are_those_of_a_window() -> None:
    trainer, history = Descent(decay=0.0), PosteriorHistory()
    trainer.move = lambda x, rate: x - 1.0
    trainer.bound = lambda x: x  # ever worse: nothing is gained
    course(trainer, history, num_steps=2000).train(0.01)
    window = history.steps[0]
    np.testing.assert_allclose(history.elbo[0], 10 - (window + 1) / 2)


def test_budget_ends_a_slow_run_and_every_stage_has_a_part() -> None:
    trainer, history = Descent(away=100.0, decay=0.02), PosteriorHistory()
    course(trainer, history, num_steps=4000).train(0.01)
    assert history.stopped == "num_steps"
    assert history.steps[-1] <= 4000
    assert sorted(set(history.learning_rate), reverse=True) == [0.01 * x for x in STAGES]


def test_means_must_stand_still_as_well() -> None:
    """A bound that does not change does not end the last stage while the draws drift."""
    trainer, history = Descent(decay=0.0, bound=lambda x: 0.0 * x), PosteriorHistory()
    trainer.move = lambda x, rate: x + 2e-4
    course(trainer, history, num_steps=6000).train(0.01)
    assert history.stopped == "num_steps"


def test_best_window_is_returned() -> None:
    """A run that diverges goes on from its best window, at the next rate."""

    class Unstable(Descent):
        def move(self, x, rate):
            return x * (0.99 if rate < 0.01 or len(self.rates) < 12 else 1.2)

    trainer, history = Unstable(), PosteriorHistory()
    run = course(trainer, history)
    run.train(0.01)
    assert min(history.elbo) < -100 < -1e-3 < run.best_elbo
    np.testing.assert_allclose(-0.5 * trainer.state[1] ** 2, run.best_elbo)
    assert run.best_elbo == max(history.elbo)


def test_tempered_powers_rise_in_equal_steps() -> None:
    trainer, history = Descent(), PosteriorHistory()
    run = course(trainer, history, temper=True)
    run.train(0.01)
    powers = np.concatenate(trainer.powers)
    warm = 3000
    np.testing.assert_allclose(powers[[0, warm // 2, warm]], [0.01, 0.505, 1.0])
    assert (powers[warm:] == 1).all()
    assert (np.diff(powers[: warm + 1]) > 0).all()
    # No window on the way counts, nor ends a stage.
    assert history.learning_rate[warm // WINDOW - 1] == 0.01


def test_improper_posterior_is_named() -> None:
    trainer = Descent(decay=0.0, bound=lambda x: np.log(np.abs(x)))
    trainer.move = lambda x, rate: x * 1.05
    message = (
        "Expected a proper posterior; got a bound that grows without an end along site 's0'. Give "
        "it a proper prior, or look for a mode at infinity."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        course(trainer).train(0.01)


def test_far_from_the_start_is_not_improper() -> None:
    """A bound that has come to its end is one, however far away; at the start of a stage too."""
    trainer, history = Descent(away=5e4, decay=0.0, bound=lambda x: 0.0 * x), PosteriorHistory()
    course(trainer, history).train(0.01)
    assert history.stopped == "converged"


def test_skipped_steps_do_not_hide_the_bound() -> None:
    """What is shown of a block is the mean of the steps that were not skipped."""
    shown: list[float] = []
    trainer = Descent(away=0.0, bound=lambda x: 0.0 * x - 2.0)
    advance = trainer.advance

    def skipping(*given):
        bounds = advance(*given)
        bounds[0] = np.nan
        return bounds

    trainer.advance = skipping
    run = course(trainer, num_steps=200)
    run.on_block = lambda steps, elbo: shown.append(elbo)
    run.train(0.01)
    assert set(shown) == {-2.0}


def test_no_bound_at_all() -> None:
    trainer = Descent(bound=lambda x: -np.inf + 0 * x)
    message = "Expected a bound that is finite; got none in "
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        course(trainer, num_steps=1000).train(0.01)


@pytest.mark.parametrize("rates", [0.0, (), (0.01, -1.0), "fast", (math.inf,)])
def test_learning_rates_are_checked(rates) -> None:
    with pytest.raises(ValueError, match=re.escape(f"learning_rates > 0; got {rates}.")):
        checked_rates(rates)


def test_budget_must_hold_the_race() -> None:
    check_steps(1200, (0.01, 0.003))
    message = "Expected num_steps >= 1200 to race 2 learning rates; got 1199. Raise num_steps, or"
    with pytest.raises(ValueError, match=re.escape(message)):
        check_steps(1199, (0.01, 0.003))
    message = "Expected num_steps >= 200 for all stages; got 100. Raise num_steps."
    with pytest.raises(ValueError, match=re.escape(message)):
        check_steps(100, (0.01,))


class Paths:
    """Normals of three paths: two modes, and one that is far below."""

    loc, scale_tril = np.zeros(2), np.eye(2)
    elbos = np.array([-1.0, -2.0, -50.0])
    locs = np.array([[-3.0, 0.0], [3.0, 0.0], [0.0, 90.0]])
    scale_trils = np.array([0.5 * np.eye(2)] * 3)


def test_modes_and_the_normal_over_them() -> None:
    assert count_modes(Paths) == 2
    loc, scale_tril = pooled(Paths)
    np.testing.assert_allclose(loc, 0, atol=1e-12)
    np.testing.assert_allclose(scale_tril @ scale_tril.T, np.diag([9.25, 0.25]), atol=1e-12)

    class Close(Paths):
        locs = np.array([[-0.5, 0.0], [0.5, 0.0], [0.0, 90.0]])

    assert count_modes(Close) == 1
    assert count_modes(object()) == 1


def noise(scale: float) -> np.ndarray:
    return -3.0 + scale * np.random.default_rng(0).standard_normal(4000)


BASE = {
    "converged": True,
    "last_gain": 0.0,
    "num_modes": 1,
    "tempered": False,
    "is_flow": True,
    "restarts": [-3.0],
}
# Weights whose square has no mean, and nearly equal ones with a heavy tail.
HEAVY = noise(0.0) - 1.5 * np.log(np.random.default_rng(0).uniform(size=4000))
ADVICE = {
    "good": (noise(0.1), {}, "is below 0.70: the guide can be relied on; sample_posterior with"),
    "modes": (noise(0.1), {"num_modes": 2}, "The paths ended at 2 modes, of which the guide may"),
    "tempered": (noise(0.1), {"num_modes": 2, "tempered": True}, "the guide can be relied on"),
    "budget": (HEAVY, {"converged": False, "last_gain": 3.0}, "The bound still rose by 3 nats"),
    "family": (HEAVY, {"is_flow": False}, "too narrow somewhere; fit with family=IAF."),
    "restarts": (HEAVY, {"restarts": [-3.0, -9.0]}, "restarts ended at different bounds"),
    "flow": (HEAVY, {}, "functools.partial(IAF, num_flows=8)"),
    "hole": (np.append(noise(0.1), np.nan), {}, "The model has no density at 1 of 4001 draws, so"),
    "equal": (np.log1p(1e-6 * np.exp(HEAVY + 3)), {}, "though the weights are nearly equal"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_follows_from_the_numbers(name: str) -> None:
    log_weights, options, text = ADVICE[name]
    assert text in diagnose(log_weights, **{**BASE, **options}).advice


def test_numbers_of_a_diagnosis() -> None:
    """Log-normal weights: bound -3, evidence -3 + .02, and their errors."""
    found = diagnose(noise(0.2), **BASE)
    np.testing.assert_allclose(found.elbo, -3, atol=4 * found.elbo_error)
    np.testing.assert_allclose(found.elbo_error, 0.2 / math.sqrt(4000), rtol=0.05)
    np.testing.assert_allclose(found.log_evidence, -2.98, atol=4 * found.log_evidence_error)
    np.testing.assert_allclose(found.log_evidence_error, found.elbo_error, rtol=0.1)
    np.testing.assert_allclose(found.ess, 4000 / math.exp(0.04), rtol=0.01)
    assert found.num_samples == 4000 and found.converged
    assert math.isnan(diagnose(HEAVY, **BASE).log_evidence_error)
    holed = diagnose(np.append(noise(0.2), np.nan), **BASE)
    assert holed.elbo == -math.inf
    np.testing.assert_allclose(holed.log_evidence, found.log_evidence + math.log(4000 / 4001))
