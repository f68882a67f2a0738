"""Weighted divergences: E log p(x | z) - w KL under every objective that is an expectation."""

from __future__ import annotations

import math
import re
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
from numpyro import handlers, infer
from numpyro.distributions.distribution import Unit
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal
from reference.free_bits import normal_divergence
from scipy.special import expit
from test_numpyro import models
from test_numpyro.models import family, module_params, normal, shaken, z_score

from numpyro_vae_ext import elbos
from numpyro_vae_ext.diagnostics import active_units, log_evidence
from numpyro_vae_ext.elbos import ImportanceWeightedELBO, TraceFreeBits_ELBO
from numpyro_vae_ext.handlers import kl_weight

WEIGHTS = [case["weight"] for case in CASES["handlers"]["kl_weight"]]
KEY = jax.random.key(4)
Program = Callable[..., Any]
OBJECTIVES = (
    infer.Trace_ELBO(),
    infer.Trace_ELBO(3),
    infer.TraceMeanField_ELBO(),
    infer.TraceGraph_ELBO(),
    ImportanceWeightedELBO(1),
    ImportanceWeightedELBO(1, gradient="stl"),
    ImportanceWeightedELBO(1, gradient="dreg"),
    TraceFreeBits_ELBO(3, free_bits=0.0, groups="site"),
)


def both(model: Program, guide: Program, weight: Any) -> tuple[Program, Program]:
    return kl_weight(model, weight=weight), kl_weight(guide, weight=weight)


@pytest.mark.parametrize("name", ["MeanField", "IAF", "Auxiliary", "VGP"])
def test_linear_in_the_weight_at_one_noise(exact: None, name: str) -> None:
    """Value and every gradient; without a weight on the divergence the likelihood is left."""
    small = {"hidden_dims": (5,)} if name != "MeanField" else {}
    posterior = shaken(family(name, latent_dim=2, context_dim=2, **small), 0.1)
    params = {**module_params(posterior=posterior), "mu": jnp.zeros(2)}
    guide, x = models.amortised(posterior), normal(6, 2)

    # Each program is compiled as a whole: all objectives where families differ most.
    chosen = OBJECTIVES if name in ("MeanField", "Auxiliary") else (OBJECTIVES[0], *OBJECTIVES[-2:])
    weights = np.array([0.0, *WEIGHTS, 1.0])

    def run(params: Any, weight: Any) -> list[Any]:
        pair = both(models.conjugate, guide, weight)
        return [
            jax.value_and_grad(lambda p, e=elbo: e.loss(KEY, p, *pair, x, 3))(params)
            for elbo in chosen
        ]

    @jax.jit
    def runs(params: Any) -> Any:
        plain = [elbo.loss(KEY, params, models.conjugate, guide, x, 3) for elbo in chosen]
        return jax.vmap(run, (None, 0))(params, weights), plain

    found, plain = runs(params)
    for leaf in map(np.asarray, jax.tree.leaves(found)):
        line = leaf[0] + weights.reshape(-1, *[1] * (leaf.ndim - 1)) * (leaf[-1] - leaf[0])
        # In units of the largest entry, of which the others are differences.
        assert np.abs(leaf - line).max() < 1e-10 * max(1.0, np.abs(leaf).max())
    for (loss, slopes), expected in zip(found, plain, strict=True):
        np.testing.assert_allclose(loss[-1], expected, rtol=1e-10)
        assert (slopes["mu"][0] == 0.0).all() and (slopes["mu"][-1] != 0.0).all()
    # What is left is the likelihood.
    seeded = handlers.substitute(handlers.seed(guide, jax.random.split(KEY)[1]), data=params)
    drawn = handlers.trace(seeded).get_trace(x, 3)
    model = handlers.seed(handlers.substitute(models.conjugate, data=params), KEY)
    seen = handlers.trace(handlers.replay(model, drawn)).get_trace(x, 3)["x"]
    expected = -(seen["fn"].log_prob(seen["value"]) * seen["scale"]).sum()
    assert float(found[0][0][0]) == pytest.approx(float(expected), rel=1e-10)


