"""Estimators for discrete latents: closed forms, enumerated gradients, the tuning objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from reference import belief_net, discrete, mixed, unbiased
from test_pyro.models import shaken
from torch import Tensor

from pyro_vae_ext.distributions import OneHotCategorical
from pyro_vae_ext.elbos import (
    ImportanceWeightedELBO,
    TraceDisARM_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
)

# (t, p) of the toy, and how many draws of each.
CASES = ((0.45, 0.3), (0.49, 0.3), (0.499, 0.3), (0.499, 0.5))
PUBLISHED = 2
DRAWS = 1_000_000
# Calls that make them, one after another: the memory of a part.
PARTS = 8
BASELINES = ("running", "learned", "leave_one_out")
Program = Callable[..., Any]


@pytest.fixture(autouse=True)
def float64(exact: None) -> None:
    """All of this is exact, to float64."""


def parameters(guide: Any) -> dict[str, Tensor]:
    """The tuning parameters of a guide."""
    return dict(guide.named_parameters()) if isinstance(guide, torch.nn.Module) else {}


def moved(guide: Any) -> None:
    """Networks off their start, with which they are zero."""
    if isinstance(guide, torch.nn.Module):
        for module in guide.modules():
            if isinstance(module, torch.nn.Linear):
                shaken(module, 0.3)


# The toy: E (b - t)^2.


class Toy:
    """Single draws of an estimator: every row has a logit of its own.

    The log-densities of the pair cancel at the given logits; the cost is a factor.
    """

    def __init__(self, elbo: Any, rows: int, cases: tuple = CASES) -> None:
        t, p = np.array(cases).T
        self.closed = discrete.Toy(t, p)
        self.t = torch.tensor(t)[:, None]
        logits = np.log(p / (1 - p))[:, None] + np.zeros(rows)
        self.logits = torch.tensor(logits, requires_grad=True)
        self.elbo, self.guide = elbo, elbo.tunable(self.program)
        self.elbo.loss(self.model, self.guide)
        moved(self.guide)

    def plates(self) -> tuple[Any, Any]:
        cases, rows = self.logits.shape
        return pyro.plate("cases", cases, dim=-2), pyro.plate("rows", rows, dim=-1)

    def model(self) -> None:
        outer, inner = self.plates()
        with outer, inner:
            b = pyro.sample("b", dist.Bernoulli(logits=self.logits.detach()))
            pyro.factor("cost", (b - self.t) ** 2)

    def program(self) -> None:
        outer, inner = self.plates()
        with outer, inner:
            pyro.sample("b", dist.Bernoulli(logits=self.logits))

    def step(self, seed: int = 0) -> tuple[dict[str, float], np.ndarray]:
        """Gradients of temperature and eta, and draws ``(cases, PARTS * rows)``."""
        found, draws = zip(*(self.part(PARTS * seed + i) for i in range(PARTS)), strict=True)
        own = {key: float(np.mean([f[key] for f in found])) for key in found[0]}
        return own, np.concatenate(draws, 1)

    def part(self, seed: int) -> tuple[dict[str, float], np.ndarray]:
        pyro.set_rng_seed(seed)
        knobs = {k: p for k, p in parameters(self.guide).items() if "surrogate" not in k}
        knobs = {k: p for k, p in knobs.items() if "network" not in k}
        loss = self.elbo.differentiable_loss(self.model, self.guide)
        draws, *found = torch.autograd.grad(loss, [self.logits, *knobs.values()])
        # The factor is a reward: the loss is its negative.
        return {k: g.item() for k, g in zip(knobs, found, strict=True)}, -draws.numpy()

    def check_mean(self, draws: np.ndarray) -> None:
        error = draws.std(1) / np.sqrt(draws.shape[1])
        z = (draws.mean(1) - self.closed.gradient) / np.where(error > 1e-15, error, 1.0)
        assert np.abs(z).max() < 4, z


@pytest.mark.parametrize("name", ["reinforce", "leave_one_out", "disarm"])
def test_toy_has_the_variance_of_its_closed_form(name: str) -> None:
    elbo = {
        "reinforce": lambda: TraceNVIL_ELBO(baselines=()),
        "leave_one_out": lambda: TraceNVIL_ELBO(2, baselines=("leave_one_out",)),
        "disarm": TraceDisARM_ELBO,
    }[name]()
    problem = Toy(elbo, DRAWS // 4 // PARTS)
    _, draws = problem.step()
    problem.check_mean(draws)
    variance = getattr(problem.closed, name)
    np.testing.assert_allclose(draws.var(1), variance, rtol=0.03, atol=1e-20)
    if name == "disarm":
        # One of a pair is always the other's negative at p = .5.
        assert np.ptp(draws[3]) < 1e-15


@pytest.mark.parametrize("baseline", ["running", "learned"])
def test_toy_is_unbiased_with_a_baseline(baseline: str) -> None:
    problem = Toy(
        TraceNVIL_ELBO(baselines=(baseline,), hidden_dims=(4,)), DRAWS // PARTS, CASES[:3]
    )
    if baseline == "running":
        problem.step(1)
        assert {k.split(".")[-1]: v for k, v in problem.guide.named_buffers()}["count"] == PARTS
    _, draws = problem.step()
    problem.check_mean(draws)


@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_toy_is_unbiased_and_tuned(name: str) -> None:
    """The mean, the tuning gradient as a difference quotient of the draws' variance, SVI."""
    elbo = TraceREBAR_ELBO() if name == "rebar" else TraceRELAX_ELBO(hidden_dims=(4,))
    problem = Toy(elbo, DRAWS // PARTS, CASES[PUBLISHED : PUBLISHED + 1])
    own, draws = problem.step()
    problem.check_mean(draws)
    step, error = 0.01, 20 * np.std(draws) * problem.closed.gradient[0] / np.sqrt(DRAWS)
    for key in ("b_log_temperature", "b_eta"):
        knob, ends = parameters(problem.guide)[key], []
        for h in (step, -step):
            with torch.no_grad():
                knob.add_(h)
            ends.append(problem.step()[1].var())
            with torch.no_grad():
                knob.sub_(h)
        assert own[key] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=error)
    if name == "rebar":
        # At t = .499 a relaxed cost is worth something only where it is linear in z.
        elbo = TraceREBAR_ELBO(temperature=1e3, eta=1e5)
    # A few rows to learn from.
    pyro.clear_param_store()
    small = Toy(elbo, 5_000, CASES[PUBLISHED : PUBLISHED + 1])
    svi = SVI(small.model, small.guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    for _ in range(300):
        svi.step()
    pyro.clear_param_store()
    problem.guide = problem.elbo.tunable(problem.program)
    problem.guide.load_state_dict(small.guide.state_dict())
    _, draws = problem.step()
    problem.check_mean(draws)
    # RELAX < REBAR < REINFORCE.
    reinforce = problem.closed.reinforce[0]
    low, high = (1e-2, 0.8) if name == "rebar" else (0.0, 1e-3)
    assert low * reinforce < draws.var() < high * reinforce


# Belief nets, their exact gradients by enumeration.

ESTIMATORS: dict[str, Callable[[], Any]] = {
    "rebar": lambda: TraceREBAR_ELBO(temperature=0.6, eta=0.8, learn=False),
    "relax": lambda: TraceRELAX_ELBO(temperature=0.6, eta=0.8, hidden_dims=(6,)),
    "nvil": lambda: TraceNVIL_ELBO(2, baselines=BASELINES, hidden_dims=(6,)),
    "disarm": lambda: TraceDisARM_ELBO(),
    "vimco": lambda: ImportanceWeightedELBO(2, gradient="vimco"),
}
# Calls, each with a subsample of its own, and copies of all parameters: draws of one call.
CALLS, COPIES = 8, 250


class Net:
    """A belief net as a pair; every row of every copy has its own biases."""

    def __init__(
        self, name: str, batch_size: int | None = None, integer: bool = False, host: bool = False
    ) -> None:
        self.net, self.reference = belief_net.trained(name)
        self.data, self.integer, self.host = belief_net.undecided(name), integer, host
        self.x = torch.tensor(self.data)
        self.weights = {k: torch.tensor(v) for k, v in self.reference.items()}
        self.batch_size = batch_size
        self.params = {
            key: value.expand(COPIES, len(self.x), -1).clone().requires_grad_()
            for key, value in self.weights.items()
            if value.dim() == 1
        }
        self.rows = torch.arange(len(self.x))

    def latent(self, name: str, logits: Tensor, layer: int) -> Tensor:
        """The site and its value as a vector."""
        shape = self.net.layers[layer]
        logits = logits.reshape(*logits.shape[:-1], *shape)
        if self.integer:
            value = pyro.sample(name, dist.Categorical(logits=logits).to_event(1))
            value = torch.nn.functional.one_hot(value, shape[-1]).to(logits)
        elif self.net.kind == "one_hot":
            family = dist.OneHotCategorical if self.host else OneHotCategorical
            value = pyro.sample(name, family(logits=logits).to_event(1))
        else:
            value = pyro.sample(name, dist.Bernoulli(logits=logits).to_event(1))
        return value.flatten(-len(shape))

    def plates(self) -> tuple[Any, Any]:
        rows = pyro.plate("data", len(self.x), subsample_size=self.batch_size, dim=-1)
        return pyro.plate("copies", COPIES, dim=-2), rows

    def model(self) -> None:
        copies, data = self.plates()
        with copies, data as self.rows:
            z = self.latent(f"z{len(self.net.layers) - 1}", self.params["prior"][:, self.rows], -1)
            for layer in range(len(self.net.layers) - 1, 0, -1):
                logits = z @ self.weights[f"decoder_{layer}"]
                logits = logits + self.params[f"decoder_bias_{layer}"][:, self.rows]
                z = self.latent(f"z{layer - 1}", logits, layer - 1)
            logits = z @ self.weights["decoder_0"] + self.params["decoder_bias_0"][:, self.rows]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=self.x[self.rows])

    def guide(self) -> None:
        copies, data = self.plates()
        with copies, data as rows:
            z = self.x[rows]
            for layer in range(len(self.net.layers)):
                logits = z @ self.weights[f"encoder_{layer}"]
                logits = logits + self.params[f"encoder_bias_{layer}"][:, rows]
                z = self.latent(f"z{layer}", logits, layer)

    def exact(self, num_particles: int = 1) -> dict[str, np.ndarray]:
        return self.net.bound(self.reference, self.data, num_particles)[1]

    def masks(self) -> dict[str, np.ndarray]:
        return self.net.regular(self.reference, self.data)


