"""Free bits: what is free, what counts as a row, and the host's contract."""

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
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal
from reference import free_bits as oracle
from test_numpyro import models
from test_numpyro.models import family, module_params, normal, shaken, z_score

from numpyro_vae_ext.elbos import TraceFreeBits_ELBO
from numpyro_vae_ext.guides import AutoPosterior
from numpyro_vae_ext.handlers import kl_weight

CASE = CASES["elbos"]["TraceFreeBits_ELBO"]
KEY = jax.random.key(2)
LOC = np.array([[0.1, 2.0, -0.4], [0.05, -1.0, 1.5], [0.2, 0.5, 0.1], [-0.1, 0.05, 2.5]])
SCALE = np.array([0.95, 0.9, 0.6])
TABLE = oracle.normal_divergence(LOC, np.log(SCALE), 0.0)
Program = Callable[..., Any]


def silent(batch_size: int | None = None, seen: list | None = None) -> tuple[Program, Program]:
    """A pair whose data say nothing: the loss is the divergence alone, without any noise."""
    rows, width = LOC.shape

    def model() -> None:
        with numpyro.plate("data", rows, subsample_size=batch_size):
            numpyro.sample("z", dist.Normal(jnp.zeros(width), 1.0).to_event(1))

    def guide() -> None:
        with numpyro.plate("data", rows, subsample_size=batch_size) as index:
            if seen is not None:
                seen.append(index)
            law = dist.Normal(jnp.asarray(LOC)[index], SCALE).to_event(1)
            numpyro.sample("z", law)

    return model, guide


def losses(*rows: tuple[TraceFreeBits_ELBO, Program, Program]) -> list[float]:
    """By one program."""
    return [float(x) for x in jax.jit(lambda: [e.loss(KEY, {}, *pair) for e, *pair in rows])()]


def test_the_mean_over_rows_comes_before_the_maximum() -> None:
    means = TABLE.mean(0)
    assert means[0] < 0.3 < means[1] and (TABLE[:, 1] < 0.3).any()
    pairs = max(means[:2].sum(), 1.2) + max(means[2], 1.2)
    expected = [
        ({"free_bits": 0.3}, np.maximum(means, 0.3).sum()),
        ({"free_bits": 0.3, "groups": "site"}, max(means.sum(), 0.3)),
        ({"free_bits": 1.2, "groups": {"z": (0, 0, 1)}}, pairs),
        ({"free_bits": 1.2, "groups": {"z": (5, 5, 2)}}, pairs),
        ({"free_bits": 0.0}, means.sum()),
    ]
    layouts = [(1, {}), (3, {}), (3, {"vectorize_particles": False})]
    rows = [
        ((TraceFreeBits_ELBO(count, **kwargs, **layout), *silent()), number)
        for kwargs, number in expected
        for count, layout in layouts
    ]
    found = losses(*(row for row, _ in rows))
    np.testing.assert_allclose(found, [4 * number for _, number in rows], rtol=1e-5)


def test_subsamples_masks_scales_and_weights() -> None:
    def expected(kept: Any, count: float) -> float:
        return count * np.maximum(TABLE[np.asarray(kept)].mean(0), 0.6).sum()

    everyone = [0, 1, 2, 3]
    mask, rows = jnp.array([True, False, True, False]), jnp.array([2.0, 1.0, 2.0, 1.0])
    cases: list[tuple[Callable[[Program], Program], float]] = [
        (lambda f: handlers.mask(f, mask=mask), expected([0, 2], 2)),
        (lambda f: handlers.mask(f, mask=False), 0.0),
        (lambda f: handlers.scale(f, scale=2.5), expected(everyone, 10)),
        (lambda f: handlers.scale(f, scale=rows), expected([0, 0, 1, 2, 2, 3], 6)),
        # A weight is one on the whole: the threshold is on the divergence itself.
        *((lambda f, w=w: kl_weight(f, weight=w), w * expected(everyone, 4)) for w in (0, 0.3, 2)),
    ]
    elbo = TraceFreeBits_ELBO(free_bits=0.6)
    found = losses(*((elbo, *map(handler, silent())) for handler, _ in cases))
    np.testing.assert_allclose(found, [number for _, number in cases], rtol=1e-5)
    seen: list[jax.Array] = []
    found = float(elbo.loss(KEY, {}, *silent(2, seen)))
    assert found == pytest.approx(expected(seen[-1], 4), rel=1e-5)


