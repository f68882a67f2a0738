"""Steps with a loss or a gradient that is not finite: named, counted, and without effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import lax
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from numpyro.primitives import mutable
from reference import training as reference
from test_numpyro.models import family
from test_numpyro.test_fit import DIM, KEY, QUIET, ROWS, pair, regression

from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.training import Skipped, fit, load_checkpoint
from numpyro_vae_ext.training._engine import Engine

pytestmark = pytest.mark.usefixtures("exact")


class Program:
    """A pair of which a part fails at rows with a number above 10."""

    def __init__(
        self, where: str, guide: str = "Normal", elbo: Any = None, optim: Any = None
    ) -> None:
        self.where = where
        self.posterior = None
        if guide != "Normal":
            self.posterior = family(guide, latent_dim=2, context_dim=4, hidden_dims=(4,))
        elbo = ImportanceWeightedELBO() if elbo is None else elbo
        optim = optax.adam(0.01) if optim is None else optim
        self.svi = SVI(self.model, self.guide, optim, elbo)

    def spoil(self, value: jax.Array, x: jax.Array, where: str) -> jax.Array:
        bad = ((x[:, :1] > 10.0) & (where == self.where.removesuffix(" gradient"))).astype(float)
        if not self.where.endswith("gradient"):
            return value + jnp.log(1.0 - 2.0 * bad) * bad
        # The derivative of a square root at 0, times 0.
        root = jnp.sqrt(jnp.abs((1.0 - bad) * value))
        return value + root - lax.stop_gradient(root)

    def model(self, x: jax.Array) -> None:
        weight = numpyro.param("decoder", 0.3 * jnp.ones((2, DIM)))
        holder = mutable("running", {"mean": jnp.zeros(())})
        holder["mean"] = 0.5 * holder["mean"] + 0.5 * lax.stop_gradient(x).mean()
        with numpyro.plate("data", ROWS, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            loc = self.spoil(z @ weight, x, "decoder")
            obs = jnp.minimum(x, 3.0)
            numpyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=obs)

    def guide(self, x: jax.Array) -> None:
        weight = numpyro.param("encoder", 0.1 * jnp.ones((DIM, 4)))
        hidden = self.spoil(jnp.minimum(x, 3.0) @ weight, x, "encoder")
        if self.posterior is not None:
            draw = nnx_module("posterior", self.posterior)
        with numpyro.plate("data", ROWS, subsample_size=len(x)):
            if self.posterior is not None:
                draw("z", hidden)
            else:
                inner = dist.Normal(hidden[:, :2], jnp.exp(hidden[:, 2:]))
                numpyro.sample("z", inner.to_event(1))


def spoilt() -> np.ndarray:
    """Data whose rows 7 and 8 make a program fail, in one batch of five, and no ragged one."""
    x = regression()[0][:15].copy()
    x[7:9, 0] = 11.0
    return x


IN_ORDER: dict[str, Any] = {"batch_size": 5, "shuffle": False, **QUIET}


@pytest.mark.parametrize(
    ("where", "guide", "elbo", "site", "reason"),
    [
        ("decoder", "Normal", ImportanceWeightedELBO(4), "x", "log_prob"),
        ("encoder", "IAF", None, "z", "value"),
        ("decoder gradient", "Normal", Trace_ELBO(), "x", "gradient"),
        ("encoder gradient", "Normal", ImportanceWeightedELBO(2), "z", "gradient"),
    ],
)
def test_site_is_named(where: str, guide: str, elbo: Any, site: str, reason: str) -> None:
    with pytest.warns(UserWarning) as caught:
        svi = Program(where, guide, elbo).svi
        history = fit(KEY, svi, spoilt(), num_epochs=2, **IN_ORDER).history
    (warning,) = caught
    assert str(warning.message) == (
        f"Skipped step 1 (epoch 0): non-finite {reason} at site '{site}'. It changed nothing; "
        "further ones are in the history, without a warning."
    )
    assert warning.filename == __file__
    assert history.skipped == [Skipped(0, 1, site, reason), Skipped(1, 4, site, reason)]
    assert np.isnan(history.step_losses).tolist() == [i % 3 == 1 for i in range(6)]
    assert np.isfinite(history.loss).all()


@pytest.mark.parametrize("elbo", [TraceGraph_ELBO(), RenyiELBO(num_particles=2)])
def test_objectives_of_the_host(elbo: Any) -> None:
    """Without mutable state, which they do not have."""

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: jax.Array) -> None:
        loc = numpyro.param("loc", jnp.zeros(()))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.where(x > 2.0, jnp.nan, 1.0)))

    svi = SVI(model, guide, numpyro.optim.Adam(0.1), elbo)
    with pytest.warns(UserWarning, match="non-finite value at site 'z'"):
        history = fit(KEY, svi, np.array([0.0, 1.0, 3.0, 4.0]), num_epochs=1, **IN_ORDER).history
    assert len(history.skipped) == 1


@pytest.mark.parametrize(
    "number", [pytest.param(math.nan, id="nan"), pytest.param(math.inf, id="inf")]
)
def test_data(number: float) -> None:
    """The run is that without the batch, Adam's count of steps included."""
    x, y = regression()
    y[12] = number
    with pytest.warns(UserWarning, match="non-finite data at site 'y'"):
        result = fit(KEY, pair(), (x, y), num_epochs=3, resident=number > 0, **IN_ORDER)
    epochs = [reference.batches(np.arange(ROWS), 5)] * 3
    expected = reference.train(np.zeros(DIM), x, y, epochs, reference.adam(lambda step: 0.05))
    np.testing.assert_allclose(result.history.step_losses, expected["step_losses"], rtol=1e-12)
    np.testing.assert_allclose(result.history.loss, expected["loss"], rtol=1e-12)
    np.testing.assert_allclose(result.params["w_loc"], expected["w"], rtol=1e-11)


