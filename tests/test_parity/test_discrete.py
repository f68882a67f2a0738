"""Every estimator for discrete latents, at the same uniform numbers, in both backends and NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import pytest
import torch
from reference import complex_step, discrete
from reference.belief_net import Net
from test_parity.bridge import torch_name, walk

import numpyro_vae_ext._relaxation
import numpyro_vae_ext.distributions
import numpyro_vae_ext.elbos
import pyro_vae_ext._relaxation
import pyro_vae_ext.distributions
import pyro_vae_ext.elbos

ROWS, PIXELS, SCALE = 3, 4, 10.0
NETS = {
    "one layer": Net("bernoulli", ((3,),)),
    "two layers": Net("bernoulli", ((3,), (2,))),
    "one-hot": Net("one_hot", ((2, 3),)),
}
TEMPERATURE, ETA = {"z0": 0.6, "z1": 0.9}, {"z0": 0.8, "z1": 1.3}
RUNNING = {"mean": -0.7, "variance": 2.5, "count": 3.0}
# Estimator: its class and options, and the networks that it declares.
ESTIMATORS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "rebar": ("TraceREBAR_ELBO", {"temperature": TEMPERATURE, "eta": ETA}, None),
    "fixed rebar": (
        "TraceREBAR_ELBO",
        {"temperature": TEMPERATURE, "eta": ETA, "learn": False},
        None,
    ),
    "relax": (
        "TraceRELAX_ELBO",
        {"temperature": TEMPERATURE, "eta": ETA, "hidden_dims": (2,)},
        "surrogate",
    ),
    "nvil": (
        "TraceNVIL_ELBO",
        {"hidden_dims": (2,), "normalize_variance": True},
        "baseline_network",
    ),
    "leave-one-out": (
        "TraceNVIL_ELBO",
        {
            "baselines": ("learned", "leave_one_out", "running"),
            "hidden_dims": (2,),
            "decay": 0.8,
            "normalize_variance": True,
        },
        "baseline_network",
    ),
    "disarm": ("TraceDisARM_ELBO", {}, None),
    "vimco": ("ImportanceWeightedELBO", {"gradient": "vimco"}, None),
}
# Tracing is what takes the time in NumPyro: it runs some of them, which take every branch.
LAYOUTS = [
    ("one layer", "rebar", 1, False),
    ("one layer", "fixed rebar", 3, False),
    ("one layer", "relax", 1, False),
    ("one layer", "nvil", 1, False),
    ("one layer", "disarm", 1, False),
    ("one layer", "vimco", 2, False),
    ("two layers", "rebar", 3, True),
    ("two layers", "relax", 3, True),
    ("two layers", "leave-one-out", 3, True),
    ("two layers", "disarm", 3, True),
    ("two layers", "vimco", 3, True),
    ("one-hot", "rebar", 3, False),
    ("one-hot", "relax", 1, True),
    ("one-hot", "nvil", 1, True),
    ("one-hot", "vimco", 3, False),
]
Found = tuple[float, dict[str, np.ndarray]]


class Case:
    """Weights, data and noise of one net, and one estimator on it."""

    def __init__(self, name: str, estimator: str, num_particles: int) -> None:
        self.net, self.estimator, self.num_particles = NETS[name], estimator, num_particles
        self.cls, self.options, self.network = ESTIMATORS[estimator]
        rng = np.random.default_rng(0)
        self.params = self.net.start(rng, PIXELS, 0.7)
        self.x = (rng.random((ROWS, PIXELS)) < 0.5) * 1.0
        shapes = [(num_particles, ROWS, *shape) for shape in self.net.layers]
        self.u, self.v = ([rng.random(shape) for shape in shapes] for _ in range(2))
        self.sites = [f"z{layer}" for layer in range(len(shapes))]
        self.relaxes = estimator in ("rebar", "fixed rebar", "relax")
        self.networks: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        if self.network is not None:
            for site, width in zip(self.sites, self.net.widths, strict=True):
                width = 2 * width if self.network == "surrogate" else width
                self.networks[site] = [
                    (rng.standard_normal((a, b)), rng.standard_normal(b))
                    for a, b in ((width, 2), (2, 1))
                ]

    def weights(self, site: str) -> dict[str, np.ndarray]:
        """The site's network under torch's names, in Flax's layout."""
        return {
            f"{2 * i}.{name}": value
            for i, layer in enumerate(self.networks[site])
            for name, value in zip(("weight", "bias"), layer, strict=True)
        }

    def model(self, lib: Any, latent: Any, p: dict[str, Any], x: Any) -> None:
        with lib.plate("data", int(SCALE) * ROWS, subsample_size=ROWS):
            z = latent(f"z{len(self.sites) - 1}", p["prior"])
            for layer in range(len(self.sites) - 1, 0, -1):
                logits = z @ p[f"decoder_{layer}"] + p[f"decoder_bias_{layer}"]
                z = latent(f"z{layer - 1}", logits)
            law = (pdist if lib is pyro else ndist).Bernoulli
            logits = z @ p["decoder_0"] + p["decoder_bias_0"]
            lib.sample("x", law(logits=logits).to_event(1), obs=x)

    def guide(self, lib: Any, latent: Any, p: dict[str, Any], x: Any) -> None:
        with lib.plate("data", int(SCALE) * ROWS, subsample_size=ROWS):
            z = x
            for layer, site in enumerate(self.sites):
                z = latent(site, z @ p[f"encoder_{layer}"] + p[f"encoder_bias_{layer}"])

    def latent(self, lib: Any, one_hot: Any, name: str, logits: Any) -> Any:
        """The site and its value as a vector."""
        shape = self.net.layers[self.sites.index(name)]
        logits = logits.reshape(*logits.shape[:-1], *shape)
        bernoulli = (pdist if lib is pyro else ndist).Bernoulli
        law = one_hot if self.net.kind == "one_hot" else bernoulli
        value = lib.sample(name, law(logits=logits).to_event(1))
        return value.reshape(*value.shape[: value.ndim - len(shape)], -1)

    def in_torch(self, monkeypatch: pytest.MonkeyPatch) -> Found:
        p = {k: torch.tensor(v, requires_grad=True) for k, v in self.params.items()}
        x = torch.tensor(self.x)

        def latent(name: str, logits: torch.Tensor) -> torch.Tensor:
            return self.latent(pyro, pyro_vae_ext.distributions.OneHotCategorical, name, logits)

        def model() -> None:
            self.model(pyro, latent, p, x)

        def program() -> None:
            self.guide(pyro, latent, p, x)

        elbo = getattr(pyro_vae_ext.elbos, self.cls)(
            self.num_particles, max_plate_nesting=1, **self.options
        )
        guide, own = program, {}
        if self.estimator != "vimco":
            guide = elbo.tunable(program)
            elbo.loss(model, guide)
        if isinstance(guide, torch.nn.Module):
            own = dict(guide.named_parameters())
            for site in self.networks:
                for name, value in self.weights(site).items():
                    own[f"{site}_{self.network}.{name}"].data.copy_(torch.tensor(value.T))
            for name, buffer in guide.named_buffers():
                buffer.fill_(RUNNING[name.split(".")[-1]])
        # Site by site, what is relaxed and what is conditional.
        pairs = zip(self.u, self.v, strict=True)
        given = iter([n for pair in pairs for n in pair] if self.relaxes else self.u)

        def uniform(shape: tuple, *_: Any) -> torch.Tensor:
            return torch.tensor(next(given)).reshape(shape)

        with monkeypatch.context() as patch:
            patch.setattr(pyro_vae_ext._relaxation, "uniform", uniform)
            loss = elbo.differentiable_loss(model, guide)
        assert next(given, None) is None
        named = {**p, **own}
        found = torch.autograd.grad(loss, list(named.values()))
        gradients = {k: g.numpy() for k, g in zip(named, found, strict=True)}
        gradients = {k: g.T if k.endswith("weight") else g for k, g in gradients.items()}
        if isinstance(guide, torch.nn.Module):
            gradients |= {k: np.asarray(v) for k, v in guide.named_buffers()}
        return loss.item(), gradients

    def in_jax(self, monkeypatch: pytest.MonkeyPatch) -> Found:
        def latent(name: str, logits: jax.Array) -> jax.Array:
            law = numpyro_vae_ext.distributions.OneHotCategorical
            return self.latent(numpyro, law, name, logits)

        def declared() -> dict[str, jax.Array]:
            return {name: numpyro.param(name, value) for name, value in self.params.items()}

        def model() -> None:
            self.model(numpyro, latent, declared(), jnp.asarray(self.x))

        def program() -> None:
            self.guide(numpyro, latent, declared(), jnp.asarray(self.x))

        elbo = getattr(numpyro_vae_ext.elbos, self.cls)(self.num_particles, **self.options)
        guide, params, state = program, {k: jnp.asarray(v) for k, v in self.params.items()}, {}
        if self.estimator != "vimco":
            guide = elbo.tunable(program)
        for site in self.sites:
            if self.estimator in ("rebar", "relax"):
                params[f"{site}_log_temperature"] = jnp.log(TEMPERATURE[site])
                params[f"{site}_eta"] = jnp.array(ETA[site])
            if self.networks:
                layers = {
                    2 * i: {"kernel": jnp.asarray(weight), "bias": jnp.asarray(bias)}
                    for i, (weight, bias) in enumerate(self.networks[site])
                }
                params[f"{site}_{self.network}$params"] = {"layers": layers}
            if "normalize_variance" in self.options:
                state[f"{site}_baseline"] = {k: jnp.array(v) for k, v in RUNNING.items()}
        # The hard run draws for all sites before the conditional values are drawn.
        given = iter([*self.u, *self.v] if self.relaxes else self.u)

        def uniform(key: jax.Array, shape: tuple, dtype: Any) -> jax.Array:
            draws = next(given)
            data = key if jnp.issubdtype(key.dtype, jnp.integer) else jax.random.key_data(key)

            # The call is traced for one particle; only at run time is there one key for each.
            def look_up(keys: np.ndarray) -> np.ndarray:
                return draws.reshape(keys.shape[:-1] + shape)

            like = jax.ShapeDtypeStruct(shape, dtype)
            return jax.pure_callback(look_up, like, data, vmap_method="broadcast_all")

        def loss(params: dict[str, Any]) -> Any:
            found = elbo.loss_with_mutable_state(
                jax.random.PRNGKey(0), {**params, **state}, model, guide
            )
            return found["loss"], found["mutable_state"]

        before = jax.config.read("jax_disable_most_optimizations")
        # It runs once.
        jax.config.update("jax_disable_most_optimizations", True)
        with monkeypatch.context() as patch:
            patch.setattr(numpyro_vae_ext._relaxation, "uniform", uniform)
            (value, new), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        jax.config.update("jax_disable_most_optimizations", before)
        assert next(given, None) is None
        gradients: dict[str, np.ndarray] = {}
        for path, gradient in walk(found).items():
            name = torch_name(path).replace("$params.layers", "")
            gradients[name] = np.asarray(gradient)
        for name, moments in (new or {}).items():
            gradients |= {f"{name}.{k}": np.asarray(v) for k, v in moments.items()}
        return float(value), gradients


