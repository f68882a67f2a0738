"""Guides made from a model: the evidence, densities by hand, layouts, and what goes wrong."""

from __future__ import annotations

import pickle
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cases import CASES, resolved
from flax import nnx
from jax.scipy.special import betaln, gammaln
from numpyro.contrib.module import nnx_module
from numpyro.distributions import biject_to
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO, autoguide, init_to_value
from reference import conjugate as oracle
from test_numpyro import models
from test_numpyro.models import normal, shaken, z_score

from numpyro_vae_ext import guides
from numpyro_vae_ext.diagnostics import log_evidence, to_arviz
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import IAF, AutoAmortized, AutoPosterior, MeanField

KEY = jax.random.key(5)
SmallIAF = partial(IAF, hidden_dims=(5,))


def registered(name: str) -> list:
    """The families that the registry lists for one of the guides."""
    cases = CASES["guides"][name]
    return [pytest.param(resolved(guides, c)["family"], id=c["family"]["name"]) for c in cases]


def widened(params: Any, name: str, is_vgp: bool) -> Any:
    """Off its start, and wider than the posterior: the weights have light tails."""
    params = shaken(params, 0.05)
    family = params[f"{name}$params"]
    scale = family.get("base", family.get("conditional", family))
    start = scale["log_scale"]
    wider = 1.2 if is_vgp else 0.3
    if isinstance(start, dict):
        start["bias"] = start["bias"] + wider
    else:
        scale["log_scale"] = start + wider
    if "reverse" in family:
        part = "nets" if "nets" in family["reverse"] else "loc"
        family["reverse"][part] = jax.tree.map(lambda x: 0.3 * x, family["reverse"][part])
    if is_vgp:
        family["targets"] = 0.3 * family["targets"]
    return params


def started(model: Any, guide: Any, *args: Any, jit: bool = False, loss: Any = None) -> Any:
    """(svi, state) of the host; the first call of a guide."""
    svi = SVI(model, guide, optax.adam(0.05), loss or Trace_ELBO())
    static = [i for i, arg in enumerate(args, 1) if not isinstance(arg, jax.Array)]
    init = jax.jit(svi.init, static_argnums=static) if jit else svi.init
    return svi, init(KEY, *args)


def initial(model: Any, guide: Any, *args: Any, shake: float = 0.0, jit: bool = True) -> Any:
    svi, state = started(model, guide, *args, jit=jit)
    params = svi.get_params(state)
    return shaken(params, shake) if shake else params


def weights(model: Any, guide: Any, params: Any, *args: Any, count: int = 20_000) -> np.ndarray:
    elbo = ImportanceWeightedELBO(count)
    run = jax.jit(lambda key, params: elbo.log_weights(key, params, model, guide, *args))
    return np.asarray(run(KEY, params))


def assert_unbiased(log_weights: np.ndarray, truth: Any) -> None:
    """E[w] is the evidence within 4 standard errors, and the bound is below it."""
    draws = np.exp(log_weights - np.asarray(truth))
    assert draws.shape[1:] == np.shape(truth)
    assert np.abs(z_score(draws, 1.0)).max() < 4
    assert z_score(np.log(draws), 0.0).max() < 4


def recorded(guide: Any, params: Any, *args: Any) -> Any:
    return trace(seed(substitute(guide, data=params), KEY)).get_trace(*args)


def log_q(sites: Any) -> jax.Array:
    total = jnp.zeros(())
    for site in sites.values():
        if site["type"] == "sample":
            given = [site["intermediates"]] if site["intermediates"] else []
            total += site["fn"].log_prob(site["value"], *given).sum()
    return total


# --- models -----------------------------------------------------------------------------------


