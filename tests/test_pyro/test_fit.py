"""Training over epochs: against a plain loop in NumPy, and against the host's steps."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro.infer import SVI, Trace_ELBO
from reference import training as reference
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae_ext import handlers
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.training import FitResult, History, compile, fit

ROWS, DIM = 23, 3
QUIET = {"compile": False, "progress_bar": False}

pytestmark = pytest.mark.usefixtures("exact")


def regression(seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, DIM))
    y = x @ [0.5, -1.0, 2.0] + 0.3 * rng.normal(size=ROWS)
    return torch.as_tensor(x), torch.as_tensor(y)


class Regression:
    """A point estimate of the weights, as a pair; remembers the rows of each step."""

    def __init__(self, optim: Any = None, num_rows: int | None = ROWS) -> None:
        self.seen: list[Tensor] = []
        self.num_rows = num_rows
        optim = pyro.optim.Adam({"lr": 0.05}) if optim is None else optim
        self.svi = SVI(self.model, self.guide, optim, Trace_ELBO())

    def model(self, x: Tensor, y: Tensor, **others: Any) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        size = len(x) if self.num_rows is None else self.num_rows
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    def guide(self, x: Tensor, y: Tensor, **others: Any) -> None:
        if torch.is_grad_enabled():
            self.seen.append(x)
        w = pyro.param("w_loc", lambda: torch.zeros(DIM))
        pyro.sample("w", dist.Delta(w).to_event(1))

    def epochs(self, x: Tensor, steps: int) -> list[list[np.ndarray]]:
        """Numbers of the rows that the steps were on."""
        rows = [(batch[:, None] == x).all(-1).int().argmax(1).numpy() for batch in self.seen]
        return [rows[start : start + steps] for start in range(0, len(rows), steps)]


def check(result: FitResult, expected: dict[str, np.ndarray]) -> None:
    history = result.history
    np.testing.assert_allclose(history.step_losses, expected["step_losses"], rtol=1e-12)
    np.testing.assert_allclose(history.loss, expected["loss"], rtol=1e-12)
    np.testing.assert_allclose(result.params["w_loc"], expected["w"], rtol=1e-11)
    if len(expected["validation_loss"]):
        np.testing.assert_allclose(history.validation_loss, expected["validation_loss"], rtol=1e-12)


@pytest.mark.parametrize("case", CASES["training"]["fit"])
def test_is_the_plain_loop(case: dict) -> None:
    x, y = regression()
    other = regression(1)
    pair = Regression()
    result = fit(pair.svi, (x, y), **case, validation_data=other, **QUIET)
    size = case.get("batch_size") or ROWS
    num_steps = ROWS // size if case.get("drop_last") else math.ceil(ROWS / size)
    epochs = pair.epochs(x, num_steps)
    if not case.get("drop_last"):
        assert [sorted(np.concatenate(epoch)) for epoch in epochs] == [[*range(ROWS)]] * 3
    if "batch_size" in case and case.get("shuffle", True):
        assert not np.array_equal(epochs[0][0], epochs[1][0])
    else:
        assert np.array_equal(epochs[0][0], np.arange(min(size, ROWS)))
    adam = reference.adam(lambda step: 0.05)
    others = tuple(map(np.asarray, other))
    start = np.zeros(DIM)
    check(result, reference.train(start, x.numpy(), y.numpy(), epochs, adam, others))
    assert result.history.stopped == "num_epochs" and result.history.epochs == [0, 1, 2]
    assert result.params["w_loc"] is not pyro.param("w_loc")
    torch.testing.assert_close(result.params["w_loc"], pyro.param("w_loc").detach())


def test_compiled_is_the_plain_loop() -> None:
    """By the graph without a compiler: a batch of each size is a graph of its own."""
    x, y = regression()
    pair = Regression(pyro.optim.SGD({"lr": 0.01, "momentum": 0.5}))
    svi = compile(pair.svi, backend="fx")
    result = fit(
        svi,
        {"y": y, "x": x},
        num_epochs=3,
        batch_size=5,
        shuffle=False,
        progress_bar=False,
        schedules={"learning_rate": lambda step: 0.01 / (1 + step), "beta": lambda step: step},
    )
    epochs = [reference.batches(np.arange(ROWS), 5)] * 3
    sgd = reference.sgd(lambda step: 0.01 / (1 + step), 0.5)
    check(result, reference.train(np.zeros(DIM), x.numpy(), y.numpy(), epochs, sgd))
    assert svi.num_graphs == 2
    # It goes on with them.
    options = {"schedules": {"beta": lambda step: step}, "progress_bar": False}
    fit(svi, {"y": y, "x": x}, num_epochs=1, batch_size=5, **options)
    assert svi.num_graphs == 2


def forms(x: Tensor, y: Tensor) -> dict[str, tuple[Any, int | None]]:
    """Data in all forms, with the size of batches to ask for."""
    batches = [(x[rows], y[rows]) for rows in (slice(0, 10), slice(10, 20), slice(20, ROWS))]
    return {
        "tuple": ((x, y), 10),
        "list": ([x, y], 10),
        "numpy": ((x.numpy(), y.numpy()), 10),
        "dict": ({"y": y, "x": x}, 10),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=10), None),
        "batches": (batches, None),
        "lists": ([list(batch) for batch in batches], None),
        "dicts": ([{"x": a.numpy(), "y": b.numpy()} for a, b in batches], None),
    }


@pytest.mark.parametrize("form", list(forms(*regression())))
def test_forms_of_data(form: str) -> None:
    x, y = regression()
    data, batch_size = forms(x, y)[form]
    valid, _ = forms(x, y)[form]
    options = {"num_epochs": 2, "shuffle": False, "validation_data": valid, **QUIET}
    result = fit(Regression().svi, data, batch_size=batch_size, **options)
    epochs = [reference.batches(np.arange(ROWS), 10)] * 2
    adam, arrays = reference.adam(lambda step: 0.05), (x.numpy(), y.numpy())
    check(result, reference.train(np.zeros(DIM), *arrays, epochs, adam))
    # Of batches of 10, 10 and 3 rows: each has the loss of the weights once.
    w = result.params["w_loc"].numpy()
    whole = reference.loss(w, *arrays, ROWS) / ROWS
    prior = reference.loss(w, *arrays, 0) / ROWS
    assert result.history.validation_loss[-1] == pytest.approx(
        whole + prior * (sum(n for n in (10, 10, 3)) / ROWS - 1), rel=1e-12
    )


def test_nested_and_single_arrays() -> None:
    """An array is one argument; nested tuples come as they are; float64 of NumPy is the default."""
    found = []

    def model(*args: Any, scale: float) -> None:
        found.append((args, scale))
        pyro.sample(
            "x", dist.Normal(pyro.param("loc", torch.zeros(())), scale), obs=torch.zeros(())
        )

    def run(data: Any, **options: Any) -> Any:
        svi = SVI(model, lambda *args, scale: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
        options = {"kwargs": {"scale": 2.0}, **options, **QUIET}
        fit(svi, data, num_epochs=1, shuffle=False, drop_last=True, **options)
        return found[-1][0]

    x = torch.arange(5.0)
    ((first,),) = [run(x, batch_size=2)]
    assert first.tolist() == [2.0, 3.0] and found[-1][1] == 2.0
    one, (two, three) = run((x, [x + 1, {"a": x.numpy() > 2}]), batch_size=5)
    assert one.shape == two.shape == (5,) and three["a"].dtype == torch.bool
    torch.set_default_dtype(torch.float32)
    try:
        (x64,) = run(np.arange(5.0))
        assert x64.dtype == torch.float32
        assert run(np.arange(5))[0].dtype == torch.int64
    finally:
        torch.set_default_dtype(torch.float64)


def test_same_numbers_per_datum() -> None:
    """On all data at once, in minibatches, by a plate that draws its own, and on new data."""

    def losses(num_rows: int | None, draw: int | None = None, **options: Any) -> History:
        pyro.clear_param_store()

        def model(x: Tensor) -> None:
            loc = pyro.param("loc", torch.zeros(()))
            size = len(x) if draw is None else draw
            with pyro.plate("data", num_rows or len(x), subsample_size=size) as rows:
                x = x if draw is None else x[rows]
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
        x = torch.ones(ROWS)
        return fit(svi, x, num_epochs=1, validation_data=x[:9], **options, **QUIET).history

    expected = 0.5 + 0.5 * math.log(2 * math.pi)
    for history in (
        losses(None),
        losses(ROWS, batch_size=5),
        losses(10 * ROWS, batch_size=5),
        losses(None, batch_size=5),
        losses(ROWS),
    ):
        np.testing.assert_allclose(history.step_losses, expected, rtol=1e-12)
        np.testing.assert_allclose(history.validation_loss, expected, rtol=1e-12)
    x = torch.ones(ROWS)
    svi = SVI(lambda x: drawn(x, 4), lambda x: None, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
    history = fit(svi, x, num_epochs=2, **QUIET).history
    np.testing.assert_allclose(history.loss, expected, rtol=1e-12)


def drawn(x: Tensor, size: int) -> None:
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", len(x), subsample_size=size) as rows:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])


def test_constant_scale_and_a_ragged_batch() -> None:
    def model(x: Tensor, scale: float = 4.6) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=scale):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def run(data: Any, **options: Any) -> History:
        svi = SVI(model, lambda x, scale=1.0: None, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO())
        return fit(svi, data, num_epochs=1, **options, **QUIET).history

    x = torch.ones(ROWS)
    text = (
        r"Expected the scale of site 'x' to follow the rows of a batch; got 4\.6 for 5 rows and "
        r"for 3\. Write plate\(\"data\", N, subsample_size=len\(x\)\), or pass drop_last=True\."
    )
    with pytest.raises(ValueError, match=text):
        run(x, batch_size=5)
    with pytest.raises(ValueError, match="got 4.6 for 5 rows and for 3"):
        run([(x[:5],), (x[:5],), (x[:3],)])
    expected = 0.5 + 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(run(x, batch_size=5, drop_last=True).step_losses, [expected] * 4)
    # A loss per number instead of per datum: no stand-in for more data.
    per_number = run(x, batch_size=5, kwargs={"scale": 0.25})
    np.testing.assert_allclose(per_number.step_losses, [expected] * 5)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"num_epochs": 0}, ValueError, "Expected num_epochs >= 1; got 0."),
        ({"num_epochs": 1.0}, TypeError, "Expected num_epochs to be an int; got float."),
        ({"batch_size": 0}, ValueError, "Expected batch_size >= 1; got 0."),
        ({"max_skipped": -1}, ValueError, "Expected max_skipped >= 0; got -1."),
        ({"validation_every": 0}, ValueError, "Expected validation_every >= 1; got 0."),
        ({"patience": 0}, ValueError, "Expected patience >= 1 or None; got 0."),
        ({"checkpoint_every": 0}, ValueError, "Expected checkpoint_every >= 1 or None; got 0."),
        ({"patience": 1}, ValueError, "Expected validation_data with patience; got None."),
        ({"schedules": {"a": 1}}, TypeError, "Expected schedules of callables; got int for 'a'."),
        (
            {"batch_size": 30, "drop_last": True},
            ValueError,
            "Expected drop_last=False with fewer rows than batch_size; got 23 rows for "
            "batch_size=30.",
        ),
    ],
)
def test_errors_about_options(options: dict, kind: type, text: str) -> None:
    with pytest.raises(kind) as error:
        fit(Regression().svi, regression(), **{"num_epochs": 1, **options}, **QUIET)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            (batch for batch in [torch.ones(3)]),
            "Expected data that can be iterated again each epoch; got a generator. Pass a list, a "
            "DataLoader, or arrays.",
        ),
        ((torch.ones(3), torch.ones(4)), "Expected arrays with one leading dimension; got [3, 4]."),
        (torch.ones(()), "Expected arrays with one leading dimension; got [None]."),
        ((), "Expected arrays with one leading dimension; got []."),
        ([(torch.ones(()),)], "Expected arrays with one leading dimension; got [()]."),
        (torch.ones(0, 2), "Expected data with at least one row; got none."),
        (DataLoader([]), "Expected data with at least one row; got none."),
    ],
)
def test_errors_about_data(data: Any, text: str) -> None:
    with pytest.raises(ValueError) as error:
        fit(Regression().svi, data, num_epochs=1, **QUIET)
    assert str(error.value) == text


def test_further_errors_about_data() -> None:
    svi, batches = Regression().svi, [tuple(regression())]
    with pytest.raises(ValueError, match="Expected batch_size=None with an iterable of batches"):
        fit(svi, batches, num_epochs=1, batch_size=5, **QUIET)
    for data in (3, (["a"],)):
        with pytest.raises(TypeError, match="Expected arrays with one leading dimension; got"):
            fit(svi, data, num_epochs=1, **QUIET)


def test_errors_of_hosts_and_objectives_come_first() -> None:
    """Before any step, with the hosts' validation, and without a change."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, -1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    # A log-density of NaN is no error but a skipped step: here it is the host's number.
    with pytest.warns(UserWarning, match="non-finite log_prob at site 'x'"):
        assert len(fit(svi, torch.ones(3), num_epochs=1, **QUIET).history.skipped) == 1
    svi = SVI(
        lambda x: drawn(x, len(x)), guide, pyro.optim.SGD({"lr": 0.1}), ImportanceWeightedELBO()
    )
    with pytest.raises(ValueError, match="got guide site 'z' that the model lacks"):
        fit(svi, torch.ones(3), num_epochs=1, **QUIET)