def in_numpy(case: Case) -> Found:
    """The reference's estimate: it ascends the bound of one row's scale."""
    members = {"nvil": score_function, "leave-one-out": score_function}
    members |= {"disarm": antithetic, "vimco": multi_sample}
    bound, gradients, own = members.get(case.estimator, relaxed)(case)
    return -SCALE * bound, {**{k: -SCALE * g for k, g in gradients.items()}, **own}


def mean_gradients(case: Case, values: list, model: Any, guide: list) -> dict[str, np.ndarray]:
    shape = (case.num_particles, ROWS)
    found = case.net.gradients(case.params, case.x, values, np.broadcast_to(model, shape), guide)
    return {name: value.mean(0) for name, value in found.items()}


def elbo(case: Case, values: list) -> float:
    return discrete.cost(case.net, case.params, case.x, values, 0).sum(1).mean()


def layers(p: dict[str, np.ndarray], name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(p[f"{name}.{i}.weight"], p[f"{name}.{i}.bias"]) for i in (0, 2)]


def named(case: Case) -> dict[str, np.ndarray]:
    """The parameters of all networks."""
    return {
        f"{site}_{case.network}.{name}": value
        for site in case.networks
        for name, value in case.weights(site).items()
    }


def relaxed(case: Case) -> tuple:
    """REBAR and RELAX; the difference quotient of what the tuning parameters descend."""
    own = named(case)
    for site in case.sites:
        own[f"{site}_log_temperature"] = np.log(TEMPERATURE[site])
        own[f"{site}_eta"] = ETA[site]

    def run(p: dict[str, np.ndarray]) -> tuple:
        return discrete.rebar(
            case.net,
            case.params,
            case.x,
            case.u,
            case.v,
            [np.exp(p[f"{site}_log_temperature"]) for site in case.sites],
            [p[f"{site}_eta"] for site in case.sites],
            [layers(p, f"{site}_surrogate") for site in case.sites] if case.networks else None,
        )

    values, guide = run(own)
    slopes = {}
    if case.estimator != "fixed rebar":
        slopes = discrete.difference_quotient(lambda p: discrete.spread(run(p)[1]), own, 0.004)
    return elbo(case, values), mean_gradients(case, values, 1.0, guide), slopes


