"""Training over epochs: against a plain loop in NumPy, and against the host's steps."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cases import CASES
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.primitives import mutable
from reference import training as reference

from numpyro_vae_ext import handlers
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.training import FitResult, History, compile, fit
from numpyro_vae_ext.training._run import Run

ROWS, DIM = 23, 3
KEY = jax.random.key(0)
QUIET = {"progress_bar": False}

pytestmark = pytest.mark.usefixtures("exact")


def regression(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, DIM))
    return x, x @ [0.5, -1.0, 2.0] + 0.3 * rng.normal(size=ROWS)


def pair(optim: Any = None, num_rows: int | None = ROWS) -> SVI:
    """A point estimate of the weights."""

    def model(x: jax.Array, y: jax.Array, **others: Any) -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros(DIM), 1.0).to_event(1))
        with numpyro.plate("data", num_rows or len(x), subsample_size=len(x)):
            numpyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    def guide(x: jax.Array, y: jax.Array, **others: Any) -> None:
        numpyro.sample("w", dist.Delta(numpyro.param("w_loc", jnp.zeros(DIM)), event_dim=1))

    return SVI(model, guide, optax.adam(0.05) if optim is None else optim, Trace_ELBO())


def orders(num_epochs: int, rows: int = ROWS, key: jax.Array = KEY) -> list[np.ndarray]:
    """The order of the rows in each epoch, as documented."""
    key = jax.random.fold_in(key, zlib.crc32(b"order"))
    keys = [jax.random.fold_in(key, epoch) for epoch in range(num_epochs)]
    return [np.asarray(jax.random.permutation(key, rows)) for key in keys]


def check(result: FitResult, expected: dict[str, np.ndarray]) -> None:
    history = result.history
    np.testing.assert_allclose(history.step_losses, expected["step_losses"], rtol=1e-12)
    np.testing.assert_allclose(history.loss, expected["loss"], rtol=1e-12)
    np.testing.assert_allclose(result.params["w_loc"], expected["w"], rtol=1e-11)
    if len(expected["validation_loss"]):
        np.testing.assert_allclose(history.validation_loss, expected["validation_loss"], rtol=1e-12)


@pytest.mark.parametrize("case", CASES["training"]["fit"])
def test_is_the_plain_loop(case: dict) -> None:
    data, other = regression(), regression(1)
    result = fit(KEY, pair(), data, **case, validation_data=other, validation_every=1, **QUIET)
    size, shuffled = case.get("batch_size") or ROWS, case.get("shuffle", True)
    order = orders(3) if shuffled and size < ROWS else [np.arange(ROWS)] * 3
    epochs = [reference.batches(rows, size, case.get("drop_last", False)) for rows in order]
    adam = reference.adam(lambda step: 0.05)
    expected = reference.train(np.zeros(DIM), *data, epochs, adam, other)
    check(result, expected)
    assert result.history.stopped == "num_epochs" and result.history.epochs == [0, 1, 2]


def test_is_the_loop_over_the_host() -> None:
    """Its random numbers are those of the host's steps, bit for bit."""

    def model(x: jax.Array, scale: float) -> None:
        weight = numpyro.param("weight", lambda key: jax.random.normal(key, (2, DIM)))
        with numpyro.plate("data", ROWS, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z @ weight, scale).to_event(1), obs=x)

    def guide(x: jax.Array, scale: float) -> None:
        weight = numpyro.param("encoder", lambda key: jax.random.normal(key, (DIM, 2)))
        with numpyro.plate("data", ROWS, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(x @ weight, 0.5).to_event(1))

    x, _ = regression()
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), ImportanceWeightedELBO(3))
    for key in (KEY, jax.random.PRNGKey(1)):
        result = fit(key, svi, x, num_epochs=2, batch_size=10, kwargs={"scale": 0.9}, **QUIET)
        state, update = svi.init(key, x[:10], scale=0.9), jax.jit(svi.update)
        losses = []
        for order in orders(2, key=key):
            for rows in reference.batches(order, 10):
                state, loss = update(state, x[rows], scale=0.9)
                losses.append(loss / ROWS)
        np.testing.assert_allclose(result.history.step_losses, losses, rtol=1e-13)
        for name, value in svi.get_params(state).items():
            np.testing.assert_allclose(result.params[name], value, rtol=1e-12)
        assert result.state.rng_key.dtype == key.dtype
        assert jnp.array_equal(
            *(k if key.ndim else jax.random.key_data(k) for k in (result.state.rng_key, state[2]))
        )