def test_random_numbers_are_those_of_steps() -> None:
    """After the seed of the run, the host's own steps draw the same numbers."""
    posterior = nn.Sequential(nn.BatchNorm1d(DIM), nn.Linear(DIM, 2))
    start = {name: p.clone() for name, p in posterior.state_dict().items()}

    def model(x: Tensor) -> None:
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("posterior", posterior)
        loc, scale = posterior(x).unbind(-1)
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    x, _ = regression()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ImportanceWeightedELBO(3))
    svi.evaluate_loss(x[:5])  # Makes the parameters.
    posterior.load_state_dict(start)
    pyro.set_rng_seed(7)
    options = {"num_epochs": 2, "batch_size": 5, "shuffle": False, "validation_data": x}
    result = fit(svi, x, **options, **QUIET)
    after = torch.rand(())
    buffers = [b.clone() for b in posterior.buffers()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ImportanceWeightedELBO(3))
    svi.evaluate_loss(x[:5])
    posterior.load_state_dict(start)
    pyro.set_rng_seed(7)
    torch.randint(2**31 - 1, ())
    losses = [svi.step(batch) / ROWS for _ in range(2) for batch in x.split(5)]
    np.testing.assert_allclose(result.history.step_losses, losses, rtol=1e-13)
    for name, value in result.params.items():
        assert torch.equal(value, pyro.param(name))
    assert all(map(torch.equal, buffers, posterior.buffers()))
    assert after == torch.rand(())


