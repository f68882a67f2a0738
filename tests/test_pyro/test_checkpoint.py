"""Checkpoints: all of a run's state, written whole or not at all; a killed run ends as another."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from safetensors import safe_open
from test_pyro.models import family
from test_pyro.test_fit import QUIET, ROWS, Regression, regression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae_ext.elbos import (
    ImportanceWeightedELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
)
from pyro_vae_ext.training import FitResult, _state, compile, fit, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.usefixtures("exact")


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, json.loads(file.metadata()["vae_ext"])


def same_files(one: Path, other: Path) -> None:
    """But for how fast it went."""
    (tensors, header), (others, expected) = contents(one), contents(other)
    assert list(tensors) == list(others)
    for name, value in tensors.items():
        assert value.dtype == others[name].dtype, name
        np.testing.assert_array_equal(value.numpy(), others[name].numpy(), err_msg=name)
    for found in (header, expected):
        if "fit" in found["metadata"]:
            del found["metadata"]["fit"]["history"]["samples_per_second"]
    assert json.dumps(header) == json.dumps(expected)


class Vae:
    """A pair with dropout, running means, a constrained parameter and one drawn when it is made."""

    def __init__(self, optim: str = "Adam", guide: str = "MeanField") -> None:
        torch.manual_seed(2)
        options = {"lr": 1e-4, "momentum": 0.9} if optim == "SGD" else {"lr": 0.01}
        self.encoder = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.3), nn.Linear(3, 4))
        self.posterior = family(guide, latent_dim=2, context_dim=4)
        self.optim = getattr(pyro.optim, optim)(options)
        self.svi = SVI(self.model, self.guide, self.optim, ImportanceWeightedELBO(2))

    def model(self, x: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.randn(2, 3))
        scale = pyro.param("scale", torch.ones(3), constraint=dist.constraints.positive)
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        pyro.module("posterior", self.posterior)
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            self.posterior("z", self.encoder(x))


@pytest.mark.parametrize("case", CASES["training"]["load_checkpoint"])
def test_round_trip(case: dict, tmp_path: Path) -> None:
    """In place; the same numbers follow, from all generators."""
    path, (x, _) = tmp_path / "run.safetensors", regression()
    vae = Vae(case["optimiser"])
    for _ in range(3):
        vae.svi.step(x)
    save_checkpoint(path, vae.svi)

    def after() -> list[Any]:
        losses = [vae.svi.step(x) for _ in range(3)]
        numbers = [torch.rand(()).item(), np.random.rand(), random.random(), random.gauss(0, 1)]
        values = [p.detach().clone() for p in pyro.get_param_store().values()]
        return [*losses, *numbers, *values, *[b.clone() for b in vae.encoder.buffers()]]

    random.gauss(0, 1)  # One number in store.
    save_checkpoint(path, vae.svi)
    first = after()
    leaves = [*vae.encoder.parameters(), *vae.posterior.parameters()]
    places = [leaf.data_ptr() for leaf in leaves]
    groups = [own.param_groups[0] for own in vae.optim.optim_objs.values()]
    assert load_checkpoint(path, vae.svi) == ({}, {})
    assert places == [leaf.data_ptr() for leaf in leaves]
    owners = vae.optim.optim_objs.values()
    assert all(own.param_groups[0] is g for own, g in zip(owners, groups, strict=True))
    for one, other in zip(first, after(), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other

    # Another process: modules of its own, made by one run; then the same again.
    pyro.clear_param_store()
    vae = Vae(case["optimiser"])
    with pytest.raises(ValueError, match="Expected modules to be registered before a checkpoint"):
        load_checkpoint(path, vae.svi)
    assert len(pyro.get_param_store()) == 0
    vae.svi.evaluate_loss(x)
    load_checkpoint(path, vae.svi)
    for one, other in zip(first, after(), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert pyro.param("encoder$$$2.weight") is vae.encoder[2].weight


@pytest.mark.parametrize("case", CASES["training"]["save_checkpoint"])
def test_metadata_and_arrays(case: dict, tmp_path: Path) -> None:
    path, svi = tmp_path / "run", Regression().svi
    arrays = {"a": np.arange(6).reshape(2, 3), "b": torch.tensor(0.1, dtype=torch.float32)}
    save_checkpoint(path, svi, **case, arrays=arrays)
    metadata, found = load_checkpoint(str(path), svi)
    assert metadata == (case["metadata"] or {})
    assert list(found) == ["a", "b"] and found["b"].dtype == torch.float32
    np.testing.assert_array_equal(found["a"], arrays["a"])
    assert found["b"] == arrays["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


CONSTRAINTS = {
    "positive": torch.rand(3) + 0.1,
    "unit_interval": torch.rand(3),
    "simplex": torch.tensor([0.2, 0.3, 0.5]),
    "lower_cholesky": torch.eye(2) * 1.7,
    "ordered_vector": torch.tensor([-1.0, 0.0, 3.0]),
    "softplus_positive": torch.rand(3) + 0.1,
}


def test_parameters_that_no_program_has_made_yet(tmp_path: Path) -> None:
    """Bit for bit, with their constraints; of a module made by Pyro as well."""
    path, (x, _) = tmp_path / "run", regression()
    box = dist.constraints.interval(torch.tensor([-1.0, 0.0]), 2.0)
    rows = dist.constraints.independent(dist.constraints.greater_than(1.5), 1)

    def model(x: Tensor) -> None:
        for name, value in CONSTRAINTS.items():
            pyro.param(name, value, constraint=getattr(dist.constraints, name))
        pyro.param("box", torch.tensor([0.3, 0.4]), constraint=box)
        pyro.param("rows", torch.tensor([2.0, 3.0]), constraint=rows)
        pyro.sample("z", dist.Normal(pyro.param("box").sum(), 1.0).expand([2]).to_event(1))

    def new() -> SVI:
        return SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

    svi = new()
    for _ in range(2):
        svi.step(x)
    save_checkpoint(path, svi)
    store = pyro.get_param_store()
    values = {name: leaf.detach().clone() for name, leaf in store.named_parameters()}
    losses = [svi.step(x) for _ in range(2)]
    pyro.clear_param_store()
    svi = new()
    load_checkpoint(path, svi)
    found = dict(pyro.get_param_store().named_parameters())
    assert set(found) == set(values) and "AutoNormal.scales.z" in found
    assert all(torch.equal(found[name], values[name]) for name in values)
    # The set-up of the guide takes them over; it draws numbers of its own, hence once more.
    svi.evaluate_loss(x)
    assert all(torch.equal(found[name], values[name]) for name in values)
    load_checkpoint(path, svi)
    assert losses == [svi.step(x) for _ in range(2)]


def test_modules_in_functions_come_first(tmp_path: Path) -> None:
    """Else the module would be trained no more, and the store's parameters by nobody."""
    path, (x, y) = tmp_path / "run", regression()

    def new() -> tuple[SVI, nn.Module]:
        pyro.clear_param_store()
        net = nn.Linear(3, 1)

        def model(x: Tensor, y: Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0), obs=y)

        return SVI(model, lambda x, y: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()), net

    svi, net = new()
    svi.step(x, y)
    save_checkpoint(path, svi)
    weight = net.weight.detach().clone()
    svi, net = new()
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, svi)
    assert str(error.value) == (
        "Expected modules to be registered before a checkpoint is loaded; got none with "
        "'net$$$bias'. Call svi.evaluate_loss on a batch before, or load it with the programs "
        "that it is of."
    )
    svi.evaluate_loss(x, y)
    load_checkpoint(path, svi)
    assert torch.equal(net.weight, weight) and pyro.param("net$$$weight") is net.weight


