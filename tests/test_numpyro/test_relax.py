"""Relaxed programs: a bound on the evidence of the relaxed model, and nothing else changed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import CASES
from numpyro import handlers, infer
from reference import concrete
from scipy import stats
from scipy.special import expit
from test_numpyro.models import z_score

from numpyro_vae_ext.distributions import OneHotCategorical
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.handlers import relax

CASE = CASES["handlers"]["relax"]
KEY = jax.random.key(5)
X, Y = [0.9, -0.4, 2.5], [1.0, 0.0, 1.0]


def bit(name: str, family: str, logit: jax.Array) -> jax.Array:
    """A bit, or a one-hot pair whose first entry is the bit."""
    if family == "bernoulli":
        return numpyro.sample(name, dist.Bernoulli(logits=logit))
    pair = OneHotCategorical(logits=jnp.stack([logit, 0 * logit], -1))
    return numpyro.sample(name, pair)[..., 0]


def pair(family: str, batch_size: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """A bit beside a continuous latent, with continuous and discrete data, in a plate."""
    x, y = jnp.array(X), jnp.array(Y)

    def model(temperature: Any) -> None:
        with numpyro.plate("rows", 3, subsample_size=batch_size) as rows:
            b = bit("b", family, jnp.full((len(rows),), 0.4))
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z + 2.0 * b, 1.0), obs=x[rows])
            numpyro.sample("y", dist.Bernoulli(logits=1.5 * b), obs=y[rows])

    def guide(temperature: Any) -> None:
        logits = numpyro.param("logits", jnp.array([0.8, -0.6, 2.0]))
        with numpyro.plate("rows", 3, subsample_size=batch_size) as rows:
            b = bit("b", family, logits[rows])
            numpyro.sample("z", dist.Normal(0.5 * (x[rows] - 2.0 * b), 0.8))

    return model, guide, {"logits": jnp.array([0.8, -0.6, 2.0])}


def given(temperature: Any) -> Any:
    return temperature


def relaxed(family: str, batch_size: int | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """The pair at the temperature that it is called with."""
    model, guide, params = pair(family, batch_size)
    return relax(model, temperature=given), relax(guide, temperature=given), params


def evidence(temperature: float) -> np.ndarray:
    """Of the relaxed model, by row."""

    def log_likelihood(row: int) -> Any:
        def at(b: float) -> float:
            p = expit(1.5 * b)
            seen = np.log(p if Y[row] else 1.0 - p)
            return stats.norm.logpdf(X[row], 2.0 * b, np.sqrt(2.0)) + seen

        return at

    return np.array(
        [concrete.binary_evidence(log_likelihood(i), 0.4, temperature) for i in range(3)]
    )


def exact_evidence() -> np.ndarray:
    """Of the discrete model, by row."""

    def joint(b: float) -> np.ndarray:
        seen = np.where(np.array(Y) == 1.0, expit(1.5 * b), expit(-1.5 * b))
        return stats.norm.pdf(X, 2.0 * b, np.sqrt(2.0)) * seen

    return expit(0.4) * joint(1.0) + expit(-0.4) * joint(0.0)


@pytest.mark.parametrize("family", ["bernoulli", "ours"])
def test_weights_are_unbiased_and_the_bound_is_one(family: str) -> None:
    """At all temperatures, by one program: compiled once."""
    model, guide, params = relaxed(family)
    one, many = ImportanceWeightedELBO(20_000), ImportanceWeightedELBO(500)

    @jax.jit
    def weights(t: jax.Array) -> Any:
        values = [elbo.loss(KEY, params, model, guide, t) for elbo in (infer.Trace_ELBO(500), many)]
        return one.log_weights(KEY, params, model, guide, t), -jnp.stack(values)

    for temperature in [case["temperature"] for case in CASE] + [0.02]:
        truth = evidence(temperature)
        found, bounds = map(np.asarray, weights(jnp.array(temperature)))
        assert found.shape == (20_000, 3)
        assert np.abs(z_score(np.exp(found), truth)).max() < 4
        assert found.mean(0).sum() < np.log(truth).sum() - 0.05
        assert (bounds < np.log(truth).sum() + 0.1).all()
    assert weights._cache_size() == 1
    # The evidence has nearly become the discrete model's. The bound has not become its bound: it
    # also pays for how the noise is matched behind the bit.
    assert np.abs(truth - exact_evidence()).max() < 0.01
    program, other, _ = pair(family)
    if family == "bernoulli":
        discrete = jax.jit(lambda: one.log_weights(KEY, params, program, other, 0.0))()
        discrete = np.asarray(discrete)
        assert np.abs(z_score(np.exp(discrete), exact_evidence())).max() < 4
        assert found.mean() < discrete.mean() - 0.05


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_sure_guide_at_a_low_temperature(exact: None, kind: str) -> None:
    """The evidence is 1. Scored as soft values, such guides seem to be worth far more."""

    def model() -> None:
        bit("a", "bernoulli", jnp.zeros((), kind))
        bit("b", "ours", jnp.zeros((), kind))

    def guide() -> None:
        logit = numpyro.param("logit", jnp.array(3.0, kind))
        bit("a", "bernoulli", logit)
        bit("b", "ours", logit)

    programs = relax(model, temperature=0.05), relax(guide, temperature=0.05)

    def loss(params: Any) -> Any:
        weights = ImportanceWeightedELBO(40_000).log_weights(KEY, params, *programs)
        return weights.mean(), weights

    gradient, weights = jax.jit(jax.grad(loss, has_aux=True))({"logit": jnp.array(3.0, kind)})
    # The divergence of two logistics, twice, whatever the temperature.
    assert np.asarray(weights).mean() == pytest.approx(-2 * 1.3128, abs=0.05)
    assert np.abs(z_score(np.exp(np.asarray(weights, float)), 1.0)).max() < 4
    assert np.isfinite(gradient["logit"]) and gradient["logit"] < 0


@pytest.mark.parametrize("family", ["bernoulli", "ours"])
def test_gradients_and_subsamples(exact: None, family: str) -> None:
    """Path gradients have the mean of the host's or of our own plain one, minibatches too."""
    plain, path = infer.Trace_ELBO(4), ImportanceWeightedELBO(1, gradient="stl")
    if family == "ours":
        plain, path = ImportanceWeightedELBO(3), ImportanceWeightedELBO(3, gradient="dreg")
    model, guide, params = relaxed(family)
    small_model, small_guide, _ = relaxed(family, 2)

    @jax.jit
    def gradients(keys: jax.Array) -> Any:
        def losses(params: Any, key: jax.Array) -> jax.Array:
            first = plain.loss(key, params, model, guide, 0.6)
            return jnp.stack([first, path.loss(key, params, small_model, small_guide, 0.6)])

        return jax.vmap(jax.jacobian(losses), (None, 0))(params, keys)["logits"]

    draws = np.asarray(gradients(jax.random.split(KEY, 3000)))
    assert np.abs(z_score(draws[:, 0] - draws[:, 1], 0.0)).max() < 4.5


