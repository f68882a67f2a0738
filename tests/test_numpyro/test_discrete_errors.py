"""Estimators for discrete latents: what goes wrong, and how they behave in SVI."""

from __future__ import annotations

import re
import warnings
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
from jax import random
from numpyro.handlers import mask, scale, seed, trace
from numpyro.infer import SVI
from test_numpyro.models import shaken

from numpyro_vae_ext import _trace, elbos
from numpyro_vae_ext.distributions import OneHotCategorical
from numpyro_vae_ext.elbos import (
    ImportanceWeightedELBO,
    TraceDisARM_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
)

KEY = random.key(0)
Program = Callable[..., Any]
ESTIMATORS = {
    "rebar": lambda **kw: TraceREBAR_ELBO(**kw),
    "relax": lambda **kw: TraceRELAX_ELBO(hidden_dims=(3,), **kw),
    "nvil": lambda **kw: TraceNVIL_ELBO(hidden_dims=(3,), normalize_variance=True, **kw),
    "disarm": lambda **kw: TraceDisARM_ELBO(**kw),
}
CONTROLLED = [TraceREBAR_ELBO, TraceRELAX_ELBO]


def raises(text: str, kind: type[Exception] = ValueError) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}")  # JAX may add a line


# Arguments.


@pytest.mark.parametrize(
    ("build", "kind", "text"),
    [
        *[
            (lambda cls=cls: cls(temperature=0.0), ValueError, "Expected temperature > 0; got 0.0.")
            for cls in CONTROLLED
        ],
        (
            lambda: TraceREBAR_ELBO(temperature={"a": 1.0, "b": -2}),
            ValueError,
            "Expected temperature > 0; got -2.",
        ),
        (
            lambda: TraceREBAR_ELBO(learn=1),
            TypeError,
            "Expected learn to be a bool; got int.",
        ),
        (
            lambda: TraceRELAX_ELBO(hidden_dims=(0,)),
            ValueError,
            "Expected hidden_dims >= 1; got 0.",
        ),
        (
            lambda: TraceNVIL_ELBO(baselines=("learned", "best")),
            ValueError,
            "Expected baselines among 'running', 'learned', 'leave_one_out'; got 'best'.",
        ),
        (
            lambda: TraceNVIL_ELBO(baselines=("running", "running")),
            ValueError,
            "Expected baselines among 'running', 'learned', 'leave_one_out'; got "
            "('running', 'running').",
        ),
        (
            lambda: TraceNVIL_ELBO(baselines="running"),
            ValueError,
            "Expected baselines among 'running', 'learned', 'leave_one_out'; got 'running'.",
        ),
        (
            lambda: TraceNVIL_ELBO(baselines=("leave_one_out",)),
            ValueError,
            "Expected num_particles >= 2 for a leave-one-out baseline; got 1.",
        ),
        (lambda: TraceNVIL_ELBO(decay=1.0), ValueError, "Expected decay in [0, 1); got 1.0."),
        (
            lambda: TraceNVIL_ELBO(normalize_variance=None),
            TypeError,
            "Expected normalize_variance to be a bool; got NoneType.",
        ),
        (
            lambda: TraceDisARM_ELBO(num_particles=0),
            ValueError,
            "Expected num_particles >= 1; got 0.",
        ),
        (
            lambda: TraceDisARM_ELBO(vectorize_particles="no"),
            TypeError,
            "Expected vectorize_particles to be a bool; got str.",
        ),
        (
            lambda: ImportanceWeightedELBO(gradient="vimco"),
            ValueError,
            "Expected num_particles >= 2 under gradient='vimco'; got 1.",
        ),
    ],
)
def test_arguments(build: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with raises(text, kind):
        build()


# Sites.


def single(law: Any, **infer: Any) -> Program:
    """One latent site, in two rows."""

    def program() -> None:
        with numpyro.plate("data", 2):
            numpyro.sample("z", law, infer=infer or None)

    return program


def shapes(elbo: Any, model: Program, guide: Program, params: Any = None) -> Any:
    """The loss is traced, not run: all errors are found that way."""
    return jax.eval_shape(lambda key: elbo.loss(key, params or {}, model, guide), KEY)


COIN = dist.Bernoulli(logits=0.3)
DIE = dist.Categorical(logits=jnp.zeros(3))
ONE_HOT = OneHotCategorical(logits=jnp.zeros(3))
UNRELAXED = "Expected Bernoulli or one-hot categorical latent sites under {}; got site 'z' with "
MIXED = "Expected site 'z' to be discrete in both model and guide; got {} in the guide and {} in "


@pytest.mark.parametrize("cls", CONTROLLED)
def test_what_cannot_be_relaxed_is_refused(cls: Any) -> None:
    elbo = cls()
    text = UNRELAXED.format(cls.__name__)
    with raises(
        f"{text}the distribution CategoricalLogits. Use OneHotCategorical of the package's "
        "distributions module, or TraceNVIL_ELBO."
    ):
        shapes(elbo, single(DIE), elbo.tunable(single(DIE)))
    remedy = "Marginalise it with the host's TraceEnum_ELBO, or use TraceNVIL_ELBO."
    with raises(f"{text}the distribution Poisson. {remedy}"):
        shapes(elbo, single(dist.Poisson(2.0)), elbo.tunable(single(dist.Poisson(2.0))))
    with raises(f"{text}the distribution BinomialProbs. {remedy}"):
        shapes(elbo, single(dist.Binomial(1, 0.5)), elbo.tunable(single(COIN)))


def test_disarm_refuses_all_but_bernoulli() -> None:
    for law, name in ((ONE_HOT, "OneHotCategorical"), (DIE, "CategoricalLogits")):
        with raises(
            f"Expected Bernoulli latent sites under TraceDisARM_ELBO; got site 'z' with the "
            f"distribution {name}. Use TraceREBAR_ELBO, or TraceNVIL_ELBO with the leave-one-out "
            "baseline."
        ):
            shapes(TraceDisARM_ELBO(), single(law), single(law))


@pytest.mark.parametrize(
    "elbo",
    [*(build() for build in ESTIMATORS.values()), ImportanceWeightedELBO(2, gradient="vimco")],
    ids=lambda elbo: type(elbo).__name__,
)
def test_a_site_is_discrete_in_both_programs(elbo: Any) -> None:
    tunable = getattr(elbo, "tunable", lambda guide: guide)
    for law, other in ((COIN, dist.Normal(0.0, 1.0)), (dist.Normal(0.0, 1.0), COIN)):
        names = [type(fn).__name__ for fn in (law, other)]
        with raises(f"{MIXED.format(*names)}the model. Use the same family of distributions in"):
            shapes(elbo, single(other), tunable(single(law)))


@pytest.mark.parametrize("name", ["rebar", "relax", "nvil"])
def test_the_guide_must_be_tunable(name: str) -> None:
    elbo = ESTIMATORS[name]()
    extra = {"rebar": ", or use learn=False", "nvil": ", or use baselines without state"}
    cls = type(elbo).__name__
    with raises(
        f"Expected the guide that {cls}.tunable(guide) returns; got site 'z' without its tuning "
        f"parameters. Pass that guide to SVI{extra.get(name, '')}."
    ):
        shapes(elbo, single(COIN), single(COIN))


@pytest.mark.parametrize("knob", ["temperature", "eta"])
def test_mappings_name_every_site(knob: str) -> None:
    text = (
        f"Expected a {knob} for every discrete site; got none for site 'z'. Add it to the "
        "mapping, or pass one number."
    )
    elbo = TraceREBAR_ELBO(**{knob: {"y": 1.0}})
    with raises(text), seed(rng_seed=0):
        elbo.tunable(single(COIN))()
    with raises(text):
        shapes(TraceREBAR_ELBO(**{knob: {"y": 1.0}}, learn=False), single(COIN), single(COIN))
    shapes(TraceREBAR_ELBO(**{knob: {"z": 1.0}}, learn=False), single(COIN), single(COIN))


def test_checks_of_sites_stay_in_force() -> None:
    elbo = TraceREBAR_ELBO(learn=False)
    with raises("Expected every latent site of the guide in the model; got guide site 'z'"):
        shapes(elbo, lambda: None, single(COIN))
    with raises("Expected every latent site of the model in the guide; got model site 'z'"):
        shapes(elbo, single(COIN), lambda: None)


def test_without_discrete_sites_the_plain_bound_goes_on() -> None:
    law = dist.Normal(0.0, 1.0)
    for build in ESTIMATORS.values():
        elbo = build()
        text = (
            f"Expected discrete latent sites under {type(elbo).__name__}; got none. Use the host's "
            "Trace_ELBO, or ImportanceWeightedELBO."
        )
        with pytest.warns(UserWarning, match=re.escape(text)):
            found = elbo.loss(KEY, {}, single(law), elbo.tunable(single(law)))
        np.testing.assert_allclose(found, 0.0, atol=1e-6)
    with pytest.warns(UserWarning, match="sites under gradient='vimco'; got none. Use gradient='r"):
        shapes(ImportanceWeightedELBO(2, gradient="vimco"), single(law), single(law))


# In SVI.

ROWS, WIDTH, FULL = 4, 3, 8


def data() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 2, (FULL, WIDTH)), float)