def test_several_latents_in_and_out_of_plates() -> None:
    """Rows are those of a site's own plates; a batch in none is an event, as the host has it."""
    locs = normal(3, 4, 2)
    plates = ("group", 3, None, -2), ("row", 8, 4, -1)

    def model() -> None:
        numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("v", dist.Normal(jnp.zeros(2), 1.0))
        with numpyro.plate(*plates[0]), numpyro.plate(*plates[1]):
            numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def guide() -> None:
        numpyro.sample("w", dist.Normal(0.2, 0.9))
        numpyro.sample("v", dist.Normal(jnp.array([0.0, 2.0]), 1.0))
        with numpyro.plate(*plates[0]), numpyro.plate(*plates[1]):
            numpyro.sample("z", dist.Normal(locs, 0.5).to_event(1))

    means = oracle.normal_divergence(np.asarray(locs), np.log(0.5), 0.0).mean((0, 1))
    expected = max(oracle.normal_divergence(0.2, np.log(0.9), 0.0), 0.4)
    expected += 24 * np.maximum(means, 0.4).sum() + 0.4 + 2.0
    elbos = [TraceFreeBits_ELBO(free_bits=0.4), TraceFreeBits_ELBO(3, free_bits=0.4)]
    np.testing.assert_allclose(losses(*((e, model, guide) for e in elbos)), expected, rtol=1e-5)


def test_a_factor_belongs_to_the_longest_name_before_its_own() -> None:
    def model() -> None:
        for name in ("z", "z_1"):
            numpyro.sample(name, dist.Normal(0.0, 1.0))

    def guide() -> None:
        for name, loc in (("z", 2.0), ("z_1", 0.0)):
            numpyro.sample(name, dist.Normal(loc, 1.0))
        numpyro.factor("z_1_reverse", 5.0)

    elbos = [TraceFreeBits_ELBO(free_bits=1.0, groups=groups) for groups in ("site", "dimension")]
    np.testing.assert_allclose(losses(*((e, model, guide) for e in elbos)), 2.0 + 5.0, rtol=1e-6)