def test_masked_rows_may_be_anything() -> None:
    """And are not to blame: here it is the latent, under a mask of its own."""

    def model(x: jax.Array) -> None:
        good = jnp.isfinite(x)
        with numpyro.plate("data", len(x)), numpyro.handlers.mask(mask=good):
            numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: jax.Array) -> None:
        loc = numpyro.param("loc", jnp.zeros(()))
        with numpyro.plate("data", len(x)), numpyro.handlers.mask(mask=jnp.isfinite(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.where(x == 3.0, jnp.nan, 1.0)))

    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    x = np.array([1.0, math.nan, 2.0, 3.0, math.nan, 4.0])
    with pytest.warns(UserWarning, match="non-finite value at site 'z'"):
        options = {**IN_ORDER, "batch_size": 3}
        history = fit(KEY, svi, x, num_epochs=1, **options).history
    assert [row.step for row in history.skipped] == [1]


@pytest.mark.parametrize("ours", [True, False])
def test_rows_of_a_plate_that_draws_them(ours: bool) -> None:
    """The rows are those that the step has drawn, by the host's rule or by ours."""

    def model(x: jax.Array) -> None:
        loc = numpyro.param("loc", jnp.zeros(()))
        with numpyro.plate("data", len(x), subsample_size=3) as rows:
            numpyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    elbo = ImportanceWeightedELBO(2) if ours else Trace_ELBO(2)
    svi = SVI(model, lambda x: None, optax.sgd(0.01), elbo)
    x = np.where(np.arange(8) == 5, np.nan, 1.0)
    with pytest.warns(UserWarning, match="non-finite data at site 'x'"):
        history = fit(KEY, svi, x, num_epochs=12, **QUIET).history
    assert 0 < len(history.skipped) < 12
    assert {row[2:] for row in history.skipped} == {("x", "data")}


def test_nothing_to_blame() -> None:
    class Bad(Trace_ELBO):
        def loss_with_mutable_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            found = super().loss_with_mutable_state(*args, **kwargs)
            return {**found, "loss": found["loss"] * jnp.nan}

    svi = pair()
    svi.loss = Bad()
    with pytest.warns(UserWarning, match=r"Skipped step 0 \(epoch 0\): non-finite loss\. It"):
        history = fit(KEY, svi, regression(), num_epochs=1, **QUIET).history
    assert history.skipped == [Skipped(0, 0, None, "loss")] and np.isnan(history.loss).all()


@pytest.mark.parametrize("where", ["decoder", "encoder"])
def test_first_batch_may_be_the_bad_one(where: str) -> None:
    """The run before the first step leaves it to the rule, errors of the host included."""
    with pytest.warns(UserWarning, match="Skipped step 0"):
        history = fit(KEY, Program(where).svi, spoilt()[5:], num_epochs=1, **IN_ORDER).history
    assert len(history.skipped) == 1


OPTIMISERS = {
    "adam": (optax.adam(0.01), False),
    "norm": (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)), False),
    "their adam": (numpyro.optim.Adam(0.01), False),
    "momentum": (numpyro.optim.Momentum(0.01, 0.5), False),
    "clip": (optax.chain(optax.clip(1.0), optax.adam(0.01)), True),
    "their clip": (numpyro.optim.ClippedAdam(0.01), True),
    "zeros": (optax.chain(optax.zero_nans(), optax.sgd(0.01)), True),
    "sign": (optax.sign_sgd(0.01), True),
    "search": (numpyro.optim.Minimize(), True),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_which_optimisers_could_hide_a_gradient(name: str) -> None:
    optim, hides = OPTIMISERS[name]
    svi = pair(optim)
    assert Engine(svi, {}, {}).hides(svi.init(KEY, *regression())) is hides