class Mixed:
    """The bits between two continuous latents; every row of every copy has its own parameters."""

    batch_size = None

    def __init__(self) -> None:
        self.reference, self.data = mixed.trained()
        self.x = torch.tensor(self.data)
        self.rows = torch.arange(len(self.x))
        self.params = {
            key: torch.tensor(value).expand(COPIES, len(self.x), *np.shape(value)).clone()
            for key, value in self.reference.items()
        }
        for value in self.params.values():
            value.requires_grad_()

    def plates(self) -> tuple[Any, Any]:
        return pyro.plate("copies", COPIES, dim=-2), pyro.plate("data", len(self.x), dim=-1)

    def model(self) -> None:
        p, (copies, data) = self.params, self.plates()
        with copies, data:
            c = pyro.sample("c", dist.Normal(torch.zeros(()), 1.0))
            logits = p["prior"] + c[..., None] * p["prior_of_c"]
            b = pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
            s = pyro.sample("s", dist.Normal(c * p["mean_of_c"] + (b * p["mean_of_b"]).sum(-1), 1))
            loc = p["x_bias"] + c[..., None] * p["x_of_c"] + s[..., None] * p["x_of_s"]
            loc = loc + (b[..., None] * p["x_of_b"]).sum(-2)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=self.x)

    def guide(self) -> None:
        p, (copies, data) = self.params, self.plates()
        with copies, data:
            loc = (self.x * p["c_weight"]).sum(-1) + p["c_bias"]
            c = pyro.sample("c", dist.Normal(loc, p["c_log_scale"].exp()))
            logits = (self.x[..., None] * p["b_weight"]).sum(-2) + p["b_bias"]
            logits = logits + c[..., None] * p["b_of_c"]
            b = pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
            loc = (self.x * p["s_weight"]).sum(-1) + p["s_bias"] + (b * p["s_of_b"]).sum(-1)
            pyro.sample("s", dist.Normal(loc, p["s_log_scale"].exp()))

    def exact(self, num_particles: int = 1) -> dict[str, np.ndarray]:
        found = mixed.gradient if num_particles == 1 else mixed.pair_gradient
        return found(self.reference, self.data)

    def masks(self) -> dict[str, np.ndarray]:
        return {}


