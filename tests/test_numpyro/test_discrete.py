"""Estimators for discrete latents: closed forms, enumerated gradients, the tuning objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro.handlers import seed, trace
from numpyro.infer import SVI
from reference import belief_net, discrete, mixed, unbiased
from test_numpyro.models import shaken

from numpyro_vae_ext.distributions import OneHotCategorical
from numpyro_vae_ext.elbos import (
    ImportanceWeightedELBO,
    TraceDisARM_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
)

KEY = random.key(3)
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


def declared(guide: Program, *args: Any) -> dict[str, Any]:
    """The parameters and the mutable state that a guide declares, at their first values."""
    sites = trace(seed(guide, KEY)).get_trace(*args)
    return {k: s["value"] for k, s in sites.items() if s["type"] in ("param", "mutable")}


def moved(params: dict[str, Any]) -> dict[str, Any]:
    """Networks off their start, with which they are zero."""
    return {k: shaken(v, 0.3) if k.endswith("$params") else v for k, v in params.items()}


# The toy: E (b - t)^2.


def toy(logits: jax.Array, t: jax.Array, learn: bool) -> tuple[Program, Program]:
    """A pair whose log-densities cancel at the given logits, and the cost as a factor."""
    cases, rows = logits.shape

    def plates() -> tuple[Any, Any]:
        return numpyro.plate("cases", cases, dim=-2), numpyro.plate("rows", rows, dim=-1)

    def model() -> None:
        outer, inner = plates()
        with outer, inner:
            b = numpyro.sample("b", dist.Bernoulli(logits=logits))
            numpyro.factor("cost", (b - t[:, None]) ** 2)

    def guide() -> None:
        a = numpyro.param("logits", logits) if learn else logits
        outer, inner = plates()
        with outer, inner:
            numpyro.sample("b", dist.Bernoulli(logits=a))

    return model, guide


class Toy:
    """Single draws of an estimator: every row has a logit of its own."""

    def __init__(self, elbo: Any, rows: int, cases: tuple = CASES, learn: bool = True) -> None:
        t, p = np.array(cases).T
        self.closed = discrete.Toy(t, p)
        logits = jnp.asarray(np.log(p / (1 - p))[:, None] + np.zeros(rows))
        self.model, guide = toy(logits, jnp.asarray(t), learn)
        self.elbo, self.guide = elbo, elbo.tunable(guide)
        self.params = moved(declared(self.guide))

        def loss(params: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            found = elbo.loss_with_mutable_state(key, params, self.model, self.guide)
            return found["loss"], found["mutable_state"]

        self._gradient = jax.jit(jax.grad(loss, has_aux=True))

    def step(self, params: dict[str, Any], seed: int = 0) -> tuple[Any, np.ndarray, Any]:
        """Gradients of temperature and eta, draws ``(cases, PARTS * rows)``, and the new state."""
        draws, own = [], []
        for key in random.split(random.key(seed), PARTS):
            found, state = self._gradient(params, key)
            # The factor is a reward: the loss is its negative.
            draws.append(-np.asarray(found["logits"]))
            own.append(
                {k: float(g) for k, g in found.items() if not isinstance(g, dict) and g.ndim == 0}
            )
        means = {k: np.mean([part[k] for part in own]) for k in own[0]}
        return means, np.concatenate(draws, 1), state

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
    _, draws, _ = problem.step(problem.params)
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
    params = problem.params
    if baseline == "running":
        _, _, state = problem.step(params, 1)
        params = {**params, **state}
        assert float(params["b_baseline"]["count"]) == 1.0
    _, draws, _ = problem.step(params)
    problem.check_mean(draws)


@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_toy_is_unbiased_and_tuned(name: str) -> None:
    """The mean, the tuning gradient as a difference quotient of the draws' variance, SVI."""
    elbo = TraceREBAR_ELBO() if name == "rebar" else TraceRELAX_ELBO(hidden_dims=(4,))
    problem = Toy(elbo, DRAWS // PARTS, CASES[PUBLISHED : PUBLISHED + 1])
    own, draws, _ = problem.step(problem.params)
    problem.check_mean(draws)
    step, error = 0.01, 20 * np.std(draws) * problem.closed.gradient[0] / np.sqrt(DRAWS)
    for key in ("b_log_temperature", "b_eta"):
        ends = [
            problem.step({**problem.params, key: problem.params[key] + h})[1].var()
            for h in (step, -step)
        ]
        assert float(own[key]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=error)
    if name == "rebar":
        # At t = .499 a relaxed cost is worth something only where it is linear in z.
        elbo = TraceREBAR_ELBO(temperature=1e3, eta=1e5)
    # The logits stay what they are while the rest is learned, of a few rows.
    small = Toy(elbo, 5_000, CASES[PUBLISHED : PUBLISHED + 1], learn=False)
    svi = SVI(small.model, small.guide, numpyro.optim.Adam(0.03), elbo)

    @jax.jit
    def run(state: Any) -> Any:
        return lax.fori_loop(0, 300, lambda _, s: svi.update(s)[0], state)

    found = svi.get_params(run(svi.init(KEY)))
    _, draws, _ = problem.step({**problem.params, **found})
    problem.check_mean(draws)
    # RELAX < REBAR < REINFORCE.
    reinforce = problem.closed.reinforce[0]
    low, high = (1e-2, 0.8) if name == "rebar" else (0.0, 1e-3)
    assert low * reinforce < draws.var() < high * reinforce


# Belief nets, their exact gradients by enumeration.

# Estimator: the number of particles and the objective.
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "rebar": lambda: TraceREBAR_ELBO(temperature=0.6, eta=0.8, learn=False),
    "relax": lambda: TraceRELAX_ELBO(temperature=0.6, eta=0.8, hidden_dims=(6,)),
    "nvil": lambda: TraceNVIL_ELBO(2, baselines=BASELINES, hidden_dims=(6,)),
    "disarm": lambda: TraceDisARM_ELBO(),
    "vimco": lambda: ImportanceWeightedELBO(2, gradient="vimco"),
}
# Repetitions, and how many of them run side by side.
REPETITIONS, SIDE_BY_SIDE = 2000, 50


