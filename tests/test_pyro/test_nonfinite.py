"""Steps that are not finite: named, skipped, counted; the training goes on as if without them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from reference import training as reference
from test_pyro.models import family
from test_pyro.test_fit import DIM, QUIET, ROWS, Regression, regression
from torch import Tensor, nn

from pyro_vae_ext.elbos import ImportanceWeightedELBO, TraceNVIL_ELBO
from pyro_vae_ext.training import Skipped, compile, fit, load_checkpoint

pytestmark = pytest.mark.usefixtures("exact")


class Program:
    """A pair whose encoder or decoder fails where the first column of a row is above 10."""

    def __init__(self, where: str = "", guide: str = "Normal", elbo: Any = None) -> None:
        self.where = where
        self.encoder, self.decoder = nn.Linear(DIM, 4), nn.Linear(2, DIM)
        self.norm = nn.BatchNorm1d(DIM)
        self.posterior = None
        if guide != "Normal":
            self.posterior = family(guide, latent_dim=2, context_dim=4, hidden_dims=(5,))
        optim = pyro.optim.Adam({"lr": 0.01})
        self.svi = SVI(self.model, self.guide, optim, elbo or ImportanceWeightedELBO(3))

    def fails(self, x: Tensor, where: str) -> Tensor:
        """A number for each row: NaN in its derivative alone, or in itself."""
        bad = (x[:, 0] > 10.0) & (where == self.where.removesuffix(" gradient"))
        if self.where.endswith("gradient"):
            # The derivative of a square root at 0, times 0.
            return torch.where(bad, torch.zeros(()), 1.0)
        return torch.where(bad, -1.0, torch.ones(())).log()

    def spoil(self, value: Tensor, x: Tensor, where: str) -> Tensor:
        number = self.fails(x, where)[:, None]
        if not self.where.endswith("gradient"):
            return value + number
        return value + (number * value).abs().sqrt() - (number * value).detach().abs().sqrt()

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.spoil(self.decoder(z), x, "decoder")
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x.clamp(max=3.0))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        pyro.module("norm", self.norm)
        hidden = self.spoil(self.encoder(self.norm(x.clamp(max=3.0))), x, "encoder")
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            if self.posterior is not None:
                pyro.module("posterior", self.posterior)
                self.posterior("z", hidden)
            else:
                loc, scale = hidden[:, :2], hidden[:, 2:].exp()
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def spoilt() -> Tensor:
    """Data whose rows 7 and 8 make a program fail, in one batch of five."""
    x, _ = regression()
    x = x.clone()
    x[7:9, 0] = 11.0
    return x


@pytest.mark.parametrize(
    ("where", "guide", "elbo", "site", "reason"),
    [
        ("decoder", "Normal", None, "x", "log_prob"),
        ("decoder", "Normal", Trace_ELBO(), "x", "log_prob"),
        ("decoder", "Normal", TraceGraph_ELBO(), "x", "log_prob"),
        ("decoder", "Normal", ImportanceWeightedELBO(4, chunk_size=2), "x", "log_prob"),
        ("encoder", "Normal", None, "z", "value"),
        ("encoder", "Normal", RenyiELBO(num_particles=2), "z", "value"),
        ("encoder", "IAF", None, "z", "value"),
        ("decoder", "IAF", None, "x", "log_prob"),
        ("decoder gradient", "Normal", None, "x", "gradient"),
        ("decoder gradient", "Normal", TraceGraph_ELBO(), "x", "gradient"),
        ("encoder gradient", "Normal", Trace_ELBO(), "z", "gradient"),
        ("encoder gradient", "IAF", ImportanceWeightedELBO(4, chunk_size=2), "z", "gradient"),
    ],
)
def test_site_is_named(where: str, guide: str, elbo: Any, site: str, reason: str) -> None:
    pair = Program(where, guide, elbo)
    with pytest.warns(UserWarning) as caught:
        options = {"num_epochs": 2, "batch_size": 5, "shuffle": False, **QUIET}
        history = fit(pair.svi, spoilt(), **options).history
    (warning,) = caught
    assert str(warning.message).startswith(
        f"Skipped step 1 (epoch 0): non-finite {reason} at site '{site}'. "
    )
    assert history.skipped == [Skipped(0, 1, site, reason), Skipped(1, 6, site, reason)]
    assert np.isnan(history.step_losses).tolist() == [i % 5 == 1 for i in range(10)]
    assert np.isfinite(history.loss).all()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_data(number: float) -> None:
    """The run is that without the batch, Adam's count of steps included."""
    x, y = regression()
    y[12] = number
    pair = Regression()
    with pytest.warns(UserWarning, match="non-finite data at site 'y'"):
        result = fit(pair.svi, (x, y), num_epochs=3, batch_size=5, shuffle=False, **QUIET)
    epochs = [reference.batches(np.arange(ROWS), 5)] * 3
    adam = reference.adam(lambda step: 0.05)
    expected = reference.train(np.zeros(DIM), x.numpy(), y.numpy(), epochs, adam)
    np.testing.assert_allclose(result.history.step_losses, expected["step_losses"], rtol=1e-12)
    np.testing.assert_allclose(result.history.loss, expected["loss"], rtol=1e-12)
    np.testing.assert_allclose(result.params["w_loc"], expected["w"], rtol=1e-11)


