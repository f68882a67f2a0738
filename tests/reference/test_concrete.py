"""The Concrete reference: densities that integrate to one, and say what the samples do."""

import numpy as np
import pytest
from scipy import integrate
from scipy.special import expit, log_softmax

from . import concrete

LOG_P = log_softmax(np.array([0.8, -0.5, 0.2]))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_binary_density_integrates_to_one(temperature):
    def total(lower):
        return integrate.quad(
            lambda y: np.exp(concrete.log_odds_log_prob(y, 0.7, temperature)),
            lower,
            40.0 / temperature,
        )[0]

    assert total(-40.0 / temperature) == pytest.approx(1.0)
    # The soft value is above 1/2 as often as the bit is 1.
    assert total(0.0) == pytest.approx(expit(0.7))


def test_binary_densities_are_one_another_s_change_of_variables():
    y = np.linspace(-6.0, 6.0, 13)
    x = expit(y)
    inside = concrete.binary_log_prob(x, 0.7, 0.4) + np.log(x) + np.log1p(-x)
    np.testing.assert_allclose(concrete.log_odds_log_prob(y, 0.7, 0.4), inside)
    # Two categories are a bit.
    both, log_p = np.stack([x, 1.0 - x], -1), log_softmax([0.7, 0.0])
    np.testing.assert_allclose(
        concrete.log_prob(both, log_p, 0.4), concrete.binary_log_prob(x, 0.7, 0.4), rtol=1e-9
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_three_way_density_integrates_to_one(temperature):
    # Log-ratios to the last entry: dx1 dx2 = x1 x2 x3 dy1 dy2. The trapezoidal rule converges
    # faster than any power on this smooth and decaying function.
    grid, step = np.linspace(-45.0 / temperature, 45.0 / temperature, 601, retstep=True)
    y = np.stack([*np.meshgrid(grid, grid, indexing="ij"), np.zeros((601, 601))], -1)
    log_x = log_softmax(y, axis=-1)
    density = np.exp(concrete.log_prob(np.exp(log_x), LOG_P, temperature) + log_x.sum(-1))
    assert density.sum() * step**2 == pytest.approx(1.0, abs=1e-6)


def test_samples_follow_the_categories_and_the_density():
    rng = np.random.default_rng(0)
    x = concrete.soften(rng.uniform(size=(200_000, 3)), LOG_P, 0.7)
    np.testing.assert_allclose(x.sum(-1), 1.0)
    frequency = np.bincount(x.argmax(-1), minlength=3) / len(x)
    np.testing.assert_allclose(frequency, np.exp(LOG_P), atol=4 * 0.5 / np.sqrt(len(x)))
    # E q(x) / p(x) = 1 for another density q of the same kind.
    ratio = np.exp(
        concrete.log_prob(x, LOG_P - 0.3 * LOG_P**2, 0.7) - concrete.log_prob(x, LOG_P, 0.7)
    )
    assert abs(ratio.mean() - 1.0) < 4 * ratio.std() / np.sqrt(len(x))


def test_evidence_of_a_relaxed_bit():
    def log_likelihood(b):
        return -0.5 * (0.3 - 2.0 * b) ** 2

    rng = np.random.default_rng(1)
    noise = rng.uniform(size=400_000)
    draws = np.exp(log_likelihood(expit((0.4 + np.log(noise) - np.log1p(-noise)) / 0.5)))
    found = concrete.binary_evidence(log_likelihood, 0.4, 0.5)
    assert abs(draws.mean() - found) < 4 * draws.std() / np.sqrt(len(draws))
    # Nearly hard at a low temperature.
    hard = expit(0.4) * np.exp(log_likelihood(1.0)) + expit(-0.4) * np.exp(log_likelihood(0.0))
    assert concrete.binary_evidence(log_likelihood, 0.4, 1e-4) == pytest.approx(hard, rel=1e-3)