def test_below_the_threshold_there_is_no_pull() -> None:
    """Gradients of the divergence: none below, in full above; the likelihood's always."""
    start = {"loc": jnp.asarray(LOC), "raw": jnp.log(SCALE), "slope": jnp.ones(3)}

    def gradients(elbo: Any, p: Any, weight: float = 1.0) -> Any:
        def loss(p: Any) -> jax.Array:
            def model() -> None:
                with numpyro.plate("data", 4):
                    z = numpyro.sample("z", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
                    law = dist.Normal(z * p["slope"], 1.0).to_event(1)
                    numpyro.sample("x", law, obs=jnp.ones((4, 3)))

            def guide() -> None:
                with numpyro.plate("data", 4):
                    law = dist.Normal(p["loc"], jnp.exp(p["raw"])).to_event(1)
                    numpyro.sample("z", law)

            pair = kl_weight(model, weight=weight), kl_weight(guide, weight=weight)
            return elbo.loss(KEY, {}, *pair)

        return jax.grad(loss)(p)

    free, likelihood, whole = jax.jit(
        lambda p: (
            gradients(TraceFreeBits_ELBO(free_bits=0.3), p),
            gradients(TraceFreeBits_ELBO(free_bits=0.0), p, 0.0),
            gradients(infer.TraceMeanField_ELBO(), p),
        )
    )(start)
    close = {"rtol": 1e-5, "atol": 1e-5}
    for name in ("loc", "raw"):
        np.testing.assert_allclose(free[name][..., 0], likelihood[name][..., 0], **close)
        np.testing.assert_allclose(free[name][..., 1:], whole[name][..., 1:], **close)
        assert np.abs(likelihood[name] - whole[name]).min() > 1e-3
    np.testing.assert_allclose(free["slope"], whole["slope"], **close)


@pytest.mark.parametrize("name", ["MeanField", "IAF", "Auxiliary", "VGP"])
def test_nothing_free_is_the_plain_bound(name: str) -> None:
    small = {"hidden_dims": (5,)} if name != "MeanField" else {}
    posterior = shaken(family(name, latent_dim=2, context_dim=2, **small), 0.1)
    params = {**module_params(posterior=posterior), "mu": jnp.zeros(2)}
    guide, x = models.amortised(posterior), normal(5, 2)
    groups = "dimension" if name in ("MeanField", "IAF") else "site"
    elbos = [
        TraceFreeBits_ELBO(200, free_bits=0.0, groups=groups),
        infer.Trace_ELBO(200),
        TraceFreeBits_ELBO(4, free_bits=30.0, groups=groups),
        TraceFreeBits_ELBO(free_bits=0.0, groups=groups),
        infer.Trace_ELBO(),
    ]

    def run(key: jax.Array) -> list[jax.Array]:
        return [e.loss(key, params, models.conjugate, guide, x) for e in elbos]

    ours, theirs, taken, one, host = jax.jit(jax.vmap(run))(jax.random.split(KEY, 10))
    error = math.hypot(ours.std(), theirs.std()) / math.sqrt(10)
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert taken.min() > 5 * 30.0 * (2 if groups == "dimension" else 1)
    if name == "IAF":
        np.testing.assert_allclose(one, host, rtol=1e-5)


def test_guides_made_from_a_model_have_groups_of_whole_sites() -> None:
    x = normal(6)

    def model() -> None:
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        with numpyro.plate("data", 6):
            numpyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    for guide in (AutoNormal(model), AutoPosterior(model)):
        ours = TraceFreeBits_ELBO(free_bits=0.0, groups="site")
        svi = SVI(model, guide, optax.adam(1e-2), ours)
        params = svi.get_params(svi.init(KEY))
        found = [e.loss(KEY, params, model, guide) for e in (ours, infer.Trace_ELBO())]
        assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-5)


def test_the_closed_form_gives_way_where_the_model_draws_in_another_order() -> None:
    """A top-down model and a bottom-up guide: KL(q(a) || p(a | b)) depends on b, which is later."""
    x = 1.3

    def model() -> None:
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        a = numpyro.sample("a", dist.Normal(b, 1.0))
        numpyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide() -> None:
        a = numpyro.sample("a", dist.Normal(0.8 * x, 0.7))
        numpyro.sample("b", dist.Normal(0.9 * a, 0.6))

    # E log p(x, a, b) - log q, by hand: a = .8 x + .7 e, b = .9 a + .6 f.
    mean, spread = 0.8 * 1.3, 0.7
    second = mean**2 + spread**2
    expected = 0.81 * second + 0.36 + (0.01 * second + 0.36) + ((1.3 - mean) ** 2 + spread**2)
    expected = -0.5 * expected - 1.5 * math.log(2 * math.pi)
    expected += math.log(2 * math.pi) + 1.0 + math.log(0.7) + math.log(0.6)
    elbo = TraceFreeBits_ELBO(2000, free_bits=0.0)
    run = jax.jit(jax.vmap(lambda key: -elbo.loss(key, {}, model, guide)))
    assert abs(z_score(run(jax.random.split(KEY, 20)), expected)) < 4