def test_data_are_blamed_before_what_is_made_of_them() -> None:
    """The guide has the latent first, and it is NaN as well."""
    x, _ = regression()
    x[7, 0] = math.nan
    with pytest.warns(UserWarning, match="non-finite data at site 'x'"):
        options = {"num_epochs": 1, "batch_size": 5, "shuffle": False, **QUIET}
        fit(Program().svi, x, **options)


def test_a_step_is_run_again_as_it_was() -> None:
    """With its own random numbers, and the buffers of its start."""

    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self) -> Tensor:
            self.count.add_(1.0)
            return self.count

    count = Count()

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
        bad = (z > 0.8) | (count() == 5.0)
        pyro.sample("x", dist.Normal(torch.where(bad, -1.0, 1.0).log(), 1.0), obs=x[0])

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.001}), Trace_ELBO())
    with pytest.warns(UserWarning, match="Skipped"):
        history = fit(svi, torch.zeros(60), num_epochs=1, batch_size=1, **QUIET).history
    assert 10 < len(history.skipped) < 60
    # The fifth step that is finite leaves the count at 4 for all that follow.
    assert {row[2:] for row in history.skipped} == {("x", "log_prob")}
    assert count.count == 4.0 and history.skipped[-1].step == 59


def test_masked_rows_may_be_anything() -> None:
    """And are not to blame: here it is the latent, under a mask of its own."""

    def model(x: Tensor) -> None:
        good = torch.isfinite(x)
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=good):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            # Not of z: the derivative of a masked NaN is NaN in torch.
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=torch.isfinite(x)):
            pyro.sample("z", dist.Normal(loc, torch.where(x == 3.0, math.nan, 1.0)))

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), ImportanceWeightedELBO(2))
    x = torch.tensor([1.0, math.nan, 2.0, 3.0, math.nan, 4.0])
    with pytest.warns(UserWarning, match="non-finite value at site 'z'"):
        options = {"num_epochs": 1, "batch_size": 3, "shuffle": False, **QUIET}
        history = fit(svi, x, **options).history
    assert [row.step for row in history.skipped] == [1]


def test_factors_and_deterministic_sites() -> None:
    def model(x: Tensor) -> None:
        pyro.deterministic("d", x / 0.0)
        pyro.factor("f", -pyro.param("loc", torch.ones(())) * x.sum())

    svi = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO())
    with pytest.warns(UserWarning, match="non-finite log_prob at site 'f'"):
        fit(svi, torch.tensor([math.inf]), num_epochs=1, **QUIET)


def test_nothing_to_blame() -> None:
    """A loss of its own, and one that runs no program in sight."""

    class Bad(Trace_ELBO):
        def loss_and_grads(self, *args: Any, **kwargs: Any) -> float:
            return super().loss_and_grads(*args, **kwargs) * math.nan

        def differentiable_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().differentiable_loss(*args, **kwargs) * math.nan

    x, y = regression()
    pair = Regression()
    svi = SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.1}), Bad())
    with pytest.warns(UserWarning, match=r"Skipped step 0 \(epoch 0\): non-finite loss\. It"):
        history = fit(svi, (x, y), num_epochs=1, **QUIET).history
    assert history.skipped == [Skipped(0, 0, None, "loss")] and np.isnan(history.loss).all()


def test_first_batch_may_be_the_bad_one() -> None:
    """The validated run before the first step leaves it to the rule."""
    for where in ("decoder", "encoder"):
        pyro.clear_param_store()
        pair = Program(where)
        x = spoilt().roll(-7, 0)
        with pytest.warns(UserWarning, match="Skipped step 0"):
            options = {"num_epochs": 1, "batch_size": 5, "shuffle": False, **QUIET}
            assert len(fit(pair.svi, x, **options).history.skipped) == 1


def states(pair: Program) -> list[Tensor]:
    found = list(pyro.get_param_store().values())
    found += [b for m in (pair.encoder, pair.decoder, pair.norm) for b in m.buffers()]
    for state in pair.svi.optim.get_state().values():
        found += [state["state"][0][key] for key in sorted(state["state"].get(0, {}))]
    return [x.detach().clone() for x in found]


