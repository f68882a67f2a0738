"""Groups of particles: the loss is the mean of their bounds, and so is every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from reference import conjugate as oracle
from reference import groups, importance_weighted
from test_pyro.models import standard_errors

from pyro_vae_ext.elbos import ImportanceWeightedELBO, TraceFreeBits_ELBO
from pyro_vae_ext.training import compile, fit

# Chunks that end within a group, and a ragged last one.
LAYOUTS = ({}, {"vectorize_particles": False}, {"chunk_size": 4})
ROWS, DIM = 3, 2
PARAMS = {
    "mu": np.array([0.2, -0.1]),
    "A": np.array([[0.4, 0.1], [-0.2, 0.6]]),
    "b": np.array([0.3, -0.3]),
    "log_scale": np.array([-0.2, 0.1]),
}


@pytest.fixture(autouse=True)
def float64(exact: None) -> None:
    """All of this is exact, to float64."""


class Linear:
    """z ~ N(mu, I), x ~ N(z, I) for every row, of which there are twice as many, and
    q(z | x) = N(A x + b, exp(log_scale)^2)."""

    def __init__(self) -> None:
        self.x = torch.randn(ROWS, DIM)
        self.params = {k: torch.tensor(v, requires_grad=True) for k, v in PARAMS.items()}

    def model(self) -> None:
        with pyro.plate("data", 2 * ROWS, subsample_size=ROWS):
            z = pyro.sample("z", dist.Normal(self.params["mu"], 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=self.x)

    def guide(self) -> None:
        A, b, log_scale = (self.params[name] for name in ("A", "b", "log_scale"))
        with pyro.plate("data", 2 * ROWS, subsample_size=ROWS):
            pyro.sample("z", dist.Normal(self.x @ A.T + b, log_scale.exp()).to_event(1))

    def slope(self, elbo: ImportanceWeightedELBO) -> tuple[Any, ...]:
        """Loss and gradient."""
        loss = elbo.differentiable_loss(self.model, self.guide)
        return loss.detach(), *torch.autograd.grad(loss, list(self.params.values()))


def in_turn(noise: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Draws that are the rows of the noise; a recomputation, told by the state, gets its own."""
    starts: dict[bytes, int] = {}
    real = torch.rand

    def draw(shape: Any, **_: Any) -> torch.Tensor:
        state = torch.get_rng_state().numpy().tobytes()
        real(1)
        count = math.prod(shape) // noise[0].numel()
        start = starts.setdefault(state, sum(sizes))
        if start == sum(sizes):
            sizes.append(count)
        return noise[start : start + count].reshape(tuple(shape))

    sizes: list[int] = []
    return draw


