"""The importance-weighted bound: plates, subsamples, layouts, masks, scales, mutable state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cases import CASES
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.handlers import mask, scale
from numpyro.infer import SVI, Trace_ELBO
from reference import conjugate as oracle
from test_numpyro import models
from test_numpyro.models import difference, family, module_params, normal, shaken, z_score

from numpyro_vae_ext.elbos import ImportanceWeightedELBO

CASES_ELBO = CASES["elbos"]["ImportanceWeightedELBO"]
GRADIENTS = ("reparam", "stl", "dreg")
LAYOUTS = (
    {},
    {"vectorize_particles": False},
    {"chunk_size": 2},
    {"chunk_size": 3, "vectorize_particles": False},
)
KEY = jax.random.key(3)


def pair(name: str = "MeanField", width: int = 2, rows: int = 6, **kwargs):
    """A conjugate model, a shaken guide, its parameters and data."""
    posterior = shaken(family(name, latent_dim=width, context_dim=width, **kwargs), 0.15)
    params = {**module_params(posterior=posterior), "mu": jnp.full(width, 0.2)}
    return models.conjugate, models.amortised(posterior), params, normal(rows, width, seed=5)


def replicated(elbo, params, model, guide, *args, repetitions: int = 400) -> np.ndarray:
    def loss(key: jax.Array) -> jax.Array:
        return elbo.loss(key, params, model, guide, *args)

    return np.asarray(jax.jit(jax.vmap(loss))(jax.random.split(KEY, repetitions)))


@pytest.mark.parametrize("case", CASES_ELBO)
def test_host_contract(case: dict) -> None:
    """Trains under SVI, step by step and in a loop, without a second compilation."""
    model, guide, params, x = pair()
    svi = SVI(model, guide, optax.adam(1e-2), ImportanceWeightedELBO(**case))
    state = jax.jit(svi.init)(KEY, x)
    update = jax.jit(svi.update)
    for _ in range(3):
        state, loss = update(state, x)
    assert update._cache_size() == 1
    assert loss.shape == () and not loss.weak_type and jnp.isfinite(loss)
    assert jnp.isfinite(jax.jit(svi.evaluate)(state, x))


def test_svi_run_lowers_the_loss() -> None:
    model, guide, _, x = pair()
    elbo = ImportanceWeightedELBO(5, gradient="dreg")
    svi = SVI(model, guide, optax.adam(0.05), elbo)
    result = svi.run(KEY, 200, x + 3.0, progress_bar=False)
    assert result.losses[-20:].mean() < result.losses[:5].mean() - 1


@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_one_bound_for_every_batch_size(name: str) -> None:
    """Full batch, minibatch and single rows: one number, below the evidence."""
    model, guide, params, x = pair(name)
    truth = oracle.log_evidence(np.asarray(x), np.asarray(params["mu"])).sum()
    draws = [
        -replicated(ImportanceWeightedELBO(20), params, model, guide, x, size)
        for size in (None, 3, 1)
    ]
    for draw in draws:
        assert z_score(draw, truth) < 4
    for draw in draws[1:]:
        error = np.hypot(*(d.std() / np.sqrt(len(d)) for d in (draw, draws[0])))
        assert abs(draw.mean() - draws[0].mean()) < 4 * error


@pytest.mark.parametrize(
    ("name", "gradient"), [("MeanField", "reparam"), ("IAF", "stl"), ("IAF", "dreg")]
)
def test_layouts_agree_on_value_and_gradient(exact: None, name: str, gradient: str) -> None:
    """The same particles, side by side, one at a time and in (ragged) chunks."""
    options = {"hidden_dims": (4,), "num_flows": 1} if name == "IAF" else {}
    model, guide, params, x = pair(name, **options)
    found = []
    for layout in LAYOUTS:
        elbo = ImportanceWeightedELBO(5, gradient=gradient, **layout)
        loss = jax.value_and_grad(lambda p, elbo=elbo: elbo.loss(KEY, p, model, guide, x))
        found.append(jax.jit(loss)(params))
    for other in found[1:]:
        assert difference(found[0], other) < 1e-10


def test_gradients_share_one_value(exact: None) -> None:
    model, guide, params, x = pair("IAF")
    for particles in (1, 5):
        elbos = [ImportanceWeightedELBO(particles, gradient=gradient) for gradient in GRADIENTS]
        losses = jax.jit(lambda p, e=elbos: [elbo.loss(KEY, p, model, guide, x) for elbo in e])
        found = losses(params)
        np.testing.assert_allclose(found, found[0], rtol=1e-12)


def test_bound_is_that_of_its_log_weights(exact: None) -> None:
    model, guide, params, x = pair()
    elbo = ImportanceWeightedELBO(7)
    weights = elbo.log_weights(KEY, params, model, guide, x, 4)
    assert weights.shape == (7, 4)
    bound = jax.nn.logsumexp(weights, 0) - np.log(7)
    np.testing.assert_allclose(elbo.loss(KEY, params, model, guide, x, 4), -1.5 * bound.sum())
    np.testing.assert_allclose(elbo.bound(weights), bound)


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_one_particle_is_the_hosts_elbo(exact: None, gradient: str) -> None:
    """The same key, the same number; and the same gradient where it is the same estimator."""
    model, guide, params, x = pair("IAF")
    ours = ImportanceWeightedELBO(1, gradient=gradient)
    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, e=elbo: e.loss(KEY, p, model, guide, x)))(params)
        for elbo in (ours, Trace_ELBO())
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    assert difference(found[1]["mu"], expected[1]["mu"]) < 1e-10
    assert (difference(found[1], expected[1]) < 1e-10) == (gradient == "reparam")


def test_one_particle_is_as_free_as_the_host(exact: None) -> None:
    """A global latent beside a subsampled plate, and a scale on one site alone."""

    def model(x: jax.Array) -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 6, subsample_size=len(x)):
            with scale(scale=0.5):
                z = numpyro.sample("z", dist.Normal(w, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: jax.Array) -> None:
        numpyro.sample("w", dist.Normal(0.1, 1.0))
        with numpyro.plate("data", 6, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(x, 1.0))

    x = normal(3)
    for gradient in GRADIENTS:
        ours = ImportanceWeightedELBO(1, gradient=gradient).loss(KEY, {}, model, guide, x)
        np.testing.assert_allclose(ours, Trace_ELBO().loss(KEY, {}, model, guide, x), rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_subsample_is_shared_by_all_particles(layout: dict) -> None:
    """Model, guide and all particles see the same rows: the weights of a row vary by no more."""
    rows = 1e3 * jnp.arange(8.0)

    def model() -> None:
        with numpyro.plate("data", 8, subsample_size=3) as index:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.factor("row", rows[index] + 0.0 * z)

    def guide() -> None:
        with numpyro.plate("data", 8, subsample_size=3) as index:
            numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.factor("row", 2 * rows[index])

    elbo = ImportanceWeightedELBO(5, **layout)
    weights = jax.jit(lambda key: elbo.log_weights(key, {}, model, guide))
    seen = []
    for key in jax.random.split(KEY, 4):
        found = np.asarray(weights(key))
        np.testing.assert_allclose(found, np.broadcast_to(found[0], (5, 3)), atol=1e-3)
        seen.append(np.sort(-found[0]))
        assert set(np.round(seen[-1])) <= set(np.asarray(rows)) and len(set(seen[-1])) == 3
    assert len({tuple(np.round(s)) for s in seen}) > 1


def test_nested_plates() -> None:
    """Two common plates in odd places, a third for the data alone, both of them subsampled."""

    def sites(guided: bool) -> None:
        with (
            numpyro.plate("outer", 4, subsample_size=2, dim=-4),
            numpyro.plate("inner", 6, subsample_size=3, dim=-2),
        ):
            law = dist.Normal(0.3, 1.2) if guided else dist.Normal(0.0, 1.0)
            z = numpyro.sample("z", law)
            if not guided:
                with numpyro.plate("pixel", 5, dim=-1):
                    numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.ones((2, 1, 3, 5)))

    elbo = ImportanceWeightedELBO(30)
    weights = elbo.log_weights(KEY, {}, lambda: sites(False), lambda: sites(True))
    assert weights.shape == (30, 2, 3)
    draws = -replicated(elbo, {}, lambda: sites(False), lambda: sites(True))
    truth = 4 * 6 * oracle.global_log_evidence(np.ones((5, 1)), 0.0)
    assert z_score(draws, truth) < 4
    assert abs(draws.mean() - truth) < 1.0


def test_no_common_plate_gives_one_joint_bound() -> None:
    posterior = shaken(family("IAF", latent_dim=2), 0.1)
    model, guide = models.one_latent, models.one_posterior(posterior)
    params, x = module_params(posterior=posterior), 0.3 * normal(3, 2)
    elbo = ImportanceWeightedELBO(10)
    assert elbo.log_weights(KEY, params, model, guide, x).shape == (10,)
    truth = oracle.global_log_evidence(np.asarray(x), 0.0)
    assert z_score(-replicated(elbo, params, model, guide, x), truth) < 4


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_row_mask_is_dropping_the_rows(
    exact: None, name: str, gradient: str, particles: int
) -> None:
    _, _, params, x = pair(name)
    posterior = family(name, latent_dim=2, context_dim=2)
    kept = jnp.array([True, False, True, True, False, True])

    def model(x: jax.Array, rows: jax.Array) -> None:
        with numpyro.plate("data", len(x)), mask(mask=rows):
            z = numpyro.sample("z", dist.Normal(numpyro.param("mu"), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: jax.Array, rows: jax.Array) -> None:
        post = nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x)), mask(mask=rows):
            post("z", x)

    elbo = ImportanceWeightedELBO(particles, gradient=gradient)
    spoilt = jnp.where(kept[:, None], x, 1e6)

    def loss(p: dict, x: jax.Array) -> jax.Array:
        return elbo.loss(KEY, p, model, guide, x, kept)

    step = jax.jit(jax.value_and_grad(loss))
    found, again = (step(params, data) for data in (x, spoilt))
    assert difference(found, again) < 1e-9
    # The noise of a row depends on the number of rows: the same weights, row by row, instead.
    weigh = jax.jit(lambda rows: elbo.log_weights(KEY, params, model, guide, x, rows))
    weights, full = weigh(kept), weigh(jnp.ones(6, bool))
    np.testing.assert_allclose(weights, jnp.where(kept, full, 0.0), rtol=1e-12)
    expected = jax.nn.logsumexp(full[:, kept], 0) - np.log(particles)
    np.testing.assert_allclose(found[0], -expected.sum(), rtol=1e-12)


def test_one_scale_of_all_sites_multiplies_the_bound(exact: None) -> None:
    model, guide, params, x = pair()
    elbo = ImportanceWeightedELBO(4)
    plain = elbo.loss(KEY, params, model, guide, x)
    scaled = [scale(f, scale=0.25) for f in (model, guide)]
    np.testing.assert_allclose(elbo.loss(KEY, params, *scaled, x), 0.25 * plain)
    rows = jnp.arange(1.0, 7.0)
    scaled = [scale(f, scale=rows) for f in (model, guide)]
    bound = elbo.bound(elbo.log_weights(KEY, params, model, guide, x))
    np.testing.assert_allclose(elbo.loss(KEY, params, *scaled, x), -(rows * bound).sum())


def test_ragged_last_batch() -> None:
    """One compiled loss a batch size; every batch of rows has its own weights."""
    model, guide, params, x = pair(rows=7)
    elbo = ImportanceWeightedELBO(3)
    loss = jax.jit(lambda x: elbo.loss(KEY, params, model, guide, x))
    assert all(jnp.isfinite(loss(x[i : i + 3])) for i in range(0, 7, 3))
    assert elbo.log_weights(KEY, params, model, guide, x[6:]).shape == (3, 1)


class Counting(nnx.Module):
    """Running mean of its input, a counter, and one parameter."""

    def __init__(self) -> None:
        self.mean = nnx.BatchStat(jnp.zeros(2))
        self.count = nnx.BatchStat(jnp.array(0))
        self.weight = nnx.Param(jnp.ones(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] = self.count[...] + 1
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * x.mean(0)
        return self.weight[...] * (x - x.mean(0))


@pytest.mark.parametrize("layout", [{}, {"chunk_size": 2}])
@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_mutable_state(gradient: str, particles: int, layout: dict) -> None:
    """State of the guide and of the model, which sees the particles, under every estimator."""
    encoder, decoder = Counting(), Counting()

    def model(x: jax.Array) -> None:
        net = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        net = nnx_module("encoder", encoder)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(net(x), 0.7).to_event(1))

    x = 1.0 + normal(6, 2)
    elbo = ImportanceWeightedELBO(particles, gradient=gradient, **layout)
    svi = SVI(model, guide, optax.sgd(0.0), elbo)
    state = jax.jit(svi.init)(KEY, x)
    update = jax.jit(svi.update)
    for _ in range(2):
        state, loss = update(state, x)
    encoded, decoded = (state.mutable_state[f"{k}coder$state"]["state"] for k in ("en", "de"))
    # The host's init runs both programs once.
    assert encoded["count"] == decoded["count"] == 3
    np.testing.assert_allclose(encoded["mean"], 0.875 * x.mean(0), rtol=1e-5)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state.mutable_state))
    params = {**svi.get_params(state), **state.mutable_state}
    keys = jax.random.split(KEY, particles) if particles > 1 else KEY[None]

    @jax.jit
    def run(params: dict) -> tuple:
        args = (params, model, guide, x)
        one = elbo.__class__(1)
        each = jax.vmap(lambda key: one.loss_with_mutable_state(key, *args)["mutable_state"])(keys)
        return elbo.loss(KEY, *args), elbo.loss_with_mutable_state(KEY, *args), each

    loss, found, each = run(params)
    np.testing.assert_allclose(loss, found["loss"], rtol=1e-5)
    # The mean over the particles: nearer to the last one than any particle by itself.
    expected = np.mean(each["decoder$state"]["state"]["mean"], axis=0)
    got = found["mutable_state"]["decoder$state"]["state"]["mean"]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_no_mutable_state_is_none() -> None:
    model, guide, params, x = pair()
    found = ImportanceWeightedELBO(2).loss_with_mutable_state(KEY, params, model, guide, x)
    assert found["mutable_state"] is None