@pytest.mark.parametrize("registered", [False, True])
def test_run_before_the_first_step_leaves_modules_alone(registered: bool) -> None:
    """Also one that it is the first to call, and that nobody registers."""
    norm = nn.BatchNorm1d(DIM, affine=registered)

    def model(x: Tensor) -> None:
        if registered:
            pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            loc = norm(x) + pyro.param("loc", torch.zeros(DIM))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    fit(svi, regression()[0], num_epochs=2, **QUIET)
    assert norm.num_batches_tracked == 2


def test_schedules_reach_programs_as_tensors() -> None:
    """A KL weight and a temperature, both by our handlers."""
    seen = []

    def weigh(x: Tensor, beta: Tensor, temperature: Tensor) -> Tensor:
        seen.append((beta, temperature))
        return beta

    def temper(x: Tensor, beta: Tensor, temperature: Tensor) -> Tensor:
        return temperature

    def model(x: Tensor, beta: Tensor, temperature: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=x)

    def guide(x: Tensor, beta: Tensor, temperature: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    pair = [handlers.relax(program, temperature=temper) for program in (model, guide)]
    pair = [handlers.kl_weight(program, weight=weigh) for program in pair]
    svi = SVI(*pair, pyro.optim.Adam({"lr": 0.1}), ImportanceWeightedELBO())
    schedules = {
        "beta": lambda step: min(1.0, step / 4),
        "temperature": lambda step: 2.0 / (1 + step),
    }
    fit(svi, torch.ones(6), num_epochs=3, batch_size=3, schedules=schedules, **QUIET)
    assert all(isinstance(x, Tensor) and x.shape == () for pair in seen for x in pair)
    steps = list(dict.fromkeys((beta.item(), temperature.item()) for beta, temperature in seen))
    assert steps == [(min(1.0, step / 4), 2.0 / (1 + step)) for step in range(6)]


@pytest.mark.parametrize("per_parameter", [False, True])
def test_schedule_of_the_learning_rate(per_parameter: bool) -> None:
    """From the first step on, which makes the optimisers."""
    x, y = regression()
    options = {"lr": 17.0, "momentum": 0.9}
    optim = pyro.optim.SGD((lambda name: options) if per_parameter else options)
    pair = Regression(optim)
    rate = reference.sgd(lambda step: 0.01 / (1 + step), 0.9)
    result = fit(
        pair.svi,
        (x, y),
        num_epochs=2,
        batch_size=10,
        schedules={"learning_rate": lambda step: torch.tensor(0.01 / (1 + step))},
        **QUIET,
    )
    epochs = pair.epochs(x, 3)
    check(result, reference.train(np.zeros(DIM), x.numpy(), y.numpy(), epochs, rate))
    # The user's own is as it was.
    assert options["lr"] == 17.0 and optim._get_optim_args(pyro.param("w_loc"))["lr"] == 17.0


def test_schedule_needs_a_learning_rate() -> None:
    pair = Regression(pyro.optim.AdagradRMSProp({"eta": 0.1}))
    with pytest.raises(ValueError) as error:
        fit(pair.svi, regression(), num_epochs=1, schedules={"learning_rate": float}, **QUIET)
    assert str(error.value) == (
        "Expected an optimiser with the hyperparameter 'learning_rate' to schedule; got "
        "AdagradRMSProp. Use one with an argument lr."
    )


@pytest.mark.parametrize("validate", [False, True])
def test_schedulers_of_the_host_step_once_an_epoch(validate: bool) -> None:
    x, y = regression()
    sgd = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}}
    pair = Regression(pyro.optim.ExponentialLR({**sgd, "gamma": 0.5}))
    rates = reference.sgd(lambda step: 0.01 * 0.5 ** (step // 3))
    result = fit(pair.svi, (x, y), num_epochs=3, batch_size=10, **QUIET)
    epochs = pair.epochs(x, 3)
    check(result, reference.train(np.zeros(DIM), x.numpy(), y.numpy(), epochs, rates))

    pyro.clear_param_store()
    optim = pyro.optim.ReduceLROnPlateau({**sgd, "patience": 0, "threshold": 1e9, "factor": 0.5})
    other = {"validation_data": (x, y), "validation_every": 2} if validate else {}
    fit(Regression(optim).svi, (x, y), num_epochs=4, **other, **QUIET)
    (scheduler,) = optim.optim_objs.values()
    # Each look is at a plateau; with validation there are two looks.
    assert scheduler.optimizer.param_groups[0]["lr"] == 0.01 * 0.5 ** (2 if validate else 4)


def test_patience_puts_the_best_parameters_back() -> None:
    """On data that the training drives away from, after a minimum on the way."""
    x = torch.full((8,), 5.0)
    norm = nn.BatchNorm1d(1, affine=False)
    seen = []

    def model(x: Tensor) -> None:
        norm(x[:, None])
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
    options = {
        "num_epochs": 50,
        "validation_data": torch.full((4,), 1.6),
        "callbacks": [
            lambda epoch, params, history: seen.append((params["loc"], norm.running_mean.clone()))
        ],
        **QUIET,
    }
    result = fit(svi, x, patience=2, **options)
    history = result.history
    best = int(np.argmin(history.validation_loss))
    assert history.stopped == "patience" and history.best_epoch == best == len(history) - 3
    assert 0 < best and torch.equal(result.params["loc"], seen[best][0])
    assert torch.equal(pyro.param("loc"), seen[best][0]) and pyro.param("loc") is not seen[best][0]
    assert torch.equal(norm.running_mean, seen[best][1])
    assert not torch.equal(norm.running_mean, seen[best + 1][1])

    pyro.clear_param_store()
    svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
    last = fit(svi, x, **{**options, "num_epochs": 9})
    assert len(last.history) == 9 and last.history.best_epoch == best
    assert not torch.equal(last.params["loc"], seen[best][0])

    pyro.clear_param_store()
    svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
    early = fit(svi, x, patience=1, min_delta=0.5, **options).history
    gains = -np.diff(early.validation_loss)
    assert len(early) == early.best_epoch + 2 and gains[-1] < 0.5 and (gains[:-1] > 0.5).all()


def test_validation_every_few_epochs() -> None:
    x, y = regression()
    result = fit(
        Regression().svi, (x, y), num_epochs=5, validation_data=(x, y), validation_every=2, **QUIET
    )
    found = np.isnan(result.history.validation_loss)
    assert found.tolist() == [True, False, True, False, True] and result.history.best_epoch == 3


def test_validation_leaves_the_training_alone() -> None:
    """Its random numbers are the same each time; dropout and running means are at rest."""
    x = torch.randn(8, 2)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1))
    start = {name: value.clone() for name, value in net.state_dict().items()}
    modes = []

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        modes.append((torch.is_grad_enabled(), net.training, net[1].training))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(net(x).squeeze(-1) + z, 1.0), obs=x[:, 0])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def run(rate: float, **options: Any) -> tuple[FitResult, list[Tensor]]:
        pyro.clear_param_store()
        net.load_state_dict(start)
        pyro.set_rng_seed(3)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": rate}), Trace_ELBO())
        return fit(svi, x, num_epochs=3, **options, **QUIET), [*net.state_dict().values()]

    (one, state), (two, other) = run(0.1), run(0.1, validation_data=x[:4])
    np.testing.assert_array_equal(one.history.step_losses, two.history.step_losses)
    assert all(map(torch.equal, state, other)) and net.training
    assert (False, False, False) in modes and (True, True, True) in modes
    still = run(0.0, validation_data=x[:4])[0].history
    assert len(set(still.step_losses)) == 3
    # The running means move on, the random numbers do not: no parameter depends on them.
    net[0].momentum = 0.0
    assert len(set(run(0.0, validation_data=x[:4])[0].history.validation_loss)) == 1