def constrained_model(x: jax.Array) -> None:
    """A rate, a simplex, a probability, and a part of it: supports of all sorts, evidence known."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 3.0))
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.array([1.0, 2.0, 1.5])))
    part = numpyro.sample("part", dist.Uniform(0.5, 2.5))
    upper = numpyro.sample("upper", dist.Uniform(0.0, part))  # a support that depends on a site
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Exponential(rate), obs=x)
    numpyro.sample("counts", dist.Multinomial(3, shares), obs=jnp.array([2, 0, 1]))
    numpyro.sample("hit", dist.Bernoulli(upper / part), obs=1)


def constrained_evidence(x: jax.Array) -> Any:
    gamma = 2 * jnp.log(3.0) - gammaln(2.0) + gammaln(2.0 + len(x))
    gamma = gamma - (2.0 + len(x)) * jnp.log(3.0 + x.sum())
    alpha, counts = jnp.array([1.0, 2.0, 1.5]), jnp.array([2.0, 0.0, 1.0])
    shares = gammaln(4.0) - gammaln(counts + 1).sum()
    shares += gammaln(alpha.sum()) - gammaln(alpha.sum() + 3.0)
    shares += (gammaln(alpha + counts) - gammaln(alpha)).sum()
    return gamma + shares + betaln(2.0, 1.0)


def local_model(x: jax.Array, batch_size: int | None = None) -> None:
    """Two local latents: a positive one, and one row by row of an inner plate."""
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        batch = numpyro.subsample(x, event_dim=1)
        rate = numpyro.sample("rate", dist.Gamma(2.0, 3.0))
        numpyro.sample("y", dist.Exponential(rate), obs=jnp.abs(batch[:, 0]))
        with numpyro.plate("time", 2):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
            numpyro.sample("v", dist.Normal(w, 1.0), obs=batch[:, 1:].T)


def local_evidence(x: jax.Array) -> Any:
    rate = jnp.log(2.0) + 2 * jnp.log(3.0) - 3 * jnp.log(3.0 + jnp.abs(x[:, 0]))
    return np.asarray(rate) + oracle.log_evidence(np.asarray(x[:, 1:]), 0.0)


def hierarchical(x: jax.Array, batch_size: int | None = None) -> None:
    """t ~ N(0, I), z_n ~ N(t, I), x_n ~ N(z_n, I): global and local."""
    t = numpyro.sample("t", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        batch = numpyro.subsample(x, event_dim=1)
        z = numpyro.sample("z", dist.Normal(t, 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=batch)


def many_supports() -> None:
    numpyro.sample("real", dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(1))
    numpyro.sample("positive", dist.LogNormal(0.0, 1.0).expand((2,)))
    numpyro.sample("unit", dist.Beta(2.0, 3.0))
    numpyro.sample("simplex", dist.Dirichlet(jnp.ones((2, 3))))
    numpyro.sample("chol", dist.LKJCholesky(3, 2.0))
    numpyro.sample("interval", dist.Uniform(-1.0, jnp.array([2.0, 3.0])))
    numpyro.sample(
        "ordered",
        dist.TransformedDistribution(
            dist.Normal(jnp.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
        ),
    )


def identity(x: jax.Array, batch_size: int | None = None) -> jax.Array:
    return x


def plate_rows(x: jax.Array, batch_size: int | None = None) -> jax.Array:
    return numpyro.subsample(x, event_dim=1)


def exact_amortised(x: jax.Array, encoder: Any = identity, **kwargs: Any) -> Any:
    """A guide for `models.conjugate`, and parameters at which it is the posterior."""
    guide = AutoAmortized(models.conjugate, encoder, family=MeanField, **kwargs)
    params = initial(models.conjugate, guide, x)
    width, family = x.shape[-1], params["auto_local_family$params"]
    family["loc"] = {"kernel": 0.5 * jnp.eye(width), "bias": jnp.zeros(width)}
    scale = jnp.full(width, 0.5 * jnp.log(0.5))
    family["log_scale"] = {"kernel": jnp.zeros((width, width)), "bias": scale}
    return guide, params


# --- the evidence and the density -------------------------------------------------------------


@pytest.mark.parametrize("family", registered("AutoPosterior"))
def test_mean_weight_is_the_evidence(family: Any) -> None:
    x, model = 0.5 * normal(3, 2), models.one_latent
    guide = AutoPosterior(model, family, init_scale=0.6)
    params = widened(initial(model, guide, x), "auto_family", family.func is guides.VGP)
    assert_unbiased(weights(model, guide, params, x), oracle.global_log_evidence(x, 0.0))


@pytest.mark.parametrize("family", [MeanField, SmallIAF], ids=["MeanField", "IAF"])
@pytest.mark.parametrize("name", ["one_latent", "constrained"])
def test_mean_weight_is_the_evidence_in_any_space(name: str, family: Any) -> None:
    x, scale = 0.5 * normal(3, 2), 0.7
    if name == "one_latent":
        model, truth = models.one_latent, oracle.global_log_evidence(np.asarray(x), 0.0)
    else:
        model, x = constrained_model, jnp.abs(x[:, 0])
        truth, scale = constrained_evidence(x), [0.8, 1.5, 1.5, 2.5, 2.5]
    guide = AutoPosterior(model, family, init_scale=scale)
    params = initial(model, guide, x, shake=0.1)
    assert_unbiased(weights(model, guide, params, x), truth)


@pytest.mark.parametrize("family", registered("AutoAmortized"))
def test_mean_weight_per_row_is_the_evidence(family: Any) -> None:
    x = 0.5 * normal(3, 2)
    guide = AutoAmortized(models.conjugate, lambda x: x, family=family)
    params = initial(models.conjugate, guide, x)
    params = widened(params, "auto_local_family", family.func is guides.VGP)
    found = weights(models.conjugate, guide, params, x)
    assert_unbiased(found, oracle.log_evidence(np.asarray(x), 0.0))


@pytest.mark.parametrize("family", [MeanField, SmallIAF], ids=["MeanField", "IAF"])
def test_mean_weight_per_datum_is_the_evidence(family: Any) -> None:
    x = 0.5 * normal(3, 3)
    encoder = shaken(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), 0.1)
    guide = AutoAmortized(local_model, lambda x, b=None: encoder(x), family=family)
    params = initial(local_model, guide, x, shake=0.1)
    assert set(params) == {"auto_local_family$params"}
    assert_unbiased(weights(local_model, guide, params, x), local_evidence(x))


@pytest.mark.parametrize("global_family", [None, SmallIAF], ids=["same", "IAF"])
def test_mean_weight_of_global_and_local_is_the_evidence(global_family: Any) -> None:
    x = 0.5 * normal(2, 2)
    guide = AutoAmortized(
        hierarchical, identity, family=MeanField, global_family=global_family, init_scale=0.8
    )
    params = initial(hierarchical, guide, x, shake=0.1)
    truth = oracle.hierarchical_log_evidence(np.asarray(x), 0.0)
    assert_unbiased(weights(hierarchical, guide, params, x), truth)
    # A subsample is fine for one particle, and no bound for more.
    one = ImportanceWeightedELBO()
    assert np.isfinite(jax.jit(lambda: one.loss(KEY, params, hierarchical, guide, x, 1))())
    text = "Expected every latent and observed site inside the subsampled plate 'data'"
    with pytest.raises(ValueError, match=text):
        ImportanceWeightedELBO(2).loss(KEY, params, hierarchical, guide, x, 1)


def free_entries(name: str, value: jax.Array) -> jax.Array:
    """The entries that determine a value, flat."""
    if name == "simplex":
        value = value[..., :-1]
    elif name == "chol":
        value = value[jnp.tril_indices(3, -1)]
    return value.ravel()


class Start(NamedTuple):
    """What a guide reads of a start."""

    loc: Any
    scale_tril: Any
    sites: dict[str, tuple[int, ...]]


def a_start(**sites: tuple[int, ...]) -> Start:
    """A dense one, for sites of these shapes."""
    size = sum(int(np.prod(shape)) for shape in sites.values())
    rng = np.random.default_rng(3)
    triangle = np.tril(0.2 * rng.standard_normal((size, size)), -1)
    return Start(rng.standard_normal(size), triangle + np.diag(rng.uniform(0.3, 2.0, size)), sites)


MANY = {
    "real": (2, 3),
    "positive": (2,),
    "unit": (),
    "simplex": (2, 2),
    "chol": (3,),
    "interval": (2,),
    "ordered": (3,),
}


@pytest.mark.parametrize("start", [None, a_start(**MANY)], ids=["plain", "start"])
def test_density_by_hand(exact: None, start: Any) -> None:
    """log q is that of the family minus the log-determinants of all that follows."""
    guide = AutoPosterior(
        many_supports, SmallIAF, init_scale=jnp.linspace(0.1, 1.0, 21), start=start
    )
    params = initial(many_supports, guide, shake=0.3)
    scale_tril = jnp.eye(21) if start is None else jnp.asarray(start.scale_tril)
    if start is not None:
        params["auto_scale_tril"] = scale_tril
    laws: dict[str, Any] = {}
    sites: dict[str, Any] = {}

    @jax.jit
    def run() -> Any:
        sites.update(recorded(guide, params))
        laws.update(trace(seed(many_supports, 0)).get_trace())
        values = {k: site["value"] for k, site in sites.items() if site["type"] == "sample"}
        inside = [laws[k]["fn"].support(values[k]).all() for k in laws]
        return values, log_q(sites), jnp.array(inside)

    values, found, inside = run()
    assert inside.all() and [k for k in sites if k in laws] == list(laws)
    for name, site in laws.items():
        assert sites[name]["fn"].shape() == site["fn"].shape()
        assert sites[name]["fn"].event_dim == site["fn"].event_dim

    shift, scale = params["auto_step_loc"], jnp.exp(params["auto_step_log_scale"])

    def all_entries(z: jax.Array) -> jax.Array:
        u, parts = params["auto_loc"] + scale_tril @ (shift + scale * z), []
        laws = trace(seed(many_supports, 0)).get_trace()
        for name, site in laws.items():
            transform = biject_to(site["fn"].support)
            shape = transform.inverse_shape(site["fn"].shape())
            size = int(np.prod(shape))
            parts.append(free_entries(name, transform(u[:size].reshape(shape))))
            u = u[size:]
        assert not u.size
        return jnp.concatenate(parts)

    @jax.jit
    def by_hand(z: jax.Array) -> Any:
        log_prob = family_of(guide, params).log_prob(z)
        return all_entries(z), log_prob - jnp.linalg.slogdet(jax.jacfwd(all_entries)(z))[1]

    assert sites["_auto_latent"]["infer"] == {"is_auxiliary": True}
    entries, expected = by_hand((values["_auto_latent"] - shift) / scale)
    drawn = jnp.concatenate([free_entries(k, values[k]) for k in laws])
    np.testing.assert_allclose(drawn, entries, rtol=1e-11)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def family_of(guide: Any, params: Any, name: str = "auto_family") -> Any:
    """The family of a guide with the parameters that it is run with."""
    graph, state = nnx.split(guide._family)
    nnx.replace_by_pure_dict(state, params[f"{name}$params"])
    return nnx.merge(graph, state)


def test_amortised_density_by_hand(exact: None) -> None:
    """Row by row: the family at the row's context, the parts in the model's order."""
    x = normal(4, 3)
    guide = AutoAmortized(local_model, identity, family=SmallIAF)
    params = initial(local_model, guide, x, shake=0.3)

    @jax.jit
    def run(params: Any) -> Any:
        sites = recorded(guide, params, x)
        values = {k: site["value"] for k, site in sites.items() if site["type"] == "sample"}
        z = values["_auto_local"]
        expected = family_of(guide, params, "auto_local_family").log_prob(z, x) - z[:, 0]
        return values, log_q(sites), expected.sum()

    values, found, expected = run(params)
    z = values["_auto_local"]
    np.testing.assert_allclose(values["rate"], jnp.exp(z[:, 0]), rtol=1e-12)
    np.testing.assert_allclose(values["w"], z[:, 1:].T, rtol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [identity, plate_rows])
def test_weights_of_a_subsample_are_those_of_its_rows(exact: None, encoder: Any) -> None:
    """At the posterior log w = log p(x_n), whatever the batch, its size and the data's."""
    x = normal(5, 2)
    guide, params = exact_amortised(x, encoder)
    elbo = ImportanceWeightedELBO(3)
    layouts = [(x, 2), (x, 3), (normal(7, 2, seed=4), None), (normal(7, 2, seed=4), 4)]
    for data, batch_size in layouts if encoder is identity else layouts[:1]:
        args = (params, models.conjugate, guide, data, batch_size)
        both = jax.jit(lambda args=args: (elbo.log_weights(KEY, *args), elbo.loss(KEY, *args)))
        found, loss = map(np.asarray, both())
        truth = oracle.log_evidence(np.asarray(data), 0.0)
        assert found.shape == (3, batch_size or len(data))
        np.testing.assert_allclose(found, found[:1].repeat(3, 0), rtol=1e-9)
        rows = np.abs(found[0][:, None] - truth).argmin(1)
        assert len(set(rows)) == len(rows)
        np.testing.assert_allclose(found[0], truth[rows], rtol=1e-9)
        np.testing.assert_allclose(loss, -truth[rows].mean() * len(data), rtol=1e-9)