def test_many_calls_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call ends makes no difference, in the midst of an epoch neither."""
    from numpyro_vae_ext.training import _feeds

    def run() -> np.ndarray:
        return fit(KEY, pair(), regression(), num_epochs=7, batch_size=5, **QUIET).history

    whole = run()
    calls: list[int] = []
    advance = Run._advance

    def record(self: Run, chunk: Any) -> None:
        calls.append(len(chunk.rows))
        advance(self, chunk)

    monkeypatch.setattr(Run, "_advance", record)
    for steps, expected in ((12, [15, 15, 5]), (3, [3, 2] * 7)):
        monkeypatch.setattr(_feeds, "CALL", steps)
        calls.clear()
        parts = run()
        assert calls == expected
        np.testing.assert_array_equal(whole.step_losses, parts.step_losses)
        np.testing.assert_allclose(whole.loss, parts.loss, rtol=1e-14)


def test_streamed_is_resident() -> None:
    """Arrays that stay on the host, in stacks of batches; schedules see the same steps."""
    options: dict[str, Any] = {
        "num_epochs": 3,
        "batch_size": 5,
        "validation_data": regression(1),
        "schedules": {"learning_rate": lambda step: 0.05 / (1 + step)},
        **QUIET,
    }
    rated = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
    one, two = (
        fit(KEY, pair(rated), regression(), resident=resident, **options)
        for resident in (True, False)
    )
    for name in ("step_losses", "loss", "validation_loss"):
        np.testing.assert_allclose(
            getattr(one.history, name), getattr(two.history, name), rtol=1e-13
        )
    np.testing.assert_allclose(one.params["w_loc"], two.params["w_loc"], rtol=1e-13)


def forms(name: str) -> tuple[Any, int | None]:
    """Data in a form, with the size of batches to ask for."""
    x, y = regression()
    batches = [(x[rows], y[rows]) for rows in (slice(0, 10), slice(10, 20), slice(20, ROWS))]
    if name in ("torch", "loader"):
        torch = pytest.importorskip("torch")
        tensors = torch.tensor(x, requires_grad=True), torch.tensor(y)
        if name == "torch":
            return tensors, 10
        rows = torch.utils.data.TensorDataset(tensors[0].detach(), tensors[1])
        return torch.utils.data.DataLoader(rows, batch_size=10), None
    return {
        "jax": ((jnp.asarray(x), jnp.asarray(y)), 10),
        "list": ([x, y], 10),
        "dict": ({"y": y, "x": x}, 10),
        "batches": (batches, None),
        "lists": ([list(batch) for batch in batches], None),
        "dicts": ([{"x": a, "y": jnp.asarray(b)} for a, b in batches], None),
        "iterable": (Again(batches), None),
    }[name]


class Again:
    """Batches without a length."""

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.fixture(scope="module")
def in_tens() -> Callable[[], dict[str, np.ndarray]]:
    epochs = [reference.batches(np.arange(ROWS), 10)] * 2
    return lambda: reference.train(
        np.zeros(DIM), *regression(), epochs, reference.adam(lambda step: 0.05)
    )


@pytest.mark.parametrize(
    "form",
    ["jax", "list", "dict", "torch", "loader", "batches", "lists", "dicts", "iterable"],
)
def test_forms_of_data(form: str, in_tens: Callable[[], dict]) -> None:
    data, batch_size = forms(form)
    options = {"num_epochs": 2, "shuffle": False, "validation_data": data, **QUIET}
    result = fit(KEY, pair(), data, batch_size=batch_size, **options)
    check(result, in_tens())
    w = np.asarray(result.params["w_loc"])
    whole = reference.loss(w, *regression(), ROWS) / ROWS
    assert result.history.validation_loss[-1] == pytest.approx(whole, rel=1e-12)


def test_nested_and_single_arrays() -> None:
    """An array is one argument; nested tuples come as they are, and what is no array stays it."""
    found = []

    def model(*args: Any, scale: float, name: str, more: Any) -> None:
        found.append((args, scale, name, more))
        loc = numpyro.param("loc", jnp.zeros(()))
        numpyro.sample("x", dist.Normal(loc, scale), obs=0.0)

    def run(data: Any, **options: Any) -> Any:
        svi = SVI(model, lambda *args, **kwargs: None, optax.sgd(0.1), Trace_ELBO())
        kwargs = {"scale": 2.0, "name": "a", "more": {"table": np.ones(3), "none": None}}
        fit(KEY, svi, data, num_epochs=1, shuffle=False, kwargs=kwargs, **options, **QUIET)
        return found[-1]

    x = np.arange(5.0)
    (first,), scale, name, more = run(x, batch_size=2, drop_last=True)
    assert first.shape == (2,) and (scale, name) == (2.0, "a") and more["none"] is None
    assert isinstance(more["table"], jax.core.Tracer)
    one, (two, three) = run((x, [x + 1, {"a": x > 2}]), batch_size=5)[0]
    assert one.shape == two.shape == (5,) and three["a"].dtype == bool
    assert run([(x.astype(np.float32),)])[0][0].dtype == np.float32


def drawn(x: jax.Array, size: int) -> None:
    loc = numpyro.param("loc", jnp.zeros(()))
    with numpyro.plate("data", len(x), subsample_size=size) as rows:
        numpyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])


def test_same_numbers_per_datum() -> None:
    """On all data at once, in minibatches, by a plate that draws its own, and on new data."""
    x = np.ones(ROWS)

    def losses(num_rows: int | None, scale: Any = None, **options: Any) -> History:
        def model(x: jax.Array) -> None:
            loc = numpyro.param("loc", jnp.zeros(()))
            with numpyro.plate("data", num_rows or len(x), subsample_size=len(x)):
                # A number that is known only when it runs.
                weight = 1.0 if scale is None else scale * jnp.ones(())
                with numpyro.handlers.scale(scale=weight):
                    numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)

        svi = SVI(model, lambda x: None, optax.sgd(0.0), Trace_ELBO())
        return fit(KEY, svi, x, num_epochs=1, validation_data=x[:9], **options, **QUIET).history

    expected = 0.5 + 0.5 * math.log(2 * math.pi)
    for history in (
        losses(None),
        losses(10 * ROWS, batch_size=5),
        losses(None, batch_size=5),
        losses(ROWS, 3.0),
    ):
        np.testing.assert_allclose(history.step_losses, expected, rtol=1e-12)
        np.testing.assert_allclose(history.validation_loss, expected, rtol=1e-12)
    svi = SVI(lambda x: drawn(x, 4), lambda x: None, optax.sgd(0.0), Trace_ELBO())
    np.testing.assert_allclose(fit(KEY, svi, x, num_epochs=2, **QUIET).history.loss, expected)


def test_sites_of_different_scales() -> None:
    """Then the loss is divided by the rows alone; a model of factors has their scale."""

    def model(x: jax.Array) -> None:
        loc = numpyro.param("loc", jnp.zeros(()))
        with numpyro.plate("data", 10, subsample_size=len(x)):
            numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        numpyro.sample("y", dist.Normal(loc, 1.0), obs=x.sum())

    def factors(x: jax.Array) -> None:
        with numpyro.plate("data", 10, subsample_size=len(x)):
            numpyro.factor("f", numpyro.param("loc", jnp.ones(())) * x)

    def loss(model: Callable[..., None]) -> float:
        svi = SVI(model, lambda x: None, optax.sgd(0.0), Trace_ELBO())
        return fit(KEY, svi, np.ones(4), num_epochs=1, **QUIET).history.loss[0]

    one = 0.5 * math.log(2 * math.pi)
    assert loss(model) == pytest.approx((10 * (one + 0.5) + one + 8.0) / 4)
    assert loss(factors) == pytest.approx(-1.0)


def test_constant_scale_and_a_ragged_batch() -> None:
    def model(x: jax.Array, scale: float = 4.6) -> None:
        loc = numpyro.param("loc", jnp.zeros(()))
        with numpyro.plate("rows", len(x)), numpyro.handlers.scale(scale=scale):
            numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def run(data: Any, **options: Any) -> History:
        svi = SVI(model, lambda x, scale=1.0: None, optax.sgd(0.0), Trace_ELBO())
        return fit(KEY, svi, data, num_epochs=1, **options, **QUIET).history

    x = np.ones(ROWS)
    with pytest.raises(ValueError) as error:
        run(x, batch_size=5)
    assert str(error.value) == (
        "Expected the scale of site 'x' to follow the rows of a batch; got 4.6 for 5 rows and for "
        '3. Write plate("data", N, subsample_size=len(x)), or pass drop_last=True.'
    )
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
        (
            {"schedules": {"learning_rate": lambda step: 0.1}},
            ValueError,
            "Expected an optimiser with the hyperparameter 'learning_rate' to schedule; got an "
            "optax transformation. Build it by "
            "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3).",
        ),
    ],
)
def test_errors_about_options(options: dict, kind: type, text: str) -> None:
    with pytest.raises(kind) as error:
        fit(KEY, pair(), regression(), **{"num_epochs": 1, **options}, **QUIET)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            (batch for batch in [np.ones(3)]),
            "Expected data that can be iterated again each epoch; got a generator. Pass a list, a "
            "DataLoader, or arrays.",
        ),
        ((np.ones(3), np.ones(4)), "Expected arrays with one leading dimension; got [3, 4]."),
        (np.ones(()), "Expected arrays with one leading dimension; got [None]."),
        ((), "Expected arrays with one leading dimension; got []."),
        ([(np.ones(()),)], "Expected arrays with one leading dimension; got [None]."),
        (np.ones((0, 2)), "Expected data with at least one row; got none."),
        (Again([]), "Expected data with at least one row; got none."),
    ],
)
def test_errors_about_data(data: Any, text: str) -> None:
    with pytest.raises(ValueError) as error:
        fit(KEY, pair(), data, num_epochs=1, **QUIET)
    assert str(error.value) == text


def test_further_errors_about_data() -> None:
    svi, batches = pair(), [regression()]
    with pytest.raises(ValueError, match="Expected batch_size=None with an iterable of batches"):
        fit(KEY, svi, batches, num_epochs=1, batch_size=5, **QUIET)
    for data in (3, (["a"],)):
        with pytest.raises(TypeError, match="Expected arrays with one leading dimension; got"):
            fit(KEY, svi, data, num_epochs=1, **QUIET)
    with pytest.raises(ValueError, match=r"one leading dimension; got \[3, 4\]"):
        fit(KEY, svi, (np.ones(3),), num_epochs=1, validation_data=(np.ones(3), np.ones(4)))


def test_errors_of_hosts_and_objectives_come_first() -> None:
    """Where they see numbers; and no second error hides them."""
    weights = [
        handlers.kl_weight(f, weight=w) for f, w in zip(unit_pair(), (1.0, 2.0), strict=True)
    ]
    svi = SVI(*weights, optax.sgd(0.1), ImportanceWeightedELBO())
    with pytest.raises(ValueError, match="Expected the same KL weight") as error:
        fit(KEY, svi, np.ones(3), num_epochs=1, **QUIET)
    assert error.value.__cause__ is None and error.value.__suppress_context__


def unit_pair() -> tuple[Callable[..., None], Callable[..., None]]:
    def model(x: jax.Array, **others: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: jax.Array, **others: Any) -> None:
        with numpyro.plate("data", len(x)):
            loc = numpyro.param("loc", jnp.ones(()))
            numpyro.sample("z", dist.Normal(loc, 0.5))

    return model, guide


@pytest.mark.parametrize("within", [False, True])
def test_learning_rate(within: bool) -> None:
    """By name, and of Optax's own."""

    def rate(step: Any) -> Any:
        return 0.02 / (1 + step)

    sgd = optax.sgd if within else optax.inject_hyperparams(optax.sgd)
    optim = sgd(learning_rate=rate if within else 1.0, momentum=0.5)
    schedules = {} if within else {"learning_rate": rate, "beta": lambda step: step}
    data = regression()
    options = {"num_epochs": 2, "batch_size": 10, "shuffle": False, **QUIET}
    result = fit(KEY, pair(optim), data, schedules=schedules, **options)
    epochs = [reference.batches(np.arange(ROWS), 10)] * 2
    check(result, reference.train(np.zeros(DIM), *data, epochs, reference.sgd(rate, 0.5)))