def test_only_the_parameters_of_its_own(tmp_path: Path) -> None:
    """Pyro's store is shared with other programs."""
    path, (x, y) = tmp_path / "run", regression()
    pyro.param("other", torch.zeros(2))
    svi = Regression().svi
    svi.step(x, y)
    save_checkpoint(path, svi)
    assert [name for name in contents(path)[0] if name.startswith("param/")] == ["param/w_loc"]
    pyro.get_param_store()["other"] = torch.ones(2)
    svi.step(x, y)
    load_checkpoint(path, svi)
    assert torch.equal(pyro.param("other"), torch.ones(2))


@pytest.mark.parametrize("name", ["NVIL", "REBAR", "RELAX"])
def test_tuning_of_objectives_survives(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    x = (torch.rand(20, 2) < 0.3).to(torch.get_default_dtype())
    classes = {"NVIL": TraceNVIL_ELBO, "REBAR": TraceREBAR_ELBO, "RELAX": TraceRELAX_ELBO}

    def model(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(0.1 + 0.8 * b).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", 20, subsample_size=len(x)):
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    def run(num_epochs: int, **options: Any) -> tuple[FitResult, dict[str, Tensor]]:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        elbo = classes[name]()
        tuned = elbo.tunable(guide)
        svi = SVI(model, tuned, pyro.optim.Adam({"lr": 0.05}), elbo)
        found = fit(svi, x, num_epochs=num_epochs, batch_size=8, **options, **QUIET)
        return found, {key: value.clone() for key, value in tuned.state_dict().items()}

    whole, state = run(4)
    run(2, checkpoint=path)
    resumed, other = run(4, checkpoint=path)
    np.testing.assert_array_equal(whole.history.step_losses, resumed.history.step_losses)
    assert len(state) > 1 and all(torch.equal(state[key], other[key]) for key in state)


class Stop(Exception):
    pass


def interrupted(run: Callable[..., Any], at: list[int]) -> Any:
    """The result of a run that fails after steps of these numbers, each time to go on."""
    from pyro_vae_ext.training import _run

    original = _run.Run._show
    for step in at:

        def fail(self: Any, bar: Any, step: int = step) -> None:
            original(self, bar)
            # Before the checkpoint that may be due.
            if self.now["step"] == step:
                raise Stop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_run.Run, "_show", fail)
            with pytest.raises(Stop):
                run()
        pyro.clear_param_store()
    return run()


def sources(x: Tensor) -> dict[str, Any]:
    loader = DataLoader(TensorDataset(x), batch_size=6, shuffle=True)
    generator = torch.Generator().manual_seed(5)
    own = DataLoader(TensorDataset(x), batch_size=6, shuffle=True, generator=generator)
    return {"arrays": (x, 6), "loader": (loader, None), "generator": (own, None)}


@pytest.mark.parametrize(
    ("source", "backend", "num_epochs", "kills"),
    [
        ("arrays", None, 5, 3),
        ("loader", None, 5, 3),
        ("generator", None, 5, 3),
        ("loader", "fx", 2, 1),
    ],
)
def test_resumes_bit_for_bit(
    source: str,
    backend: str | None,
    num_epochs: int,
    kills: int,
    tmp_path: Path,
) -> None:
    """In the midst of an epoch, with validation, and with the best parameters put back."""
    x, _ = regression()
    places = np.random.default_rng(0).choice(np.arange(4, 4 * num_epochs), kills, replace=False)
    steps = sorted(places.tolist())

    def run(name: str) -> tuple[FitResult, Vae]:
        data, batch_size = sources(x)[source]
        pyro.set_rng_seed(3)
        vae = Vae()
        result = fit(
            compile(vae.svi, backend=backend) if backend else vae.svi,
            data,
            num_epochs=num_epochs,
            batch_size=batch_size,
            compile=backend is not None,
            validation_data=x[:9],
            patience=9,
            schedules={"learning_rate": lambda step: 0.1 / (1 + step)},
            checkpoint=tmp_path / name,
            checkpoint_every=3,
            progress_bar=False,
        )
        return result, vae

    whole, vae = run("whole")
    after = torch.rand(3)
    pyro.clear_param_store()
    resumed, other = interrupted(lambda: run("killed"), steps)
    assert torch.equal(after, torch.rand(3))
    same_files(tmp_path / "whole", tmp_path / "killed")
    np.testing.assert_array_equal(whole.history.step_losses, resumed.history.step_losses)
    assert whole.history.loss == resumed.history.loss
    assert whole.history.best_epoch == resumed.history.best_epoch
    for name, value in whole.params.items():
        assert torch.equal(value, resumed.params[name])
    assert all(map(torch.equal, vae.encoder.buffers(), other.encoder.buffers()))


def test_exception_in_a_callback(tmp_path: Path) -> None:
    x, y = regression()
    path = tmp_path / "run"
    failing = {1, 3}

    def fail(epoch: int, params: Any, history: Any) -> None:
        if epoch in failing:
            failing.remove(epoch)
            raise Stop

    def run(**options: Any) -> FitResult:
        pyro.clear_param_store()
        options = {"num_epochs": 5, "batch_size": 6, **options, **QUIET}
        return fit(Regression().svi, (x, y), **options)

    torch.manual_seed(0)
    whole = run()
    for start in range(2):
        torch.manual_seed(start)
        with pytest.raises(Stop):
            run(callbacks=[fail], checkpoint=path, checkpoint_every=4)
    resumed = run(callbacks=[fail], checkpoint=path, checkpoint_every=4)
    np.testing.assert_array_equal(whole.history.step_losses, resumed.history.step_losses)
    assert torch.equal(whole.params["w_loc"], resumed.params["w_loc"])
    assert len(resumed.history.samples_per_second) == 5


def test_finished_run_goes_on_with_more_epochs(tmp_path: Path) -> None:
    x, y = regression()

    def run(num_epochs: int, name: str, **options: Any) -> FitResult:
        pyro.clear_param_store()
        torch.manual_seed(0)
        options = {"batch_size": 6, "checkpoint": tmp_path / name, **options, **QUIET}
        return fit(Regression().svi, (x, y), num_epochs=num_epochs, **options)

    whole = run(5, "a")
    run(3, "b")
    more = run(5, "b")
    np.testing.assert_array_equal(whole.history.step_losses, more.history.step_losses)
    assert more.history.stopped == "num_epochs"
    same_files(tmp_path / "a", tmp_path / "b")
    before = (tmp_path / "b").stat().st_mtime_ns
    again = run(5, "b")
    assert len(again.history) == 5 and (tmp_path / "b").stat().st_mtime_ns == before
    assert torch.equal(again.params["w_loc"], whole.params["w_loc"])
    assert len(run(2, "b").history) == 5
    # Anew, over the old one.
    assert len(run(2, "b", resume=False).history) == 2 and len(run(2, "b").history) == 2

    best = {"validation_data": (x, y), "patience": 9, "min_delta": 1e9}
    expected = run(4, "e", **best)
    run(2, "f", **best)
    found = run(4, "f", **best)
    assert found.history.best_epoch == 0 and not torch.equal(
        found.params["w_loc"], whole.params["w_loc"]
    )
    assert torch.equal(found.params["w_loc"], expected.params["w_loc"])

    still = {"validation_data": (x, y), "patience": 1, "min_delta": 1e9}
    first = run(9, "c", **still).history
    assert first.stopped == "patience" and len(first) == 2
    assert run(9, "c", **still).history.stopped == "patience"
    assert len(run(9, "c", **{**still, "patience": 4}).history) == 5
    ends = {"callbacks": [lambda epoch, params, history: epoch == 1]}
    assert len(run(9, "d", **ends).history) == 2 == len(run(9, "d", **ends).history)


def test_ends_of_epochs_without_a_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyro_vae_ext.training import _run

    saved: list[int] = []
    write = _run.write

    def record(path: Any, svi: SVI, places: Any, metadata: Any, arrays: Any) -> None:
        saved.append(metadata["fit"]["now"]["epoch"])
        write(path, svi, places, metadata, arrays)

    monkeypatch.setattr(_run, "write", record)
    x, y = regression()
    for seconds in (0.0, _run.SECONDS):
        monkeypatch.setattr(_run, "SECONDS", seconds)
        options = {"num_epochs": 3, "checkpoint": tmp_path / "run", "resume": False, **QUIET}
        fit(Regression().svi, (x, y), **options)
    assert saved == [1, 2, 3, 3]


def test_checkpoint_of_another_run(tmp_path: Path) -> None:
    x, y = regression()
    path = tmp_path / "run"
    options: dict[str, Any] = {"num_epochs": 1, "checkpoint": path, **QUIET}

    def run(svi: SVI, data: Any, **others: Any) -> None:
        pyro.clear_param_store()
        fit(svi, data, **{**options, **others})

    run(Regression().svi, (x, y), batch_size=5)

    def check(text: str, svi: SVI, data: Any, **others: Any) -> None:
        with pytest.raises(ValueError) as error:
            run(svi, data, **others)
        assert str(error.value) == (
            f"Expected the checkpoint of this run at {path}; got {text}. Pass resume=False to "
            "start anew, or another path."
        )

    check("one with num_rows=23, not 20", Regression().svi, (x[:20], y[:20]), batch_size=5)
    check("one with batch_size=5, not 6", Regression().svi, (x, y), batch_size=6)
    check("one with shuffle=True, not False", Regression().svi, (x, y), batch_size=5, shuffle=False)
    check("one with num_steps=5, not 4", Regression().svi, (x, y), batch_size=5, drop_last=True)
    sgd = Regression(pyro.optim.SGD({"lr": 0.1})).svi
    check("the optimiser Adam, where SGD is used here", sgd, (x, y), batch_size=5)

    class Wide(Regression):
        def guide(self, x: Tensor, y: Tensor) -> None:
            w = pyro.param("w_loc", lambda: torch.zeros(4))
            pyro.sample("w", dist.Delta(w[:3]).to_event(1))

    text = "shape (3,) of float64 for the parameter 'w_loc', which has shape (4,) of float64 here"
    check(text, Wide().svi, (x, y), batch_size=5)
    assert torch.equal(pyro.param("w_loc"), torch.zeros(4))  # Nothing was changed.

    class Bounded(Regression):
        def guide(self, x: Tensor, y: Tensor) -> None:
            w = pyro.param("w_loc", lambda: torch.ones(3), constraint=dist.constraints.positive)
            pyro.sample("w", dist.Delta(w).to_event(1))

    text = "the constraint Real() for the parameter 'w_loc', which has GreaterThan(lower_bound=0.0)"
    text += " here"
    check(text, Bounded().svi, (x, y), batch_size=5)

    class Other(Regression):
        def guide(self, x: Tensor, y: Tensor) -> None:
            pyro.sample("w", dist.Delta(pyro.param("other", torch.ones(3))).to_event(1))

    check("one without the parameter 'other'", Other().svi, (x, y), batch_size=5)

    save_checkpoint(path, Regression().svi)
    check("one that fit did not write", Regression().svi, (x, y), batch_size=5)
    path.write_bytes(b"no such thing")
    check("a file that is no checkpoint", Regression().svi, (x, y), batch_size=5)
    run(Regression().svi, (x, y), batch_size=5, resume=False)
    with pytest.raises(ValueError, match=r"Expected a checkpoint at .*none; got no such file\."):
        load_checkpoint(tmp_path / "none", Regression().svi)


def test_parameters_must_be_finite(tmp_path: Path) -> None:
    path, svi = tmp_path / "run", Regression().svi
    pyro.param("loc", torch.ones(2))
    save_checkpoint(path, svi)
    before = path.read_bytes()
    pyro.get_param_store()["loc"] = torch.tensor([1.0, float("inf")])
    with pytest.raises(ValueError) as error:
        save_checkpoint(path, svi)
    assert str(error.value) == (
        "Expected finite parameters in a checkpoint; got non-finite values in 'loc'. The last "
        "checkpoint is kept."
    )
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, svi = tmp_path / "run", Regression().svi
    pyro.param("loc", torch.ones(2))
    save_checkpoint(path, svi)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space left"):
                save_checkpoint(path, svi, metadata={"a": 1})
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name", ["ExponentialLR", "MultiStepLR", "ReduceLROnPlateau", "OneCycleLR"]
)
def test_schedulers_of_the_host(name: str, tmp_path: Path) -> None:
    path, (x, y) = tmp_path / "run", regression()
    options = {
        "ExponentialLR": {"gamma": 0.5},
        "MultiStepLR": {"milestones": [1, 3], "gamma": 0.3},
        "ReduceLROnPlateau": {"patience": 1},
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
    }[name]

    def run(num_epochs: int, **others: Any) -> FitResult:
        pyro.clear_param_store()
        torch.manual_seed(0)
        made = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, **options}
        svi = Regression(getattr(pyro.optim, name)(made)).svi
        return fit(svi, (x, y), num_epochs=num_epochs, batch_size=9, **others, **QUIET)

    whole = run(4)
    run(2, checkpoint=path)
    np.testing.assert_array_equal(
        whole.history.step_losses, run(4, checkpoint=path).history.step_losses
    )