@pytest.mark.parametrize(
    ("gradient", "particles", "outer"),
    [("stl", 1, 4), ("dreg", 1, 4), ("reparam", 3, 2), ("stl", 3, 2), ("dreg", 3, 2)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_of_the_groups_in_closed_form(
    monkeypatch: pytest.MonkeyPatch, layout: dict, gradient: str, particles: int, outer: int
) -> None:
    """Loss and every gradient: the mean over groups of formulas written out by hand."""
    pair, noise = Linear(), torch.randn(particles * outer, ROWS, DIM)
    options = {"num_outer": outer, "gradient": gradient, "max_plate_nesting": 1, **layout}
    elbo = ImportanceWeightedELBO(particles, **options)
    assert elbo.max_plate_nesting == (2 if elbo.vectorize_particles else 1)
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", in_turn(noise))
    loss, *found = pair.slope(elbo)
    each = [
        importance_weighted.linear_gaussian(group.numpy(), pair.x.numpy(), PARAMS, gradient)
        for group in noise.split(particles)
    ]
    np.testing.assert_allclose(loss, -2.0 * np.mean([bound for bound, _ in each]), rtol=1e-12)
    for name, value in zip(PARAMS, found, strict=True):
        expected = -2.0 * np.mean([gradients[name] for _, gradients in each], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_log_weights_of_groups_and_of_one() -> None:
    """One group has the draws and, bit by bit, the bound that it had."""
    pair, found = Linear(), []
    one = ImportanceWeightedELBO(6, max_plate_nesting=1)
    two = ImportanceWeightedELBO(3, num_outer=2, max_plate_nesting=1)
    assert one.num_outer == 1
    for elbo in (one, two):
        torch.manual_seed(3)
        weights = elbo.log_weights(pair.model, pair.guide).detach()
        torch.manual_seed(3)
        found.append((weights, elbo.loss(pair.model, pair.guide)))
    (weights, loss), (grouped, mean) = found
    assert weights.shape == (6, ROWS) and grouped.shape == (2, 3, ROWS)
    assert torch.equal(grouped.reshape(6, ROWS), weights)
    assert loss == -(2.0 * one.bound(weights)).sum().item()
    bounds = torch.stack([two.bound(group) for group in grouped])
    assert mean == pytest.approx(-2.0 * bounds.mean(0).sum().item(), rel=1e-12)


def test_vimco_has_the_enumerated_mean() -> None:
    """Of the bound of a group, not of all particles; and the variance falls with the groups."""
    rows = 40_000
    logits = torch.full((rows,), groups.LOGIT, requires_grad=True)

    def model() -> None:
        with pyro.plate("data", rows):
            b = pyro.sample("b", dist.Bernoulli(groups.PRIOR))
            pyro.sample("x", dist.Normal(2.0 * b, 1.0), obs=torch.full((rows,), groups.DATUM))

    def guide() -> None:
        with pyro.plate("data", rows):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    variances = []
    for outer in (1, 3):
        elbo = ImportanceWeightedELBO(2, num_outer=outer, gradient="vimco")
        # Rows of one kind: their gradients are draws of one law.
        (found,) = torch.autograd.grad(-elbo.differentiable_loss(model, guide), logits)
        assert abs(standard_errors(found, groups.slope(2))) < 4
        assert abs(standard_errors(found, groups.slope(6))) > 8
        variances.append(found.var().item())
    assert 0.3 < variances[1] / variances[0] < 0.37


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_bound_beside_a_subsample(layout: dict) -> None:
    """Nothing is averaged inside of a logarithm: as free as one particle, and unbiased."""
    x, loc = torch.randn(6, 1), torch.tensor([0.4], requires_grad=True)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", 6, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    def guide() -> None:
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    elbo = ImportanceWeightedELBO(num_outer=5, gradient="stl", **layout)
    losses, found = [], []
    for _ in range(200):
        loss = elbo.differentiable_loss(model, guide)
        losses.append(loss.item())
        found.append(torch.autograd.grad(loss, loc)[0].item())
    value, slopes = groups.plain(x.numpy(), 0.4, 0.5)
    assert abs(standard_errors(torch.tensor(losses), -value)) < 4
    assert abs(standard_errors(torch.tensor(found), -slopes)) < 4
    with pytest.raises(ValueError, match="when num_particles > 1; got site 'z' outside it"):
        ImportanceWeightedELBO(2, num_outer=5, **layout).loss(model, guide)


@pytest.mark.parametrize(
    "elbo",
    [ImportanceWeightedELBO(num_outer=5, **layout) for layout in LAYOUTS]
    + [TraceFreeBits_ELBO(5, free_bits=0.0, vectorize_particles=False)],
)
def test_one_subsample_for_all_groups(elbo: Any) -> None:
    """Rows that are powers of two: the loss tells which of them it is the sum of."""
    rows = 2.0 ** torch.arange(8)
    loc = torch.zeros((), requires_grad=True)

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("mine", 8, subsample_size=3) as index:
            pyro.factor("row", rows[index] * (1 + loc))
        with pyro.plate("both", 8, subsample_size=3) as index:
            pyro.factor("other", 256 * rows[index])

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("both", 8, subsample_size=3) as index:
            pyro.factor("own", 512 * rows[index], has_rsample=True)

    seen = []
    for _ in range(4):
        loss = elbo.differentiable_loss(model, guide)
        # Chunks that run again in the backward pass see the rows that they saw.
        (slope,) = torch.autograd.grad(-loss, loc)
        found = -3 / 8 * loss.item()
        assert found == pytest.approx(round(found), abs=1e-6)
        both, mine = divmod(round(found), 256)
        assert bin(mine).count("1") == bin(-both).count("1") == 3
        assert 3 / 8 * slope.item() == pytest.approx(mine)
        seen.append((mine, both))
    assert len({mine for mine, _ in seen}) > 1 and len({both for _, both in seen}) > 1


def test_more_plates_than_declared() -> None:
    """An objective that guessed its nesting on a smaller pair stays right on a larger one."""
    elbo = ImportanceWeightedELBO(num_outer=4, gradient="stl")
    pair, loc = Linear(), torch.zeros(5, requires_grad=True)
    elbo.loss(pair.model, pair.guide)
    assert elbo.max_plate_nesting == 2

    def program(guided: bool) -> None:
        with pyro.plate("row", 5), pyro.plate("group", 6):
            pyro.sample("z", dist.Normal(loc if guided else 0.0, 1.0))

    loss = elbo.differentiable_loss(lambda: program(False), lambda: program(True))
    assert elbo.max_plate_nesting == 3
    assert loss.item() == 0.0
    # At the posterior no draw says anything.
    assert torch.equal(torch.autograd.grad(loss, loc)[0], torch.zeros(5))


def test_trains_under_svi() -> None:
    """The best recipe: the plain bound over many draws, sticking the landing."""
    x = 2.0 + torch.randn(10, DIM)
    elbo = ImportanceWeightedELBO(num_outer=16, gradient="stl")

    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
        with pyro.plate("data", 10, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(DIM))
        spread = pyro.param("spread", torch.ones(DIM), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, spread).to_event(1))

    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    options = {"num_epochs": 300, "batch_size": 10, "compile": False, "progress_bar": False}
    result = fit(compile(svi, backend="fx"), x, **options)
    # No noise is left at the posterior; the history's losses are per row.
    np.testing.assert_allclose(pyro.param("loc").detach(), x.sum(0) / 11, atol=1e-2)
    np.testing.assert_allclose(pyro.param("spread").detach(), 11**-0.5, rtol=1e-2)
    evidence = oracle.global_log_evidence(x.numpy(), 0.0)
    np.testing.assert_allclose(10 * result.history.step_losses[-1], -evidence, atol=1e-2)


def test_a_failure_of_one_particle_is_named() -> None:
    """Whichever particle of whichever group it is."""

    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("broken", torch.where(z > 1.2, torch.inf, x.sum()))

    def guide(x: torch.Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    pyro.clear_param_store()
    elbo = ImportanceWeightedELBO(num_outer=4)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    options = {"num_epochs": 1, "batch_size": 1, "compile": False, "progress_bar": False}
    with pytest.warns(UserWarning, match="non-finite log_prob at site 'broken'"):
        result = fit(svi, torch.zeros(20), **options)
    skipped = result.history.skipped
    assert 2 < len(skipped) < 18
    assert {(step.site, step.reason) for step in skipped} == {("broken", "log_prob")}


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="^Expected num_outer >= 1; got 0.$"):
        ImportanceWeightedELBO(num_outer=0)
    for value, name in ((2.0, "float"), (True, "bool"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^Expected num_outer to be an int; got {name}.$"):
            ImportanceWeightedELBO(num_outer=value)
    with pytest.raises(TypeError, match="positional"):
        ImportanceWeightedELBO(3, 2)
    # Its baselines are made of the other particles of a group.
    with pytest.raises(ValueError, match="^Expected num_particles >= 2 under gradient='vimco'; go"):
        ImportanceWeightedELBO(num_outer=4, gradient="vimco")