def test_plates_of_the_guide(exact: None) -> None:
    """`create_plates` draws the subsample, and the model replays it."""
    x = normal(5, 2)

    def plates(x: jax.Array, batch_size: int | None = None) -> Any:
        return numpyro.plate("data", len(x), subsample_size=batch_size)

    guide, params = exact_amortised(x, create_plates=plates)
    elbo = ImportanceWeightedELBO(3)
    found = jax.jit(lambda: elbo.log_weights(KEY, params, models.conjugate, guide, x, 2))()
    assert found.shape == (3, 2)
    assert np.ptp(found, axis=0).max() < 1e-9


def test_diagnostics_and_predictive(exact: None) -> None:
    x = normal(5, 2)
    guide, params = exact_amortised(x)
    new = normal(3, 2, seed=8)
    truth = oracle.log_evidence(np.asarray(new), 0.0)
    args = (KEY, models.conjugate, guide, new)
    found = log_evidence(*args, params=params, num_samples=3, progress_bar=False)
    np.testing.assert_allclose(found, truth, rtol=1e-9)
    data = to_arviz(*args, params=params, num_samples=4, num_chains=1)
    assert data["posterior"]["z"].shape == (1, 4, 3, 2)
    draws = Predictive(guide, params=params, num_samples=4)(KEY, new)
    assert draws["z"].shape == (4, 3, 2)
    draws = Predictive(models.conjugate, guide=guide, params=params, num_samples=4)(KEY, new)
    assert set(draws) >= {"x"}


