"""The contract of the likelihoods, over every registered member."""

from __future__ import annotations

import itertools
import re
from functools import cache, partial
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
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Predictive, Trace_ELBO
from reference import made as reference_made
from reference import outputs as reference
from scipy import stats
from test_numpyro.models import named, shaken

from numpyro_vae_ext import likelihoods
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import MeanField
from numpyro_vae_ext.likelihoods import MADE, _base
from numpyro_vae_ext.likelihoods._outputs import make_output

FAMILY = CASES["likelihoods"]
MAX_VALUES = 70_000


def identifier(case: tuple[str, dict]) -> str:
    name, options = case
    return f"{name}{FAMILY[name].index(options)}"


ALL = [(name, options) for name, cases in FAMILY.items() for options in cases]


def over(cases: list[tuple[str, dict]]) -> Any:
    return pytest.mark.parametrize(
        ("name", "options"), [pytest.param(*case, id=identifier(case)) for case in cases]
    )


def build(name: str, options: dict, **more: Any) -> Any:
    """A likelihood far from its start, where everything depends on everything it may."""
    return shaken(getattr(likelihoods, name)(**options, **more, rngs=nnx.Rngs(0)), 0.5)


def element(options: dict) -> dict:
    """What the reference needs to know of an element."""
    found = {key: options[key] for key in ("num_categories", "num_components") if key in options}
    return {"output": options.get("output", "bernoulli"), **found}


def num_values(options: dict) -> int | None:
    output, categories = element(options)["output"], options.get("num_categories", 256)
    return reference.num_values(output, categories)


def size(options: dict) -> int:
    return int(np.prod(options["shape"]))


def is_small(options: dict) -> bool:
    values = num_values(options)
    return values is not None and values ** size(options) <= MAX_VALUES


def conditioning(module: Any, *batch: int, seed: int = 1) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    steps = (module.num_positions,) if getattr(module, "context_per_step", False) else ()
    return (
        None
        if module.context_dim is None
        else jnp.asarray(rng.normal(size=(*batch, *steps, module.context_dim))),
        None
        if module.covariate_dim is None
        else jnp.asarray(rng.normal(size=(*batch, module.covariate_dim))),
    )


def some_values(module: Any, *batch: int, seed: int = 2) -> jax.Array:
    rng = np.random.default_rng(seed)
    shape, categories = (*batch, *module.shape), getattr(module.output, "num_categories", 2)
    if module.output.is_discrete:
        dtype = module.output.value_dtype(float)
        return jnp.asarray(rng.integers(categories, size=shape)).astype(dtype)
    return jnp.asarray(rng.normal(size=shape))


@cache
def all_values(count: int, shape: tuple[int, ...]) -> np.ndarray:
    rows = list(itertools.product(range(count), repeat=int(np.prod(shape))))
    return np.array(rows, float).reshape(-1, *shape)