def residuals(problem: Any, estimator: str) -> dict[str, np.ndarray]:
    """Gradients of the bound, minus the exact one of the rows that a call saw."""
    elbo, guide = ESTIMATORS[estimator](), problem.guide
    if estimator != "vimco":
        guide = elbo.tunable(guide)
        # A step before: networks are made, and a running baseline has something to subtract.
        elbo.differentiable_loss(problem.model, guide)
        moved(guide)
    exact = problem.exact(2 if estimator == "vimco" else 1)
    found: dict[str, list[np.ndarray]] = {key: [] for key in exact}
    for _ in range(CALLS):
        loss = -elbo.differentiable_loss(problem.model, guide)
        gradients = torch.autograd.grad(loss, list(problem.params.values()))
        seen = np.zeros(len(problem.x))
        seen[problem.rows.numpy()] = 1 if problem.batch_size is None else len(seen)
        seen = seen / (problem.batch_size or 1)
        for key, gradient in zip(problem.params, gradients, strict=True):
            truth = exact[key] * seen.reshape(-1, *[1] * (exact[key].ndim - 1))
            found[key].append(gradient.numpy() - truth)
    masks = problem.masks()
    return {
        key: np.concatenate(rows)[:, masks.get(key, np.ones(exact[key].shape, bool))]
        for key, rows in found.items()
        if rows
    }


NETS = {
    "one layer": lambda: Net("one layer"),
    "two layers": lambda: Net("two layers", 20),
    "one-hot": lambda: Net("one-hot", 20),
    "host one-hot": lambda: Net("one-hot", host=True),
    "integer": lambda: Net("one-hot", integer=True),
    "mixed": Mixed,
}
PAIRS = [
    (name, estimator)
    for name in NETS
    for estimator in ESTIMATORS
    if not (name == "one-hot" and estimator == "disarm")
    and not (name == "host one-hot" and estimator not in ("relax", "vimco"))
    and not (name == "integer" and estimator not in ("nvil", "vimco"))
]


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_mean_is_the_enumerated_gradient(name: str, estimator: str) -> None:
    unbiased.check(residuals(NETS[name](), estimator))
