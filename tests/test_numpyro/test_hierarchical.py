"""The contract of the hierarchical families: auxiliary sites, a factor, an estimated density."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cases import CASES, HIERARCHICAL, outputs_of_reverse
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI
from reference import auxiliary, complex_step, vgp
from reference import conjugate as oracle
from test_numpyro import models
from test_numpyro.models import (
    Params,
    family,
    module_params,
    named,
    normal,
    shaken,
    wide_reverse,
    z_score,
)

from numpyro_vae_ext import guides
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import VGP, AutoPosterior

CASE = {
    f"{name}-{i}": (name, case)
    for name in HIERARCHICAL
    for i, case in enumerate(CASES["guides"][name])
}
MEMBERS = [pytest.param(*values, id=member) for member, values in CASE.items()]
VGPS = [member for member in MEMBERS if member.values[0] == "VGP"]
# The auxiliary variable may have a hierarchical law itself.
CASE["nested"] = (
    "Auxiliary",
    {
        "latent_dim": 2,
        "context_dim": 4,
        "aux_dim": 1,
        "hidden_dims": (5,),
        "aux_family": {"name": "Auxiliary", "hidden_dims": (5,)},
    },
)
NESTED = pytest.param(*CASE["nested"], id="nested")
REFERENCES: dict[str, Callable] = {"Auxiliary": auxiliary.log_density, "VGP": vgp.log_density}
SITES = {"Auxiliary": ("aux", "z"), "VGP": ("xi", "z")}
# Under path gradients a parameter's part decides: these have all parts there are.
PATHS = ("Auxiliary-4", "Auxiliary-6", "nested", "VGP-5", "VGP-6")
ROWS = 5
KEY = jax.random.key(4)
KEYS = jax.random.split(KEY, 500)


def build(name: str, case: dict) -> tuple[nnx.Module, jax.Array | None]:
    # Not far: the inverse of a flow, as a reverse model needs it, leaves all bounds.
    posterior = shaken(family(name, **case), 0.1)
    width = case["context_dim"]
    return posterior, None if width is None else normal(ROWS, width, seed=1)


def sites_of(statement: Callable[[], Any], *plates: int, key: Any = 0, values: Any = None) -> dict:
    """The sample sites of a statement in plates, at given values where there are any."""
    with seed(rng_seed=key), substitute(data=values or {}), trace() as sites:
        with numpyro.plate_stack("rows", list(plates)):
            statement()
    return {name: site for name, site in sites.items() if site["type"] == "sample"}


def log_prob(site: dict) -> jax.Array:
    """The log-density as the objectives take it, with what a draw carries."""
    kept = [site["intermediates"]] if site["intermediates"] else []
    return site["fn"].log_prob(site["value"], *kept)


def full(site: str) -> str:
    return "z" if site == "z" else f"z_{site}"


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of the parameters of a module, under dotted names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree["posterior$params"])
    return {".".join(str(k.key) for k in path): np.asarray(leaf) for path, leaf in leaves}


@cache
def sampler(member: str) -> Callable[[Params, Any], dict[str, jax.Array]]:
    """Draws of all latent sites in three plates, as a program of what SVI gives and the context."""
    name, case = CASE[member]
    posterior = family(name, **case)

    def draw(params: Params, context: Any) -> dict[str, jax.Array]:
        def statement() -> None:
            nnx_module("posterior", posterior)("z", context)

        sites = sites_of(statement, 40, 20, ROWS, values=params)
        return {key: site["value"] for key, site in sites.items() if not site["is_observed"]}

    return jax.jit(draw)


@pytest.mark.parametrize("member", [member.id for member in MEMBERS])
def test_starts_near_a_standard_normal(member: str) -> None:
    name, case = CASE[member]
    context = None if case["context_dim"] is None else jnp.zeros((ROWS, case["context_dim"]))
    params = module_params(posterior=family(name, **case))
    z = np.asarray(sampler(member)(params, context)["z"]).reshape(4000, -1)
    assert (np.abs(np.log(z.std(0))) < 0.8).all()
    assert (np.abs(z.mean(0)) < 0.5).all()


@pytest.mark.parametrize("plates", [(), (ROWS,), (2, ROWS), (3, 2, ROWS)])
@pytest.mark.parametrize(("name", "case"), [*MEMBERS, NESTED])
def test_sites_in_plates(name: str, case: dict, plates: tuple[int, ...]) -> None:
    posterior, context = build(name, case)
    if context is not None and not plates:
        context = context[0]

    def statement(posterior: nnx.Module, context: jax.Array | None) -> jax.Array:
        sites = sites_of(lambda: posterior("z", context), *plates)
        assert sites["z"]["value"].shape == (*plates, case["latent_dim"])
        assert not sites["z"]["infer"].get("is_auxiliary", False)
        assert sites["z_reverse"]["is_observed"]
        for key, site in sites.items():
            assert log_prob(site).shape == plates, key
            assert key == "z" or site["infer"]["is_auxiliary"]
        return sites["z"]["value"]

    jax.eval_shape(statement, posterior, context)


@pytest.mark.parametrize("member", CASE)
def test_every_element_of_a_plate_has_noise_of_its_own(member: str) -> None:
    posterior, context = build(*CASE[member])
    values = sampler(member)(module_params(posterior=posterior), context)
    nested = {"z_aux_aux"} if member == "nested" else set()
    assert set(values) == {*nested, *map(full, SITES[CASE[member][0]])}
    for key, value in values.items():
        rows = np.asarray(value).reshape(-1, value.shape[-1])
        assert len(np.unique(rows, axis=0)) == len(rows) == 800 * ROWS, key


@pytest.mark.parametrize("batch", [(), (2, 1, 4)])
@pytest.mark.parametrize(("name", "case"), [m for m in MEMBERS if m.values[1]["context_dim"]])
def test_any_left_batch(exact: None, name: str, case: dict, batch: tuple[int, ...]) -> None:
    """The density of a batch is that of its rows, one by one."""
    posterior, _ = build(name, case)
    context = normal(*batch, case["context_dim"], seed=2)

    def estimate(value: jax.Array) -> jax.Array:
        return posterior.log_prob(value, context, num_samples=3, rng_key=KEY)

    @jax.jit
    def run(posterior: nnx.Module, context: jax.Array) -> Any:
        sites = sites_of(lambda: posterior("z", context))
        values = {key: sites[full(key)]["value"] for key in SITES[name]}
        return values, sum(map(log_prob, sites.values()))

    values, total = run(posterior, context)
    assert values["z"].shape == (*batch, case["latent_dim"])
    assert total.shape == jax.eval_shape(estimate, values["z"]).shape == batch
    values = {key: np.asarray(value) for key, value in values.items()}
    expected = REFERENCES[name](values, named(posterior), np.asarray(context), **case)
    np.testing.assert_allclose(total, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_density_and_its_derivatives_are_the_reference(exact: None, name: str, case: dict) -> None:
    """In every parameter and the context, at given values of the sites; by complex steps."""
    posterior, context = build(name, case)
    rng = np.random.default_rng(5)
    width = case.get("aux_dim" if name == "Auxiliary" else "input_dim", case["latent_dim"])
    # Two rows for each of the context: every row of values meets the process of its own context.
    plates = (2, ROWS)
    values = {
        key: rng.normal(size=(*plates, case["latent_dim"] if key == "z" else width))
        for key in SITES[name]
    }
    data = {full(key): jnp.asarray(value) for key, value in values.items()}

    def total(posterior: nnx.Module, context: jax.Array | None) -> jax.Array:
        sites = sites_of(lambda: posterior("z", context), *plates, values=data)
        assert not any(site["intermediates"] for site in sites.values())
        return sum(log_prob(site).sum() for site in sites.values())

    argnums = (0,) if context is None else (0, 1)
    value, found = jax.jit(jax.value_and_grad(total, argnums))(posterior, context)
    given, got = named(posterior), named(found[0])
    if context is not None:
        given["context"], got["context"] = np.asarray(context), found[1]

    def reference(given: dict) -> complex:
        weights = {key: value for key, value in given.items() if key != "context"}
        return REFERENCES[name](values, weights, given.get("context"), **case).sum()

    np.testing.assert_allclose(value, reference(given), rtol=1e-9)
    expected = complex_step.gradient(reference, given)
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        np.testing.assert_allclose(gradient, expected[key], rtol=1e-6, atol=1e-8, err_msg=key)


def evidence_pair(posterior: nnx.Module) -> tuple[Callable, Callable, Any]:
    """Model, guide and exact log-evidence of three rows, or of one latent for all of them."""
    dim, width, mu = posterior.latent_dim, posterior.context_dim, 0.3
    x = 0.5 * normal(3, dim, seed=3)
    context = None if width is None else 0.5 * x @ normal(dim, width, seed=4)

    def rows() -> Any:
        return numpyro.plate("copies", 1) if width is None else numpyro.plate("data", len(x))

    def model() -> None:
        with rows():
            z = numpyro.sample("z", dist.Normal(jnp.full(dim, mu), 1.0).to_event(1))
            if width is None:
                numpyro.sample("x", dist.Normal(z[..., None, :], 1.0).to_event(2), obs=x)
            else:
                numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        q = nnx_module("posterior", posterior)
        with rows():
            q("z", context)

    data = np.asarray(x)
    truth = oracle.log_evidence(data, mu)
    return model, guide, truth if width else np.array([oracle.global_log_evidence(data, mu)])


def check_evidence(log_weights: jax.Array, truth: Any) -> None:
    draws = np.exp(np.asarray(log_weights) - truth)
    assert draws.shape == (40_000, *np.shape(truth))
    assert np.abs(z_score(draws, 1.0)).max() < 4
    # The weights vary little enough for their standard error to mean something.
    assert (draws.std(0) < 20.0 * draws.mean(0)).all()


def widened(params: Params, name: str) -> Params:
    """Wider than the posterior, and a narrow reverse model near it: weights of light tails."""

    outputs = outputs_of_reverse(flat(params))

    def moved(path: Any, value: jax.Array) -> jax.Array:
        key = ".".join(str(k.key) for k in path[1:])
        if key.startswith(tuple(outputs)):
            narrow = key == f"{outputs[0]}.bias"
            return value.at[len(value) // 2 :].add(-0.3) if narrow else 0.2 * value
        if key.endswith(("log_scale", "log_scale.bias")):
            return value + (-0.3 if "reverse" in key else 0.3 if name == "Auxiliary" else 1.2)
        if key.startswith(("reverse.loc", "reverse.base.loc")):
            return 0.2 * value
        return 0.5 * value if key.startswith("targets") else value

    return jax.tree_util.tree_map_with_path(moved, params)


class Programs:
    """A member with a model of known evidence, and the programs that the tests share."""

    def __init__(self, posterior: nnx.Module) -> None:
        self.params = module_params(posterior=posterior)
        model, guide, self.truth = evidence_pair(posterior)
        weigher = ImportanceWeightedELBO(40_000)
        adam = optax.adam(1e-2)

        def gradient(how: str, params: Params, key: jax.Array) -> Params:
            elbo = ImportanceWeightedELBO(8, gradient=how)
            return jax.grad(lambda p: elbo.loss(key, p, model, guide))(params)

        def train(params: Params, keys: jax.Array, steps: Any) -> tuple[Params, Params]:
            def step(i: Any, carry: tuple[Params, Any, Params]) -> tuple[Params, Any, Params]:
                params, state, _ = carry
                found = gradient("reparam", params, keys[i])
                updates, state = adam.update(found, state)
                return optax.apply_updates(params, updates), state, found

            start = (params, adam.init(params), params)
            trained, _, found = jax.lax.fori_loop(0, steps, step, start)
            return trained, found

        def path_gradients(params: Params, key: jax.Array) -> list[Params]:
            return [gradient(how, params, key) for how in ("stl", "dreg")]

        # Parameters after so many steps, and the gradient of the last: one program for both.
        self.train = jax.jit(train)
        self.path_gradients = jax.jit(path_gradients)
        self.log_weights = jax.jit(lambda p, key: weigher.log_weights(key, p, model, guide))


@cache
def programs(member: str) -> Programs:
    name, case = CASE[member]
    return Programs(shaken(family(name, **case), 0.02))


@pytest.mark.parametrize(
    ("member", "gradient"),
    [*((member, "reparam") for member in CASE), *((member, "path") for member in PATHS)],
)
def test_a_gradient_reaches_every_parameter(member: str, gradient: str) -> None:
    """Of the plain estimator, and of both path estimators where a member has a part of its own."""
    shared = programs(member)
    params = shaken(shared.params, 0.1)
    if gradient == "path":
        found = shared.path_gradients(params, KEY)
    else:
        found = [shared.train(params, KEYS, 1)[1]]
    # With one dimension a masked net sees no other: its first weights are masked out.
    idle = {
        key
        for key, value in flat(params).items()
        if "nets" in key and key.endswith("layers.0.kernel") and value.shape[0] == 1
    }
    for one in map(flat, found):
        assert all(np.isfinite(value).all() for value in one.values())
        assert {key for key, value in one.items() if not value.any()} == idle


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_dtypes(exact: None, name: str, case: dict, kind: str) -> None:
    case = {**case, "param_dtype": jnp.dtype(kind)}
    posterior, width = nnx.eval_shape(lambda: family(name, **case)), case["context_dim"]
    context = None if width is None else normal(ROWS, width).astype(kind)

    def run(posterior: nnx.Module, context: jax.Array | None) -> list[jax.Array]:
        sites = sites_of(lambda: posterior("z", context), ROWS)
        estimate = posterior.log_prob(sites["z"]["value"], context, rng_key=KEY)
        drawn = [site["value"] for site in sites.values() if not site["is_observed"]]
        return [*map(log_prob, sites.values()), *drawn, estimate]

    arrays = [*jax.eval_shape(run, posterior, context), *jax.tree.leaves(posterior)]
    assert {str(x.dtype) for x in arrays} == {kind}
    assert not any(x.weak_type for x in arrays)


@pytest.mark.parametrize("member", [member.id for member in MEMBERS])
def test_save_and_load(member: str, tmp_path: Any) -> None:
    """Through the state of the module, and as the parameters that SVI gives."""
    (name, case), draw = CASE[member], sampler(member)
    posterior, context = build(name, case)
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(posterior)))
    params = jax.tree.map(np.asarray, module_params(posterior=posterior))
    (tmp_path / "posterior.pkl").write_bytes(pickle.dumps((state, params)))
    state, params = pickle.loads((tmp_path / "posterior.pkl").read_bytes())
    expected = draw(module_params(posterior=posterior), context)["z"]
    np.testing.assert_array_equal(draw(params, context)["z"], expected)
    other = family(name, **case)
    assert (draw(module_params(posterior=other), context)["z"] != expected).all()
    fresh = nnx.state(other)
    nnx.replace_by_pure_dict(fresh, state)
    nnx.update(other, fresh)
    np.testing.assert_array_equal(draw(module_params(posterior=other), context)["z"], expected)


@pytest.mark.parametrize("member", CASE)
def test_mean_weight_is_the_evidence(member: str) -> None:
    """E[exp(log_weight)] = p(x) off the start, and after 500 steps of training."""
    shared, (name, _) = programs(member), CASE[member]

    params = widened(shared.params, name)
    check_evidence(shared.log_weights(params, KEY), shared.truth)
    before = flat(params)
    params, _ = shared.train(params, KEYS, len(KEYS))
    moved = {key: np.abs(value - before[key]).max() for key, value in flat(params).items()}
    for part in ("reverse.", "base." if name == "VGP" else "conditional."):
        assert max(change for key, change in moved.items() if key.startswith(part)) > 0.03
    check_evidence(shared.log_weights(params, jax.random.key(5)), shared.truth)


@pytest.mark.parametrize(("name", "case"), [m for m in MEMBERS if m.values[1]["latent_dim"] == 1])
def test_estimated_density_integrates_to_one(name: str, case: dict) -> None:
    """And is that of the draws: E_q[h(z)] by quadrature over exp(log_prob) and by sampling."""
    posterior, context = build(name, case)
    context = None if context is None else context[:1]
    # Wider than the law that it stands for: estimates of little variance.
    wide_reverse(posterior, 0.5)
    # No point at 0.5, where one of the functions jumps.
    grid = jnp.linspace(-25.0, 25.0, 2000)[:, None]

    @jax.jit
    def run(posterior: nnx.Module) -> tuple[jax.Array, jax.Array]:
        density = jnp.exp(posterior.log_prob(grid, context, num_samples=400, rng_key=KEY))
        return density, sites_of(lambda: posterior("z", context), 100_000, 1)["z"]["value"]

    density, z = run(posterior)
    step = grid[1, 0] - grid[0, 0]
    assert density.sum() * step == pytest.approx(1.0, abs=0.02)
    for h in (jnp.tanh, lambda value: jnp.where(value > 0.5, 1.0, 0.0)):
        by_quadrature = float((density * h(grid[:, 0])).sum() * step)
        assert float(h(z).mean()) == pytest.approx(by_quadrature, abs=0.02)


@pytest.mark.parametrize(("name", "case"), VGPS)
def test_process_is_the_reference(exact: None, name: str, case: dict) -> None:
    posterior, context = build(name, case)
    inputs = normal(ROWS, 4, case.get("input_dim", case["latent_dim"]), seed=6)
    mean, covariance = jax.jit(lambda *args: posterior.conditional(*args))(inputs, context)
    amortize = case.get("amortize", "none" if context is None else "targets")
    assert mean.shape == (ROWS, 4, case["latent_dim"]) and covariance.shape[-2:] == (4, 4)
    shape = case.get("jitter", 1e-4), case.get("mean", "identity")
    for row in range(ROWS):
        given = vgp.data(
            named(posterior), None if context is None else np.asarray(context[row]), amortize
        )
        expected = vgp.conditional(np.asarray(inputs[row]), *given, *shape)
        np.testing.assert_allclose(mean[row], expected[0], atol=1e-9)
        np.testing.assert_allclose(covariance[row], expected[1], atol=1e-9)


def test_process_is_that_of_scikit_learn(exact: None) -> None:
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    kernels = gaussian_process.kernels
    posterior = shaken(
        VGP(3, input_dim=2, num_inducing=20, jitter=1e-3, mean="zero", rngs=nnx.Rngs(0)), 0.5
    )
    amplitude = float(jnp.exp(2.0 * posterior.log_amplitude[...]))
    kernel = kernels.ConstantKernel(amplitude) * kernels.RBF(
        np.exp(posterior.log_lengthscale[...])
    ) + kernels.WhiteKernel(1e-3 * amplitude)
    peer = gaussian_process.GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None)
    peer.fit(np.asarray(posterior.sources[...]), np.asarray(posterior.targets[...]))
    inputs = 1.5 * np.asarray(normal(30, 2, seed=7))
    mean, covariance = posterior.conditional(inputs)
    expected_mean, expected = peer.predict(inputs, return_cov=True)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-8)
    np.testing.assert_allclose(covariance, expected[..., 0], atol=1e-8)
    np.testing.assert_allclose(covariance, expected[..., 2], atol=1e-8)


def rows_of_the_prior(posterior: nnx.Module, context: Any, rows: int) -> tuple[Callable, Callable]:
    def model() -> None:
        with numpyro.plate("rows", rows):
            law = dist.Normal(jnp.zeros(posterior.latent_dim, context_dtype), 1.0)
            numpyro.sample("z", law.to_event(1))

    def guide() -> None:
        q = nnx_module("posterior", posterior)
        with numpyro.plate("rows", rows):
            q("z", context)

    context_dtype = jax.tree.leaves(posterior)[0].dtype
    return model, guide


@cache
def of_500_sources() -> tuple[Params, Callable, Callable]:
    """Parameters in single precision, and what is computed from them."""
    posterior = VGP(2, num_inducing=500, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    model, guide = rows_of_the_prior(posterior, None, 10)
    graph, _ = nnx.split(posterior)

    @jax.jit
    def conditional(params: Params, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graph, params).conditional(inputs)

    elbo = ImportanceWeightedELBO(2)

    @jax.jit
    def gradient(params: Params) -> Params:
        given = {"posterior$params": nnx.to_pure_dict(params)}
        return jax.grad(lambda p: elbo.loss(KEY, p, model, guide))(given)

    return nnx.state(posterior), conditional, gradient


@pytest.mark.parametrize("lengthscale", [0.1, 1.0, 30.0])
def test_process_of_500_sources_in_single_precision(exact: None, lengthscale: float) -> None:
    """Compiled, where a factor that fails is not an error but NaN."""
    params, conditional, gradient = of_500_sources()
    params = jax.tree.map(lambda x: x, params)
    params["log_lengthscale"] = jax.tree.map(
        lambda x: jnp.full_like(x, math.log(lengthscale)), params["log_lengthscale"]
    )
    inputs = 2.0 * normal(50, 2, seed=8)
    found = conditional(params, inputs.astype(jnp.float32))
    assert {x.dtype for x in found} == {jnp.dtype("float32")}
    expected = conditional(jax.tree.map(lambda x: x.astype(jnp.float64), params), inputs)
    assert jnp.abs(found[0] - expected[0]).max() < 0.02
    assert jnp.abs(found[1] - expected[1]).max() < 1e-3
    for leaf in jax.tree.leaves(gradient(params)):
        assert jnp.isfinite(leaf).all() and leaf.dtype == jnp.float32


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those of the programs inside of it as well."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("amortize", ["none", "targets", "all"])
def test_one_factor_a_step(amortize: str) -> None:
    """The cubic step is taken once, not per row or particle, unless sources are amortised."""
    posterior = VGP(2, 4, num_inducing=7, amortize=amortize, rngs=nnx.Rngs(0))
    model, guide = rows_of_the_prior(posterior, normal(ROWS, 4, seed=1), ROWS)
    elbo, params = ImportanceWeightedELBO(6), module_params(posterior=posterior)
    program = jax.make_jaxpr(jax.grad(lambda p: elbo.loss(KEY, p, model, guide)))(params)
    factors = [e for e in equations(program.jaxpr) if e.primitive.name == "cholesky"]
    shapes = [e.outvars[0].aval.shape for e in factors]
    assert shapes == [(ROWS, 7, 7) if amortize == "all" else (7, 7)]


class Periodic(nnx.Module):
    """A kernel with a parameter."""

    def __init__(self) -> None:
        self.period = nnx.Param(jnp.array(3.0))

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        turns = jnp.pi * (a[..., :, None, :] - b[..., None, :, :]) / self.period[...]
        return jnp.exp(-2.0 * (jnp.sin(turns) ** 2).sum(-1))


def test_any_kernel() -> None:
    posterior = VGP(2, 4, num_inducing=6, kernel=Periodic(), rngs=nnx.Rngs(0))
    shared = Programs(shaken(posterior, 0.02))
    check_evidence(shared.log_weights(widened(shared.params, "VGP"), KEY), shared.truth)
    found = shared.train(shared.params, KEYS, 1)[1]
    assert np.abs(flat(found)["kernel.period"]) > 0


def test_targets_and_sources_may_be_given() -> None:
    grid = np.linspace(-2.0, 2.0, 9)[:, None]
    posterior = VGP(1, sources=grid, targets=np.sin(grid), jitter=1e-6, rngs=nnx.Rngs(0))
    mean, _ = posterior.conditional(grid)
    np.testing.assert_allclose(mean, np.sin(grid), atol=1e-2)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_trains_under_a_compiled_step(name: str) -> None:
    """Without a second compilation; the parameters of SVI start as those of the module."""
    options = {"hidden_dims": (5,), **({"num_inducing": 4} if name == "VGP" else {})}
    posterior = family(name, latent_dim=2, context_dim=2, **options)
    x = normal(4, 2)
    svi = SVI(
        models.conjugate,
        models.amortised(posterior),
        optax.adam(1e-2),
        ImportanceWeightedELBO(2, gradient="stl"),
    )
    state = jax.jit(svi.init)(KEY, x)
    before = svi.get_params(state)
    expected = module_params(posterior=posterior)["posterior$params"]
    assert models.difference(before["posterior$params"], expected) == 0.0
    update = jax.jit(svi.update)
    for _ in range(3):
        state, loss = update(state, x)
        assert loss.shape == () and not loss.weak_type and jnp.isfinite(loss)
    assert update._cache_size() == 1
    assert models.difference(before, svi.get_params(state)) > 0.01


@pytest.mark.parametrize("member", ["Auxiliary-1", "nested", "VGP-6"])
def test_the_key_of_an_estimate(member: str) -> None:
    """It is given, or the surrounding handler's."""
    name, case = CASE[member]
    posterior, context = build(name, case)
    z = 0.5 * normal(ROWS, case["latent_dim"], seed=9)
    text = f"Expected rng_key for the samples behind log_prob of {name}; got None outside of a seed"
    with pytest.raises(ValueError, match=text):
        posterior.log_prob(z, context)

    @jax.jit
    def estimates(key: jax.Array) -> list[jax.Array]:
        with seed(rng_seed=key):
            return [
                posterior.log_prob(z, context),
                posterior.log_prob(z, context),
                posterior.log_prob(z, context, rng_key=KEY),
            ]

    first, second, given = estimates(jax.random.key(0))
    assert first.shape == (ROWS,)
    assert (first != second).all()
    np.testing.assert_array_equal(estimates(jax.random.key(1))[2], given)


