"""The contract of a guide family, over every registered member."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from cases import CASES, DIRECT
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.handlers import mask, seed, trace
from numpyro.infer.util import log_density
from reference import complex_step, conjugate, iaf, mean_field
from test_numpyro import models
from test_numpyro.models import family, module_params, named, normal, shaken, z_score

from numpyro_vae_ext.elbos import ImportanceWeightedELBO

MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name in DIRECT
    for i, case in enumerate(CASES["guides"][name])
]
IAFS = [member for member in MEMBERS if member.values[0] == "IAF"]
ROWS = 5


def build(name: str, case: dict) -> tuple[nnx.Module, jax.Array | None]:
    posterior = shaken(family(name, **case))
    width = case["context_dim"]
    return posterior, None if width is None else normal(ROWS, width, seed=1)


def law_of(posterior: nnx.Module, context: jax.Array | None) -> dist.Distribution:
    return posterior.distribution(context).expand((ROWS,))


@jax.jit
def drawn(posterior: nnx.Module, context: jax.Array | None):
    """A batch of samples, and what they carry."""
    return law_of(posterior, context).sample_with_intermediates(jax.random.key(0))


def reference_log_prob(name: str, case: dict, weights: dict, value, context):
    if name == "MeanField":
        heads = mean_field.heads(weights, context, case.get("activation", "elu"))
        return mean_field.log_prob(value, *heads)
    options = {k: case[k] for k in ("update", "activation") if k in case}
    return iaf.log_prob(value, weights, context, **options)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_starts_near_a_standard_normal(name: str, case: dict) -> None:
    """Around the origin at a zero context, with scales near 1 at any."""
    new = family(name, **case)

    @jax.jit
    def draw(new: nnx.Module, context: jax.Array | None) -> jax.Array:
        return new.distribution(context).sample(jax.random.key(1), (4000,))

    for scale in (0.0, 1.0):
        context = None
        if case["context_dim"] is not None:
            context = scale * jax.random.normal(jax.random.key(0), (1, case["context_dim"]))
        z = np.asarray(draw(new, context))
        assert np.abs(np.log(z.std(0))).max() < 0.8
        if scale == 0.0:
            assert np.abs(z.mean((0, 1) if z.ndim > 2 else 0)).max() < 0.3


@pytest.mark.parametrize("plates", [(), (ROWS,), (3, ROWS)])
@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_shapes_in_plates(name: str, case: dict, plates: tuple[int, ...]) -> None:
    posterior, context = build(name, case)
    if context is not None and not plates:
        context = context[0]

    def statement(posterior: nnx.Module, context: jax.Array | None) -> jax.Array:
        with seed(rng_seed=0), trace() as sites, numpyro.plate_stack("rows", list(plates)):
            value = nnx_module("posterior", posterior)("z", context)
        assert value.shape == (*plates, case["latent_dim"])
        site = sites["z"]
        assert site["fn"].log_prob(value, site["intermediates"]).shape == plates
        assert site["fn"].event_dim == 1 and site["fn"].has_rsample
        assert [k for k, s in sites.items() if s["type"] == "mutable"] == []
        return value

    jax.eval_shape(statement, posterior, context)


@pytest.mark.parametrize("batch", [(), (2, 3, ROWS)])
@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_any_left_batch(name: str, case: dict, batch: tuple[int, ...]) -> None:
    """Particles are dimensions on the left: rows do not mix, and the context may lack them."""
    posterior, _ = build(name, case)
    context = None if case["context_dim"] is None else normal(*batch[1:], case["context_dim"])

    @jax.jit
    def run(posterior: nnx.Module, context: jax.Array | None) -> tuple:
        law = posterior.distribution(context).expand(batch)
        value, carried = law.sample_with_intermediates(jax.random.key(0), (4,))
        log_prob = law.log_prob(value, carried)
        if name == "MeanField":
            assert law.base_dist.log_prob(value, carried).shape == value.shape
        return value, log_prob, posterior.log_prob(value[2], context)

    value, log_prob, one = run(posterior, context)
    assert value.shape == (4, *batch, case["latent_dim"])
    assert log_prob.shape == (4, *batch)
    np.testing.assert_allclose(log_prob[2], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_density_is_the_reference(exact: None, name: str, case: dict) -> None:
    posterior, context = build(name, case)
    value, carried = drawn(posterior, context)
    foreign = np.asarray(value) + 0.7

    @jax.jit
    def run(posterior: nnx.Module, context: jax.Array | None) -> tuple:
        known = law_of(posterior, context).log_prob(value, carried)
        return known, posterior.log_prob(foreign, context)

    known, other = run(posterior, context)
    numpy_context = None if context is None else np.asarray(context)
    expected = reference_log_prob(name, case, named(posterior), np.asarray(value), numpy_context)
    np.testing.assert_allclose(known, expected, rtol=1e-10)
    expected = reference_log_prob(name, case, named(posterior), foreign, numpy_context)
    np.testing.assert_allclose(other, expected, rtol=1e-10)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_density_is_the_change_of_variables(exact: None, name: str, case: dict) -> None:
    posterior, context = build(name, case)
    _, carried = drawn(posterior, context)

    @jax.jit
    def run(posterior: nnx.Module, context: jax.Array | None) -> tuple:
        def sample(noise: jax.Array, context: jax.Array | None) -> jax.Array:
            if name == "MeanField":
                loc, log_scale = posterior.loc_and_log_scale(context)
                return loc + jnp.exp(log_scale) * noise
            return posterior.distribution(context).transform.forward(noise)[0]

        axes = (0, None if context is None else 0)
        value = jax.vmap(sample, axes)(carried.noise, context)
        jacobian = jax.vmap(jax.jacfwd(sample), axes)(carried.noise, context)
        expected = dist.Normal(0.0, 1.0).log_prob(carried.noise).sum(-1)
        expected = expected - jnp.linalg.slogdet(jacobian)[1]
        return law_of(posterior, context).log_prob(value, carried), expected

    np.testing.assert_allclose(*run(posterior, context), rtol=1e-10)


@pytest.mark.parametrize("how", ["inverted", "path"])
@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_density_at_a_fixed_value_has_exact_derivatives(
    exact: None, name: str, case: dict, how: str
) -> None:
    """In the value, the context and every parameter, against the reference's complex step."""
    posterior, context = build(name, case)
    value, carried = drawn(posterior, context)

    def log_prob(posterior: nnx.Module, value: jax.Array, context: jax.Array | None) -> jax.Array:
        law = law_of(posterior, context)
        return law.log_prob(value, *([carried.path()] if how == "path" else [])).sum()

    argnums = (0, 1) if context is None else (0, 1, 2)
    found = jax.jit(jax.grad(log_prob, argnums))(posterior, value, context)
    given = {**named(posterior), "value": np.asarray(value)}
    if context is not None:
        given["context"] = np.asarray(context)

    def reference(given: dict) -> complex:
        arrays = (given["value"], given.get("context"))
        return reference_log_prob(name, case, given, *arrays).sum()

    expected = complex_step.gradient(reference, given)
    got = {**named(found[0]), "value": found[1]}
    if context is not None:
        got["context"] = found[2]
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        np.testing.assert_allclose(gradient, expected[key], rtol=1e-9, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_a_gradient_reaches_every_parameter(name: str, case: dict, kept: bool) -> None:
    posterior, context = build(name, case)

    def objective(posterior: nnx.Module, context: jax.Array | None) -> jax.Array:
        law = law_of(posterior, context)
        value, carried = law.sample_with_intermediates(jax.random.key(0))
        log_prob = law.log_prob(value, carried) if kept else law.log_prob(jnp.ones_like(value))
        return (log_prob + (value**2).sum(-1) * kept).sum()

    argnums = (0,) if context is None else (0, 1)
    found = jax.jit(jax.grad(objective, argnums))(posterior, context)
    gradient = named(found[0])
    # With one feature the masked nets see no z: their first weights have nothing to do.
    idle = {f"nets.{t}.layers.0.weight" for t in range(9)} if case["latent_dim"] == 1 else set()
    assert {k for k, v in gradient.items() if not v.any()} == idle & set(gradient)
    if context is not None:
        assert np.asarray(found[1]).any(-1).all()


@pytest.mark.parametrize("dtype_name", ["float32", "float64"])
@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_dtypes(exact: None, name: str, case: dict, dtype_name: str) -> None:
    posterior, context = build(name, {**case, "param_dtype": jnp.dtype(dtype_name)})
    context = None if context is None else context.astype(dtype_name)
    value, carried = drawn(posterior, context)

    @jax.jit
    def run(posterior: nnx.Module, context: jax.Array | None) -> tuple:
        law = law_of(posterior, context)
        return law.log_prob(value, carried), law.log_prob(value)

    arrays = (value, *run(posterior, context), *jax.tree.leaves(posterior))
    assert {str(x.dtype) for x in arrays} == {dtype_name}
    assert not any(x.weak_type for x in arrays)
    tolerance = 1e-10 if dtype_name == "float64" else 2e-4
    np.testing.assert_allclose(arrays[1], arrays[2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_save_and_load(name: str, case: dict) -> None:
    posterior, context = build(name, case)
    value, _ = drawn(posterior, context)
    saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(posterior)))
    fresh = family(name, **case)
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(fresh, state)
    score = jax.jit(lambda posterior: posterior.log_prob(value, context))
    np.testing.assert_array_equal(score(fresh), score(posterior))


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_masked_rows_score_zero(name: str, case: dict) -> None:
    posterior, context = build(name, case)
    rows = jnp.arange(ROWS) % 2 == 0

    @jax.jit
    def run(posterior: nnx.Module, context: jax.Array | None) -> tuple:
        with seed(rng_seed=0), trace() as sites, numpyro.plate("data", ROWS), mask(mask=rows):
            value = posterior("z", context)
        site = sites["z"]
        # A flow keeps its draw under a mask: it would have to invert itself otherwise.
        assert bool(site["intermediates"]) == (name == "IAF")
        kept = [site["intermediates"]] if site["intermediates"] else []
        found = [site["fn"].log_prob(value, *carried) for carried in (kept, [])]
        return found, jnp.where(rows, posterior.log_prob(value, context), 0.0)

    found, expected = run(posterior, context)
    for log_prob in found:
        np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "case"), IAFS)