def model(x: jax.Array) -> None:
    """A global bit; rows from a subsample, with bits in an inner plate; masked and scaled."""
    weight = numpyro.param("weight", jnp.linspace(-1.0, 1.0, WIDTH))
    with numpyro.plate("rows", FULL, subsample_size=ROWS, dim=-2), scale(scale=0.5):
        batch = numpyro.subsample(x[:, None], event_dim=1)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0))
        with numpyro.plate("inner", 2, dim=-1):
            b = numpyro.sample("b", dist.Bernoulli(logits=h))
        total = b.sum(-1, keepdims=True)[..., None]
        kept = jnp.arange(ROWS)[:, None] < ROWS - 1
        with mask(mask=kept):
            law = dist.Bernoulli(logits=weight * total + h[..., None]).to_event(1)
            numpyro.sample("x", law, obs=batch)


def guide(x: jax.Array) -> None:
    loc = numpyro.param("loc", jnp.asarray(0.3))
    coin = dist.Bernoulli(logits=loc)
    aux = numpyro.sample("aux", coin, infer={"is_auxiliary": True})
    with numpyro.plate("rows", FULL, subsample_size=ROWS, dim=-2), scale(scale=0.5):
        batch = numpyro.subsample(x[:, None], event_dim=1)
        given = {"baseline_input": batch}
        h = numpyro.sample("h", dist.Normal(loc * aux, 1.0))
        with numpyro.plate("inner", 2, dim=-1):
            numpyro.sample("b", dist.Bernoulli(logits=h + 0.1 * batch.sum(-1)), infer=given)