def test_errors() -> None:
    def vgp_of(*args: Any, **kwargs: Any) -> VGP:
        return VGP(*args, **kwargs, rngs=nnx.Rngs(0))

    def linear(latent_dim: int, context_dim: int, **options: Any) -> nnx.Module:
        return nnx.Linear(latent_dim, context_dim, **options)

    def narrow(latent_dim: int, context_dim: int, **options: Any) -> nnx.Module:
        return family("MeanField", latent_dim=1, context_dim=context_dim)

    with pytest.raises(ValueError, match="Expected as many targets as sources; got 4 targets and"):
        vgp_of(2, sources=np.zeros((5, 2)), targets=np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"Expected sources of shape \(num_inducing, 2\); got"):
        vgp_of(2, sources=np.zeros((5, 3)))
    with pytest.raises(ValueError, match="Expected amortize='none' without a context; got 'all'"):
        vgp_of(2, amortize="all")
    with pytest.raises(ValueError, match="Expected amortize to be one of .*; got 'some'"):
        vgp_of(2, 3, amortize="some")
    with pytest.raises(ValueError, match="Expected jitter > 0; got 0"):
        vgp_of(2, jitter=0.0)
    with pytest.raises(ValueError, match=r"Expected inputs of shape \(\*batch, n, 2\)"):
        vgp_of(2).conditional(jnp.zeros((4, 3)))
    with pytest.raises(TypeError, match="Expected a guide family from aux_family.*; got Linear"):
        family("Auxiliary", latent_dim=2, context_dim=3, aux_family=linear)
    with pytest.raises(ValueError, match="to build a family of latent_dim=2 and .*; got 1 and 5"):
        family("Auxiliary", latent_dim=2, context_dim=3, reverse_family=narrow)
    with pytest.raises(TypeError, match="with a density of its own from reverse_family; got Aux"):
        family("Auxiliary", latent_dim=2, context_dim=3, reverse_family={"name": "Auxiliary"})
    with pytest.raises(TypeError, match="with a density of its own from latent_family; got VGP"):
        family("Auxiliary", latent_dim=2, context_dim=3, latent_family={"name": "VGP"})
    with pytest.raises(TypeError, match="with a density of its own from reverse_family; got VGP"):
        vgp_of(2, 3, reverse_family=VGP)
    with pytest.raises(ValueError, match="Expected num_samples >= 1; got 0"):
        family("Auxiliary", latent_dim=2).log_prob(jnp.zeros(2), num_samples=0, rng_key=KEY)
    with pytest.raises(ValueError, match="Expected aux_dim >= 1; got 0"):
        family("Auxiliary", latent_dim=2, aux_dim=0)
    with pytest.raises(ValueError, match="Expected input_dim >= 1; got 0"):
        vgp_of(2, input_dim=0)
    with pytest.raises(ValueError, match="Expected num_inducing >= 1; got 0"):
        vgp_of(2, num_inducing=0)
    with pytest.raises(ValueError, match="Expected a context of width 3 at site 'z'; got None"):
        vgp_of(2, 3)("z")


