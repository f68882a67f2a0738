"""The reference of the recurrent likelihood, checked by enumeration and by a cell in scalars."""

import itertools
import math

import numpy as np
import pytest

from . import recurrent


@pytest.mark.parametrize("cell, num_layers, window", [("gru", 1, 1), ("lstm", 2, 3)])
def test_probabilities_sum_to_one(cell, num_layers, window):
    rng = np.random.default_rng(0)
    kwargs = {"cell": cell, "window": window}
    weights = recurrent.random_weights(rng, 2 * window + 1, 2, cell=cell, num_layers=num_layers)
    values = np.array(list(itertools.product((0, 1), repeat=8))).reshape(-1, 4, 2)
    rows = rng.standard_normal((4, 1))
    conditioning = np.broadcast_to(rows, (len(values), 4, 1))
    log_prob = recurrent.bernoulli_log_prob(values, weights, conditioning, **kwargs)
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1.0, rtol=1e-12)
    # The present part of a masked sequence as well, whatever the rest holds.
    mask = np.array([True, True, False, False])
    log_prob = recurrent.bernoulli_log_prob(values, weights, conditioning, mask=mask, **kwargs)
    np.testing.assert_allclose(np.exp(log_prob).sum(), 2.0**4, rtol=1e-12)
    first = recurrent.bernoulli_log_prob(values[:, :2], weights, conditioning[:, :2], **kwargs)
    np.testing.assert_allclose(log_prob, first, rtol=1e-12)


def test_categorical_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    weights = recurrent.random_weights(rng, 6, 3)
    values = np.array(list(itertools.product(range(3), repeat=4)))
    log_prob = recurrent.categorical_log_prob(values, weights, 3, window=2)
    np.testing.assert_allclose(np.exp(log_prob).sum(), 1.0, rtol=1e-12)


def test_one_unit_by_hand():
    """Two steps of a cell with one unit, in plain numbers."""

    def sigmoid(x):
        return 1.0 / (1.0 + math.exp(-x))

    rng = np.random.default_rng(0)
    for cell, gates in recurrent.GATES.items():
        weights = recurrent.random_weights(rng, 1, 1, cell=cell, hidden_dim=1)
        w, u, b, d = (
            weights[f"rnn.{name}_l0"].ravel()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = c = 0.0
        found = []
        for x in (0.0, 1.0):
            a = [w[g] * x + b[g] for g in range(gates)]
            r = [u[g] * h + d[g] for g in range(gates)]
            if cell == "gru":
                reset, update = sigmoid(a[0] + r[0]), sigmoid(a[1] + r[1])
                h = (1 - update) * math.tanh(a[2] + reset * r[2]) + update * h
            else:
                i, f, o = (sigmoid(a[g] + r[g]) for g in (0, 1, 3))
                c = f * c + i * math.tanh(a[2] + r[2])
                h = o * math.tanh(c)
            found.append(float(weights["head.weight"][0, 0] * h + weights["head.bias"][0]))
        # The value 1 enters the second step.
        params = recurrent.params(np.ones((2, 1)), weights, cell=cell)
        np.testing.assert_allclose(params[:, 0], found, rtol=1e-12)
