"""The contract of a prior: its density, its samples, and the evidence under every family."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cases import CASES, HIERARCHICAL
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from reference import masked_flow
from reference import priors as oracle
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

from numpyro_vae_ext import priors
from numpyro_vae_ext.elbos import ImportanceWeightedELBO

MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES["priors"].items()
    for i, case in enumerate(cases)
]
FAMILIES = ("MeanField", "IAF", "Auxiliary", "VGP")
NAMES = tuple(CASES["priors"])
ROWS, CONTEXT = 3, 2
KEY = jax.random.key(3)


def small(name: str, latent_dim: int, context_dim: int | None = CONTEXT) -> nnx.Module:
    """A family with few weights."""
    options = {
        "MeanField": {},
        "IAF": {"hidden_dims": (5,)},
        "Auxiliary": {"aux_dim": 1, "hidden_dims": (5,)},
        "VGP": {"input_dim": 1, "num_inducing": 4, "hidden_dims": (5,)},
    }[name]
    return family(name, latent_dim=latent_dim, context_dim=context_dim, **options)


def member(name: str, case: dict, **options: Any) -> nnx.Module:
    return getattr(priors, name)(**case, **options, rngs=nnx.Rngs(0))


def encoder_of(width: int) -> Callable[[jax.Array], jax.Array]:
    """A fixed map of inputs of any shape to contexts."""
    weight = np.random.default_rng(9).normal(size=(width, CONTEXT))
    return lambda u: jnp.reshape(u, (len(u), -1)) @ jnp.asarray(weight, u.dtype)


def built(name: str, case: dict, guide: str = "MeanField") -> tuple[Any, Callable[[Any], Any]]:
    """Modules away from their start, and the function that makes a distribution of them."""
    prior = shaken(member(name, case))
    if name != "VampPrior":
        return prior, lambda prior: prior()
    encode = encoder_of(int(np.prod(prior.input_shape)))
    modules = (prior, shaken(small(guide, case.get("latent_dim", 2)), 0.2))
    return modules, lambda modules: modules[0](modules[1], encode, rng_key=KEY)


def reference(name: str, case: dict, modules: Any, guide: str) -> Callable[[np.ndarray], Any]:
    """The log-density in NumPy."""
    if name == "Mixture":
        weights = named(modules)
        parts = [weights[key] for key in ("logits", "locs", "log_scales")]
        return lambda z: oracle.mixture(z, *parts)
    if name == "FlowPrior":
        weights = named(modules)
        return lambda z: masked_flow.log_prob(z, weights, None, case.get("activation", "elu"))
    prior, posterior = modules
    inputs, weights = prior.pseudo_inputs[...], named(posterior)
    if prior.bounds is not None:
        inputs = jnp.clip(inputs, *prior.bounds)
    context = np.asarray(encoder_of(inputs[0].size)(inputs))
    return lambda z: oracle.vamp(guide, z, weights, context)


@pytest.mark.parametrize(
    ("name", "case", "guide"),
    [pytest.param(*m.values, "MeanField", id=m.id) for m in MEMBERS]
    + [pytest.param("VampPrior", CASES["priors"]["VampPrior"][0], "IAF", id="IAF")],
)
def test_shapes_and_density(exact: None, name: str, case: dict, guide: str) -> None:
    """The density is the reference's, the distribution an argument of a compiled program."""
    modules, make = built(name, case, guide)
    dim = case.get("latent_dim", 2)
    law = make(modules)
    assert law.batch_shape == () and law.event_shape == (dim,) and not law.has_rsample
    assert law.support.event_dim == 1

    @jax.jit
    def run(law: Any, z: jax.Array) -> tuple[jax.Array, ...]:
        wide = law.expand((3, 5))
        drawn = wide.sample(KEY, (2,))
        assert law.sample(KEY).shape == (dim,)
        assert wide.log_prob(z[0, 0]).shape == (3, 5)
        gradient = jax.grad(lambda law: law.sample(KEY, (4,)).sum(), allow_int=True)(law)
        parts = [x for x in jax.tree.leaves(gradient) if x.dtype == z.dtype]
        still = sum(jnp.abs(x).sum() for x in parts)
        return law.log_prob(z), wide.log_prob(drawn), law.log_prob(drawn), drawn, still

    z = 1.5 * normal(4, ROWS, dim)
    log_prob, wide, narrow, drawn, still = run(law, z)
    expected = reference(name, case, modules, guide)(np.asarray(z))
    np.testing.assert_allclose(log_prob, expected, rtol=1e-9, atol=1e-9)
    assert drawn.shape == (2, 3, 5, dim) and wide.shape == (2, 3, 5)
    np.testing.assert_allclose(wide, narrow, rtol=1e-12)
    assert len(np.unique(np.asarray(drawn).reshape(-1, dim), axis=0)) == 30
    # A mixture of the host's is drawn in its own way.
    assert name == "Mixture" or still == 0.0


