"""Groups of particles: the loss is the mean of their bounds, and so is every gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI
from numpyro.primitives import mutable
from reference import conjugate as oracle
from reference import groups, importance_weighted
from test_numpyro.models import difference, normal, z_score

from numpyro_vae_ext.elbos import ImportanceWeightedELBO, TraceFreeBits_ELBO
from numpyro_vae_ext.training import compile, fit

KEY = jax.random.key(6)
GRADIENTS = ("reparam", "stl", "dreg")
# Chunks that end within a group, and a ragged last one.
LAYOUTS = ({}, {"vectorize_particles": False}, {"chunk_size": 4})
ROWS, DIM = 3, 2
PARAMS = {
    "mu": np.array([0.2, -0.1]),
    "A": np.array([[0.4, 0.1], [-0.2, 0.6]]),
    "b": np.array([0.3, -0.3]),
    "log_scale": np.array([-0.2, 0.1]),
}


def conjugate(x: jax.Array) -> None:
    """z ~ N(mu, I), x ~ N(z, I) for every row, of which there are twice as many."""
    mu = numpyro.param("mu", PARAMS["mu"])
    with numpyro.plate("data", 2 * len(x), subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def linear(x: jax.Array) -> None:
    """z ~ N(A x + b, exp(log_scale)^2) for every row."""
    A, b, log_scale = (numpyro.param(name, PARAMS[name]) for name in ("A", "b", "log_scale"))
    with numpyro.plate("data", 2 * len(x), subsample_size=len(x)):
        numpyro.sample("z", dist.Normal(x @ A.T + b, jnp.exp(log_scale)).to_event(1))


def slope(elbo: ImportanceWeightedELBO, x: jax.Array) -> Any:
    """Loss and gradient, compiled."""
    step = jax.jit(jax.value_and_grad(lambda p, x: elbo.loss(KEY, p, conjugate, linear, x)))
    return step(PARAMS, x)


def noise_of(x: jax.Array, count: int) -> np.ndarray:
    """The standard noise of all particles, as documented: one key each."""

    def draw(key: jax.Array) -> jax.Array:
        with trace() as sites:
            substitute(seed(linear, jax.random.split(key)[1]), PARAMS)(x)
        return (sites["z"]["value"] - x @ PARAMS["A"].T - PARAMS["b"]) / jnp.exp(
            PARAMS["log_scale"]
        )

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, count)))


@pytest.mark.parametrize(
    ("gradient", "particles", "outer"),
    [("stl", 1, 4), ("dreg", 1, 4), ("reparam", 3, 2), ("stl", 3, 2), ("dreg", 3, 2)],
)
def test_mean_of_the_groups_in_closed_form(
    exact: None, gradient: str, particles: int, outer: int
) -> None:
    """Loss and every gradient: the mean over groups of formulas written out by hand."""
    x = normal(ROWS, DIM)
    loss, found = slope(ImportanceWeightedELBO(particles, num_outer=outer, gradient=gradient), x)
    noise = noise_of(x, particles * outer).reshape(outer, particles, ROWS, DIM)
    each = [
        importance_weighted.linear_gaussian(group, np.asarray(x), PARAMS, gradient)
        for group in noise
    ]
    np.testing.assert_allclose(loss, -2.0 * np.mean([bound for bound, _ in each]), rtol=1e-12)
    for name, value in found.items():
        expected = -2.0 * np.mean([gradients[name] for _, gradients in each], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_log_weights_of_groups_and_of_one(exact: None) -> None:
    """One group has the draws and, bit by bit, the bound that it had."""
    x = normal(ROWS, DIM)
    one, two = ImportanceWeightedELBO(6), ImportanceWeightedELBO(3, num_outer=2)
    assert one.num_outer == 1

    @jax.jit
    def run(x: jax.Array) -> Any:
        args = (KEY, PARAMS, conjugate, linear, x)
        return [(elbo.log_weights(*args), elbo.loss(*args)) for elbo in (one, two)]

    (weights, loss), (grouped, mean) = run(x)
    assert weights.shape == (6, ROWS) and grouped.shape == (2, 3, ROWS)
    np.testing.assert_array_equal(grouped.reshape(6, ROWS), weights)
    np.testing.assert_array_equal(loss, -(2.0 * one.bound(weights)).sum())
    bounds = [two.bound(group) for group in grouped]
    np.testing.assert_allclose(mean, -2.0 * np.mean(bounds, axis=0).sum(), rtol=1e-12)


def bits(logits: jax.Array) -> tuple[Any, Any]:
    """Bits that are rows of one kind: their gradients are draws of one law."""

    def model() -> None:
        with numpyro.plate("data", len(logits)):
            b = numpyro.sample("b", dist.Bernoulli(groups.PRIOR))
            numpyro.sample("x", dist.Normal(2.0 * b, 1.0), obs=jnp.full(len(logits), groups.DATUM))

    def guide() -> None:
        a = numpyro.param("a", logits)
        with numpyro.plate("data", len(logits)):
            numpyro.sample("b", dist.Bernoulli(logits=a))

    return model, guide


def test_vimco_has_the_enumerated_mean(exact: None) -> None:
    """Of the bound of a group, not of all particles; and the variance falls with the groups."""
    logits = jnp.full(40_000, groups.LOGIT)
    pair = bits(logits)
    variances = []
    for outer in (1, 3):
        elbo = ImportanceWeightedELBO(2, num_outer=outer, gradient="vimco")
        step = jax.jit(jax.grad(lambda a, e=elbo: -e.loss(KEY, {"a": a}, *pair)))
        found = np.asarray(step(logits))
        assert abs(z_score(found, groups.slope(2))) < 4
        assert abs(z_score(found, groups.slope(6))) > 8
        variances.append(found.var())
    assert 0.3 < variances[1] / variances[0] < 0.37


def test_layouts_agree(exact: None) -> None:
    """The same particles side by side, one at a time and in chunks."""
    x = normal(ROWS, DIM)
    for particles, layout in ((3, LAYOUTS[2]), (1, LAYOUTS[1])):
        options = {"num_outer": 6 // particles, "gradient": "dreg"}
        first, other = (
            slope(ImportanceWeightedELBO(particles, **options, **extra), x)
            for extra in ({}, layout)
        )
        assert difference(first, other) < 1e-10


def shared(x: jax.Array) -> tuple[Any, Any]:
    """A latent outside of a subsampled plate, which the guide does not have."""

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(1), 1.0).to_event(1))
        with numpyro.plate("data", len(x), subsample_size=2):
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=numpyro.subsample(x, 1))

    def guide() -> None:
        loc = numpyro.param("loc", jnp.array([0.4]))
        numpyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    return model, guide


def test_plain_bound_beside_a_subsample(exact: None) -> None:
    """Nothing is averaged inside of a logarithm: as free as one particle, and unbiased."""
    x = normal(6, 1, seed=2)
    model, guide = shared(x)
    elbo = ImportanceWeightedELBO(num_outer=5, gradient="stl")

    def step(key: jax.Array) -> Any:
        loss = jax.value_and_grad(lambda loc: elbo.loss(key, {"loc": loc}, model, guide))
        return loss(jnp.array([0.4]))

    losses, found = jax.jit(jax.vmap(step))(jax.random.split(KEY, 2_000))
    value, slopes = groups.plain(np.asarray(x), 0.4, 0.5)
    assert abs(z_score(losses, -value)) < 4
    assert abs(z_score(found[:, 0], -slopes)) < 4
    with pytest.raises(ValueError, match="when num_particles > 1; got site 'z' outside it"):
        jax.eval_shape(lambda: ImportanceWeightedELBO(2, num_outer=5).loss(KEY, {}, model, guide))


@pytest.mark.parametrize(
    "elbo",
    [ImportanceWeightedELBO(num_outer=5, **layout) for layout in LAYOUTS]
    + [TraceFreeBits_ELBO(5, free_bits=0.0, vectorize_particles=False)],
)
def test_one_subsample_for_all_groups(exact: None, elbo: Any) -> None:
    """Rows that are powers of two: the loss tells which of them it is the sum of."""
    rows = 2.0 ** jnp.arange(8)

    def model() -> None:
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("mine", 8, subsample_size=3) as index:
            numpyro.factor("row", rows[index])
        with numpyro.plate("both", 8, subsample_size=3) as index:
            numpyro.factor("other", 256 * rows[index])

    def guide() -> None:
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("both", 8, subsample_size=3) as index:
            numpyro.factor("own", 512 * rows[index])

    loss = jax.jit(jax.vmap(lambda key: elbo.loss(key, {}, model, guide)))
    found = -3 / 8 * np.asarray(loss(jax.random.split(KEY, 4)))
    np.testing.assert_allclose(found, np.round(found), atol=1e-6)
    both, mine = np.divmod(np.round(found).astype(int), 256)
    assert all(bin(number).count("1") == 3 for number in (*mine, *-both))
    assert len(set(mine)) > 1 and len(set(both)) > 1


def test_state_is_that_of_all_particles(exact: None) -> None:
    """Plain bound and groups: the mean over all particles."""

    def model() -> None:
        holder = mutable("seen", {"z": jnp.zeros(())})
        holder["z"] = numpyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        numpyro.sample("z", dist.Normal(0.5, 1.0))

    def draw(key: jax.Array) -> jax.Array:
        return trace(seed(guide, jax.random.split(key)[1])).get_trace()["z"]["value"]

    draws = jax.vmap(draw)(jax.random.split(KEY, 6))
    for particles, outer in ((1, 6), (3, 2)):
        elbo = ImportanceWeightedELBO(particles, num_outer=outer)
        step = jax.jit(lambda s, e=elbo: e.loss_with_mutable_state(KEY, {"seen": s}, model, guide))
        state = step({"z": jnp.zeros(())})["mutable_state"]
        np.testing.assert_allclose(state["seen"]["z"], np.mean(draws))


def test_trains_under_svi(exact: None) -> None:
    """The best recipe: the plain bound over many draws, sticking the landing."""
    x = 2.0 + normal(10, DIM)
    elbo = ImportanceWeightedELBO(num_outer=16, gradient="stl")

    def model(x: jax.Array) -> None:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(DIM), 1.0).to_event(1))
        with numpyro.plate("data", 10, subsample_size=len(x)):
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        loc = numpyro.param("loc", jnp.zeros(DIM))
        spread = numpyro.param("spread", jnp.ones(DIM), constraint=dist.constraints.positive)
        numpyro.sample("z", dist.Normal(loc, spread).to_event(1))

    svi = SVI(model, guide, optax.adam(0.1), elbo)
    result = fit(KEY, compile(svi), x, num_epochs=300, batch_size=10, progress_bar=False)
    # No noise is left at the posterior; the history's losses are per row.
    np.testing.assert_allclose(result.params["loc"], x.sum(0) / 11, atol=1e-2)
    np.testing.assert_allclose(result.params["spread"], 11**-0.5, rtol=1e-2)
    evidence = oracle.global_log_evidence(np.asarray(x), 0.0)
    np.testing.assert_allclose(10 * result.history.step_losses[-1], -evidence, atol=1e-2)


def test_a_failure_of_one_particle_is_named(exact: None) -> None:
    """Whichever particle of whichever group it is."""

    def model(x: jax.Array) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("broken", jnp.where(z > 1.2, jnp.nan, x.sum()))

    def guide(x: jax.Array) -> None:
        numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.zeros(())), 1.0))

    svi = SVI(model, guide, optax.sgd(0.0), ImportanceWeightedELBO(num_outer=4))
    with pytest.warns(UserWarning, match="non-finite log_prob at site 'broken'"):
        result = fit(KEY, svi, np.zeros(20), num_epochs=1, batch_size=1, progress_bar=False)
    skipped = result.history.skipped
    assert 2 < len(skipped) < 18
    assert {(step.site, step.reason) for step in skipped} == {("broken", "log_prob")}


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="^Expected num_outer >= 1; got 0.$"):
        ImportanceWeightedELBO(num_outer=0)
    for value, name in ((2.0, "float"), (True, "bool"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^Expected num_outer to be an int; got {name}.$"):
            ImportanceWeightedELBO(num_outer=value)
    with pytest.raises(TypeError, match="positional"):
        ImportanceWeightedELBO(3, 2)
    # Its baselines are made of the other particles of a group.
    with pytest.raises(ValueError, match="^Expected num_particles >= 2 under gradient='vimco'; go"):
        ImportanceWeightedELBO(num_outer=4, gradient="vimco")