def test_values_survive() -> None:
    value = {
        "a": [None, True, 1, 0.1, float("inf"), "text", (2, [3])],
        4: {"tensor": torch.arange(3), "empty": {}},
        "counter": Counter({1: 2, 3: 1}),
        "number": np.float64(0.1),
        "constraint": dist.constraints.independent(dist.constraints.interval(0.0, 2.0), 1),
    }
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_state.Encoder(tensors)("name", value))
    found = _state.Decoder(tensors)(json.loads(text))
    assert found["a"] == value["a"] and found["number"] == 0.1
    assert torch.equal(found[4]["tensor"], torch.arange(3)) and found[4]["empty"] == {}
    assert type(found["counter"]) is Counter and found["counter"] == value["counter"]
    assert str(found["constraint"]) == str(value["constraint"])


def test_state_that_no_file_can_have(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "odd": object()}

    x, y = regression()
    svi = Regression(pyro.optim.PyroOptim(Odd, {"lr": 0.1})).svi
    svi.step(x, y)
    with pytest.raises(ValueError, match="Expected numbers, strings and tensors in the state of a"):
        save_checkpoint(tmp_path / "run", svi)
    assert list(tmp_path.iterdir()) == []


def test_modules_without_a_name(tmp_path: Path) -> None:
    """Buffers of what nobody registers are kept by ``fit``, which sees it being called."""
    path, (x, y) = tmp_path / "run", regression()

    def run(num_epochs: int, **options: Any) -> Tensor:
        pyro.clear_param_store()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(3, affine=False)
        pair = Regression()

        def model(x: Tensor, y: Tensor) -> None:
            pair.model(norm(x), y)

        svi = SVI(model, pair.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        fit(svi, (x, y), num_epochs=num_epochs, batch_size=9, **options, **QUIET)
        return norm.running_mean

    whole = run(4)
    run(2, checkpoint=path)
    assert torch.equal(whole, run(4, checkpoint=path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_run_ends_as_one_in_peace(tmp_path: Path) -> None:
    """By SIGKILL at random moments; ``VAE_EXT_KILLS`` says how often."""
    kills = os.environ.get("VAE_EXT_KILLS", "2")
    script = Path(__file__).with_name("killed.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(script), str(tmp_path), kills]
    found = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"{kills} kills")
    names = ["killed.safetensors", "warm.safetensors", "whole.safetensors"]
    for name in names[:2]:
        same_files(tmp_path / name, tmp_path / "whole.safetensors")
    # Nor is anything left of a write that was cut short.
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names