@pytest.mark.parametrize(("name", "case"), [m for m in MEMBERS if m.values[0] == "FlowPrior"])
def test_samples_of_a_flow_are_sequential(exact: None, name: str, case: dict) -> None:
    """The very numbers of the reference, which draws one coordinate after the other."""
    prior, make = built(name, case)
    noise = np.asarray(jax.random.normal(KEY, (7, case["latent_dim"])))
    expected = masked_flow.sample(noise, named(prior), None, case.get("activation", "elu"))
    found = jax.jit(lambda prior: make(prior).sample(KEY, (7,)))(prior)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("num_flows", "total"), [(1, 3.0), (2, 6.0), (8, 12.0)])
def test_scales_of_a_flow_are_bounded(exact: None, num_flows: int, total: float) -> None:
    """Whatever the nets say: at their bounds the flow is a Normal whose scale is known."""
    prior = priors.FlowPrior(2, num_flows=num_flows, rngs=nnx.Rngs(0))
    for sign in (-1.0, 1.0):
        for net in prior.nets:
            net.layers[-1].kernel[...] *= 0
            net.layers[-1].bias[...] = sign * jnp.array([0.0, 0.0, 1e6, 1e6])
        scale = np.exp(sign * total)
        value = scale * jnp.array([0.3, -1.2])
        expected = dist.Normal(0.0, scale).log_prob(value).sum()
        np.testing.assert_allclose(prior().log_prob(value), expected, rtol=1e-9)


FUNCTIONS = (
    lambda z: z[..., 0],
    lambda z: z[..., -1],
    lambda z: z[..., 0] * z[..., -1],
    lambda z: z[..., 0] ** 2,
    lambda z: np.tanh(2.0 * z[..., 0] - z[..., -1]),
    lambda z: np.cos(2.0 * z[..., 0] + z[..., -1]),
)


@pytest.mark.parametrize(
    ("name", "case", "guide"),
    [
        ("Mixture", {"latent_dim": 2, "num_components": 3}, "MeanField"),
        ("FlowPrior", {"latent_dim": 2, "hidden_dims": (6,)}, "MeanField"),
        ("VampPrior", {"input_shape": 2, "num_pseudo_inputs": 3}, "MeanField"),
        ("VampPrior", {"input_shape": 2, "num_pseudo_inputs": 3}, "IAF"),
    ],
)
def test_density_integrates_to_one_and_samples_follow_it(name: str, case: dict, guide: str) -> None:
    """Expectations of several functions by quadrature over the density and by sampling."""
    modules, make = built(name, case, guide)
    points, volume = oracle.grid(2, 30.0, 481)

    @jax.jit
    def run(modules: Any) -> tuple[jax.Array, jax.Array]:
        law = make(modules)
        density = jnp.exp(law.log_prob(jnp.asarray(points)))
        return density, law.sample(jax.random.key(5), (200_000,))

    density, z = map(np.asarray, run(modules))
    mass = density * volume
    assert mass.sum() == pytest.approx(1.0, abs=2e-4)
    for h in FUNCTIONS:
        assert abs(z_score(h(z), (mass * h(points)).sum())) < 4


def moved(params: Any, name: str) -> Any:
    """Wider than the exact posterior, and a reverse model near the prior of what it stands for."""

    def move(path: Any, value: jax.Array) -> jax.Array:
        key = jax.tree_util.keystr(path)
        if "reverse" in key:
            return value - 0.15 if "log_scale" in key and "bias" in key else 0.2 * value
        if "log_scale" in key and "bias" in key:
            return value + (0.0 if "aux" in key else 1.2 if name == "VGP" else 0.3)
        return 0.5 * value if "targets'" in key else value

    return jax.tree_util.tree_map_with_path(move, params)


