"""Checkpoints: all of a state, complete or not there; a killed run ends as one in peace."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cases import CASES
from numpyro.infer import SVI, Trace_ELBO
from test_numpyro.test_fit import KEY, QUIET, ROWS, Normalised, pair, regression

from numpyro_vae_ext import elbos
from numpyro_vae_ext.training import FitResult, fit, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.usefixtures("exact")


def contents(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    from numpyro_vae_ext.training import _file

    # A run that was killed just before its end may have left the one before.
    return _file._read(path / str(_file._complete(path)[-1]))


def same_files(one: Path, other: Path) -> None:
    """But for how fast it went."""
    (header, values), (expected, others) = contents(one), contents(other)
    for found in (header, expected):
        del found["metadata"]["history"]["samples_per_second"]
        del found["metadata"]["now"]["seconds"]
    assert json.dumps(header) == json.dumps(expected)
    for a, b in zip(values, others, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def same_states(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", CASES["training"]["load_checkpoint"])
@pytest.mark.parametrize("theirs", [True, False])
def test_round_trip(case: dict, theirs: bool, tmp_path: Path) -> None:
    """Of the host's optimisers and Optax's, with constraints, and parameters of several types."""
    optim = getattr(numpyro.optim, case["optimiser"])(0.1)
    if not theirs:
        optim = optax.chain(optax.clip(1.0), getattr(optax, case["optimiser"].lower())(0.1))

    def guide(x: jax.Array) -> None:
        positive = dist.constraints.positive
        scale = numpyro.param("scale", jnp.ones(2), constraint=positive)
        nested = numpyro.param(
            "a$params", {"b": [jnp.ones(2, jnp.float32)], "c": jnp.zeros((2, 0))}
        )
        half = numpyro.param("half", jnp.ones(2, jnp.bfloat16))
        loc = nested["b"][0] + half + nested["c"].sum()
        numpyro.sample("z", dist.Normal(loc.astype(float), scale).to_event(1))

    def model(x: jax.Array) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    svi, x = SVI(model, guide, optim, Trace_ELBO()), jnp.ones(())
    update = jax.jit(svi.update)
    for key in (KEY, jax.random.PRNGKey(0)):
        state, _ = update(svi.init(key, x), x)
        save_checkpoint(tmp_path / "run", state)
        other = svi.init(jax.random.fold_in(key, 1), x)
        found, metadata, arrays = load_checkpoint(str(tmp_path / "run"), other)
        assert (metadata, arrays) == ({}, {})
        same_states(found, state)
        same_states(update(found, x), update(state, x))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["1"]


def test_mutable_state_and_devices(tmp_path: Path) -> None:
    pair = Normalised()
    x = jnp.linspace(0.0, 1.0, 4)
    state, _ = pair.svi.update(pair.svi.init(KEY, x), x)
    state = jax.device_put(state, jax.devices()[0])
    save_checkpoint(tmp_path, state)
    found, _, _ = load_checkpoint(tmp_path, state)
    same_states(found, state)
    assert all(leaf.committed for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("case", CASES["training"]["save_checkpoint"])
def test_metadata_and_arrays(case: dict, tmp_path: Path) -> None:
    state = pair(optax.sgd(0.1)).init(KEY, *regression())
    arrays = {
        "a": np.arange(6).reshape(2, 3),
        "b": np.array(0.1, np.float32),
        "none": np.empty((0, 2), np.int8),
        "flags": jnp.array([True, False]),
    }
    save_checkpoint(tmp_path / "run", state, **case, arrays=arrays)
    _, metadata, found = load_checkpoint(tmp_path / "run", state)
    assert metadata == (case["metadata"] or {}) and list(found) == list(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "optim", [numpyro.optim.Adam(0.1), numpyro.optim.SGD(0.1), optax.adam(0.1), optax.sgd(0.1)]
)
def test_parameters_must_be_finite(optim: Any, tmp_path: Path) -> None:
    """Whatever the optimiser keeps beside them, which may start from infinity."""
    svi = pair(optim)
    state = svi.init(KEY, *regression())
    save_checkpoint(tmp_path, state)
    bad = svi.optim.init({"a": jnp.ones(2), "w_loc": jnp.array([1.0, jnp.inf])})
    with pytest.raises(ValueError) as error:
        save_checkpoint(tmp_path, state._replace(optim_state=bad))
    assert str(error.value) == (
        "Expected finite parameters in a checkpoint; got non-finite values in 'w_loc'. The last "
        "checkpoint is kept."
    )
    same_states(load_checkpoint(tmp_path, state)[0], state)
    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    save_checkpoint(tmp_path, pair(plateau).init(KEY, *regression()))


def test_another_state(tmp_path: Path) -> None:
    svi = pair(optax.sgd(0.1))
    state = svi.init(KEY, *regression())
    save_checkpoint(tmp_path, state)

    def check(text: str, params: dict[str, Any]) -> None:
        with pytest.raises(ValueError) as error:
            load_checkpoint(tmp_path, state._replace(optim_state=svi.optim.init(params)))
        assert str(error.value) == (
            f"Expected the checkpoint of this run at {tmp_path}; got {text}. Pass resume=False to "
            "start anew, or another path."
        )

    name = "optim_state.1.0.w_loc"
    text = f"shape (3,) of float64 for '{name}', which has shape "
    check(f"{text}(4,) of float64 here", {"w_loc": jnp.ones(4)})
    check(f"{text}(3,) of float32 here", {"w_loc": jnp.ones(3, jnp.float32)})
    check(
        "one without 'optim_state.1.0.other'",
        {"w_loc": jnp.ones(3), "other": jnp.ones(3)},
    )
    check(f"one with '{name}', which is not here", {})
    with pytest.raises(ValueError, match=r"Expected a checkpoint at .*none; got no such file\."):
        load_checkpoint(tmp_path / "none", state)


def test_a_write_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is there, and what is left over goes at the next one."""
    from numpyro_vae_ext.training import _file

    state = pair(optax.sgd(0.1)).init(KEY, *regression())
    save_checkpoint(tmp_path, state, metadata={"step": 1})
    for name in ("_write", "_flush"):
        original = getattr(_file, name)

        def fail(*args: Any, original: Callable[..., None] = original) -> None:
            original(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_file, name, fail)
            save_checkpoint(tmp_path, state, metadata={"step": 2})
        assert load_checkpoint(tmp_path, state)[1] == {"step": 1}
        assert len(list(tmp_path.iterdir())) == 2
    # The new one is there, and the old one has not gone yet.
    with monkeypatch.context() as patch:
        patch.setattr(_file, "_remove", lambda folders: None)
        save_checkpoint(tmp_path, state, metadata={"step": 3})
    assert load_checkpoint(tmp_path, state)[1] == {"step": 3}
    save_checkpoint(tmp_path, state, metadata={"step": 4})
    assert load_checkpoint(tmp_path, state)[1] == {"step": 4}
    assert [entry.name for entry in tmp_path.iterdir()] == ["2"]