def rows_model(x: jax.Array, integer: bool = False) -> None:
    """Every site in the subsampled plate, which an importance weight needs."""
    weight = numpyro.param("weight", jnp.linspace(-1.0, 1.0, WIDTH))
    with numpyro.plate("rows", FULL, subsample_size=ROWS):
        batch = numpyro.subsample(x, event_dim=1)
        b = numpyro.sample("b", dist.Bernoulli(logits=jnp.zeros(WIDTH)).to_event(1))
        logits = weight * b
        if integer:
            z = numpyro.sample("z", dist.Categorical(logits=jnp.zeros(3)))
            logits = logits + z[..., None]
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=batch)


def rows_guide(x: jax.Array, integer: bool = False) -> None:
    loc = numpyro.param("loc", jnp.asarray(0.3))
    with numpyro.plate("rows", FULL, subsample_size=ROWS):
        batch = numpyro.subsample(x, event_dim=1)
        numpyro.sample("b", dist.Bernoulli(logits=loc * batch).to_event(1))
        if integer:
            numpyro.sample("z", dist.Categorical(logits=loc * jnp.arange(3.0)))


def declared(program: Program, *args: Any) -> dict[str, Any]:
    """The parameters and the mutable state that a program declares, off their start."""
    sites = trace(seed(program, KEY)).get_trace(*args)
    params = {k: s["value"] for k, s in sites.items() if s["type"] == "param"}
    state = {k: s["value"] for k, s in sites.items() if s["type"] == "mutable"}
    return {**{k: shaken(v, 0.2) if "$" in k else v for k, v in params.items()}, **state}


def start(guide: Program, *args: Any) -> dict[str, Any]:
    """Parameters of guide and model."""
    return {**declared(guide, *args), "weight": jnp.linspace(-1.0, 1.0, WIDTH)}


@pytest.mark.parametrize("name", ["rebar", "nvil", "vimco"])
def test_looped_particles_agree_with_vectorised_ones(name: str) -> None:
    integer = name in ("nvil", "vimco")
    functions = []
    for vectorize in (True, False):
        options: dict[str, Any] = {"num_particles": 3, "vectorize_particles": vectorize}
        if name == "vimco":
            elbo: Any = ImportanceWeightedELBO(gradient="vimco", **options)
            wrapped: Program = rows_guide
        else:
            elbo = ESTIMATORS[name](**options)
            wrapped = elbo.tunable(rows_guide)
        params = start(wrapped, data(), integer)

        def loss(params: Any, elbo: Any = elbo, wrapped: Any = wrapped) -> Any:
            pair = rows_model, wrapped, data(), integer
            out = elbo.loss_with_mutable_state(KEY, params, *pair)
            return out["loss"], out["mutable_state"]

        functions.append(jax.value_and_grad(loss, has_aux=True))
    found = jax.jit(lambda p: [function(p) for function in functions])(params)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
    assert bool(jnp.all(found[0][1]["weight"] != 0))