@pytest.mark.parametrize("guide", HIERARCHICAL)
def test_mixture_of_hierarchical_posteriors(exact: None, guide: str) -> None:
    """The estimate's exponential has the density as its mean; samples follow the density."""
    case = {"input_shape": 2, "num_pseudo_inputs": 3, "num_samples": 4}
    prior = shaken(member("VampPrior", case))
    posterior = shaken(small(guide, 1), 0.2)
    wide_reverse(posterior, 0.4)
    points, volume = oracle.grid(1, 30.0, 2001)
    at = np.array([[-1.0], [0.2], [1.5]])

    @jax.jit
    def run(prior: nnx.Module, posterior: nnx.Module) -> tuple[jax.Array, jax.Array]:
        law = prior(posterior, encoder_of(2), rng_key=KEY)
        wide = jnp.broadcast_to(at, (20_000, 3, 1))
        return law.sample(KEY, (200_000,)), jnp.exp(law.log_prob(wide))

    z, estimates = map(np.asarray, run(prior, posterior))
    log_p = reference("VampPrior", case, (prior, posterior), guide)
    mass = np.exp(log_p(points)) * volume
    assert mass.sum() == pytest.approx(1.0, abs=1e-6)
    for h in FUNCTIONS:
        assert abs(z_score(h(z), (mass * h(points)).sum())) < 4
    assert estimates.std(0).min() > 0.0
    assert np.abs(z_score(estimates, np.exp(log_p(at)))).max() < 4