@pytest.mark.parametrize("name", ["clip", "their clip"])
def test_an_infinite_gradient_of_a_finite_loss(name: str) -> None:
    """Where the optimiser would have made a number of it; and nothing at all has changed."""
    svi, parts = Program("decoder gradient", optim=OPTIMISERS[name][0]).svi, np.split(spoilt(), 3)
    with pytest.warns(UserWarning, match="non-finite gradient at site 'x'"):
        bad = fit(KEY, svi, [(parts[0],), (parts[1],)], num_epochs=1, **QUIET)
    good, _ = jax.jit(svi.update)(svi.init(KEY, parts[0]), parts[0])
    leaves = [jax.tree.leaves(state._replace(rng_key=0)) for state in (good, bad.state)]
    assert len(leaves[0]) > 5
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


def test_minimiser() -> None:
    """An optimiser without a gradient of its own is guarded as well."""
    x, y = regression()
    data = [(x, y), (x, np.full(ROWS, np.nan)), (x, y)]
    with pytest.warns(UserWarning, match="non-finite data at site 'y'"):
        result = fit(KEY, pair(numpyro.optim.Minimize()), data, num_epochs=1, **QUIET)
    np.testing.assert_allclose(result.params["w_loc"], reference.minimum(x, y), rtol=1e-6)
    assert [row.step for row in result.history.skipped] == [1]


def test_state_of_modules_stays() -> None:
    """Running means of a network, which a step moves."""
    net = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

    def model(x: jax.Array) -> None:
        norm = nnx_module("net", net)
        with numpyro.plate("data", len(x)):
            loc = norm(x[:, None].astype(jnp.float32))[:, 0] + jnp.sqrt(10.0 - x)
            numpyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi = SVI(model, lambda x: None, optax.adam(0.01), Trace_ELBO())
    good, bad = (np.array([0.5, -1.0]),), (np.array([11.0, 0.0]),)
    one = fit(KEY, svi, [good], num_epochs=1, **QUIET).state.mutable_state
    with pytest.warns(UserWarning, match="non-finite log_prob at site 'x'"):
        two = fit(KEY, svi, [good, bad], num_epochs=1, **QUIET).state.mutable_state
    leaves = jax.tree.leaves(one)
    assert set(one) == {"net$state"} and any((np.asarray(x) != 0).any() for x in leaves)
    for a, b in zip(leaves, jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_many(tmp_path: Path) -> None:
    """The last checkpoint is that of the step before, and a run goes on from there."""
    x, y = regression()
    y[12] = math.nan
    path, options = tmp_path / "run", {"num_epochs": 5, **IN_ORDER}
    with pytest.warns(UserWarning, match="Skipped"), pytest.raises(FloatingPointError) as error:
        fit(KEY, pair(), (x, y), max_skipped=2, checkpoint=path, **options)
    assert str(error.value) == (
        "Expected at most 2 steps with a non-finite loss or gradient; got 3, the last at site 'y' "
        "(data). The parameters and the last checkpoint are those of the last finite step."
    )
    svi = pair()
    state, metadata, _ = load_checkpoint(path, svi.init(KEY, x, y))
    assert metadata["now"]["step"] == 12 and len(metadata["history"]["skipped"]) == 2
    assert metadata["now"]["guarded"] is False
    epochs = [reference.batches(np.arange(ROWS), 5)] * 5
    expected = reference.train(np.zeros(DIM), x, y, epochs, reference.adam(lambda step: 0.05))
    np.testing.assert_allclose(svi.get_params(state)["w_loc"], expected["trace"][11], rtol=1e-11)
    with pytest.warns(UserWarning, match=r"Skipped step 12 \(epoch 2\)"):
        result = fit(KEY, svi, (x, y), checkpoint=path, **options)
    np.testing.assert_allclose(result.history.step_losses, expected["step_losses"], rtol=1e-12)
    assert [row.step for row in result.history.skipped] == [2, 7, 12, 17, 22]


def test_last_checkpoint_with_finite_parameters_is_kept(tmp_path: Path) -> None:
    """An update by a finite gradient can still overflow."""
    path, svi = tmp_path / "run", pair(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
    rates = {"learning_rate": lambda step: jnp.where(step < 2, 0.01, 1e308)}
    options = {"num_epochs": 1, "checkpoint": path, "checkpoint_every": 1, **IN_ORDER}
    with pytest.warns(UserWarning) as caught:
        result = fit(KEY, svi, regression(), schedules=rates, **options)
    text = "Expected finite parameters in a checkpoint; got non-finite values in 'w_loc'. The last"
    assert any(str(warning.message).startswith(text) for warning in caught)
    assert not jnp.isfinite(result.params["w_loc"]).all()
    state, metadata, _ = load_checkpoint(path, result.state)
    assert jnp.isfinite(svi.get_params(state)["w_loc"]).all() and metadata["now"]["step"] < 5