class Net:
    """A belief net as a pair; the biases are parameters, and every row has its own."""

    def __init__(self, name: str, batch_size: int | None = None, integer: bool = False) -> None:
        self.net, params = belief_net.trained(name)
        self.x = belief_net.undecided(name)
        self.reference, self.integer = params, integer
        self.weights = {k: jnp.asarray(v) for k, v in params.items()}
        self.batch_size = batch_size
        rows = len(self.x)
        self.params = {
            key: jnp.broadcast_to(value, (rows, len(value)))
            for key, value in self.weights.items()
            if value.ndim == 1
        }

    def latent(self, name: str, logits: jax.Array, layer: int) -> jax.Array:
        """The site and its value as a vector."""
        shape = self.net.layers[layer]
        logits = jnp.reshape(logits, (*logits.shape[:-1], *shape))
        if self.integer:
            value = numpyro.sample(name, dist.Categorical(logits=logits).to_event(1))
            value = jax.nn.one_hot(value, shape[-1])
        elif self.net.kind == "one_hot":
            value = numpyro.sample(name, OneHotCategorical(logits=logits).to_event(1))
        else:
            value = numpyro.sample(name, dist.Bernoulli(logits=logits).to_event(1))
        return jnp.reshape(value, (*value.shape[: value.ndim - len(shape)], -1))

    def model(self, x: jax.Array) -> None:
        biases = {k: numpyro.param(k, v) for k, v in self.params.items() if "encoder" not in k}
        with numpyro.plate("data", len(x), subsample_size=self.batch_size) as rows:
            z = self.latent(f"z{len(self.net.layers) - 1}", biases["prior"][rows], -1)
            for layer in range(len(self.net.layers) - 1, 0, -1):
                logits = z @ self.weights[f"decoder_{layer}"]
                logits = logits + biases[f"decoder_bias_{layer}"][rows]
                z = self.latent(f"z{layer - 1}", logits, layer - 1)
            logits = z @ self.weights["decoder_0"] + biases["decoder_bias_0"][rows]
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x[rows])

    def guide(self, x: jax.Array) -> None:
        biases = {k: numpyro.param(k, v) for k, v in self.params.items() if "encoder" in k}
        with numpyro.plate("data", len(x), subsample_size=self.batch_size) as rows:
            z = x[rows]
            for layer in range(len(self.net.layers)):
                logits = z @ self.weights[f"encoder_{layer}"]
                z = self.latent(f"z{layer}", logits + biases[f"encoder_bias_{layer}"][rows], layer)

    def exact(self, num_particles: int = 1) -> dict[str, np.ndarray]:
        return self.net.bound(self.reference, self.x, num_particles)[1]

    def masks(self) -> dict[str, np.ndarray]:
        return self.net.regular(self.reference, self.x)