@pytest.mark.parametrize("guide", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_mean_weight_is_the_evidence(exact: None, name: str, guide: str) -> None:
    """E[exp(log_weight)] = p(x) where z has the prior and x ~ N(z, I)."""
    dim = 1 if name == "VampPrior" and guide in HIERARCHICAL else 2
    case = {
        "Mixture": {"latent_dim": dim, "num_components": 3},
        "FlowPrior": {"latent_dim": dim, "hidden_dims": (6,)},
        "VampPrior": {"input_shape": dim, "num_pseudo_inputs": 3, "num_samples": 5},
    }[name]
    posterior = moved(shaken(small(guide, dim), 0.1), guide)
    prior = shaken(member(name, case), 0.5 if name == "VampPrior" else 0.2)
    weight = encoder_of(dim)
    x = normal(ROWS, dim, seed=7)

    def encode(u: jax.Array) -> jax.Array:
        return 0.3 * weight(u)

    def law(posterior: Any, prior: Any) -> Any:
        return prior(posterior, encode) if name == "VampPrior" else prior()

    def model() -> None:
        made = law(nnx_module("posterior", posterior), nnx_module("prior", prior))
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", made)
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def program() -> None:
        q = nnx_module("posterior", posterior)
        with numpyro.plate("data", ROWS):
            q("z", encode(x))

    if name == "VampPrior":
        context = np.asarray(encode(prior.pseudo_inputs[...]))
        weights = named(posterior)

        def log_p(z: np.ndarray) -> np.ndarray:
            return oracle.vamp(guide, z, weights, context)
    else:
        log_p = reference(name, case, prior, guide)
    data = np.asarray(x)
    if name == "Mixture":
        truth = oracle.mixture_evidence(data, *(named(prior)[k] for k in MIXTURE))
    elif name == "VampPrior" and guide == "MeanField":
        heads = posterior.loc_and_log_scale(jnp.asarray(context))
        truth = oracle.mixture_evidence(data, np.zeros(3), *map(np.asarray, heads))
    else:
        points, volume = oracle.grid(dim, 12.0, 161 if dim == 2 else 2001)
        truth = oracle.evidence(data, log_p(points), points, volume)
    elbo = ImportanceWeightedELBO(20_000)
    params = module_params(posterior=posterior, prior=prior)
    log_weights = jax.jit(lambda p: elbo.log_weights(KEY, p, model, program))(params)
    draws = np.exp(np.asarray(log_weights) - truth)
    assert draws.shape == (20_000, ROWS)
    assert np.abs(z_score(draws, 1.0)).max() < 4
    # The weights vary little enough for their standard error to mean something.
    assert (0.0 < draws.std(0)).all() and (draws.std(0) < 20.0).all()


MIXTURE = ("logits", "locs", "log_scales")


class VAE:
    """A small model of eight rows with a prior, and its guide."""

    def __init__(self, name: str, guide: str, batch: int | None = None) -> None:
        rng = np.random.default_rng(0)
        self.x, self.name, self.batch = jnp.asarray(rng.random((8, 4))), name, batch
        # Within the bounds, where pseudo-inputs have a gradient.
        options = {
            "Mixture": {"latent_dim": 2, "num_components": 3},
            "FlowPrior": {"latent_dim": 2, "hidden_dims": (6,)},
            "VampPrior": {
                "input_shape": 4,
                "pseudo_inputs": rng.random((3, 4)),
                "bounds": (-0.1, 1.1),
                "num_samples": 2,
            },
        }[name]
        self.prior = member(name, options)
        if name != "VampPrior":
            self.prior = shaken(self.prior, 0.1)
        self.encoder = nnx.Linear(4, CONTEXT, rngs=nnx.Rngs(1))
        self.decoder = nnx.Linear(2, 4, rngs=nnx.Rngs(2))
        self.posterior = shaken(small(guide, 2), 0.1)

    def law(self) -> Any:
        prior = nnx_module("prior", self.prior)
        if self.name != "VampPrior":
            return prior()
        posterior = nnx_module("posterior", self.posterior)
        return prior(posterior, nnx_module("encoder", self.encoder))

    def model(self) -> None:
        law, decode = self.law(), nnx_module("decoder", self.decoder)
        with numpyro.plate("data", len(self.x), subsample_size=self.batch):
            x = jnp.round(numpyro.subsample(self.x, event_dim=1))
            z = numpyro.sample("z", law)
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(self) -> None:
        posterior = nnx_module("posterior", self.posterior)
        encode = nnx_module("encoder", self.encoder)
        with numpyro.plate("data", len(self.x), subsample_size=self.batch):
            posterior("z", encode(numpyro.subsample(self.x, event_dim=1)))

    @property
    def params(self) -> Params:
        return module_params(
            prior=self.prior, decoder=self.decoder, posterior=self.posterior, encoder=self.encoder
        )


def ours(count: int, gradient: str, **options: Any) -> Any:
    return ImportanceWeightedELBO(count, gradient=gradient, **options)


OBJECTIVES = {
    "host": lambda: Trace_ELBO(num_particles=3),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(),
    **{
        f"{gradient}-{count}": lambda gradient=gradient, count=count: ours(count, gradient)
        for gradient in ("reparam", "stl", "dreg")
        for count in (1, 5)
    },
    "loop": lambda: ours(3, "stl", vectorize_particles=False),
    "chunks": lambda: ours(4, "dreg", chunk_size=2),
}


@pytest.mark.parametrize("name", NAMES)
def test_trains_under_every_objective(name: str) -> None:
    """On minibatches: every parameter is declared once and gets a gradient."""
    # The programs of all are written, where a prior may differ; a few of them are compiled.
    vae = VAE(name, "Auxiliary", batch=4)
    for key in OBJECTIVES if name == "VampPrior" else ("host", "TraceMeanField_ELBO", "dreg-1"):
        elbo = OBJECTIVES[key]()
        loss = jax.eval_shape(lambda p, e=elbo: e.loss(KEY, p, vae.model, vae.guide), vae.params)
        assert loss.shape == ()
    vae = VAE(name, "MeanField", batch=4)
    svi = SVI(vae.model, vae.guide, optax.adam(0.05), OBJECTIVES["dreg-5"]())
    start = jax.jit(svi.init)(KEY)
    declared = svi.get_params(start)
    # No mutable state, and the very parameters of the modules.
    assert start.mutable_state is None
    assert set(declared) == {f"{k}$params" for k in ("prior", "decoder", "posterior", "encoder")}
    assert jax.tree.structure(declared) == jax.tree.structure(vae.params)
    update = jax.jit(svi.update)
    state = start
    for _ in range(2):
        state, loss = update(state)
        assert loss.shape == () and np.isfinite(loss)
    assert update._cache_size() == 1

    @jax.jit
    def gradients(params: Params) -> list[Params]:
        elbos = [OBJECTIVES[key]() for key in ("host", "stl-1")]
        losses = [lambda p, e=elbo: e.loss(KEY, p, vae.model, vae.guide) for elbo in elbos]
        return [jax.grad(loss)(params) for loss in losses]

    moved_by = jax.tree.map(jnp.subtract, declared, svi.get_params(state))
    for found in (*gradients(declared), moved_by):
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0.0, path


@pytest.mark.parametrize("guide", FAMILIES)
def test_gradients_of_the_prior_reach_inputs_encoder_and_posterior(guide: str) -> None:
    """At a fixed value: what the model alone contributes."""
    vae = VAE("VampPrior", guide)
    z = normal(8, 2)

    @jax.jit
    def gradient(params: Params) -> Params:
        def score(params: Params) -> jax.Array:
            with seed(rng_seed=0), substitute(data=params):
                return vae.law().log_prob(z).sum()

        return jax.grad(score)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(vae.params)):
        assert (np.abs(leaf).max() > 0.0) == (path[0].key != "decoder$params"), path