@pytest.mark.parametrize("case", CASE)
def test_host_contract(case: dict) -> None:
    """Trains under SVI, subsampled, without a second compilation; state of a module is kept."""
    posterior = shaken(family("IAF", latent_dim=3, context_dim=3, hidden_dims=(6,)))
    x, guide = normal(8, 3), models.amortised(posterior)

    def counted(x: jax.Array, size: int) -> None:
        count = numpyro.primitives.mutable("count", {"steps": jnp.zeros(())})
        guide(x, size)
        count["steps"] = count["steps"] + 1.0

    svi = SVI(models.conjugate, counted, optax.adam(1e-2), TraceFreeBits_ELBO(**case))
    state = svi.init(KEY, x, 4)
    update = jax.jit(svi.update, static_argnums=2)
    before = svi.get_params(state)
    for _ in range(3):
        state, loss = update(state, x, 4)
    assert update._cache_size() == 1
    assert loss.shape == () and not loss.weak_type and jnp.isfinite(loss)
    assert state.mutable_state["count"]["steps"] == 4.0
    after = svi.get_params(state)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
    assert all(jax.tree.leaves({k: v for k, v in moved.items() if k != "count"}))


def one(fn: Any, name: str = "z") -> Program:
    return lambda: numpyro.sample(name, fn)


def mvn() -> Any:
    return dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))


def test_errors() -> None:
    plain = dist.Normal(jnp.zeros(2), 1.0).to_event(1)

    def says(error: type[Exception], text: str, call: Callable[[], object]) -> None:
        with pytest.raises(error, match=f"^{re.escape(text)}"):
            call()

    def loss(model: Program, guide: Program, **kwargs: Any) -> Callable[[], Any]:
        return lambda: TraceFreeBits_ELBO(**kwargs).loss(KEY, {}, model, guide)

    for wrong in (-0.1, math.nan, math.inf):
        says(
            ValueError,
            f"Expected free_bits >= 0; got {wrong}.",
            lambda wrong=wrong: TraceFreeBits_ELBO(free_bits=wrong),
        )
    says(
        ValueError,
        "Expected groups to be 'dimension' or 'site'; got 'all'.",
        lambda: TraceFreeBits_ELBO(groups="all"),
    )
    says(
        TypeError,
        "Expected groups to be an int; got float.",
        lambda: TraceFreeBits_ELBO(groups={"z": (0.5,)}),
    )
    text = "Expected a density that splits over dimensions at site 'z' under groups='dimension'; "
    says(ValueError, text + "got MultivariateNormal. Use", loss(one(plain), one(mvn())))
    says(ValueError, text + "got MultivariateNormal. Use", loss(one(mvn()), one(plain)))
    flow = family("Auxiliary", latent_dim=2)
    says(
        ValueError,
        text + "got CarryingNormal at its own site 'z_aux'. Use groups='site'.",
        loss(one(plain), lambda: flow("z")),
    )
    assert jnp.isfinite(loss(one(plain), one(mvn()), groups="site")())
    says(
        ValueError,
        "Expected groups for every latent site; got none for site 'z'.",
        loss(one(plain), one(plain), groups={"y": (0,)}),
    )
    says(
        ValueError,
        "Expected a group for each of the 2 elements of site 'z'; got 3 groups.",
        loss(one(plain), one(plain), groups={"z": (0, 1, 2)}),
    )

    def two(*extra: Program) -> Program:
        def program() -> None:
            for call in (*extra, one(plain, "u"), one(plain, "z")):
                call()

        return program

    def alone() -> None:
        numpyro.sample("a", plain, infer={"is_auxiliary": True})

    says(
        ValueError,
        "Expected auxiliary sites named after a latent site, such as 'z_aux' of 'z'; got 'a' "
        "beside the latent sites ['u', 'z']. Rename the site.",
        loss(two(), two(alone), groups="site"),
    )
    says(
        ValueError,
        "Expected reparameterised latent sites under gradient='reparam'; got site 'z' with the "
        "distribution BernoulliProbs",
        loss(one(dist.Bernoulli(0.5)), one(dist.Bernoulli(0.5))),
    )
    says(
        ValueError,
        "Expected the same KL weight on model and guide; got site 'z' weighted in the guide alone. "
        "Wrap both in handlers.kl_weight.",
        loss(one(plain), kl_weight(one(plain), weight=0.5)),
    )
    says(
        ValueError,
        "Expected every latent site of the model in the guide; got model site 'z'",
        loss(one(plain), lambda: None),
    )
    says(
        ValueError,
        "Expected a model with at least one sample site; got none.",
        loss(lambda: None, lambda: None),
    )