def test_optimisers_without_a_rate_to_set() -> None:
    """One that has a schedule of its own would write over ours."""
    own = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda step: 0.1)
    for optim in (own, numpyro.optim.Adam(0.1)):
        with pytest.raises(ValueError, match="Expected an optimiser with the hyperparameter"):
            schedules = {"learning_rate": lambda step: 0.1}
            fit(KEY, pair(optim), regression(), num_epochs=1, schedules=schedules, **QUIET)


def test_schedules_reach_the_handlers() -> None:
    """A weight and a temperature at every step, and nothing is compiled again."""
    traced: list[Any] = []

    def weight(x: jax.Array, *, beta: Any, heat: Any) -> Any:
        traced.append(beta)
        return beta

    def model(x: jax.Array, **others: Any) -> None:
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: jax.Array, **others: Any) -> None:
        logits = numpyro.param("logits", jnp.zeros(()))
        with numpyro.plate("data", len(x)):
            numpyro.sample("b", dist.Bernoulli(logits=logits))

    def heat(x: jax.Array, *, beta: Any, heat: Any) -> Any:
        return heat

    relaxed = [handlers.relax(f, temperature=heat) for f in (model, guide)]
    svi = SVI(
        *(handlers.kl_weight(f, weight=weight) for f in relaxed), optax.sgd(0.01), Trace_ELBO()
    )
    schedules = {
        "beta": lambda step: jnp.minimum(1.0, step / 4),
        "heat": optax.exponential_decay(1.0, 2, 0.5),
    }
    x = np.linspace(0.0, 1.0, 6)
    result = fit(KEY, svi, x, num_epochs=8, schedules=schedules, validation_data=x, **QUIET)
    compiled = len(traced)
    state, update = svi.init(KEY, x, beta=0.0, heat=1.0), jax.jit(svi.update)
    losses = []
    for step in range(8):
        scheduled = {name: jnp.asarray(f(step), float) for name, f in schedules.items()}
        state, loss = update(state, x, **scheduled)
        losses.append(loss / 6)
    np.testing.assert_allclose(result.history.step_losses, losses, rtol=1e-12)
    assert compiled < 20