def test_callbacks() -> None:
    x, y = regression()
    calls = []

    def record(epoch: int, params: dict[str, Tensor], history: History) -> None:
        calls.append((epoch, params["w_loc"].clone(), len(history), torch.is_grad_enabled()))
        params["w_loc"].zero_()  # A copy.

    def stop(epoch: int, params: dict[str, Tensor], history: History) -> bool:
        return epoch == 2

    result = fit(Regression().svi, (x, y), num_epochs=9, callbacks=[record, stop], **QUIET)
    assert result.history.stopped == "callback" and len(result.history) == 3
    assert [(call[0], *call[2:]) for call in calls] == [(0, 1, True), (1, 2, True), (2, 3, True)]
    assert torch.equal(calls[-1][1], result.params["w_loc"])

    def fail(epoch: int, params: dict[str, Tensor], history: History) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(Regression().svi, (x, y), num_epochs=2, callbacks=[fail], **QUIET)


def test_training_goes_on_from_where_the_parameters_are() -> None:
    x, y = regression()
    svi = Regression().svi
    first = fit(svi, (x, y), num_epochs=2, **QUIET)
    second = fit(svi, (x, y), num_epochs=2, **QUIET)
    pyro.clear_param_store()
    whole = fit(Regression().svi, (x, y), num_epochs=4, **QUIET)
    losses = np.concatenate([first.history.step_losses, second.history.step_losses])
    np.testing.assert_array_equal(losses, whole.history.step_losses)