def own_parameters(name: str, case: dict) -> set[str]:
    """Suffixes of what a member declares at a site."""
    if name in ("TraceREBAR_ELBO", "TraceRELAX_ELBO"):
        learned = {"_surrogate$params"} if name == "TraceRELAX_ELBO" else set()
        return {"_eta", "_log_temperature", *learned} if case.get("learn", True) else set()
    baselines = case.get("baselines", ("running", "learned"))
    learned = name == "TraceNVIL_ELBO" and "learned" in baselines
    return {"_baseline_network$params"} if learned else set()


MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES["elbos"].items()
    if hasattr(getattr(elbos, name), "tunable")
    for i, case in enumerate(cases)
]


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_steps_of_svi(name: str, case: dict) -> None:
    elbo = getattr(elbos, name)(**case)
    svi = SVI(model, elbo.tunable(guide), optax.sgd(1e-2), elbo)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = svi.init(KEY, data())
    first = svi.get_params(state)
    sites = ("aux", "b")
    own = {f"{site}{suffix}" for site in sites for suffix in own_parameters(name, case)}
    assert set(first) == {"weight", "loc"} | own
    step = jax.jit(svi.update)
    for _ in range(3):
        state, loss = step(state, data())
    assert step._cache_size() == 1
    assert np.isfinite(loss)
    for leaf in jax.tree.leaves((svi.get_params(state), state.mutable_state)):
        assert not jnp.asarray(leaf).weak_type
        assert leaf.dtype == jnp.result_type(float)
    assert loss.dtype == jnp.result_type(float)
    params = svi.get_params(state)
    for key in params:
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params[key], first[key])
        assert any(jax.tree.leaves(moved)), key
    if name == "TraceNVIL_ELBO" and "running" in case.get("baselines", ("running",)):
        assert set(state.mutable_state) == {f"{site}_baseline" for site in sites}
        for running in state.mutable_state.values():
            assert {k: x.shape for k, x in running.items()} == dict.fromkeys(
                ("mean", "variance", "count"), ()
            )
            assert running["count"] == 3.0
            assert running["variance"] > 0.0
    else:
        assert state.mutable_state is None
    # A step leaves nothing of its trace in what a second run starts from.
    again = svi.get_params(svi.init(KEY, data()))
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert jax.eval_shape(svi.evaluate, state, data()).shape == ()


def test_tuning_and_learning_leave_each_other_alone() -> None:
    """Model and guide get what they get without tuning, the tuning its own derivative alone."""
    fixed, elbo = TraceREBAR_ELBO(learn=False), TraceREBAR_ELBO()
    wrapped = elbo.tunable(rows_guide)

    def objective(params: Any) -> jax.Array:
        pair = _trace.Pair(rows_model, wrapped, (data(),), {})
        return elbo._particle(KEY, _trace.shared_key(KEY), params, pair)["objective"]

    def gradients(params: Any) -> Any:
        return (
            jax.grad(lambda p: fixed.loss(KEY, p, rows_model, rows_guide, data()))(params),
            jax.grad(lambda p: elbo.loss(KEY, p, rows_model, wrapped, data()))(params),
            jax.grad(objective)(params),
        )

    params = start(wrapped, data())
    plain, found, tuned = jax.jit(gradients)(params)
    for key in params:
        own = key not in ("weight", "loc")
        np.testing.assert_array_equal((plain if own else tuned)[key], 0.0)
        want = (tuned if own else plain)[key]
        np.testing.assert_allclose(found[key], want, rtol=1e-4, atol=1e-6)
        assert bool(jnp.any(want != 0))