def test_draws_medians_and_quantiles() -> None:
    """Of a Normal in unconstrained space, whose quantiles are known; deterministic sites too."""

    def model(x: jax.Array) -> None:
        a = numpyro.sample("a", dist.LogNormal(0.0, 1.0))
        b = numpyro.sample("b", dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(2))
        numpyro.deterministic("twice", 2 * a)
        numpyro.sample("x", dist.Normal(a * b.sum(), 1.0), obs=x)

    guide = AutoPosterior(model, MeanField, init_loc_fn=init_to_value(values={"a": 2.0}))
    x = jnp.array(0.3)
    params = initial(model, guide, x)
    sample = jax.jit(lambda: guide.sample_posterior(KEY, params, x, sample_shape=(4, 2)))
    draws = sample()
    shapes = {name: value.shape for name, value in draws.items()}
    assert shapes == {"a": (4, 2), "b": (4, 2, 2, 3), "twice": (4, 2)}
    np.testing.assert_allclose(draws["twice"], 2 * draws["a"], rtol=1e-6)
    assert jax.eval_shape(lambda: guide.sample_posterior(KEY, params, x))["b"].shape == (2, 3)
    middle, found, other = jax.jit(
        lambda: (
            guide.median(params, x),
            guide.quantiles(params, [0.1, 0.5], x),
            guide.median(params, x, rng_key=KEY, num_samples=100),
        )
    )()
    # Exact, whatever the draws; a deterministic site's are by Monte Carlo.
    np.testing.assert_allclose(middle["a"], 2.0, rtol=1e-6)
    np.testing.assert_array_equal(other["b"], middle["b"])
    assert found["b"].shape == (2, 2, 3) and found["twice"].shape == (2,)
    np.testing.assert_allclose(found["b"][1], middle["b"], rtol=1e-6, atol=1e-9)
    expected = dist.Normal(jnp.log(2.0), 0.1).icdf(0.1)
    np.testing.assert_allclose(jnp.log(found["a"][0]), expected, rtol=1e-6)
    np.testing.assert_allclose(found["twice"], 2 * found["a"], rtol=0.01)
    assert (np.asarray(found["twice"]) != 2 * found["a"]).all()
    with pytest.raises(ValueError, match="^Expected num_samples >= 1; got 0.$"):
        guide.median(params, x, num_samples=0)