def conditioned_on_first(distribution: Any) -> Any:
    """What the module made of the conditioning, with one mask where there are several."""
    if isinstance(distribution.likelihood, MADE) and distribution.conditioned[1] is None:
        return distribution.conditioned[0], jnp.asarray(0)
    return distribution.conditioned


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of the chi-square test, rare values put together up to 5 expected draws or more."""
    order = np.argsort(-expected)
    counts, expected = counts[order], expected[order]
    alone = int(np.sum(expected >= 5.0))
    # Parts of 10 of a sum of terms below 5; the last one may be a rest.
    group = (np.cumsum(expected[alone:]) / 10.0).astype(int)
    group = np.minimum(group, max(group.max(initial=0) - 1, 0))
    group = np.concatenate([np.arange(alone), alone + group])
    counts, expected = np.bincount(group, counts), np.bincount(group, expected)
    statistic = np.sum((counts - expected) ** 2 / expected)
    return float(stats.chi2.sf(statistic, len(counts) - 1))


# --- one element ------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("ordinal", [False, True])
@pytest.mark.parametrize("name", ["bernoulli", "categorical", "discretized_logistic_mixture"])
def test_discrete_element(name: str, ordinal: bool) -> None:
    output = make_output(name, 6, 3, ordinal=ordinal)
    rng = np.random.default_rng(0)
    params = 3.0 * rng.normal(size=(300, 1, output.num_params))
    params[:20, :, -1] = -9.0  # as a log-scale it is below the least one
    count = 2 if name == "bernoulli" else 6
    noise = rng.uniform(size=(300, 40, output.num_noise))
    noise[:, :2] = [[0.0], [1.0 - 1e-16]]
    values = np.broadcast_to(np.arange(count, dtype=float), (300, count))
    found, drawn, encoded = jax.jit(
        lambda p, x, u: (output.log_prob(p, x), output.draw(p, u), output.encode(x, float))
    )(params, values, noise)
    kind = {"num_categories": 6, "num_components": 3}
    np.testing.assert_allclose(found, reference.log_prob(name, params, values, **kind), rtol=1e-10)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, rtol=1e-12)
    wide = np.broadcast_to(params, (300, 40, output.num_params))
    assert np.array_equal(drawn, reference.draw(name, wide, noise, **kind))
    np.testing.assert_allclose(encoded, reference.encode(name, values, 6, ordinal), rtol=1e-14)
    assert encoded.shape[-1] == output.num_inputs
    assert drawn.dtype == output.value_dtype(params.dtype)
    assert np.all(output.valid(np.asarray(drawn)))
    assert np.all(output.support(drawn)) and not np.any(output.support(np.array([-1, count])))
    assert not np.any(output.valid(np.array([-1.0, 0.5, np.nan, np.inf, count])))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["normal", "logistic_mixture"])
def test_continuous_element(name: str) -> None:
    output = make_output(name, 2, 3)
    rng = np.random.default_rng(0)
    params = rng.normal(size=(5, 1, output.num_params))
    grid = np.sinh(np.linspace(-12.0, 12.0, 40_001))
    noise = rng.uniform(size=(5, 2000, 2)) if name != "normal" else rng.normal(size=(5, 2000, 1))
    found, drawn = jax.jit(lambda p, x, u: (output.log_prob(p, x), output.draw(p, u)))(
        params, grid, noise
    )
    near = np.abs(grid) < 100.0
    expected = reference.log_prob(name, params, grid[near], num_components=3)
    np.testing.assert_allclose(found[:, near], expected, rtol=1e-10)
    total = np.trapezoid(np.exp(found), grid, axis=-1)
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    wide = np.broadcast_to(params, (5, 2000, output.num_params))
    np.testing.assert_allclose(
        drawn, reference.draw(name, wide, noise, num_components=3), rtol=1e-10
    )
    for row, numbers in zip(params, np.asarray(drawn), strict=True):
        uniforms = reference.cdf(name, row, numbers, num_components=3)
        assert stats.kstest(uniforms, "uniform").pvalue > 1e-4
    assert not np.any(output.valid(np.array([np.nan, np.inf, -np.inf])))
    assert np.all(output.valid(np.array([0.0, -1e30])))


def test_steep_logistics_have_gradients() -> None:
    """Far tails and scales at the limit: finite masses and derivatives."""
    output = make_output("discretized_logistic_mixture", 256, 2)
    params = jnp.array([[0.0, 1.0, -5.0, 0.9, -20.0, -6.9], [0.0, 1.0, 0.0, 0.0, 15.0, 3.0]])
    value = jnp.array([[0.0], [128.0], [255.0]])
    found, slopes = jax.jit(jax.value_and_grad(lambda p: output.log_prob(p, value).sum()))(params)
    assert np.isfinite(found) and np.all(np.isfinite(slopes)) and np.any(slopes != 0)


def test_category_without_mass_is_never_drawn() -> None:
    output = make_output("categorical", 4, 1)
    logits = jnp.array([-jnp.inf, 0.0, 0.0, -jnp.inf])
    top = 1.0 - np.finfo(logits.dtype).epsneg
    drawn = output.draw(logits, jnp.array([0.0, 0.5, top])[:, None])
    assert drawn.tolist() == [1, 2, 2]


# --- the density ------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact")
@over([case for case in ALL if is_small(case[1])])
def test_samples_follow_a_density_over_all_values(name: str, options: dict) -> None:
    module = build(name, options)
    count = num_values(options)
    values = all_values(count, module.shape)
    batch = (3,) if module.conditioning_dim else ()
    # Convolutions take their time.
    draws = (20_000 if name == "PixelCNN" else 100_000) // max(batch, default=1)

    @jax.jit
    def check(module: Any, given: Any, values: Any) -> Any:
        distribution = module(*given)
        drawn = distribution.sample(jax.random.key(0), (draws,))
        if batch:
            values = values[:, None]
        return distribution.log_prob(values), drawn

    log_prob, drawn = check(module, conditioning(module, *batch), values)
    assert log_prob.shape == (len(values), *batch)
    probabilities = np.exp(np.asarray(log_prob)).reshape(len(values), -1)
    np.testing.assert_allclose(probabilities.sum(0), 1.0, atol=1e-10)

    assert drawn.shape == (draws, *batch, *module.shape)
    assert drawn.dtype == module.output.value_dtype(module.dtype)
    weights = count ** np.arange(size(options) - 1, -1, -1)
    index = np.asarray(drawn).reshape(draws, -1, size(options)).astype(int) @ weights
    counts = [np.bincount(column, minlength=len(values)) for column in index.T]
    for row, probability in zip(counts, probabilities.T, strict=True):
        assert p_value(row, draws * probability) > 1e-4


@pytest.mark.usefixtures("exact")
@over([case for case in ALL if num_values(case[1]) is None])
def test_continuous_samples_follow_every_conditional(name: str, options: dict) -> None:
    module = build(name, options)
    given = conditioning(module)

    @jax.jit
    def check(module: Any, given: Any) -> Any:
        distribution = module(*given)
        conditioned = conditioned_on_first(distribution)
        fixed = _base.Autoregressive(module, conditioned, distribution.batch_shape)
        drawn = fixed.sample(jax.random.key(0), (20_000,))
        params = module._params(module.output.encode(drawn, float), conditioned)
        return drawn, params, fixed.log_prob(drawn)

    drawn, params, log_prob = map(np.asarray, check(module, given))
    known = element(options)
    terms = reference.log_prob(known["output"], params, drawn, **_numbers(known))
    np.testing.assert_allclose(log_prob, terms.reshape(20_000, -1).sum(-1), rtol=1e-10)
    components = known.get("num_components", 5)
    uniforms = reference.cdf(known["output"], params, drawn, components).reshape(20_000, -1)
    for column in uniforms.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    # Uniform one by one, and together.
    correlation = np.corrcoef(uniforms.T) * np.sqrt(20_000)
    assert np.abs(correlation[np.triu_indices(len(correlation), 1)]).max(initial=0.0) < 4.5


def _numbers(known: dict) -> dict:
    return {key: value for key, value in known.items() if key != "output"}


# --- who depends on whom ----------------------------------------------------------------------


def dependency(module: Any, options: dict, mask_index: int) -> np.ndarray:
    """Boolean (D, D): row element's parameters depend on the column element."""
    if isinstance(module, MADE):
        return reference_made.dependency(mask_index, **options)
    places = np.arange(module.num_elements)
    if hasattr(module, "block_size"):
        block = places // module.block_size
        return block[:, None] > block[None, :]
    # A window of an image: rows above, the row's left part, earlier channels of the pixel.
    reach = (module.receptive_field - 1) // 2
    *channels, height, width = module.shape
    grid = np.indices((channels[0] if channels else 1, height, width)).reshape(3, -1)
    channel, row, column = (axis[:, None] - axis[None, :] for axis in grid)
    above = (row > 0) & (row <= reach) & (np.abs(column) <= reach)
    left = (row == 0) & (column > 0) & (column <= reach)
    return above | left | ((row == 0) & (column == 0) & (channel > 0))