def gaussian() -> tuple[Program, Program, np.ndarray, dict[str, jax.Array]]:
    """z ~ N(mu, I), x ~ N(z, I) for every row, and a Normal guide with free parameters."""
    x = np.asarray(normal(6, 2, seed=1))
    start = {"mu": jnp.array([0.3, -0.2]), "loc": normal(6, 2), "raw": jnp.array([-0.4, 0.1])}

    def model() -> None:
        mu = numpyro.param("mu", start["mu"])
        with numpyro.plate("data", 6):
            z = numpyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        loc, raw = (numpyro.param(name, start[name]) for name in ("loc", "raw"))
        with numpyro.plate("data", 6):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(raw)).to_event(1))

    return model, guide, x, start


def test_closed_form(exact: None) -> None:
    """The divergence exactly where the host has it, the rest by Monte Carlo; gradients as well."""
    model, guide, x, start = gaussian()
    mu, loc, raw = (np.asarray(value) for value in start.values())
    table, variance, gap = normal_divergence(loc, raw, mu), np.exp(2.0 * raw), loc - mu
    of_divergence = [table.sum(), {"loc": gap, "mu": -gap.sum(0), "raw": 6.0 * (variance - 1.0)}]
    fit = -0.5 * ((x - loc) ** 2 + variance + np.log(2.0 * np.pi))
    of_fit = [fit.sum(), {"loc": x - loc, "mu": np.zeros(2), "raw": -6.0 * variance}]

    def evaluated(key: jax.Array, weight: Any) -> list[Any]:
        pair = both(model, guide, weight)
        return [
            jax.value_and_grad(lambda p, e=elbo: e.loss(key, p, *pair))(start)
            for elbo in (infer.TraceMeanField_ELBO(), infer.Trace_ELBO(), infer.TraceGraph_ELBO())
        ]

    run = jax.jit(jax.vmap(evaluated, (0, None)))
    keys = jax.random.split(KEY, 10_000)
    none = run(keys, 0.0)
    for weight in WEIGHTS:
        found = run(keys, float(weight))
        parts = (found[0], none[0], of_divergence)
        for a, b, slope in zip(*map(jax.tree.leaves, parts), strict=True):
            np.testing.assert_allclose(a[:5] - b[:5], np.broadcast_to(weight * slope, a[:5].shape))
        for each in found[1:]:
            parts = (each, of_fit, of_divergence)
            for a, f, d in zip(*map(jax.tree.leaves, parts), strict=True):
                error = np.asarray(a).std(0, ddof=1) / 100.0 + 1e-10
                assert np.abs((a.mean(0) - (weight * d - f)) / error).max() < 5


X, PRIOR = np.array([0.3, -0.8, 1.4]), 0.4
LOGITS = np.array([0.5, -0.7, 1.2])


def bits_model() -> None:
    """A bit for each of three rows out of six."""
    with numpyro.plate("rows", 6, subsample_size=3):
        b = numpyro.sample("b", dist.Bernoulli(logits=jnp.full((3,), PRIOR)))
        numpyro.sample("x", dist.Normal(2.0 * b - 1.0, 1.0), obs=jnp.asarray(X))


def bits_guide() -> None:
    a = numpyro.param("a", jnp.asarray(LOGITS))
    with numpyro.plate("rows", 6, subsample_size=3):
        numpyro.sample("b", dist.Bernoulli(logits=a))


def exact_bits(weight: float) -> tuple[float, np.ndarray]:
    """Loss and its derivative in the logits, by summing over the values of every bit."""
    q, p = expit(LOGITS), expit(PRIOR)
    fit = q * -0.5 * (X - 1.0) ** 2 + (1 - q) * -0.5 * (X + 1.0) ** 2 - 0.5 * np.log(2 * np.pi)
    divergence = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    slope = q * (1 - q) * (2.0 * X - weight * (LOGITS - PRIOR))
    return -2.0 * (fit - weight * divergence).sum(), -2.0 * slope


DISCRETE = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES["elbos"].items()
    if hasattr(getattr(elbos, name), "tunable")
    for i, case in enumerate(cases)
]