@pytest.mark.parametrize("backend", [None, "fx"])
def test_a_skipped_step_changes_nothing(backend: str | None) -> None:
    """Not the running means either, which are written before the number is there."""

    def run(x: list, where: str = "decoder") -> list[Tensor]:
        pyro.clear_param_store()
        torch.manual_seed(4)
        pair = Program(where)
        with pytest.warns(UserWarning, match="Skipped") if where else _nothing():
            svi = compile(pair.svi, backend=backend) if backend else pair.svi
            fit(svi, x, num_epochs=1, **{**QUIET, "compile": backend is not None})
        return states(pair)

    def _nothing() -> Any:
        from contextlib import nullcontext

        return nullcontext()

    parts = spoilt().split(5)
    batches = [(part,) for part in parts[:4]]
    # Without the bad step, but with its random numbers: the program is another one.
    with_bad = run([batches[0], batches[1]])
    without = run([batches[0]], "")
    assert len(with_bad) == len(without) > 10
    for one, other in zip(with_bad, without, strict=True):
        assert torch.equal(one, other)
    later = run(batches)
    assert not all(map(torch.equal, later, without))
    assert all(torch.isfinite(x).all() for x in later)


def test_tuning_state_stays() -> None:
    """NVIL's running means, which a step moves, and which the first run makes."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            scale = torch.where(x > 10.0, -1.0, 1.0).log().exp()
            pyro.sample("x", dist.Normal(b * scale, 1.0), obs=x.clamp(max=3.0))

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    def run(data: list) -> dict[str, Tensor]:
        pyro.clear_param_store()
        torch.manual_seed(4)
        elbo = TraceNVIL_ELBO()
        tuned = elbo.tunable(guide)
        svi = SVI(model, tuned, pyro.optim.Adam({"lr": 0.01}), elbo)
        fit(svi, data, num_epochs=1, **QUIET)
        return {name: x.clone() for name, x in tuned.state_dict().items()}

    good, bad = (torch.tensor([0.5, -1.0]),), (torch.tensor([11.0, 0.0]),)
    with pytest.warns(UserWarning, match="non-finite log_prob at site 'x'"):
        found = run([good, bad])
    expected = run([good])
    assert found["b_baseline.count"] == 1 and list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_too_many() -> None:
    x, y = regression()
    y[12] = math.nan
    options = {"num_epochs": 5, "batch_size": 5, "shuffle": False, **QUIET}
    with pytest.warns(UserWarning, match="Skipped"), pytest.raises(FloatingPointError) as error:
        fit(Regression().svi, (x, y), max_skipped=2, **options)
    assert str(error.value) == (
        "Expected at most 2 steps with a non-finite loss or gradient; got 3, the last at site 'y' "
        "(data). The parameters and the last checkpoint are those of the last finite step."
    )
    pyro.clear_param_store()
    with pytest.raises(FloatingPointError, match=r"at most 0 steps .* got 1, the last at site 'y'"):
        fit(Regression().svi, (x, y), max_skipped=0, **options)
    assert torch.isfinite(pyro.param("w_loc")).all()


def test_last_checkpoint_with_finite_parameters_is_kept(tmp_path: Path) -> None:
    """An update by a finite gradient can still overflow."""
    path = tmp_path / "run.safetensors"
    x, y = regression()
    pair = Regression(pyro.optim.SGD({"lr": 0.01}))
    rates = {"learning_rate": lambda step: 0.01 if step < 2 else 1e308}
    options = {"num_epochs": 1, "batch_size": 5, "checkpoint": path, "checkpoint_every": 1}
    text = (
        r"Expected finite parameters in a checkpoint; got non-finite values in 'w_loc'\. The last"
    )
    with pytest.warns(UserWarning) as caught:
        fit(pair.svi, (x, y), schedules=rates, **options, **QUIET)
    texts = [str(warning.message) for warning in caught]
    assert any(text.startswith("Expected finite parameters") for text in texts), text
    assert not torch.isfinite(pyro.param("w_loc")).all()
    metadata, _ = load_checkpoint(path, pair.svi)
    assert torch.isfinite(pyro.param("w_loc")).all()
    assert metadata["fit"]["now"]["step"] < 5


def test_objectives_that_cannot_be_watched() -> None:
    """A compiled objective of the host runs no program any more: then nobody is named."""
    pytest.importorskip("torch.jit")
    x, y = regression()
    y[3] = math.inf

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.zeros(DIM))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    import warnings

    svi = SVI(model, lambda x, y: None, pyro.optim.SGD({"lr": 0.001}), JitTrace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"num_epochs": 1, "batch_size": 5, "shuffle": False, "drop_last": True, **QUIET}
        history = fit(svi, (x, y), **options).history
    assert len(history.skipped) == 1 and np.isfinite(history.step_losses[1:]).all()