def test_wrappers_are_kept() -> None:
    p = np.array([[0.2, 0.8], [0.5, 0.5], [0.1, 0.9]])
    mask = np.array([True, False, True])

    def model(t: Any) -> Any:
        with numpyro.plate("rows", 3):
            a = numpyro.sample("a", dist.Bernoulli(p).to_event(1).mask(jnp.array(mask)))
            b = numpyro.sample("b", OneHotCategorical(logits=jnp.ones((2, 4))).to_event(1))
            c = numpyro.sample("c", dist.Bernoulli(0.3))
            d = numpyro.sample("d", dist.Bernoulli(0.3).expand([3]).mask(False))
        return a, b, c, d

    @jax.jit
    def run(key: jax.Array, t: jax.Array) -> Any:
        found = []
        for program in (model, relax(model, temperature=given)):
            with handlers.trace() as sites, handlers.seed(rng_seed=key):
                values = program(t)
            sites = {name: sites[name] for name in "abcd"}
            for name, value in zip("abcd", values, strict=True):
                fn = sites[name]["fn"]
                assert fn.batch_shape == (3,) and sites[name]["value"].shape == value.shape
                assert fn.event_shape == {"a": (2,), "b": (2, 4)}.get(name, ())
                assert fn.has_rsample == bool(found)
            densities = {k: s["fn"].log_prob(s["value"]) for k, s in sites.items()}
            found.append((values, {k: s["value"] for k, s in sites.items()}, densities))
        return found

    (hard, _, _), (soft, inner, density) = jax.tree.map(np.asarray, run(KEY, jnp.array(0.2)))
    assert all(((v == 0) | (v == 1)).all() for v in hard)
    assert all(((v > 0) & (v < 1)).all() for v in soft)
    # A site is scored in log-odds; the program, and what it returns, has soft values.
    logit = np.log(p) - np.log1p(-p)
    expected = concrete.log_odds_log_prob(inner["a"], logit, 0.2).sum(-1) * mask
    np.testing.assert_allclose(density["a"], expected, rtol=1e-4)
    assert (density["d"] == 0.0).all() and density["b"].shape == (3,)
    np.testing.assert_allclose(soft[0], expit(inner["a"]), atol=1e-6)
    np.testing.assert_allclose(soft[1], np.exp(inner["b"]), atol=1e-6)
    # A temperature for each element.
    wide = relax(
        lambda: numpyro.sample("a", dist.Bernoulli(p).to_event(1)),
        temperature=jnp.array([5.0, 1e-3]),
    )
    with handlers.seed(rng_seed=0):
        values = np.asarray(wide())
    rounding = np.abs(values - np.round(values)).max(0)
    assert rounding[0] > 0.1 and rounding[1] < 1e-3