def test_a_kernel_that_is_not_positive_definite() -> None:
    """An error where numbers are known, and NaN in a compiled step."""

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sqrt(((a[..., :, None, :] - b[..., None, :, :]) ** 2).sum(-1))

    posterior = VGP(2, kernel=distance, rngs=nnx.Rngs(0))
    text = "Expected a positive definite kernel; got distance, .* 50 sources with jitter=0.0001"
    with seed(rng_seed=0), pytest.raises(ValueError, match=text):
        posterior("z")
    with pytest.raises(ValueError, match=text):
        posterior.log_prob(jnp.zeros(2), rng_key=KEY)

    @jax.jit
    def run(posterior: nnx.Module) -> list[jax.Array]:
        sites = sites_of(lambda: posterior("z"))
        estimate = posterior.log_prob(jnp.zeros(2), rng_key=KEY)
        return [sum(map(log_prob, sites.values())), estimate]

    assert jnp.isnan(jnp.stack(run(posterior))).all()


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_data_far_from_the_start(name: str) -> None:
    """Two parameters, data near 2500: no step sends a scale, and with it the loss, to infinity."""
    jax.config.update("jax_enable_x64", False)  # infinity is near; the fixture sets it back
    x = 2500.0 + 50.0 * normal(30, seed=2)

    def model() -> None:
        loc = numpyro.sample("loc", dist.Normal(0.0, 500.0))
        scale = numpyro.sample("scale", dist.HalfNormal(500.0))
        with numpyro.plate("data", 30):
            numpyro.sample("x", dist.Normal(loc, scale), obs=x)

    guide = AutoPosterior(model, getattr(guides, name))
    elbo = ImportanceWeightedELBO(16, gradient="stl")
    svi = SVI(model, guide, optax.adam(1e-2), elbo)
    losses = svi.run(jax.random.key(0), 60, progress_bar=False).losses
    assert jnp.isfinite(losses).all()
    assert losses[-10:].mean() < losses[0]


@pytest.mark.parametrize(("latent_dim", "aux_dim"), [(3, 2), (2, 3)])
def test_default_parts_start_as_exact_reverses(latent_dim: int, aux_dim: int) -> None:
    """Without its small heads the start is a standard Normal, whose bound is exact."""
    posterior = guides.Auxiliary(latent_dim, aux_dim=aux_dim, rngs=nnx.Rngs(0))
    for part in (posterior.conditional, posterior.reverse):
        for head in (part.loc, part.log_scale):
            head.kernel[...] = jnp.zeros_like(head.kernel[...])
    both = min(latent_dim, aux_dim)
    for key in KEYS[:5]:
        sites = trace(seed(lambda: posterior("z"), key)).get_trace()
        log_q = sum(site["fn"].log_prob(site["value"]).sum() for site in sites.values())
        a, z = sites["z_aux"]["value"], sites["z"]["value"]
        exact = dist.Normal(0.0, 1.0).log_prob(z).sum()
        np.testing.assert_allclose(log_q, exact, rtol=1e-5)
        mean = posterior.conditional.distribution(a).mean
        np.testing.assert_allclose(mean[:both], math.sqrt(0.5) * a[:both], rtol=1e-5)