class Stop(Exception):
    pass


def interrupted(run: Callable[[], Any], at: list[int]) -> Any:
    """The result of a run that fails after these steps, before what they would save."""
    from numpyro_vae_ext.training._run import Run

    original = Run._save_if_due
    for step in at:

        def fail(self: Any, step: int = step) -> None:
            if self.now["step"] >= step:
                raise Stop
            original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "_save_if_due", fail)
            with pytest.raises(Stop):
                run()
    return run()


class Shuffled:
    """Batches in an order that is drawn from NumPy's and Python's numbers."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        order = np.random.permutation(ROWS)
        for place in range(0, ROWS, 6):
            noise = random.gauss(0.0, 0.1)
            yield [x[order[place : place + 6]] + noise for x in self.arrays]


def source(name: str) -> tuple[Any, int | None]:
    arrays = regression()
    if name == "loader":
        torch = pytest.importorskip("torch")
        rows = torch.utils.data.TensorDataset(*map(torch.tensor, arrays))
        own = torch.Generator().manual_seed(3)
        return torch.utils.data.DataLoader(rows, 6, shuffle=True, generator=own), None
    if name == "iterable":
        return Shuffled(*arrays), None
    return arrays, 6


@pytest.mark.parametrize(
    ("name", "steps"),
    [("resident", [5, 12]), ("streamed", [5]), ("iterable", [5, 12]), ("loader", [6])],
)
def test_resumes_bit_for_bit(name: str, steps: list[int], tmp_path: Path) -> None:
    """In the midst of an epoch, with validation, schedules, and what patience keeps."""

    def run(path: str) -> FitResult:
        np.random.seed(1)
        random.seed(1)
        data, batch_size = source(name)
        return fit(
            KEY,
            pair(optax.inject_hyperparams(optax.adam)(learning_rate=1.0)),
            data,
            num_epochs=5,
            batch_size=batch_size,
            validation_data=source("iterable")[0] if name == "iterable" else regression(1),
            validation_every=2,
            patience=9,
            schedules={"learning_rate": lambda step: 0.1 / (1 + step)},
            checkpoint=tmp_path / path,
            checkpoint_every=3,
            resident=name == "resident",
            **QUIET,
        )

    whole = run("whole")
    resumed = interrupted(lambda: run("killed"), steps)
    same_files(tmp_path / "whole", tmp_path / "killed")
    same_states(whole.state, resumed.state)
    np.testing.assert_array_equal(whole.history.step_losses, resumed.history.step_losses)
    assert whole.history.loss == resumed.history.loss
    assert whole.history.best_epoch == resumed.history.best_epoch
    assert len(whole.history.step_losses) == 20


def test_exception_in_a_callback(tmp_path: Path) -> None:
    """Of an epoch that is not saved yet: it is called again. The shuffle is that of the start."""
    x, y = regression()
    y[3] = np.nan
    calls, failing = [], {1, 3}

    def fail(epoch: int, params: Any, history: Any) -> None:
        calls.append(epoch)
        if epoch in failing:
            failing.remove(epoch)
            raise Stop

    def run(name: str, key: jax.Array = KEY) -> FitResult:
        with pytest.warns(UserWarning, match="Skipped step"):
            return fit(
                key,
                pair(),
                (x, y),
                num_epochs=5,
                batch_size=6,
                callbacks=[fail],
                checkpoint=tmp_path / name,
                checkpoint_every=3,
                **QUIET,
            )

    with pytest.raises(Stop):
        run("a")
    with pytest.raises(Stop):
        run("a", jax.random.key(7))
    resumed = run("a")
    assert calls == [0, 1, 1, 2, 3, 3, 4]
    whole = run("b")
    same_files(tmp_path / "a", tmp_path / "b")
    assert [row.epoch for row in resumed.history.skipped] == [0, 1, 2, 3, 4]
    same_states(resumed.state, whole.state)


def test_finished_run_goes_on_with_more_epochs(tmp_path: Path) -> None:
    data = regression()

    def run(num_epochs: int, name: str, **options: Any) -> FitResult:
        options = {"checkpoint": tmp_path / name, **options, **QUIET}
        return fit(KEY, pair(), data, num_epochs=num_epochs, **options)

    whole = run(5, "a")
    run(3, "b")
    more = run(5, "b")
    np.testing.assert_array_equal(whole.history.step_losses, more.history.step_losses)
    assert more.history.stopped == "num_epochs"
    same_files(tmp_path / "a", tmp_path / "b")
    (before,) = (tmp_path / "b").iterdir()
    again = run(5, "b")
    assert [before] == list((tmp_path / "b").iterdir())
    assert len(again.history) == 5 == len(run(2, "b").history)
    same_states(again.state, whole.state)
    # Anew, over the old one.
    assert len(run(2, "b", resume=False).history) == 2 == len(run(2, "b").history)


def test_runs_that_have_stopped(tmp_path: Path) -> None:
    """Patience is asked again; a callback's word is the last."""
    data = regression()

    def run(**options: Any) -> Any:
        return fit(KEY, pair(), data, num_epochs=9, **options, **QUIET).history

    still = {"validation_data": data, "min_delta": 1e9, "checkpoint": tmp_path / "c"}
    for patience, epochs in ((1, 2), (1, 2), (4, 5)):
        history = run(patience=patience, **still)
        assert history.stopped == "patience" and len(history) == epochs
    ends = {"callbacks": [lambda epoch, *_: epoch == 1], "checkpoint": tmp_path / "d"}
    for _ in range(2):
        history = run(**ends)
        assert history.stopped == "callback" and len(history) == 2