def test_logits_from_a_closure_get_nothing_of_the_tuning() -> None:
    """A number that is no parameter is not held fixed with them."""

    def value(a: jax.Array, learn: bool) -> jax.Array:
        elbo = TraceREBAR_ELBO(learn=learn)
        wrapped = elbo.tunable(single(dist.Bernoulli(logits=a)))
        return elbo.loss(KEY, declared(wrapped), single(COIN), wrapped)

    both = [jax.grad(value)(jnp.array([0.3, -0.4]), learn) for learn in (True, False)]
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_the_network_sees_its_own_loss_alone() -> None:
    plain = TraceNVIL_ELBO(baselines=())
    elbo = TraceNVIL_ELBO(baselines=("learned",), hidden_dims=())
    wrapped = elbo.tunable(rows_guide)

    def gradients(params: Any) -> Any:
        return (
            jax.grad(lambda p: plain.loss(KEY, p, rows_model, rows_guide, data()))(params),
            jax.grad(lambda p: elbo.loss(KEY, p, rows_model, wrapped, data()))(params),
        )

    # The head is 0 at first: so is the baseline.
    params = jax.tree.map(jnp.zeros_like, start(wrapped, data()))
    params["weight"], params["loc"] = jnp.linspace(-1.0, 1.0, WIDTH), jnp.asarray(0.3)
    without, learned = jax.jit(gradients)(params)
    for key in ("weight", "loc"):
        np.testing.assert_allclose(learned[key], without[key], rtol=1e-5, atol=1e-6)
    network = learned["b_baseline_network$params"]
    assert all(bool(jnp.any(x != 0)) for x in jax.tree.leaves(network))


def test_one_hot_sites_and_integers() -> None:
    """One-hot sites under REBAR, integers and counts under NVIL, with surrogates of the user."""

    class Surrogate(nnx.Module):
        def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
            self.layer = nnx.Linear(width, 1, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.layer(x)[..., 0]

    elbo = TraceRELAX_ELBO(2, surrogate=Surrogate)
    wrapped = elbo.tunable(single(ONE_HOT))
    params = declared(wrapped)
    grads = jax.jit(jax.grad(lambda p: elbo.loss(KEY, p, single(ONE_HOT), wrapped)))(params)
    assert params["z_surrogate$params"]["layer"]["kernel"].shape == (6, 1)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(grads))
    nvil = TraceNVIL_ELBO(2)
    for law in (DIE, dist.Poisson(2.0)):
        wrapped = nvil.tunable(single(law))
        found = jax.eval_shape(lambda wrapped=wrapped: declared(wrapped))
        assert found["z_baseline_network$params"]
        shapes(nvil, single(law), wrapped)


@pytest.mark.parametrize("name", ["disarm", "nvil"])
def test_bits_may_index_where_nothing_is_relaxed(name: str) -> None:
    def model() -> None:
        means = numpyro.param("means", jnp.array([-1.0, 1.0]))
        b = numpyro.sample("z", dist.Bernoulli(logits=jnp.zeros(2)).to_event(1))
        c = numpyro.sample("c", dist.Bernoulli(logits=means[b].sum()))
        numpyro.sample("x", dist.Normal(means[b].sum() + means[c], 1.0), obs=0.3)

    def program() -> None:
        a = numpyro.param("a", jnp.zeros(2))
        b = numpyro.sample("z", dist.Bernoulli(logits=a).to_event(1))
        numpyro.sample("c", dist.Bernoulli(logits=a[b].sum()))

    elbo = ESTIMATORS[name]()
    shapes(elbo, model, elbo.tunable(program))


def test_a_guide_without_own_parameters_is_itself() -> None:
    for elbo in (
        TraceDisARM_ELBO(),
        TraceREBAR_ELBO(learn=False),
        TraceNVIL_ELBO(baselines=()),
        TraceNVIL_ELBO(2, baselines=("leave_one_out",)),
    ):
        assert elbo.tunable(guide) is guide


def test_the_infer_dict_of_the_user_stays_as_it_was() -> None:
    infer: dict[str, Any] = {}

    def program() -> None:
        numpyro.sample("z", COIN, infer=infer)

    with seed(rng_seed=0):
        TraceREBAR_ELBO().tunable(program)()
    assert infer == {}


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_a_narrow_model_beside_wide_parameters(name: str, exact: None) -> None:
    narrow = single(dist.Bernoulli(logits=jnp.zeros(2, jnp.float32)))
    elbo = ESTIMATORS[name]()
    wrapped = elbo.tunable(narrow)

    def loss(params: Any) -> jax.Array:
        return elbo.loss(KEY, params, narrow, wrapped)

    params = jax.eval_shape(lambda: declared(wrapped))
    params = {k: v for k, v in params.items() if k != "z_baseline"}
    value, grads = jax.eval_shape(jax.value_and_grad(loss), params)
    assert value.dtype == jnp.float32
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(grads))