class Normalised:
    """A pair with running means: where a training is can be seen from them."""

    def __init__(self, rate: float = 0.02) -> None:
        self.norm = nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
        self.svi = SVI(self.model, lambda x: None, optax.sgd(rate), ImportanceWeightedELBO())

    def model(self, x: jax.Array) -> None:
        norm = nnx_module("norm", self.norm)
        loc = numpyro.param("loc", jnp.zeros(()))
        mutable("count", {"steps": jnp.zeros(())})["steps"] += 1.0
        with numpyro.plate("data", len(x)):
            shift = norm(x[:, None].astype(jnp.float32))[:, 0]
            numpyro.sample("x", dist.Normal(loc + 0.0 * shift, 1.0), obs=x)


def test_patience_gives_the_best() -> None:
    """Parameters, and the mutable state that belongs to them."""
    x, other = np.linspace(1.0, 3.0, 8), np.full(4, 1.6)
    seen: list[float] = []
    options: dict[str, Any] = {
        "num_epochs": 30,
        "batch_size": 4,
        "validation_data": other,
        "callbacks": [lambda epoch, params, history: seen.append(float(params["loc"]))],
        **QUIET,
    }
    result = fit(KEY, Normalised().svi, x, patience=2, **options)
    history = result.history
    best = int(np.argmin(history.validation_loss))
    assert history.stopped == "patience" and history.best_epoch == best == len(history) - 3
    assert 0 < best and result.params["loc"] == seen[best] != seen[-1]
    assert result.state.mutable_state["count"]["steps"] == 2 * (best + 1) + 1
    last = fit(KEY, Normalised().svi, x, **{**options, "num_epochs": best + 2})
    assert last.history.best_epoch == best and last.params["loc"] == seen[best + 1]
    early = fit(KEY, Normalised().svi, x, patience=1, min_delta=0.5, **options).history
    gains = -np.diff(early.validation_loss)
    assert len(early) == early.best_epoch + 2 and gains[-1] < 0.5 and (gains[:-1] > 0.5).all()