@pytest.mark.usefixtures("exact")
@over(ALL)
def test_parallel_pass_is_autoregressive_and_the_sampler_is_the_same(
    name: str, options: dict
) -> None:
    """Who sees whom; and step by step with the same noise, the naive way and the cached one."""
    module = build(name, options)
    last = options.get("num_masks", 1) - 1
    extra = {"mask_index": last} if last else {}
    batch = (40,)
    rng = np.random.default_rng(3)
    noise = rng.uniform(size=(*batch, *module.shape, module.output.num_noise))
    inputs = 3.0 * rng.normal(size=(*batch, *module.shape, module.output.num_inputs))
    covered = batch if module.conditioning_dim else ()

    @jax.jit
    def check(module: Any, given: Any, inputs: Any, noise: Any) -> Any:
        conditioned = module(*given, **extra).conditioned

        def alone(inputs: jax.Array, given: Any) -> jax.Array:
            return module._params(inputs, module(*given, **extra).conditioned)

        jacobians = jax.vmap(jax.jacfwd(alone), in_axes=(0, 0 if covered else None))(inputs, given)
        sizes = (module.num_elements, module.output.num_params)
        sizes += (module.num_elements, module.output.num_inputs)
        slopes = jnp.abs(jacobians).sum(0).reshape(sizes).sum((1, 3))

        # Any values at first: after D rounds all are drawn from values that are right already.
        def redraw(_: Any, value: jax.Array) -> jax.Array:
            params = module._params(module.output.encode(value, float), conditioned)
            return module.output.draw(params, noise)

        value = jnp.ones(noise.shape[:-1], module.output.value_dtype(float))
        naive = jax.lax.fori_loop(0, module.num_elements, redraw, value)
        return slopes, naive, module._draw(noise, conditioned)

    slopes, naive, cached = check(module, conditioning(module, *covered), inputs, noise)
    wanted = dependency(module, options, last)
    assert np.array_equal(np.asarray(slopes) != 0, wanted)
    np.testing.assert_allclose(cached, naive, rtol=1e-10)
    if module.output.is_discrete:
        assert np.array_equal(cached, naive)
        assert len(np.unique(np.asarray(cached).reshape(40, -1), axis=0)) > 1