@pytest.mark.parametrize(("name", "case"), DISCRETE)
def test_discrete_latents(exact: None, name: str, case: dict) -> None:
    """The mean gradient is the exact one, and all numbers are finite without a weight."""
    elbo = getattr(elbos, name)(**case)
    guide = elbo.tunable(bits_guide)
    svi = SVI(bits_model, guide, optax.sgd(0.1), elbo)
    state = svi.init(KEY)
    params = {**svi.get_params(state), **(state.mutable_state or {})}

    def run(key: jax.Array, weight: Any) -> Any:
        def loss(a: jax.Array, others: Any) -> jax.Array:
            pair = both(bits_model, guide, weight)
            given = {**params, **others, "a": a}
            return elbo.loss(key, given, *pair)

        others = {k: v for k, v in svi.get_params(state).items() if k != "a"}
        return jax.value_and_grad(loss, (0, 1))(jnp.asarray(LOGITS), others)

    runs = jax.jit(jax.vmap(run, (0, None)))
    keys = jax.random.split(KEY, 4000)
    for weight in (0.0, 0.3):
        values, (slopes, own) = runs(keys, weight)
        loss, slope = exact_bits(weight)
        assert abs(z_score(values, loss)) < 4.5
        assert np.abs(z_score(slopes, slope)).max() < 4.5
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((slopes, own)))


def test_baselines_keep_the_units_of_one_row(exact: None) -> None:
    """Neither the plate's scale nor the weight is in what a baseline learns."""

    def model(weight: Any) -> None:
        with numpyro.plate("rows", 6, subsample_size=3):
            numpyro.sample("b", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=jnp.asarray(X))

    def guide(weight: Any) -> None:
        bits_guide()

    elbo = elbos.TraceNVIL_ELBO(baselines=("running",), decay=0.9)
    svi = SVI(*both(model, elbo.tunable(guide), lambda w: w), optax.sgd(0.1), elbo)
    state = svi.init(KEY, 0.0)
    before = state.mutable_state["b_baseline"]["mean"]
    expected = dist.Normal(0.0, 1.0).log_prob(X).mean()
    update = jax.jit(svi.update)
    for weight in (0.0, 1e-9):
        after = update(state, weight)[0].mutable_state["b_baseline"]["mean"]
        assert float(after - 0.9 * before) == pytest.approx(0.1 * float(expected), rel=1e-6)


def test_the_hosts_graph_objective_scales_the_score(exact: None) -> None:
    """Of discrete sites, by that of the plate and hence by the weight: docs/hosts.md says so."""
    elbo, start = infer.TraceGraph_ELBO(), {"a": jnp.asarray(LOGITS)}

    def run(key: jax.Array, weight: Any) -> Any:
        pair = both(bits_model, bits_guide, weight)
        return jax.value_and_grad(lambda p: elbo.loss(key, p, *pair))(start)

    values, slopes = jax.jit(jax.vmap(run, (0, None)))(jax.random.split(KEY, 4000), 0.3)
    loss, slope = exact_bits(0.3)
    assert abs(z_score(values, loss)) < 4.5
    assert np.abs(z_score(slopes["a"], 2 * 0.3 * slope)).max() < 4.5


class Reverse(Unit):
    """A factor whose number is differentiable, as a reverse model's is."""

    reparametrized_params = ["log_factor"]


def scales(program: Program) -> dict[str, Any]:
    found = handlers.trace(handlers.seed(program, 0)).get_trace()
    return {name: site["scale"] for name, site in found.items() if site["type"] == "sample"}


