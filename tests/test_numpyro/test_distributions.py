"""Densities, samples and shapes of the distributions that the host lacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import CASES
from numpyro import handlers
from reference import concrete
from scipy.special import log_softmax

from numpyro_vae_ext import distributions
from numpyro_vae_ext.distributions import OneHotCategorical, RelaxedOneHotCategorical

KEY = jax.random.key(3)
LOGITS = ((0.4, -1.0, 2.0, 0.1), (-0.3, 0.0, 0.7, -2.0))


def build(name: str, case: dict[str, Any]) -> Any:
    arrays = {k: jnp.array(v) if isinstance(v, tuple) else v for k, v in case.items()}
    return getattr(distributions, name)(**arrays)


def log_p(case: dict[str, Any]) -> np.ndarray:
    given = case["logits"] if "logits" in case else np.log(case["probs"])
    return log_softmax(np.asarray(given), axis=-1)


def cases(name: str) -> list[dict[str, Any]]:
    return CASES["distributions"][name]


def test_one_hot_density() -> None:
    """The host's at the corners, linear between them, with the moments of the categories."""

    @jax.jit
    def everything(key: jax.Array) -> list[dict[str, Any]]:
        found = []
        for case in cases("OneHotCategorical"):
            fn = build("OneHotCategorical", case)
            k, batch = fn.event_shape[0], fn.batch_shape
            corners = fn.enumerate_support()
            assert corners.shape == (k, *batch, k)
            assert fn.enumerate_support(expand=False).shape == (k, *[1] * len(batch), k)
            assert not fn.has_rsample and fn.has_enumerate_support and fn.is_discrete
            assert fn.is_one_hot and fn.support.event_dim == 1
            index = jnp.broadcast_to(jnp.arange(k).reshape(-1, *[1] * len(batch)), (k, *batch))
            soft = dist.Dirichlet(jnp.ones(k)).sample(key, batch)
            found.append(
                {
                    "corners": fn.log_prob(corners),
                    "host": dist.Categorical(logits=fn.logits).log_prob(index),
                    "soft": soft,
                    "between": fn.log_prob(soft),
                    "gradient": jax.grad(lambda v, fn=fn: fn.log_prob(v).sum())(soft),
                    "moments": (fn.probs, fn.mean, fn.variance, fn.entropy()),
                    "inside": (fn.support(corners), ~fn.support(0.5 * corners)),
                    "feasible": fn.support(fn.support.feasible_like(corners)),
                }
            )
        return found

    for case, found in zip(cases("OneHotCategorical"), everything(KEY), strict=True):
        np.testing.assert_allclose(found["corners"], found["host"], rtol=1e-5)
        expected, p = log_p(case), np.exp(log_p(case))
        linear = (found["soft"] * expected).sum(-1)
        np.testing.assert_allclose(found["between"], linear, rtol=1e-5)
        np.testing.assert_allclose(found["gradient"], expected, rtol=1e-5)
        for moment, other in zip(
            found["moments"], (p, p, p * (1 - p), -(p * expected).sum(-1)), strict=True
        ):
            np.testing.assert_allclose(moment, other, rtol=1e-5)
        assert np.all(found["feasible"]) and all(np.all(x) for x in found["inside"])


def test_categories_that_cannot_occur() -> None:
    @jax.jit
    def values(logits: jax.Array) -> jax.Array:
        return OneHotCategorical(logits=logits, validate_args=False).log_prob(jnp.eye(3))

    logits = jnp.array([0.0, -jnp.inf, 1.0])
    found = values(logits)
    assert np.isneginf(found[1]) and np.isfinite(np.asarray(found)[[0, 2]]).all()
    assert np.isfinite(jax.jacobian(values)(logits)[0]).all()
    never = OneHotCategorical(probs=jnp.array([0.5, 0.0, 0.5]))
    assert np.isfinite(never.log_prob(np.eye(3))).all() and np.isfinite(never.entropy())


def test_validation_of_one_hots() -> None:
    ours = OneHotCategorical(logits=jnp.array(LOGITS), validate_args=True)
    assert np.isfinite(ours.log_prob(np.full((2, 4), 0.25))).all()
    for wrong in (np.full((2, 4), 0.5), np.broadcast_to([1.5, -0.5, 0.0, 0.0], (2, 4))):
        with pytest.warns(UserWarning, match="Out-of-support values"):
            assert np.isneginf(ours.log_prob(wrong)).all()
    for given in ({}, {"probs": jnp.ones(3) / 3, "logits": jnp.ones(3)}):
        with pytest.raises(ValueError, match="Exactly one of"):
            OneHotCategorical(**given)
    with pytest.raises(ValueError, match="invalid probs"):
        OneHotCategorical(probs=jnp.array([1.5, -0.5]), validate_args=True)
    assert OneHotCategorical(logits=jnp.array([0, 1])).logits.dtype == jnp.result_type(float)


def test_frequencies() -> None:
    """Of the largest entries, also at rows of different temperatures."""
    names = [(name, case) for name in sorted(CASES["distributions"]) for case in cases(name)]

    @jax.jit
    def everything(key: jax.Array) -> list[Any]:
        fns = [build(name, case) for name, case in names]
        return [(fn.sample(key, (20_000,)), fn.probs) for fn in fns]

    for (name, _), (draws, p) in zip(names, everything(KEY), strict=True):
        draws, p = np.asarray(draws), np.asarray(p)
        np.testing.assert_allclose(draws.sum(-1), 1.0, rtol=1e-5)
        winners = np.eye(draws.shape[-1])[draws.argmax(-1)]
        error = np.sqrt(p * (1 - p) / 20_000)
        assert np.abs((winners.mean(0) - p) / error).max() < 4.5
        assert name != "OneHotCategorical" or np.array_equal(draws, winners)