def score_function(case: Case) -> tuple:
    """NVIL; the network descends the mean square of what is left of the signal."""
    values, logits, costs = discrete.signals(case.net, case.params, case.x, case.u)
    running = tuple(RUNNING[name] for name in ("mean", "variance", "count"))
    options = {
        "decay": case.options.get("decay", 0.9),
        "normalize": True,
        "loo": case.estimator == "leave-one-out",
    }
    guide, own = [], {}
    for site, a, b, signal in zip(case.sites, logits, values, costs, strict=True):

        def output(p: dict, a: np.ndarray = a, b: np.ndarray = b, site: str = site) -> Any:
            seen = np.broadcast_to(discrete.normalised(case.net.kind, a), b.shape)
            return discrete.network(layers(p, f"{site}_{case.network}"), seen)

        def fitted(p: dict, output: Any = output, signal: np.ndarray = signal) -> Any:
            return np.mean(discrete.nvil(signal - output(p), running, **options)[1] ** 2)

        mine = {k: v for k, v in named(case).items() if k.startswith(f"{site}_")}
        own |= complex_step.gradient(fitted, mine)
        multiplier, _, new = discrete.nvil(signal - output(mine), running, **options)
        own |= {f"{site}_baseline.{k}": v for k, v in zip(RUNNING, new, strict=True)}
        multiplier = multiplier.reshape(*multiplier.shape, *[1] * (b.ndim - 2))
        guide.append(multiplier * discrete.score(case.net.kind, a, b))
    return elbo(case, values), mean_gradients(case, values, 1.0, guide), own