def test_progress_bar(capsys: pytest.CaptureFixture) -> None:
    x, y = regression()
    fit(Regression().svi, (x, y), num_epochs=2, batch_size=10, compile=False)
    err = capsys.readouterr().err
    assert "fit" in err and "6/6" in err and "loss=" in err and "samples/s=" in err
    fit(Regression().svi, (x, y), num_epochs=1, **QUIET)
    assert capsys.readouterr().err == ""


def test_losses_of_all_kinds() -> None:
    """The host's own objectives, and a program that is a module."""
    x, y = regression()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(DIM))

        def model(self, x: Tensor, y: Tensor) -> None:
            pyro.module("pair", self)
            with pyro.plate("data", ROWS, subsample_size=len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal((x * self.w).sum(-1) + z, 1.0), obs=y)

        def guide(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", ROWS, subsample_size=len(x)):
                pyro.sample("z", dist.Normal(y / 2, 0.7))

    for elbo in (
        pyro.infer.TraceMeanField_ELBO(),
        pyro.infer.TraceGraph_ELBO(),
        pyro.infer.TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        pyro.infer.RenyiELBO(num_particles=3),
        ImportanceWeightedELBO(3),
    ):
        pair = Pair()
        pyro.clear_param_store()
        svi = SVI(pair.model, pair.guide, pyro.optim.ClippedAdam({"lr": 0.05}), elbo)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = fit(svi, (x, y), num_epochs=10, batch_size=10, **QUIET)
        assert result.history.loss[-1] < result.history.loss[0]
        assert list(result.params) == ["pair$$$w"] and torch.equal(
            pair.w, result.params["pair$$$w"]
        )


def test_result() -> None:
    case = CASES["training"]["FitResult"][0]
    result: FitResult = fit(Regression().svi, regression(), **case, **QUIET)
    params, history = result
    assert isinstance(history, History) and list(params) == ["w_loc"]
    assert isinstance(params["w_loc"], Tensor) and not params["w_loc"].requires_grad