def test_what_is_weighted() -> None:
    """Latent sites, and a guide's factors; not data, a model's factors, and subsamples."""

    def model() -> None:
        numpyro.param("p", 1.0)
        with numpyro.plate("data", 4, subsample_size=2):
            numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=jnp.zeros(2))
            numpyro.factor("f", jnp.zeros(2))
        numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("v", dist.Normal(0.0, 1.0), obs=0.0)
        numpyro.deterministic("d", 1.0)

    def guide() -> None:
        numpyro.sample("z_aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        unit = Reverse(0.0)
        numpyro.sample("z_reverse", unit, obs=unit.sample(None), infer={"is_auxiliary": True})

    found = scales(kl_weight(model, weight=0.25))
    assert found == {"z": 0.5, "x": 2.0, "f": 2.0, "w": 0.25, "v": None}
    assert scales(kl_weight(guide, weight=0.25)) == {"z_aux": 0.25, "z_reverse": 0.25}
    # Twice is the product.
    program = kl_weight(lambda: numpyro.sample("z", dist.Normal(0.0, 1.0)), weight=0.5)
    assert scales(kl_weight(program, weight=0.25)) == {"z": 0.125}


def test_a_factor_of_a_guide_is_weighed_with_it() -> None:
    def model() -> None:
        numpyro.sample("z", dist.Delta(0.7, log_density=-1.0))

    def guide() -> None:
        numpyro.sample("z", dist.Delta(0.7, log_density=-0.25))
        unit = Reverse(0.5)
        numpyro.sample("z_reverse", unit, obs=unit.sample(None), infer={"is_auxiliary": True})

    for weight in WEIGHTS:
        for elbo in (OBJECTIVES[0], OBJECTIVES[4], OBJECTIVES[-1]):
            found = elbo.loss(KEY, {}, *both(model, guide, weight))
            assert float(found) == pytest.approx(weight * 1.25)


def test_weights_by_row() -> None:
    model, guide, _, start = gaussian()
    weights = jnp.concatenate([jnp.arange(6.0)[None], jnp.eye(6), jnp.zeros((1, 6))])
    run = jax.jit(jax.vmap(lambda w: infer.Trace_ELBO().loss(KEY, start, *both(model, guide, w))))
    weighted, *rows, none = run(weights)
    total = none + sum(i * (row - none) for i, row in enumerate(rows))
    assert float(weighted) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("elbo", [infer.Trace_ELBO(), ImportanceWeightedELBO(1, gradient="dreg")])
def test_a_traced_step_compiles_once(elbo: Any) -> None:
    """The weight is a function of the program's arguments; counted by its traces."""
    model, guide, _, _ = gaussian()
    traces = []

    def plain(step: Any, *, rate: Any = 0.1) -> None:
        model()

    def drawn(step: Any, *, rate: Any = 0.1) -> None:
        guide()

    def weight(step: Any, *, rate: Any = 0.1) -> Any:
        traces.append(step)
        return jnp.minimum(1.0, rate * step)

    svi = SVI(*both(plain, drawn, weight), optax.sgd(0.1), elbo)
    state = svi.init(KEY, 0)
    update = jax.jit(svi.update)
    update(state, 0)
    before = len(traces)
    found = [float(update(state, step)[1]) for step in (0, 4, 10, 50)]
    assert update._cache_size() == 1 and len(traces) == before
    none, part, *whole = found
    assert whole[0] == whole[1]
    assert part == pytest.approx(none + 0.4 * (whole[0] - none), rel=1e-5)
    assert abs(whole[0] - none) > 1e-3
    number = SVI(*both(plain, drawn, 0.4), optax.sgd(0.1), elbo)
    assert float(number.update(number.init(KEY, 0), 4)[1]) == pytest.approx(part, rel=1e-5)
    slow = float(svi.update(state, 4, rate=0.01)[1])
    assert slow == pytest.approx(none + 0.04 * (whole[0] - none), rel=1e-5)
    assert both(plain, drawn, weight)[0].__name__ == "plain"


def test_guides_made_from_a_model() -> None:
    x = normal(5)

    def model() -> None:
        with numpyro.plate("data", 5):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, elbo = AutoNormal(model), ImportanceWeightedELBO(1)
    svi = SVI(*both(model, guide, 0.5), optax.adam(1e-2), elbo)
    params = svi.get_params(svi.init(KEY))
    none, half, plain = (
        float(elbo.loss(KEY, params, *both(model, guide, w))) for w in (0.0, 0.5, 1.0)
    )
    assert plain == pytest.approx(float(elbo.loss(KEY, params, model, guide)), rel=1e-6)
    assert half == pytest.approx(0.5 * (none + plain), rel=1e-5)
    assert none != pytest.approx(plain, rel=1e-3)


def says(text: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):  # JAX may add a line
        call()


WRAP = " Wrap both in handlers.kl_weight."


def test_errors() -> None:
    for wrong in (-0.5, math.nan, math.inf):
        text = f"Expected weight >= 0; got {wrong}."
        says(text, lambda w=wrong: kl_weight(lambda: None, weight=w))
        says(text, kl_weight(lambda: None, weight=lambda w=wrong: w))
    says(
        "Expected weight >= 0; got [ 1. -1.].", lambda: kl_weight(print, weight=np.array([1, -1.0]))
    )
    model, guide, _, start = gaussian()
    expected = "Expected the same KL weight on model and guide; got "
    nvil = elbos.TraceNVIL_ELBO(baselines=())
    for elbo in (ImportanceWeightedELBO(1), TraceFreeBits_ELBO(), nvil):

        def loss(*pair: Program, elbo: Any = elbo) -> Any:
            return elbo.loss(KEY, start, *pair)

        for w in (1.0, jnp.array(0.5)):
            weighted = both(model, guide, w)
            for pair, alone in (((weighted[0], guide), "model"), ((model, weighted[1]), "guide")):
                text = f"{expected}site 'z' weighted in the {alone} alone.{WRAP}"
                says(text, lambda p=pair, f=loss: f(*p))
                says(text, lambda p=pair, f=loss: jax.eval_shape(lambda: f(*p)))
        pair = both(model, guide, 0.25)[0], both(model, guide, jnp.array(0.5))[1]
        text = f"{expected}0.25 in the model and 0.5 in the guide at 'z'.{WRAP}"
        says(text, lambda p=pair, f=loss: f(*p))

    def with_factor() -> None:
        guide()
        numpyro.factor("f", 0.0)

    text = f"{expected}the guide's own site 'f' without it. Wrap the whole guide, and make a factor"
    says(text + " of a Unit that has_rsample.", lambda: loss(*both(model, with_factor, 1.0)))


TEXT = (
    "Expected sites without a KL weight in an importance-weighted bound; got handlers.kl_weight at "
    "site 'z'. A weight inside the logarithm is no weight on a KL divergence; use num_particles=1 "
    "or the host's Trace_ELBO, and the plain pair for evaluation."
)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_no_weight_inside_a_logarithm(weight: float, traced: bool) -> None:
    model, guide, _, start = gaussian()

    def pairs(w: Any) -> list[tuple[Program, Program]]:
        weighted = both(model, guide, w)
        return [weighted, (model, weighted[1]), (weighted[0], guide)]

    def shape(call: Callable[..., Any]) -> Callable[[], Any]:
        return (lambda: jax.eval_shape(call, weight)) if traced else (lambda: call(weight))

    one = ImportanceWeightedELBO(1)
    layouts = ({}, {"vectorize_particles": False}, {"chunk_size": 2})
    for i in range(3):
        for gradient in ("reparam", "stl", "dreg", "vimco"):
            for layout in layouts[: 3 if i == 0 and traced else 1]:
                elbo = ImportanceWeightedELBO(3, gradient=gradient, **layout)
                says(TEXT, shape(lambda w, e=elbo, i=i: e.loss(KEY, start, *pairs(w)[i])))
        says(TEXT, shape(lambda w, i=i: one.log_weights(KEY, start, *pairs(w)[i])))
        if not traced:
            pair = pairs(weight)[i]
            options = {"num_samples": 4, "params": start}
            says(TEXT, lambda p=pair, o=options: log_evidence(KEY, *p, progress_bar=False, **o))
            says(TEXT, lambda p=pair, o=options: active_units(KEY, *p, **o))
    vimco = ImportanceWeightedELBO(3, gradient="vimco")
    bits = both(bits_model, bits_guide, weight)
    says(TEXT.replace("'z'", "'b'"), lambda: vimco.loss(KEY, {"a": LOGITS}, *bits))