# --- layouts ----------------------------------------------------------------------------------


ONE_OF_EACH = [(name, cases[0]) for name, cases in FAMILY.items()]


@pytest.mark.usefixtures("exact")
@over(ALL)
def test_particles_rows_and_every_parameter(name: str, options: dict) -> None:
    """Conditioning (particles, rows) and data (rows) are what they are a row at a time."""
    module = build(name, options)
    rows = 4 if module.conditioning_dim else 1
    given, x = conditioning(module, 2, rows), some_values(module, rows)
    batch = (2, rows) if module.conditioning_dim else ()

    @jax.jit
    def check(module: Any, given: Any, x: Any) -> Any:
        def summed(module: Any) -> Any:
            log_prob = module(*given).log_prob(x)
            return log_prob.sum(), log_prob

        (_, wide), slopes = jax.value_and_grad(summed, has_aux=True)(module)
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), given)
        tiled = jnp.tile(x, (2,) + (1,) * len(module.shape))
        single = jax.lax.map(lambda one: module(*one[0]).log_prob(one[1]), (flat, tiled))
        sample = module(*given).expand((3, *batch)).sample(jax.random.key(0))
        return wide, single[: wide.size], slopes, sample

    distribution = module(*given)
    assert distribution.batch_shape == batch and distribution.event_shape == module.shape
    wide, single, slopes, sample = check(module, given, x)
    assert wide.shape == (batch or (1,))
    np.testing.assert_allclose(wide.reshape(-1), single, rtol=1e-9)
    assert sample.shape == (3, *batch, *module.shape)
    assert np.all(module.output.valid(np.asarray(sample)))
    for path, slope in nnx.to_flat_state(nnx.state(slopes)):
        assert np.all(np.isfinite(slope[...])), path
        assert np.any(slope[...] != 0) or module.num_elements == 1, path


@pytest.mark.usefixtures("exact")
@over(ONE_OF_EACH)
def test_distribution_is_a_tree_and_expands(name: str, options: dict) -> None:
    module = build(name, options)
    given, x = conditioning(module, 4), some_values(module, 4)

    @jax.jit
    def check(module: Any, given: Any, x: Any) -> Any:
        many = jax.vmap(lambda g: module(*g))(given)
        mapped = jax.vmap(lambda d, v: d.log_prob(v))(many, x)
        wide = module(*given).expand((5, 4))
        sample = wide.sample(jax.random.key(0), (2,))
        return module(*given), mapped, sample, wide.log_prob(sample), wide.log_prob(x)

    distribution, mapped, sample, of_sample, expanded = check(module, given, x)
    assert distribution.batch_shape == (4,)
    np.testing.assert_allclose(mapped, expanded[0], rtol=1e-9)
    np.testing.assert_allclose(expanded, np.broadcast_to(expanded[0], (5, 4)), rtol=1e-12)
    assert sample.shape == (2, 5, 4, *module.shape) and of_sample.shape == (2, 5, 4)
    # Copies are draws of their own.
    assert len(np.unique(np.asarray(sample).reshape(10, -1), axis=0)) > 5