def test_draws_of_a_subsample_belong_together() -> None:
    def model(x: jax.Array, batch_size: int) -> None:
        with numpyro.plate("data", len(x), subsample_size=batch_size):
            batch = numpyro.subsample(x, event_dim=1)
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.deterministic("sum", z + 100 * batch[:, 0])

    x = jnp.arange(6.0)[:, None]
    guide = AutoAmortized(model, lambda x, b: 100 * x, family=MeanField)
    params = initial(model, guide, x, 2)
    params["auto_local_family$params"]["loc"] = {"kernel": jnp.eye(1), "bias": jnp.zeros(1)}
    params["auto_local_family$params"]["log_scale"]["kernel"] = jnp.zeros((1, 1))
    draws, middle = jax.jit(
        lambda: (
            guide.sample_posterior(KEY, params, x, 2, sample_shape=(20,)),
            guide.median(params, x, 2, rng_key=KEY, num_samples=20),
        )
    )()
    assert draws["z"].shape == draws["sum"].shape == (20, 2)
    rows = np.asarray(jnp.round(draws["z"] / 100))
    assert (rows == rows[0]).all() and rows[0, 0] != rows[0, 1]
    np.testing.assert_allclose(draws["sum"], draws["z"] + 100 * rows, atol=1e-3)
    np.testing.assert_allclose(middle["z"], 100 * rows[0], atol=5)


# --- life in the host -------------------------------------------------------------------------