def test_a_density_alone_costs_no_score(
    monkeypatch: pytest.MonkeyPatch, name: str, case: dict
) -> None:
    posterior, context = build(name, case)
    foreign = normal(ROWS, case["latent_dim"], seed=4)

    def total(foreign: jax.Array) -> jax.Array:
        return posterior.log_prob(foreign, context).sum()

    expected, _ = jax.value_and_grad(total)(foreign)

    def score(self: object, noise: jax.Array) -> jax.Array:
        raise AssertionError("Expected no score.")

    monkeypatch.setattr("numpyro_vae_ext.guides.iaf._Steps.score", score)
    np.testing.assert_allclose(total(foreign), expected, rtol=1e-6)
    with pytest.raises(AssertionError, match="no score"):
        jax.grad(total)(foreign)


@pytest.mark.parametrize(("name", "case"), IAFS)
def test_inverse_in_many_dimensions(exact: None, name: str, case: dict) -> None:
    posterior = shaken(family(name, **{**case, "latent_dim": 20}), scale=0.1)
    context = None if case["context_dim"] is None else normal(ROWS, case["context_dim"])
    value, carried = drawn(posterior, context)

    @jax.jit
    def run(posterior: nnx.Module, context: jax.Array | None) -> tuple:
        inverse = law_of(posterior, context).transform.inverse
        return inverse(value), jax.vmap(inverse)(jnp.stack([value, 3 * value]))

    alone, batched = run(posterior, context)
    np.testing.assert_allclose(alone, carried.noise, atol=1e-9)
    np.testing.assert_allclose(batched[0], carried.noise, atol=1e-9)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_mean_weight_is_the_evidence(name: str, case: dict) -> None:
    """E[exp(log weight)] = p(x) for any guide, per datum or jointly."""
    width = case["latent_dim"]
    posterior = shaken(family(name, **{**case, "context_dim": case["context_dim"] and width}), 0.1)
    x = 0.5 * normal(2, width, seed=3)
    if case["context_dim"] is None:
        model, guide = models.one_latent, models.one_posterior(posterior)
        truth = conjugate.global_log_evidence(np.asarray(x), 0.0)
    else:
        model, guide = models.conjugate, models.amortised(posterior)
        truth = conjugate.log_evidence(np.asarray(x), 0.0)
    elbo, params = ImportanceWeightedELBO(20_000), module_params(posterior=posterior)
    weights = jax.jit(lambda key: elbo.log_weights(key, params, model, guide, x))
    draws = np.exp(np.asarray(weights(jax.random.key(0))) - truth)
    assert draws.shape == (20_000, *np.shape(truth))
    assert np.abs(z_score(draws, 1.0)).max() < 4
    assert z_score(np.log(draws), 0.0).max() < 4  # and the bound is below