def test_ends_of_epochs_without_a_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numpyro_vae_ext.training import _file, _run

    saved: list[int] = []
    write = _file.write

    def record(path: Any, state: Any, metadata: Any, arrays: Any) -> None:
        saved.append(metadata["now"]["epoch"])
        write(path, state, metadata, arrays)

    monkeypatch.setattr(_file, "write", record)
    for seconds in (0.0, _run.SECONDS):
        monkeypatch.setattr(_run, "SECONDS", seconds)
        options = {"checkpoint": tmp_path, "resume": False, "callbacks": [lambda *_: None]}
        fit(KEY, pair(optax.sgd(0.1)), regression(), num_epochs=3, **options, **QUIET)
    assert saved == [1, 2, 3, 3]


def test_checkpoint_of_another_run(tmp_path: Path) -> None:
    x, y = regression()
    svi = pair(optax.sgd(0.01))

    def run(data: Any = (x, y), size: int | None = 5, svi: SVI = svi, **options: Any) -> None:
        options = {"batch_size": size, "checkpoint": tmp_path, **options, **QUIET}
        fit(KEY, svi, data, num_epochs=1, **options)

    run()
    for options, text in (
        ({"data": (x[:20], y[:20])}, "one with num_rows=23, not 20"),
        ({"size": 6}, "one with batch_size=5, not 6"),
        ({"shuffle": False}, "one with shuffle=True, not False"),
        ({"drop_last": True}, "one with drop_last=False, not True"),
        ({"data": [(x, y)], "size": None}, "one with num_steps=None, not 1"),
        ({"svi": pair(optax.adam(0.1))}, "one without 'optim_state.1.1.0.count'"),
    ):
        with pytest.raises(ValueError) as error:
            run(**options)
        assert str(error.value) == (
            f"Expected the checkpoint of this run at {tmp_path}; got {text}. Pass resume=False to "
            "start anew, or another path."
        )
    save_checkpoint(tmp_path, svi.init(KEY, x, y))
    with pytest.raises(ValueError, match="got one that fit did not write"):
        run()
    run(resume=False)