def test_start_is_fixed_and_nothing_traced_is_kept() -> None:
    """Though the first call is under jit; the guide is pickled and copied as well."""
    x = 0.5 * normal(4, 2)
    encoder = FirstArgument(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    guide = AutoAmortized(hierarchical, encoder, family=MeanField)
    svi, state = started(hierarchical, guide, x, None, jit=True)
    params = svi.get_params(state)
    assert set(params) == {
        "auto_encoder$params",
        "auto_family$params",
        "auto_local_family$params",
        "auto_loc",
    }
    update = jax.jit(svi.update, static_argnums=2)
    for batch_size in (None, 2, 2):
        state, loss = update(state, x, batch_size)
        assert np.isfinite(loss)
    trained = svi.get_params(state)
    np.testing.assert_array_equal(trained["auto_loc"], params["auto_loc"])
    del trained["auto_loc"], params["auto_loc"]
    moved = jax.tree.leaves(jax.tree.map(jnp.subtract, trained, params))
    assert min(models.largest(x) for x in moved) > 0
    trained = svi.get_params(state)
    again = pickle.loads(pickle.dumps(guide))
    for found, expected in zip(
        recorded(again, trained, x).values(), recorded(guide, trained, x).values(), strict=True
    ):
        if found["type"] == "sample":
            np.testing.assert_array_equal(found["value"], expected["value"])


class FirstArgument(nnx.Module):
    """A network as an encoder."""

    def __init__(self, net: nnx.Module) -> None:
        self.net = net

    def __call__(self, x: jax.Array, *_: Any) -> jax.Array:
        return self.net(x)


def test_run_of_the_host_finds_the_posterior() -> None:
    """Gamma-Exponential: the posterior of the rate is Gamma(2 + 4, 3 + sum x)."""
    x = jnp.array([0.4, 1.1, 0.2, 2.0])

    def model(x: jax.Array) -> None:
        rate = numpyro.sample("rate", dist.Gamma(2.0, 3.0))
        numpyro.sample("x", dist.Exponential(rate).expand((4,)).to_event(1), obs=x)

    guide = AutoPosterior(model, MeanField)
    svi = SVI(model, guide, optax.adam(0.05), Trace_ELBO())
    params = svi.run(KEY, 300, x, progress_bar=False).params
    draws = guide.sample_posterior(KEY, params, sample_shape=(2000,))["rate"]
    np.testing.assert_allclose(draws.mean(), 6.0 / (3.0 + x.sum()), rtol=0.1)
    np.testing.assert_allclose(draws.std(), 6.0**0.5 / (3.0 + x.sum()), rtol=0.2)


def test_mean_field_objective_of_the_host(exact: None) -> None:
    """It takes the divergence of a Delta for its log-density against the model's."""
    x = 0.5 * normal(2, 2)
    guide = AutoAmortized(hierarchical, identity, family=MeanField)
    params = initial(hierarchical, guide, x, shake=0.1)
    args = (KEY, params, hierarchical, guide, x)
    found = jax.jit(lambda: [elbo.loss(*args) for elbo in (Trace_ELBO(), TraceMeanField_ELBO())])()
    np.testing.assert_allclose(*found, rtol=1e-9)


def test_support_that_depends_on_a_parameter() -> None:
    """The parameter's value of the moment counts, and its gradient is that of the density."""

    def model() -> None:
        upper = numpyro.param("upper", 1.0)
        numpyro.sample("z", dist.Uniform(0.0, upper))

    guide = AutoPosterior(model, MeanField)
    params = initial(model, guide) | {"upper": jnp.array(3.0)}
    elbo = ImportanceWeightedELBO(10)
    slope = jax.jit(jax.grad(lambda upper: elbo.loss(KEY, params | {"upper": upper}, model, guide)))
    assert abs(slope(jnp.array(3.0))) < 1e-6  # the evidence is 1 for every value
    sites = recorded(guide, params)
    u = params["auto_loc"] + sites["_auto_latent"]["value"]
    np.testing.assert_allclose(sites["z"]["value"], 3 * jax.nn.sigmoid(u[0]), rtol=1e-6)


def test_type_and_order_do_not_depend_on_jit() -> None:
    """The host orders its vector as it happens to find the sites; parameters could not be kept."""

    def model(x: jax.Array, _: Any) -> None:
        b = numpyro.sample("b", dist.Normal(jnp.full((), 3.0, x.dtype), 0.01))
        a = numpyro.sample("a", dist.Normal(jnp.full((2,), -3.0, x.dtype), 0.01).to_event(1))
        numpyro.sample("x", dist.Normal(a.sum() + b, 1.0), obs=x)

    x = jnp.array(0.1, "float32")
    for jit in (True, False):
        svi, state = started(model, AutoPosterior(model, MeanField), x, None, jit=jit)
        params = svi.get_params(state)
        np.testing.assert_allclose(params["auto_loc"], [3.0, -3.0, -3.0], atol=0.1)
        assert {str(v.dtype) for v in jax.tree.leaves(params)} == {str(params["auto_loc"].dtype)}


def test_list_of_guides() -> None:
    def model(x: jax.Array) -> None:
        rate = numpyro.sample("rate", dist.Gamma(2.0, 3.0))
        t = numpyro.sample("t", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Exponential(rate * jnp.exp(0 * t)), obs=x)

    x = jnp.array(0.7)
    guide = autoguide.AutoGuideList(model)
    hidden = (block(model, hide=["t"]), block(model, hide=["rate"]))
    guide.append(AutoPosterior(hidden[0], MeanField, init_scale=0.8))
    guide.append(AutoPosterior(hidden[1], MeanField, init_scale=0.8, prefix="other"))
    params = initial(model, guide, x, jit=False)
    truth = np.log(2.0 * 9.0 / 3.7**3)
    assert_unbiased(weights(model, guide, params, x), truth)
    draws = guide.sample_posterior(KEY, params, sample_shape=(50,))
    assert {name: v.shape for name, v in draws.items()} == {"rate": (50,), "t": (50,)}
    # The host hands one key to all parts; their draws have nothing to do with each other.
    assert np.abs(np.corrcoef(jnp.log(draws["rate"]), draws["t"])[0, 1]) < 0.5
    assert set(guide.median(params)) == {"rate", "t"}


class Counting(nnx.Module):
    """A scale by a parameter, and mutable state that counts the calls."""

    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(()))
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x: jax.Array, *_: Any) -> jax.Array:
        self.calls[...] = self.calls[...] + 1.0
        return x * self.scale[...]


