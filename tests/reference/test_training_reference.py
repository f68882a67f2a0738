"""The reference of the training loops, checked by differentiation and against its own minimum."""

import numpy as np
import pytest

from . import complex_step, training


def problem(num_rows=13, dim=3):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, dim))
    return x, x @ [0.5, -1.0, 2.0] + 0.3 * rng.normal(size=num_rows)


def test_gradient_is_that_of_the_loss():
    x, y = problem()
    w = np.array([0.3, -0.2, 0.7])
    expected = complex_step.gradient(lambda p: training.loss(p["w"], x[:4], y[:4], 13), {"w": w})
    np.testing.assert_allclose(training.gradient(w, x[:4], y[:4], 13), expected["w"], rtol=1e-12)
    np.testing.assert_allclose(training.gradient(training.minimum(x, y), x, y, 13), 0, atol=1e-12)


def test_mean_of_the_batches_is_the_whole():
    """With a ragged last batch, each weighted by its rows."""
    x, y = problem()
    w = np.array([0.3, -0.2, 0.7])
    parts = training.batches(np.arange(13), 5)
    assert [len(rows) for rows in parts] == [5, 5, 3]
    mean = sum(len(rows) * training.loss(w, x[rows], y[rows], 13) for rows in parts) / 13
    np.testing.assert_allclose(mean, training.loss(w, x, y, 13), rtol=1e-12)
    assert [len(rows) for rows in training.batches(np.arange(13), 5, drop_last=True)] == [5, 5]


@pytest.mark.parametrize("optimiser", [training.adam, training.sgd])
def test_training_ends_at_the_minimum(optimiser):
    x, y = problem()
    rate = 0.02 if optimiser is training.sgd else 0.05
    found = training.train(
        np.zeros(3), x, y, [[np.arange(13)]] * 800, optimiser(lambda step: rate), (x, y)
    )
    np.testing.assert_allclose(found["w"], training.minimum(x, y), atol=1e-6)
    np.testing.assert_allclose(found["validation_loss"][-1], found["step_losses"][-1], rtol=1e-9)


def test_a_step_without_a_number_changes_nothing():
    x, y = problem()
    y[7] = np.nan
    epochs = [training.batches(np.arange(13), 5)] * 2
    found = training.train(np.zeros(3), x, y, epochs, training.adam(lambda step: 0.1))
    assert np.isnan(found["step_losses"]).tolist() == [False, True, False] * 2
    np.testing.assert_array_equal(found["trace"][0], found["trace"][1])
    # As if there were no such batch.
    kept = training.train(
        np.zeros(3), x, y, [[rows for rows in epochs[0] if 7 not in rows]] * 2,
        training.adam(lambda step: 0.1),
    )  # fmt: skip
    np.testing.assert_array_equal(found["w"], kept["w"])