@pytest.mark.usefixtures("exact")
@over(ONE_OF_EACH)
def test_eager_sampling_compiles_once_and_draws_the_same(name: str, options: dict) -> None:
    module = build(name, options)
    given = conditioning(module, 4)
    eager = module(*given).sample(jax.random.key(0), (2,))
    compiled = jax.jit(lambda m, g: m(*g).sample(jax.random.key(0), (2,)))(module, given)
    assert np.array_equal(eager, compiled)
    before = _base._block._cache_size()
    assert before > 0
    module(*conditioning(module, 4, seed=8)).sample(jax.random.key(1), (2,))
    assert _base._block._cache_size() == before


@over(ONE_OF_EACH)
def test_numbers_have_the_type_of_the_parameters(name: str, options: dict) -> None:
    module = build(name, options, param_dtype=jnp.float32)
    given = jax.tree.map(lambda x: x.astype(jnp.float32), conditioning(module, 2))
    x, log_prob = jax.jit(_drawn_and_scored)(module, given)
    assert x.dtype == log_prob.dtype == jnp.float32 == module.dtype
    double = jax.tree.map(lambda leaf: leaf.astype(float), module)
    expected = jax.jit(lambda m, g, x: m(*g).log_prob(x))(double, given, x)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4)


def _drawn_and_scored(module: Any, given: Any) -> Any:
    x = module(*given).sample(jax.random.key(0))
    return x, module(*given).log_prob(x)


# --- in the host's programs -------------------------------------------------------------------


def pair(module: Any, num_rows: int) -> tuple[Any, Any]:
    posterior = MeanField(2, 2, rngs=nnx.Rngs(1))

    def model(x: Any = None, context: Any = None, batch_size: int | None = None) -> None:
        decoder = nnx_module("decoder", module)
        with numpyro.plate("data", num_rows, subsample_size=batch_size) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("x", decoder(z), obs=None if x is None else x[rows])

    def guide(x: Any = None, context: Any = None, batch_size: int | None = None) -> None:
        family = nnx_module("posterior", posterior)
        with numpyro.plate("data", num_rows, subsample_size=batch_size) as rows:
            family("z", context[rows])

    return model, guide


@pytest.mark.usefixtures("exact")
@over(ONE_OF_EACH)
def test_trains_with_every_objective(name: str, options: dict) -> None:
    module = build(name, options)
    x = jnp.tile(some_values(module), (6,) + (1,) * len(module.shape))
    context = jnp.asarray(np.random.default_rng(4).normal(size=(6, 2)))
    model, guide = pair(module, 6)
    objectives = {
        "host": Trace_ELBO(num_particles=3, vectorize_particles=True),
        "ours": ImportanceWeightedELBO(num_particles=3),
    }
    svis = {key: SVI(model, guide, optax.adam(0.05), loss) for key, loss in objectives.items()}
    states = {
        key: svi.init(jax.random.key(0), x, context, batch_size=4) for key, svi in svis.items()
    }
    assert all(state.mutable_state is None for state in states.values())

    @jax.jit
    def check(states: Any) -> Any:
        found = {}
        for key, svi in svis.items():
            step = partial(svi.update, x=x, context=context, batch_size=4)
            found[key] = jax.lax.scan(lambda state, _, f=step: f(state), states[key], length=60)
        return found

    for key, (state, losses) in check(states).items():
        assert np.all(np.isfinite(losses)) and losses[-20:].mean() < losses[:10].mean() - 1.0
        before, after = (svis[key].get_params(s) for s in (states[key], state))
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
        assert all(jax.tree.leaves(moved)), moved

    params = svis["host"].get_params(states["host"])
    drawn = Predictive(model, params=params, num_samples=5)(jax.random.key(2))
    assert drawn["x"].shape == (5, 6, *module.shape)
    assert np.all(module.output.valid(np.asarray(drawn["x"])))
    assert len(np.unique(np.asarray(drawn["x"]).reshape(30, -1), axis=0)) > 5