def test_mutable_state_of_model_and_encoder() -> None:
    net = Counting()

    def model(x: jax.Array) -> None:
        count = nnx_module("net", net)
        t = numpyro.sample("t", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(t, 1.0))
            numpyro.sample("x", dist.Normal(count(z), 1.0), obs=x[:, 0])

    x = normal(3, 1)
    guide = AutoAmortized(model, Counting(), family=MeanField)
    svi, state = started(model, guide, x, loss=ImportanceWeightedELBO(2))
    update = jax.jit(svi.update)
    before = state.mutable_state
    for _ in range(2):
        state, _ = update(state, x)
    found = {k: v["state"]["calls"] - before[k]["state"]["calls"] for k, v in state[1].items()}
    assert found == {"net$state": 2, "auto_encoder$state": 2}
    assert isinstance(net.calls[...], jax.Array) and net.calls[...] == 0


def test_prediction_without_the_data_that_it_predicts() -> None:
    """What was observed at the first call is a latent site of the model later, even a discrete."""

    def model(x: jax.Array, y: Any = None) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Bernoulli(logits=z + x[:, 0]), obs=y)

    x, y = normal(4, 1), jnp.array([0, 1, 1, 0])
    guide = AutoAmortized(model, lambda x, y=None: x, family=MeanField)
    params = initial(model, guide, x, y)
    new = Predictive(model, guide=guide, params=params, num_samples=2)(KEY, normal(6, 1))
    assert new["y"].shape == (2, 6)
    assert set(guide.sample_posterior(KEY, params, normal(6, 1))) == {"z"}
    with pytest.raises(ValueError, match="^Expected the arguments of the model, which the enc"):
        guide.sample_posterior(KEY, params)


def regression(x: jax.Array, y: Any = None) -> None:
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    part = numpyro.sample("part", dist.Uniform(0.0, jnp.exp(w)))  # a support that depends on a site
    slope = numpyro.deterministic("slope", x[:, 0] * part)
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=slope), obs=y)


def test_prediction_on_new_rows() -> None:
    """Without what is predicted, with another number of rows, and with the rows left out."""
    x, new, y = normal(4, 1), normal(6, 1, seed=1), jnp.array([0, 1, 1, 0])
    guide = AutoPosterior(regression, MeanField)
    params = initial(regression, guide, x, y, jit=False)
    draws = guide.sample_posterior(KEY, params, new, sample_shape=(3,))
    np.testing.assert_allclose(draws["slope"], draws["part"][:, None] * new[:, 0], rtol=1e-6)
    for kwargs in ({"guide": guide, "params": params}, {"posterior_samples": draws}):
        found = Predictive(regression, num_samples=3, **kwargs)(KEY, new)
        assert found["y"].shape == found["slope"].shape == (3, 6)
    # As the host's AutoNormal: what depends on the rows is that of the first call.
    alone = guide.sample_posterior(KEY, params, sample_shape=(3,))
    np.testing.assert_array_equal(alone["part"], draws["part"])
    np.testing.assert_allclose(alone["slope"], draws["part"][:, None] * x[:, 0], rtol=1e-6)
    middle, found = guide.median(params, num_samples=9), guide.quantiles(params, 0.5, num_samples=9)
    np.testing.assert_allclose(middle["slope"], middle["part"] * x[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found["w"], middle["w"], rtol=1e-6)
    # A copy on a disk has no data, and says so.
    copied = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ValueError, match="^Expected the arguments of the model, on which determ"):
        copied.median(params)
    assert set(copied.median(params, x, num_samples=9)) == {"w", "part", "slope"}


def test_questions_without_arguments_after_a_first_call_under_jit() -> None:
    x = normal(4, 2)
    guide = AutoPosterior(models.conjugate, MeanField)
    params = initial(models.conjugate, guide, x, jit=True)
    assert guide.sample_posterior(KEY, params, sample_shape=(2,))["z"].shape == (2, 4, 2)
    assert guide.quantiles(params, [0.1, 0.9], num_samples=9)["z"].shape == (2, 4, 2)
    guide = AutoPosterior(regression, MeanField)
    params = initial(regression, guide, x, jnp.ones(4), jit=True)
    with pytest.raises(ValueError, match="^Expected the arguments of the model, on which determ"):
        guide.sample_posterior(KEY, params)


# --- errors -----------------------------------------------------------------------------------


def run_once(guide: Any, *args: Any) -> Any:
    return seed(guide, 0)(*args)


def discrete(x: jax.Array) -> None:
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Bernoulli(0.3).mask(True))
        numpyro.sample("x", dist.Normal(k, 1.0).to_event(0), obs=x[:, 0])


def masked(x: jax.Array) -> None:
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(jnp.arange(len(x)) > 0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def within(inner: str, outer: str, **sizes: Any) -> Any:
    def model(x: jax.Array) -> None:
        with numpyro.plate(outer, len(x)), numpyro.plate(inner, 3, **sizes):
            numpyro.sample("z", dist.Normal(0.0, 1.0))

    return model


def nothing(x: jax.Array) -> None:
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])


