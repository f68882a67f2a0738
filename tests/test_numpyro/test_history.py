"""The history of a training run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from cases import CASES

from numpyro_vae_ext.training import History, Skipped


def filled(case: dict) -> History:
    history = History()
    for loss, validation_loss in zip(case["loss"], case["validation_loss"], strict=True):
        history.add_steps([loss + 0.5, math.nan, loss - 0.5])
        history.add_epoch(loss, validation_loss=validation_loss, samples_per_second=100.0)
        history.skipped.append(Skipped(len(history) - 1, 3 * len(history) - 2, "x", "data"))
    history.best_epoch = case["best_epoch"]
    return history


@pytest.mark.parametrize("case", CASES["training"]["History"])
def test_survives_json(case: dict) -> None:
    history = filled(case)
    history.stopped = "patience"
    state = history.to_dict()
    steps = state.pop("step_losses")
    again = History.from_dict({**json.loads(json.dumps(state)), "step_losses": steps})
    for name in ("epochs", "skipped", "best_epoch", "stopped"):
        assert getattr(again, name) == getattr(history, name)
    for name in ("loss", "validation_loss", "samples_per_second", "step_losses"):
        np.testing.assert_array_equal(getattr(again, name), getattr(history, name))
    assert len(again) == len(case["loss"]) and again.epochs == list(range(len(again)))
    assert all(isinstance(row, Skipped) for row in again.skipped)


@pytest.mark.parametrize("case", CASES["training"]["Skipped"])
def test_skipped_is_a_tuple(case: dict) -> None:
    assert Skipped(*case.values()) == Skipped(**case) == tuple(case.values())


def test_step_losses_grow() -> None:
    history = History()
    assert history.step_losses.shape == (0,) and history.step_losses.dtype == np.float64
    history.add_steps([1.0, 2.0])
    history.add_steps(np.array([np.nan], np.float32))
    np.testing.assert_array_equal(history.step_losses, [1.0, 2.0, np.nan])
    history.add_steps([3.0])
    np.testing.assert_array_equal(history.step_losses, [1.0, 2.0, np.nan, 3.0])


def test_text() -> None:
    history = History()
    assert repr(history) == "History(0 epochs)"
    history.add_epoch(2.0, validation_loss=2.5)
    assert repr(history) == "History(1 epoch, loss 2, validation loss 2.5)"
    history.skipped += [Skipped(0, 1, None, "loss"), Skipped(0, 2, None, "loss")]
    assert repr(history) == "History(1 epoch, loss 2, validation loss 2.5, 2 skipped steps)"


@pytest.mark.parametrize("case", CASES["training"]["History"])
def test_plot(case: dict) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    history = filled(case)
    _, ax = pyplot.subplots()
    assert history.plot(ax) is ax
    lines = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(lines["training"].get_ydata(), case["loss"])
    validated = [value for value in case["validation_loss"] if not math.isnan(value)]
    assert ("validation" in lines) == bool(validated)
    if validated:
        np.testing.assert_array_equal(lines["validation"].get_ydata(), validated)
    marks = [line for label, line in lines.items() if "skipped" in label]
    assert [len(line.get_xdata()) for line in marks] == [len(case["loss"])] * bool(case["loss"])
    assert ("best epoch 0" in lines) == (case["best_epoch"] == 0)
    assert ax.get_xlabel() == "epoch" and "nats per datum" in ax.get_ylabel()
    pyplot.close("all")
    assert history.plot().figure is not ax.figure
    pyplot.close("all")