def test_concrete_density(exact: None) -> None:
    @jax.jit
    def everything(key: jax.Array) -> list[Any]:
        found = []
        for case in cases("RelaxedOneHotCategorical"):
            fn = build("RelaxedOneHotCategorical", case)
            assert fn.has_rsample and not fn.is_discrete
            x, kept = fn.sample_with_intermediates(key, (5,))
            # The logarithm's own density: the same but for the change of variables.
            inside = fn.base_dist.log_prob(jnp.log(x)) - jnp.log(x).sum(-1)
            found.append((x, fn.support(x), fn.log_prob(x), fn.log_prob(x, kept), inside))
        return found

    for case, found in zip(cases("RelaxedOneHotCategorical"), everything(KEY), strict=True):
        x, supported, *densities = map(np.asarray, found)
        expected = concrete.log_prob(x, log_p(case), np.asarray(case["temperature"]))
        assert supported.all()
        for density in densities:
            np.testing.assert_allclose(density, expected, rtol=1e-9, atol=1e-9)


def test_concrete_sample_is_the_reference_s(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).uniform(size=(5, 2, 4))
    monkeypatch.setattr(jax.random, "uniform", lambda *_, **__: jnp.asarray(noise))

    @jax.jit
    def sample(t: jax.Array) -> Any:
        fn = RelaxedOneHotCategorical(t, logits=jnp.array(LOGITS))
        x = fn.sample(KEY, (5,))
        return fn.log_prob(x).sum(), x

    t = jnp.array([0.4, 1.3])
    gradient, x = jax.grad(sample, has_aux=True)(t)
    p = log_softmax(np.asarray(LOGITS), axis=-1)
    np.testing.assert_allclose(x, concrete.soften(noise, p, np.asarray(t)), rtol=1e-9)
    assert np.all(np.asarray(gradient) != 0)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_dtypes_and_low_temperatures(exact: None, kind: str) -> None:
    def value(logits: jax.Array, t: jax.Array) -> Any:
        fns = OneHotCategorical(logits=logits), RelaxedOneHotCategorical(t, logits=logits)
        hard, soft = (fn.sample(KEY, (500,)) for fn in fns)
        densities = [fn.log_prob(x).sum() for fn, x in zip(fns, (hard, soft), strict=True)]
        return sum(densities) + (soft**2).sum(), (hard, soft)

    logits = jnp.array(LOGITS, dtype=kind)
    gradient, (hard, soft) = jax.jit(jax.grad(value, has_aux=True))(logits, jnp.array(0.02))
    assert hard.dtype == soft.dtype == gradient.dtype == jnp.dtype(kind)
    soft = np.asarray(soft)
    assert np.isfinite(gradient).all() and (soft > 0).all()
    assert (soft.max(-1) > 0.99).mean() > 0.9


def test_wrappers_and_trees() -> None:
    """Through expansions, events and masks; as arguments of compiled and mapped functions."""
    mask = np.array([True, False])

    @jax.jit
    def everything(fn: Any, key: jax.Array) -> Any:
        wide = fn.expand((3, 2))
        assert wide.batch_shape == (3, 2)
        assert wide.to_event(1).event_shape == (2, 4)
        assert wide.mask(mask).has_rsample == fn.has_rsample
        before = jax.tree.structure(fn)
        assert fn.probs.shape == (2, 4)
        assert jax.tree.structure(fn) == before
        x = wide.sample(key)
        with handlers.seed(rng_seed=0), numpyro.plate("outer", 3, dim=-2), numpyro.plate("rows", 2):
            assert numpyro.sample("x", fn).shape == x.shape == (3, 2, 4)
        others = wide.to_event(1).log_prob(x), wide.mask(mask).log_prob(x), fn.log_prob(x)
        mapped = jax.vmap(lambda fn, v: fn.log_prob(v), (None, 0))(fn, x)
        return wide.log_prob(x), *others, mapped

    for name in sorted(CASES["distributions"]):
        fn = build(name, cases(name)[1])
        leaves, structure = jax.tree.flatten(fn)
        fn = jax.tree.unflatten(structure, leaves)
        rows, event, masked, *same = map(np.asarray, everything(fn, KEY))
        np.testing.assert_allclose(event, rows.sum(-1), rtol=1e-5)
        np.testing.assert_allclose(masked, np.where(mask, rows, 0.0))
        for other in same:
            np.testing.assert_allclose(other, rows, rtol=1e-5)


def test_temperatures() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^Expected temperature > 0; got "):
            RelaxedOneHotCategorical(wrong, logits=jnp.zeros(3))
    with pytest.raises(ValueError, match=r"^Expected temperature > 0; got "):
        RelaxedOneHotCategorical(jnp.array([1.0, -1.0]), logits=jnp.zeros(3))
    traced = jax.jit(lambda t: RelaxedOneHotCategorical(t, logits=jnp.zeros(3)).sample(KEY))
    assert np.abs(traced(50.0) - 1 / 3).max() < 0.1 < np.abs(traced(0.01) - 1 / 3).max()
    assert traced._cache_size() == 1