def test_path_gradients_are_unbiased_where_the_model_shares_the_guide(exact: None) -> None:
    """Their mean is that of the plain estimator, where the prior's density is an estimate, too.

    The model's part of posterior and encoder has no mean of zero: it must not be left out.
    """
    vae = VAE("VampPrior", "Auxiliary")
    keys = jax.random.split(jax.random.key(8), 2000)

    @jax.jit
    def rows(params: Params) -> list[jax.Array]:
        found = []
        for how in ("dreg", "reparam"):
            elbo = ours(3, how)
            one = jax.grad(lambda p, key, e=elbo: e.loss(key, p, vae.model, vae.guide))
            tree = jax.vmap(one, (None, 0))(params, keys)
            found.append(jnp.concatenate([x.reshape(2000, -1) for x in jax.tree.leaves(tree)], 1))
        return found

    path, plain = map(np.asarray, rows(shaken(vae.params, 0.2)))
    # With common random numbers the difference varies less than either; the decoder's is none.
    difference = path - plain
    difference = difference[:, difference.std(0) > 1e-9]
    assert difference.shape[1] > 50
    scores = z_score(difference, 0.0)
    assert np.abs(scores).max() < 4.5 and np.sqrt((scores**2).mean()) < 1.6


def test_rows_and_scales() -> None:
    """A bound on a minibatch is that of its rows times N / B; particles do not mix rows."""
    keys = jax.random.split(KEY, 2000)

    @jax.jit
    def losses() -> list[jax.Array]:
        found = []
        for batch in (8, 2):
            vae, elbo = VAE("VampPrior", "MeanField", batch % 8 or None), ours(5, "reparam")
            params = vae.params
            assert elbo.log_weights(KEY, params, vae.model, vae.guide).shape == (5, batch)
            found.append(
                jax.vmap(lambda key, e=elbo, p=params, v=vae: e.loss(key, p, v.model, v.guide))(
                    keys
                )
            )
        return found

    whole, parts = map(np.asarray, losses())
    error = np.sqrt(whole.var() / len(whole) + parts.var() / len(parts))
    assert abs(whole.mean() - parts.mean()) < 4 * error < 0.1 * abs(whole.mean())


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_dtypes_and_no_mutable_sites(exact: None, name: str, case: dict, kind: str) -> None:
    for guide in FAMILIES if name == "VampPrior" else ("MeanField",):
        options = {"param_dtype": jnp.dtype(kind)}
        prior = member(name, case, **options)
        posterior = nnx.eval_shape(
            lambda g=guide, o=options: family(g, latent_dim=2, context_dim=CONTEXT, **o)
        )
        assert {str(x.dtype) for x in jax.tree.leaves(prior)} == {kind}
        assert not nnx.to_pure_dict(nnx.state(prior, nnx.Not(nnx.Param)))

        def run(prior: nnx.Module, posterior: nnx.Module, name: str = name) -> Any:
            with seed(rng_seed=0), trace() as sites:
                made = nnx_module("prior", prior)
                if name == "VampPrior":
                    encode = encoder_of(int(np.prod(prior.input_shape)))
                    law = made(nnx_module("posterior", posterior), encode)
                else:
                    law = made()
                with numpyro.plate("rows", 5):
                    z = numpyro.sample("z", law)
            assert {site["type"] for site in sites.values()} == {"param", "plate", "sample"}
            # A draw of the posterior is inside of the prior's, and no site of the program.
            assert [k for k, site in sites.items() if site["type"] == "sample"] == ["z"]
            assert z.shape[0] == 5
            # The host's Normal draws JAX's default float.
            z = z.astype(kind) if name == "Mixture" else z
            return z, sites["z"]["fn"].log_prob(z)

        arrays = jax.eval_shape(run, prior, posterior)
        assert [x.shape[:1] for x in arrays] == [(5,), (5,)]
        assert {str(x.dtype) for x in arrays} == {kind}


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_save_and_load(name: str, case: dict, tmp_path: Any) -> None:
    prior = shaken(member(name, case))
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(prior)))
    (tmp_path / "prior.pkl").write_bytes(pickle.dumps(state))
    other = member(name, case)
    fresh = nnx.state(other)
    nnx.replace_by_pure_dict(fresh, pickle.loads((tmp_path / "prior.pkl").read_bytes()))
    nnx.update(other, fresh)
    mine, theirs = named(prior), named(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        np.testing.assert_array_equal(theirs[key], value)
    # The pseudo-inputs alone: posterior and encoder are saved with the guide.
    assert name != "VampPrior" or set(mine) == {"pseudo_inputs"}


def test_starts() -> None:
    flow = priors.FlowPrior(3, rngs=nnx.Rngs(0))().sample(KEY, (4000,))
    assert (np.abs(np.log(flow.std(0))) < 0.5).all() and (np.abs(flow.mean(0)) < 0.3).all()
    rows = normal(7, 2, 3)
    given = member("VampPrior", {"input_shape": (2, 3), "pseudo_inputs": rows})
    np.testing.assert_array_equal(given.pseudo_inputs[...], rows)
    assert given.num_pseudo_inputs == 7
    case = {"input_shape": 5, "num_pseudo_inputs": 200}
    within = member("VampPrior", {**case, "bounds": (-1.0, 3.0)}).pseudo_inputs[...]
    assert within.shape == (200, 5) and within.min() > -1.0 and within.max() < 3.0
    assert float(within.mean()) == pytest.approx(1.0, abs=0.2)
    free = member("VampPrior", case).pseudo_inputs[...]
    assert float(free.std()) == pytest.approx(0.01, rel=0.2)


def test_bounds_clip_and_let_gradients_pass_up_to_them() -> None:
    """Binary rows start on the bounds themselves, and must be able to move."""
    inputs = jnp.array([[0.0, 1.0, 0.4, 0.4], [-0.5, 1.5, 0.2, 0.1]])
    posterior = shaken(small("MeanField", 2, 4))
    prior, twin = (
        member("VampPrior", {"input_shape": 4, "pseudo_inputs": u, "bounds": bounds})
        for u, bounds in ((inputs, (0.0, 1.0)), (jnp.clip(inputs, 0.0, 1.0), None))
    )
    z = normal(6, 2)
    run = jax.jit(jax.value_and_grad(lambda prior: prior(posterior).log_prob(z).sum()))
    value, found = run(prior)
    other, free = run(twin)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    inside = np.array([[True] * 4, [False, False, True, True]])
    expected = np.asarray(free.pseudo_inputs[...])
    assert np.abs(expected).min() > 0.0
    np.testing.assert_allclose(found.pseudo_inputs[...], np.where(inside, expected, 0.0), rtol=1e-5)


@cache
def compiled(guide: str) -> Callable[..., Any]:
    posterior = shaken(small(guide, 2))

    @jax.jit
    def run(context: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        with seed(rng_seed=0), trace() as sites:
            by_handler = posterior("z", context, value=value, num_samples=7)
        found = posterior("z", context, value=value, num_samples=7, rng_key=KEY)
        assert not sites or {site["type"] for site in sites.values()} == {"prng_key"}
        return by_handler, found, posterior.log_prob(value, context, num_samples=7, rng_key=KEY)

    return run


@pytest.mark.parametrize("guide", FAMILIES)
def test_a_family_scores_a_given_value(guide: str) -> None:
    """The statement with a value is the method, and no site."""
    context, value = normal(5, CONTEXT), normal(5, 2, seed=1)
    by_handler, found, expected = compiled(guide)(context, value)
    np.testing.assert_array_equal(found, expected)
    # Another key, and another estimate where there is one.
    assert (by_handler != found).any() == (guide in HIERARCHICAL)
    with pytest.raises(ValueError, match="Expected values of width 2 at log_prob; got shape"):
        small(guide, 2)("z", context, value=value[:, :1])


def test_a_registered_prior_is_a_pytree() -> None:
    """Made of what ``nnx_module`` returns, it is an argument of a compiled program."""
    vae = VAE("VampPrior", "Auxiliary")
    with seed(rng_seed=0), substitute(data=vae.params):
        law = vae.law()
    z = normal(5, 2)
    run = jax.jit(lambda law, z: law.log_prob(z))
    np.testing.assert_allclose(run(law, z), law.log_prob(z), rtol=1e-5)
    parameters = sum(x.size for x in jax.tree.leaves(vae.posterior))
    assert sum(np.size(x) for x in jax.tree.leaves(law)) >= parameters + law.law.context.size


def test_errors() -> None:
    for name in ("Mixture", "FlowPrior"):
        with pytest.raises(ValueError, match="Expected latent_dim >= 1; got 0"):
            member(name, {"latent_dim": 0})
    with pytest.raises(ValueError, match="Expected values of width 2 at log_prob; got shape"):
        member("FlowPrior", {"latent_dim": 2})().log_prob(jnp.zeros((5, 3)))
    with pytest.raises(ValueError, match="Expected num_components >= 1; got 0"):
        member("Mixture", {"latent_dim": 2, "num_components": 0})
    with pytest.raises(ValueError, match="Expected num_flows >= 1; got 0"):
        member("FlowPrior", {"latent_dim": 2, "num_flows": 0})
    with pytest.raises(ValueError, match="Expected activation to be one of .*; got 'x'"):
        member("FlowPrior", {"latent_dim": 2, "activation": "x"})
    with pytest.raises(ValueError, match="Expected at least one hidden layer; got hidden_dims="):
        member("FlowPrior", {"latent_dim": 2, "hidden_dims": ()})
    with pytest.raises(ValueError, match="Expected input_shape >= 1; got 0"):
        member("VampPrior", {"input_shape": (2, 0)})
    with pytest.raises(TypeError, match="Expected input_shape to be an int; got float"):
        member("VampPrior", {"input_shape": 2.0})
    with pytest.raises(ValueError, match="Expected num_pseudo_inputs >= 1; got 0"):
        member("VampPrior", {"input_shape": 2, "num_pseudo_inputs": 0})
    with pytest.raises(ValueError, match="Expected num_samples >= 1; got 0"):
        member("VampPrior", {"input_shape": 2, "num_samples": 0})
    text = r"Expected pseudo_inputs of shape \(num_pseudo_inputs, 2, 3\); got shape \(5, 6\)"
    with pytest.raises(ValueError, match=text):
        member("VampPrior", {"input_shape": (2, 3), "pseudo_inputs": jnp.zeros((5, 6))})
    with pytest.raises(ValueError, match=r"low < high; got \(1.0, 1.0\)"):
        member("VampPrior", {"input_shape": 2, "bounds": (1.0, 1.0)})
    prior = member("VampPrior", {"input_shape": (2, 3), "num_pseudo_inputs": 4})
    free = small("IAF", 2, None)
    text = "Expected a posterior with a context at VampPrior; got IAF without one"
    with pytest.raises(ValueError, match=text):
        prior(free)
    text = r"Expected no context at site 'z'; got shape \(1, 2\). Build the family with context_dim"
    with seed(rng_seed=0), pytest.raises(ValueError, match=text):
        prior(nnx_module("posterior", free), encoder_of(6))
    posterior = small("MeanField", 2)
    text = r"Expected one context for each of 4 pseudo-inputs at VampPrior; got shape \(4, 2, 3\)"
    with pytest.raises(ValueError, match=text):
        prior(posterior)
    with pytest.raises(ValueError, match="Expected a context of width 2 at log_prob; got shape"):
        prior(posterior, lambda u: u.reshape(4, 6)).log_prob(jnp.zeros(2))
    with pytest.raises(ValueError, match="Expected values of width 2 at log_prob; got shape"):
        prior(posterior, encoder_of(6)).log_prob(jnp.zeros((5, 3)))
    text = "Expected rng_key for the samples behind log_prob of VGP; got None outside of a seed"
    law = prior(small("VGP", 2), encoder_of(6))
    with pytest.raises(ValueError, match=text):
        law.log_prob(jnp.zeros((5, 2)))