@pytest.mark.parametrize("name", ["TraceNVIL_ELBO", "TraceREBAR_ELBO", "TraceRELAX_ELBO"])
def test_tuning_of_objectives_survives(name: str, tmp_path: Path) -> None:
    """Parameters and running state that an objective adds to the guide."""

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", 8, subsample_size=len(x)):
            b = numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: jax.Array) -> None:
        logits = numpyro.param("logits", jnp.zeros(()))
        with numpyro.plate("data", 8, subsample_size=len(x)):
            numpyro.sample("b", dist.Bernoulli(logits=logits))

    def new() -> SVI:
        elbo = getattr(elbos, name)(**({} if "REBAR" in name else {"hidden_dims": (3,)}))
        return SVI(model, elbo.tunable(guide), optax.adam(0.05), elbo)

    svi, x = new(), jnp.linspace(-1.0, 2.0, 8)
    update = jax.jit(svi.update)
    state, _ = update(svi.init(KEY, x), x)
    save_checkpoint(tmp_path, state)
    found, _, _ = load_checkpoint(tmp_path, new().init(jax.random.key(1), x))
    same_states(found, state)
    same_states(update(found, x), update(state, x))
    assert len(svi.get_params(state)) > 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_run_ends_as_one_in_peace(tmp_path: Path) -> None:
    """By SIGKILL at random moments; ``VAE_EXT_KILLS`` says how often."""
    kills = os.environ.get("VAE_EXT_KILLS", "2")
    script = Path(__file__).with_name("killed.py")
    own = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path), kills]
    found = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"{kills} kills")
    done = [path for path in tmp_path.iterdir() if path.name not in ("programs", "whole")]
    assert done
    for path in done:
        same_files(path, tmp_path / "whole")