class Mixed:
    """The bits between two continuous latents; every row has its own parameters."""

    def __init__(self) -> None:
        self.reference, self.x = mixed.trained()
        self.params = {
            key: jnp.broadcast_to(value, (len(self.x), *np.shape(value)))
            for key, value in self.reference.items()
        }

    def given(self) -> dict[str, jax.Array]:
        return {key: numpyro.param(key, value) for key, value in self.params.items()}

    def model(self, x: jax.Array) -> None:
        p = self.given()
        with numpyro.plate("data", len(x)):
            c = numpyro.sample("c", dist.Normal(0.0, 1.0))
            logits = p["prior"] + c[..., None] * p["prior_of_c"]
            b = numpyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
            loc = c * p["mean_of_c"] + jnp.sum(b * p["mean_of_b"], -1)
            s = numpyro.sample("s", dist.Normal(loc, 1.0))
            loc = p["x_bias"] + c[..., None] * p["x_of_c"] + s[..., None] * p["x_of_s"]
            loc = loc + jnp.sum(b[..., None] * p["x_of_b"], -2)
            numpyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x: jax.Array) -> None:
        p = self.given()
        with numpyro.plate("data", len(x)):
            loc = jnp.sum(x * p["c_weight"], -1) + p["c_bias"]
            c = numpyro.sample("c", dist.Normal(loc, jnp.exp(p["c_log_scale"])))
            logits = jnp.sum(x[..., None] * p["b_weight"], -2) + p["b_bias"]
            logits = logits + c[..., None] * p["b_of_c"]
            b = numpyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
            loc = jnp.sum(x * p["s_weight"], -1) + p["s_bias"] + jnp.sum(b * p["s_of_b"], -1)
            numpyro.sample("s", dist.Normal(loc, jnp.exp(p["s_log_scale"])))

    def exact(self, num_particles: int = 1) -> dict[str, np.ndarray]:
        found = mixed.gradient if num_particles == 1 else mixed.pair_gradient
        return found(self.reference, self.x)

    def masks(self) -> dict[str, np.ndarray]:
        return {}


def residuals(problem: Any, estimator: str) -> dict[str, np.ndarray]:
    """Gradients of the bound from many keys, minus the exact one."""
    elbo, guide = ESTIMATORS[estimator](), problem.guide
    x, own = jnp.asarray(problem.x), {}
    if estimator != "vimco":
        guide = elbo.tunable(guide)
        found = declared(guide, x)
        own = moved({k: v for k, v in found.items() if k not in problem.params})

    def loss(params: Any, state: Any, key: jax.Array) -> Any:
        found = elbo.loss_with_mutable_state(
            key, {**own, **params, **state}, problem.model, guide, x
        )
        return -found["loss"], found["mutable_state"]

    # A step before: the running baseline has something to subtract.
    seen = {"mean": jnp.array(-2.0), "variance": jnp.array(3.0), "count": jnp.array(1.0)}
    state = {k: seen for k in own if k.endswith("_baseline")}

    @jax.jit
    def run(params: Any, keys: jax.Array) -> Any:
        def one(key: jax.Array) -> Any:
            return jax.grad(loss, has_aux=True)(params, state, key)[0]

        return lax.map(one, keys, batch_size=SIDE_BY_SIDE)

    found = run(problem.params, random.split(random.key(0), REPETITIONS))
    exact = problem.exact(2 if estimator == "vimco" else 1)
    masks = problem.masks()
    return {
        key: (np.asarray(value) - exact[key])[:, masks.get(key, np.ones(exact[key].shape, bool))]
        for key, value in found.items()
    }


NETS = {
    "one layer": lambda: Net("one layer"),
    "two layers": lambda: Net("two layers", 20),
    "one-hot": lambda: Net("one-hot", 20),
    "integer": lambda: Net("one-hot", integer=True),
    "mixed": Mixed,
}
PAIRS = [
    (name, estimator)
    for name in NETS
    for estimator in ESTIMATORS
    if not (name == "one-hot" and estimator == "disarm")
    and not (name == "integer" and estimator not in ("nvil", "vimco"))
]


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_mean_is_the_enumerated_gradient(name: str, estimator: str) -> None:
    unbiased.check(residuals(NETS[name](), estimator))