@pytest.mark.usefixtures("exact")
def test_observed_rows_count_as_often_as_the_plate_says() -> None:
    module = build("MADE", {"shape": 3, "hidden_dims": (5,)})
    x = some_values(module, 6)

    def model(batch_size: int | None) -> None:
        decoder = nnx_module("decoder", module)
        with numpyro.plate("data", 6, subsample_size=batch_size) as rows:
            numpyro.sample("x", decoder(), obs=x[rows])

    trace = handlers.trace(handlers.seed(model, 0)).get_trace(4)
    assert not [site for site in trace.values() if site["type"] == "mutable"]
    site = trace["x"]
    assert site["fn"].batch_shape == (4,) and site["scale"] == 1.5
    losses = [Trace_ELBO().loss(jax.random.key(0), {}, model, lambda b: None, b) for b in (None, 4)]
    terms = np.asarray(module().log_prob(x))
    np.testing.assert_allclose(losses[0], -terms.sum(), rtol=1e-12)
    # Seeded as the loss seeds it.
    assert any(
        np.isclose(losses[1], -1.5 * terms[list(chosen)].sum(), rtol=1e-12)
        for chosen in itertools.combinations(range(6), 4)
    )


@pytest.mark.usefixtures("exact")
def test_gradient_through_samples() -> None:
    """Of Normal elements it is that of the naive sampler; elsewhere there is none."""
    normal = build("MADE", {"shape": 4, "context_dim": 2, "hidden_dims": (8,), "output": "normal"})
    mixed = build("MADE", {"shape": 3, "context_dim": 2, "output": "logistic_mixture"})
    z = jnp.array([0.3, -0.7])
    assert normal(z).has_rsample and not mixed(z).has_rsample

    @jax.jit
    def check(modules: Any, z: Any) -> Any:
        normal, mixed = modules
        noise = normal.output.noise(jax.random.key(0), (4,), float)

        def naive(module: Any, z: Any) -> jax.Array:
            value = jnp.zeros(4)
            for i in range(4):
                params = module._params(value[:, None], module(z).conditioned)
                value = value.at[i].set(module.output.draw(params, noise)[i])
            return value

        weights = jnp.array([1.0, -0.5, 2.0, 0.7])
        return (
            jax.grad(lambda m, z: weights @ m(z).rsample(jax.random.key(0)), (0, 1))(normal, z),
            jax.grad(lambda m, z: weights @ naive(m, z), (0, 1))(normal, z),
            jax.grad(lambda m, z: m(z).sample(jax.random.key(0)).sum(), (0, 1))(mixed, z),
        )

    found, expected, none = check((normal, mixed), z)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert np.all(np.asarray(found[1]) != 0)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(none))