def antithetic(case: Case) -> tuple:
    """DisARM; every run is a draw, and all of them count for the bound and the model."""
    runs, guide = discrete.disarm(case.net, case.params, case.x, case.u)
    nothing = [np.zeros_like(g) for g in guide]
    found = [mean_gradients(case, values, 1.0, nothing) for values in runs]
    gradients = {name: np.mean([g[name] for g in found], axis=0) for name in case.params}
    first = mean_gradients(case, runs[0], 1.0, guide)
    gradients |= {name: value for name, value in first.items() if "encoder" in name}
    return np.mean([elbo(case, values) for values in runs]), gradients, {}


def multi_sample(case: Case) -> tuple:
    values, logits, costs = discrete.signals(case.net, case.params, case.x, case.u)
    bound, model, guide = discrete.vimco(costs[0])
    guide = [
        guide.reshape(*guide.shape, *[1] * (b.ndim - 2)) * discrete.score(case.net.kind, a, b)
        for a, b in zip(logits, values, strict=True)
    ]
    found = mean_gradients(case, values, model, guide)
    return bound.sum(), {k: case.num_particles * v for k, v in found.items()}, {}


@pytest.mark.parametrize(("name", "estimator", "num_particles", "both"), LAYOUTS)
def test_loss_and_every_gradient(
    monkeypatch: pytest.MonkeyPatch, name: str, estimator: str, num_particles: int, both: bool
) -> None:
    """Tuning parameters and running state included, with a scaled data plate."""
    case = Case(name, estimator, num_particles)
    expected_loss, expected = in_numpy(case)
    for run in (case.in_torch, case.in_jax) if both else (case.in_torch,):
        loss, gradients = run(monkeypatch)
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        assert set(gradients) == set(expected)
        for key, value in expected.items():
            scale = max(1.0, np.abs(value).max())
            np.testing.assert_allclose(
                gradients[key] / scale, value / scale, rtol=1e-9, atol=1e-9, err_msg=key
            )