def test_validation_leaves_the_training_alone() -> None:
    """Its random numbers are the same each time; every few epochs."""
    x = np.ones(8)

    def run(rate: float, **options: Any) -> FitResult:
        svi = SVI(*unit_pair(), optax.sgd(rate), ImportanceWeightedELBO(2))
        return fit(KEY, svi, x, num_epochs=5, batch_size=4, **options, **QUIET)

    one, two = run(0.1), run(0.1, validation_data=x[:3], validation_every=2)
    np.testing.assert_array_equal(one.history.step_losses, two.history.step_losses)
    missing = np.isnan(two.history.validation_loss)
    assert missing.tolist() == [True, False, True, False, True]
    still = run(0.0, validation_data=x[:3]).history
    assert len(set(still.step_losses)) == 10 and len(set(still.validation_loss)) == 1


class Drawn:
    """A batch that is drawn from NumPy's numbers."""

    def __iter__(self) -> Any:
        yield (np.random.normal(size=3),)


def test_batches_of_the_validation_use_up_no_numbers() -> None:
    def run(**options: Any) -> History:
        np.random.seed(0)
        svi = SVI(*unit_pair(), optax.sgd(0.0), ImportanceWeightedELBO())
        return fit(KEY, svi, Drawn(), num_epochs=3, **options, **QUIET).history

    one, two = run(), run(validation_data=Drawn())
    np.testing.assert_array_equal(one.step_losses, two.step_losses)
    assert len(set(two.validation_loss)) == 3