@pytest.mark.parametrize("update", ["affine", "gated"])
@pytest.mark.parametrize(("num_flows", "total"), [(1, 3.0), (2, 6.0), (8, 12.0)])
def test_scales_are_bounded(exact: None, update: str, num_flows: int, total: float) -> None:
    """Whatever the nets say: at their bounds the flow is a Normal whose scale is known."""
    posterior = family("IAF", latent_dim=2, context_dim=None, num_flows=num_flows, update=update)

    @jax.jit
    def log_prob(posterior: nnx.Module, value: jax.Array, sign: jax.Array) -> jax.Array:
        for net in posterior.nets:
            net.layers[-1].kernel[...] *= 0
            net.layers[-1].bias[...] = sign * jnp.array([0.0, 0.0, 1e6, 1e6])
        return posterior.log_prob(value)

    for sign in (-1.0, 1.0):
        scale = np.exp(sign * total)
        value = scale * jnp.array([[0.3, -1.2]])
        expected = dist.Normal(0.0, scale).log_prob(value).sum(-1)
        np.testing.assert_allclose(log_prob(posterior, value, sign), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "name", sorted(CASES["guides"].keys() - {"AutoPosterior", "AutoAmortized"})
)
def test_raw_counts_are_a_context(name: str) -> None:
    """A context of any scale: finite draws and densities, and gradients to learn from."""
    posterior = family(name, latent_dim=2, context_dim=64)
    counts = 1000.0 * jax.random.uniform(jax.random.key(0), (50, 64))

    def guide() -> jax.Array:
        post = nnx_module("posterior", posterior)
        with numpyro.plate("rows", 50):
            return post("z", counts)

    @jax.jit
    @jax.value_and_grad
    def loss(params: dict) -> jax.Array:
        seeded = seed(guide, jax.random.key(1))
        log_q, sites = log_density(seeded, (), {}, params)
        return jnp.mean(sites["z"]["value"] ** 2) - log_q

    value, gradient = loss(module_params(posterior=posterior))
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if name == "MeanField":
        law = posterior.distribution(counts)
        assert (jnp.abs(jnp.log(law.variance)) <= 6.0).all()
        assert jnp.abs(gradient["posterior$params"]["log_scale"]["kernel"]).min() > 0
        assert jnp.abs(posterior.distribution(counts / 1000.0).mean).max() < 0.8