X = np.ones((4, 2))
DISCRETE = (
    "got site 'k' with the distribution BernoulliProbs. Marginalise it with the host's "
    "TraceEnum_ELBO and hide it from this guide, or use an objective for discrete latents."
)
OUTSIDE = "Declare 'data' outermost, or write the guide by hand."
ERRORS = {
    "discrete": (
        lambda: AutoPosterior(discrete),
        f"Expected continuous latent sites under AutoPosterior; {DISCRETE}",
    ),
    "discrete-amortised": (
        lambda: AutoAmortized(discrete, identity),
        f"Expected continuous latent sites under AutoAmortized; {DISCRETE}",
    ),
    "none": (
        lambda: AutoPosterior(nothing),
        "Expected at least one continuous latent site in the model; got none.",
    ),
    "none-amortised": (
        lambda: AutoAmortized(nothing, identity),
        "Expected at least one continuous latent site in the model; got none.",
    ),
    "mask": (
        lambda: AutoAmortized(masked, identity),
        "Expected latent sites without a mask under AutoAmortized; got site 'z' with one, and site "
        "'x', whose density reads what is masked out. Mask site 'x' there as well, or write the "
        "guide by hand.",
    ),
    "subsample": (
        lambda: AutoPosterior(partial(models.conjugate, batch_size=3)),
        "Expected no latent site inside a subsampled plate under AutoPosterior; got site 'z' in "
        "plate 'data' (3 of 4 rows). Use AutoAmortized, or pass the full data.",
    ),
    "no-plate": (
        lambda: AutoAmortized(models.one_latent, identity),
        "Expected a plate 'data' around latent sites of the model; got latent sites in the plates "
        "none. Name the plate of the local latents, or use AutoPosterior.",
    ),
    "other-plates": (
        lambda: AutoAmortized(within("b", "a"), identity),
        "Expected a plate 'data' around latent sites of the model; got latent sites in the plates "
        "['a', 'b']. Name the plate of the local latents, or use AutoPosterior.",
    ),
    "rows": (
        lambda: AutoAmortized(models.conjugate, lambda x: x[:3]),
        "Expected the encoder's rows to match plate 'data' (4 rows, 4 of them drawn); got a "
        "context of shape (3, 2). Return one row of context per row of the plate.",
    ),
    "rows-of-a-vector": (
        lambda: AutoAmortized(partial(models.conjugate, batch_size=3), lambda x: x[:, 0]),
        "Expected the encoder's rows to match plate 'data' (4 rows, 3 of them drawn); got a "
        "context of shape (4,). Return one row of context per row of the plate.",
    ),
    "outer": (
        lambda: AutoAmortized(within("data", "chain"), identity),
        "Expected local latent sites inside plate 'data' with no other plate outside of it; got "
        f"site 'z' in plate 'chain'. {OUTSIDE}",
    ),
    "inner-subsample": (
        lambda: AutoAmortized(within("time", "data", subsample_size=2), identity),
        "Expected no subsampled plate inside plate 'data' around a latent site under "
        "AutoAmortized; got site 'z' in plate 'time' (2 of 3 rows). Use all rows of 'time'.",
    ),
    "scale": (
        lambda: AutoPosterior(models.one_latent, init_scale=0.0),
        "Expected init_scale to be a positive number or 2 of them; got 0.0.",
    ),
    "scales": (
        lambda: AutoPosterior(models.one_latent, init_scale=[0.1, 0.1, 0.2]),
        "Expected init_scale to be a positive number or 2 of them; got [0.1, 0.1, 0.2].",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    build, text = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        run_once(build(), jnp.asarray(X))


def test_what_is_no_family() -> None:
    text = "Expected a guide family from family(latent_dim, context_dim); got {}. Pass IAF, "
    for family, got in (
        (lambda *_, **__: 3.0, "float"),
        (MeanField(2), "MeanField"),
        (None, "NoneType"),
    ):
        for guide in (
            AutoPosterior(models.one_latent, family),
            AutoAmortized(models.conjugate, identity, family=family),
        ):
            with pytest.raises(TypeError, match=f"^{re.escape(text.format(got))}"):
                run_once(guide, jnp.asarray(X))


def test_a_family_of_another_width() -> None:
    def build(latent_dim: int, context_dim: int | None, **options: Any) -> Any:
        return MeanField(latent_dim + 1, context_dim, **options)

    text = "Expected family to build a family of latent_dim=2 and context_dim={}; got 3 and {}."
    for guide, width in (
        (AutoPosterior(models.one_latent, build), None),
        (AutoAmortized(models.conjugate, identity, family=build), 2),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text.format(width, width))}"):
            run_once(guide, jnp.asarray(X))


def test_rows_of_another_width() -> None:
    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)), numpyro.plate("time", x.shape[1]):
            numpyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoAmortized(model, lambda x: x[:, :1], family=MeanField)
    run_once(guide, jnp.asarray(X))
    text = (
        "Expected 2 unconstrained numbers per row of plate 'data', as at the first call; got 3. "
        "Only the number of rows may change: build a guide for each size of the plates inside."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        run_once(guide, jnp.ones((4, 3)))