@pytest.mark.usefixtures("exact")
def test_absent_elements_neither_count_nor_are_seen() -> None:
    options = {"shape": (2, 2), "hidden_dims": (9,), "output": "categorical", "num_categories": 2}
    module = build("MADE", options)
    present = np.array([[True, False], [True, True]])
    full = all_values(2, (2, 2))
    one = np.array([[0.0, 1.0], [1.0, 0.0]])

    @jax.jit
    def check(module: Any, missing: Any) -> Any:
        conditioned = module().conditioned
        distribution = _base.Autoregressive(module, conditioned, (), jnp.asarray(present))
        # Not even the code of a zero: nothing.
        seen = module._params(module.output.encode(one, float) * present[..., None], conditioned)
        drawn = distribution.sample(jax.random.key(0), (50,))
        return distribution.log_prob(full), distribution.log_prob(missing), seen, drawn

    log_prob, of_missing, seen, drawn = check(module, np.where(present, one, np.nan))
    inside = full[:, 0, 1] == 0
    np.testing.assert_allclose(np.exp(log_prob[inside]).sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(log_prob[inside], log_prob[~inside], rtol=1e-12)
    terms = reference.log_prob("categorical", seen, one, 2)
    np.testing.assert_allclose(of_missing, terms[present].sum(), rtol=1e-12)
    assert np.all(drawn[:, 0, 1] == 0) and np.all(np.any(drawn != 0, axis=0) == present)
    # Nor are they looked at outside of a transformation.
    distribution = _base.Autoregressive(module, module().conditioned, (), jnp.asarray(present))
    distribution._check_value(np.where(present, one, np.nan))


# --- MADE against its reference ---------------------------------------------------------------


@pytest.mark.usefixtures("exact")
@over([case for case in ALL if case[0] == "MADE"])
def test_made_is_its_reference(name: str, options: dict) -> None:
    """All masks by one program with a traced index, and their mixture."""
    module, weights = build(name, options), None
    weights = named(module)
    masks = range(options.get("num_masks", 1))
    given = conditioning(module, 3)
    x = some_values(module, 2, 3)
    both = [np.asarray(part) for part in given if part is not None]
    joined = np.concatenate(both, -1) if both else None

    @jax.jit
    def check(module: Any, given: Any, x: Any, index: Any, noise: Any) -> Any:
        one = module(*given, mask_index=index)
        return one.log_prob(x), module(*given).log_prob(x), module._draw(noise, one.conditioned)

    noise = np.random.default_rng(5).uniform(size=(3, *module.shape, module.output.num_noise))
    for mask in masks:
        one, mixture, drawn = check(module, given, x, mask, noise)
        expected = reference_made.log_prob(x, weights, joined, mask, **options)
        np.testing.assert_allclose(one, expected, rtol=1e-10)
        drawn_there = reference_made.draw(noise, weights, joined, mask, **options)
        np.testing.assert_allclose(drawn, drawn_there, rtol=1e-9)
    assert check._cache_size() == 1
    expected = reference_made.log_prob(x, weights, joined, **options)
    np.testing.assert_allclose(mixture, expected, rtol=1e-10)
    if len(masks) > 1:
        assert np.abs(np.asarray(one - mixture)).max() > 1e-3


@pytest.mark.usefixtures("exact")
def test_one_step_serves_all_masks() -> None:
    """Training with another mask each step is one program, and reaches the ensemble."""
    module = MADE(6, hidden_dims=(20,), num_masks=4, rngs=nnx.Rngs(0))
    x = (np.random.default_rng(0).uniform(size=(40, 1)) < 0.5) * np.ones((40, 6))

    def model(step: Any) -> None:
        decoder = nnx_module("decoder", module)
        with numpyro.plate("data", 40):
            numpyro.sample("x", decoder(mask_index=step % 4), obs=x)

    svi = SVI(model, lambda step: None, optax.adam(0.05), Trace_ELBO())
    state = svi.init(jax.random.key(0), 0)
    update = jax.jit(svi.update)
    for step in range(120):
        state, _ = update(state, step)
    assert update._cache_size() == 1
    trained = nnx.state(module, nnx.Param)
    nnx.replace_by_pure_dict(trained, svi.get_params(state)["decoder$params"])
    nnx.update(module, trained)
    assert float(jax.jit(lambda m: m().log_prob(x).mean())(module)) > -1.5 * np.log(2.0)


# --- errors -----------------------------------------------------------------------------------


def made(**options: Any) -> MADE:
    return MADE(**({"shape": (3, 3), "hidden_dims": (4,), "rngs": nnx.Rngs(0)} | options))


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"shape": ()}, ValueError, "Expected a shape of at least one dimension; got ()."),
        ({"shape": (3, 0)}, ValueError, "Expected shape >= 1; got 0."),
        ({"shape": 2.0}, TypeError, "Expected shape to be an int; got float."),
        ({"context_dim": 0}, ValueError, "Expected context_dim >= 1; got 0."),
        ({"covariate_dim": 0}, ValueError, "Expected covariate_dim >= 1; got 0."),
        (
            {"hidden_dims": ()},
            ValueError,
            "Expected at least one hidden layer; got hidden_dims=().",
        ),
        ({"hidden_dims": (4, 0)}, ValueError, "Expected hidden_dims >= 1; got 0."),
        (
            {"output": "poisson"},
            ValueError,
            "Expected output to be one of 'bernoulli', 'categorical', ",
        ),
        ({"num_categories": 1}, ValueError, "Expected num_categories >= 2; got 1."),
        ({"num_components": 0}, ValueError, "Expected num_components >= 1; got 0."),
        (
            {"shape": 3, "order": (0, 2, 2)},
            ValueError,
            "Expected order to be a permutation of range(3); got (0, 2, 2).",
        ),
        ({"num_masks": 0}, ValueError, "Expected num_masks >= 1; got 0."),
        ({"mask_seed": -1}, ValueError, "Expected mask_seed >= 0; got -1."),
        (
            {"hidden_dims": (4, 5), "residual": True},
            ValueError,
            "Expected equal hidden_dims under residual=True; got (4, 5).",
        ),
        ({"activation": "gelu"}, ValueError, "Expected activation to be one of 'elu', 'relu', "),
    ],
)
def test_arguments(options: dict, kind: type, text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        made(**options)


@pytest.mark.parametrize(
    ("options", "call", "kind", "text"),
    [
        (
            {"context_dim": 2},
            {},
            ValueError,
            "Expected a context of width 2 at MADE; got None. Pass the encoder's output, or build "
            "the likelihood with context_dim=None.",
        ),
        (
            {"context_dim": 2},
            {"context": np.ones((5, 3))},
            ValueError,
            "Expected a context of width 2 at MADE; got shape (5, 3).",
        ),
        (
            {},
            {"context": np.ones((5, 3))},
            ValueError,
            "Expected no context at MADE; got shape (5, 3). Build the likelihood with "
            "context_dim=3 to use one.",
        ),
        (
            {"context_dim": 2},
            {"context": np.ones((5, 2), int)},
            TypeError,
            "Expected a floating-point context at MADE; got int",
        ),
        (
            {"context_dim": 2},
            {"context": np.full((5, 2), np.nan)},
            ValueError,
            "Expected a context without NaN at MADE; got NaN. Check the data and the encoder.",
        ),
        (
            {"covariate_dim": 2},
            {},
            ValueError,
            "Expected covariates of width 2 at MADE; got None. Pass them, or build the likelihood "
            "with covariate_dim=None.",
        ),
        (
            {},
            {"covariates": np.ones((5, 3))},
            ValueError,
            "Expected no covariates at MADE; got shape (5, 3). Build the likelihood with "
            "covariate_dim=3 to use them.",
        ),
        (
            {"covariate_dim": 2},
            {"covariates": np.ones((5, 2), int)},
            TypeError,
            "Expected floating-point covariates at MADE; got int",
        ),
        (
            {"covariate_dim": 2},
            {"covariates": np.full((5, 2), np.nan)},
            ValueError,
            "Expected covariates without NaN at MADE; got NaN. Check the data.",
        ),
        (
            {"num_masks": 3},
            {"mask_index": 3},
            ValueError,
            "Expected mask_index in [0, 2]; got 3.",
        ),
        (
            {"num_masks": 3},
            {"mask_index": -1},
            ValueError,
            "Expected mask_index in [0, 2]; got -1.",
        ),
        ({}, {"mask_index": 1}, ValueError, "Expected mask_index in [0, 0]; got 1."),
        ({}, {"mask_index": 0.0}, TypeError, "Expected mask_index to be an int; got float."),
        ({}, {"mask_index": True}, TypeError, "Expected mask_index to be an int; got bool."),
    ],
)
def test_calls(options: dict, call: dict, kind: type, text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        made(**options)(**call)


@pytest.mark.parametrize(
    ("output", "bad", "support"),
    [
        ("bernoulli", 0.5, "{0, 1}"),
        ("bernoulli", np.nan, "{0, 1}"),
        ("categorical", 5.0, "{0, ..., 4}"),
        ("discretized_logistic_mixture", -1.0, "{0, ..., 4}"),
        ("normal", np.inf, "finite numbers"),
        ("logistic_mixture", np.nan, "finite numbers"),
    ],
)
def test_values(output: str, bad: float, support: str) -> None:
    distribution = made(shape=(2, 3), output=output, num_categories=5)()
    value = np.zeros((4, 2, 3))
    value[2, 1, 0] = bad
    text = f"Expected values in {support} at MADE.log_prob; got {bad} at position (2, 1, 0)."
    with pytest.raises(ValueError, match=re.escape(text)):
        distribution.log_prob(value)
    # Within a transformation numbers are unknown, and nothing can be said.
    jax.eval_shape(distribution.log_prob, value)


def test_shapes() -> None:
    distribution = made()()
    for shape in ((4, 3, 2), (3,), ()):
        text = f"Expected values of shape (..., 3, 3) at MADE.log_prob; got shape {shape}."
        with pytest.raises(ValueError, match=re.escape(text)):
            distribution.log_prob(np.zeros(shape))
    for shape in ((0,), (2, 0), (-1,)):
        text = f"Expected a sample shape of positive sizes; got {shape}."
        with pytest.raises(ValueError, match=re.escape(text)):
            distribution.sample(jax.random.key(0), shape)