def test_observed_and_continuous_sites_are_left_alone() -> None:
    def model() -> None:
        numpyro.sample("k", dist.Categorical(probs=jnp.ones(3) / 3), obs=1)
        numpyro.sample("b", dist.Bernoulli(0.5), obs=1.0)
        numpyro.sample("z", dist.Gamma(2.0, 1.0))
        numpyro.factor("f", 1.0)
        numpyro.deterministic("d", 1.0)

    hard, soft = (
        handlers.trace(handlers.seed(program, rng_seed=0)).get_trace()
        for program in (model, relax(model, temperature=0.5))
    )
    for name in "kbzf":
        assert type(soft[name]["fn"]) is type(hard[name]["fn"])
    seen = handlers.condition(lambda: numpyro.sample("c", dist.Bernoulli(0.5)), {"c": 1.0})
    assert relax(seen, temperature=0.5)() == 1.0


def test_errors() -> None:
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"^Expected temperature > 0; got {wrong}\.$"):
            relax(lambda: None, temperature=wrong)
        late = relax(lambda: None, temperature=lambda wrong=wrong: wrong)
        with pytest.raises(ValueError, match=rf"^Expected temperature > 0; got {wrong}\.$"):
            late()
    text = (
        "Expected Bernoulli or one-hot categorical latent sites under relax; got site 'k' with the "
        "distribution {}. {}"
    )
    for fn, name, remedy in (
        (
            dist.Categorical(logits=jnp.ones(3)).expand([2]).to_event(1),
            "CategoricalLogits",
            "Use OneHotCategorical of the package's distributions module, or TraceNVIL_ELBO.",
        ),
        (
            dist.Poisson(2.0),
            "Poisson",
            "Marginalise it with the host's TraceEnum_ELBO, or use TraceNVIL_ELBO.",
        ),
    ):
        program = relax(lambda fn=fn: numpyro.sample("k", fn), temperature=0.5)
        with pytest.raises(ValueError) as error, handlers.seed(rng_seed=0):
            program()
        assert str(error.value) == text.format(name, remedy)


def test_schedule() -> None:
    """The temperature is a function of the program's arguments; the step is compiled once."""
    traced = []

    def cool(*, step: Any) -> Any:
        traced.append(step)
        return 0.05 + 2.0 * jnp.exp(-step)

    def model(*, step: Any) -> Any:
        logits = jnp.zeros(1000)
        return numpyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    def guide(*, step: Any) -> None:
        logits = numpyro.param("logits", jnp.ones(1000))
        numpyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    soft_model, soft_guide = relax(model, temperature=cool), relax(guide, temperature=cool)
    assert soft_model.__name__ == "model"

    @jax.jit
    def distance(step: jax.Array) -> jax.Array:
        with handlers.seed(rng_seed=0):
            b = soft_model(step=step)
        return jnp.abs(b - jnp.round(b)).mean()

    found = [float(distance(jnp.array(step))) for step in (0.0, 2.0, 20.0)]
    assert found[0] > found[1] > found[2]
    svi = infer.SVI(soft_model, soft_guide, numpyro.optim.Adam(0.01), infer.Trace_ELBO())
    state = svi.init(KEY, step=jnp.array(0.0))
    update = jax.jit(svi.update)
    traced.clear()
    for step in range(4):
        state, loss = update(state, step=jnp.array(float(step)))
        assert np.isfinite(loss)
    assert len(traced) == 2, "model and guide are traced once"