def test_callbacks() -> None:
    calls = []

    def record(epoch: int, params: dict[str, jax.Array], history: History) -> None:
        calls.append((epoch, params["w_loc"], len(history)))

    def stop(epoch: int, params: dict[str, jax.Array], history: History) -> bool:
        return epoch == 2

    options = {"num_epochs": 9, "callbacks": [record, stop], **QUIET}
    result = fit(KEY, pair(), regression(), **options)
    assert result.history.stopped == "callback" and len(result.history) == 3
    assert [(call[0], call[2]) for call in calls] == [(0, 1), (1, 2), (2, 3)]
    assert jnp.array_equal(calls[-1][1], result.params["w_loc"])

    def fail(epoch: int, params: dict[str, jax.Array], history: History) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fit(KEY, pair(), regression(), num_epochs=2, callbacks=[fail], **QUIET)


def test_training_goes_on_from_a_state() -> None:
    """Of a fit, an SVI that is compiled, and one that has not been initialised."""
    svi, data = pair(), regression()
    first = fit(KEY, svi, data, num_epochs=2, **QUIET)
    second = fit(KEY, compile(pair()), data, num_epochs=2, init_state=first.state, **QUIET)
    whole = fit(KEY, svi, data, num_epochs=4, **QUIET)
    losses = np.concatenate([first.history.step_losses, second.history.step_losses])
    np.testing.assert_allclose(losses, whole.history.step_losses, rtol=1e-14)
    assert jnp.isfinite(first.params["w_loc"]).all()


def test_progress_bar(capsys: pytest.CaptureFixture) -> None:
    fit(KEY, pair(), regression(), num_epochs=2, batch_size=10)
    err = capsys.readouterr().err
    assert "fit" in err and "6/6" in err and "loss=" in err and "samples/s=" in err
    fit(KEY, pair(), regression(), num_epochs=1, **QUIET)
    assert capsys.readouterr().err == ""


def test_validation_setting_of_the_host_is_left_alone() -> None:
    """Steps run without; what is outside of them has the user's."""
    found = []

    def see(*args: Any) -> None:
        found.append(dist.Normal(0.0, 1.0)._validate_args)

    for enabled in (True, False):
        with numpyro.validation_enabled(enabled):
            fit(KEY, pair(), regression(), num_epochs=1, callbacks=[see], **QUIET)
            see()
    assert found == [True, True, False, False]


def test_result() -> None:
    case = CASES["training"]["FitResult"][0]
    result = fit(KEY, pair(), regression(), **case, **QUIET)
    assert isinstance(result, tuple) and isinstance(result.history, History)
    assert result._fields == ("params", "history", "state")
    assert result.history.samples_per_second[0] > 0
