"""The three gradient estimators: closed forms, exact zeros, unbiasedness, slopes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.module import nnx_module
from numpyro.handlers import seed, trace
from reference import importance_weighted, signal_to_noise
from test_numpyro import models
from test_numpyro.models import family, largest, module_params, normal, shaken

from numpyro_vae_ext.elbos import ImportanceWeightedELBO

GRADIENTS = ("reparam", "stl", "dreg")
KEY = jax.random.key(2)


def gradient_of(gradient: str, particles: int, model: Any, guide: Any, *args: Any, **kwargs: Any):
    elbo = ImportanceWeightedELBO(particles, gradient=gradient, **kwargs)
    return jax.jit(jax.grad(lambda p, key: elbo.loss(key, p, model, guide, *args)))


def many(gradient: Any, params: Any, repetitions: int, seed: int = 0) -> np.ndarray:
    """Gradients of many keys, one row each."""
    keys = jax.random.split(jax.random.key(seed), repetitions)
    found = jax.jit(jax.vmap(gradient, (None, 0)))(params, keys)
    rows = [np.asarray(x).reshape(repetitions, -1) for x in jax.tree.leaves(found)]
    return np.concatenate(rows, 1)


def z_scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the difference of the means, where there is any noise."""
    error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    return ((a.mean(0) - b.mean(0)) / np.where(error > 0, error, 1.0))[error > 1e-12]


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_linear_gaussian_in_closed_form(exact: None, gradient: str, particles: int) -> None:
    """Every entry, for the noise that was drawn, against formulas written out by hand."""
    x, width = normal(3, 2), 2
    posterior = family("MeanField", latent_dim=width, context_dim=width)
    params = shaken({**module_params(posterior=posterior), "mu": jnp.zeros(2)}, 0.4)
    params["posterior$params"]["log_scale"]["kernel"] *= 0.0
    model, guide = models.conjugate, models.amortised(posterior)
    elbo = ImportanceWeightedELBO(particles, gradient=gradient)
    loss, found = jax.value_and_grad(lambda p: elbo.loss(KEY, p, model, guide, x))(params)
    keys = [KEY] if particles == 1 else jax.random.split(KEY, particles)
    noise = []
    for key in keys:
        with trace() as sites, numpyro.handlers.substitute(data=params):
            seed(guide, jax.random.split(key)[1])(x)
        noise.append(sites["z"]["intermediates"].noise)
    post = params["posterior$params"]
    bound, expected = importance_weighted.linear_gaussian(
        np.stack(noise),
        np.asarray(x),
        {
            "mu": np.asarray(params["mu"]),
            "A": np.asarray(post["loc"]["kernel"]).T,
            "b": np.asarray(post["loc"]["bias"]),
            "log_scale": np.asarray(post["log_scale"]["bias"]),
        },
        gradient,
    )
    np.testing.assert_allclose(loss, -bound, rtol=1e-12)
    got = {
        "mu": found["mu"],
        "A": found["posterior$params"]["loc"]["kernel"].T,
        "b": found["posterior$params"]["loc"]["bias"],
        "log_scale": found["posterior$params"]["log_scale"]["bias"],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(-got[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("update", [None, "gated", "affine"])
def test_zero_at_the_posterior(
    exact: None, update: str | None, gradient: str, particles: int
) -> None:
    """The prior is a frozen copy of the guide and there are no data: log w is 0 throughout."""
    if update is None:
        posterior = shaken(family("MeanField", latent_dim=3, context_dim=2))
    else:
        kwargs = {"hidden_dims": (5,), "update": update}
        posterior = shaken(family("IAF", latent_dim=3, context_dim=2, **kwargs))
    x = normal(4, 2)

    def model() -> None:
        with numpyro.plate("data", 4):
            numpyro.sample("z", posterior.distribution(x))

    def guide() -> None:
        post = nnx_module("posterior", posterior)
        with numpyro.plate("data", 4):
            post("z", x)

    params = module_params(posterior=posterior)
    sizes = {
        name: largest(gradient_of(name, particles, model, guide)(params, KEY))
        for name in ("reparam", gradient)
    }
    assert sizes["reparam"] > 1e-2
    assert sizes[gradient] < 1e-6 * sizes["reparam"]


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_zero_at_the_conjugate_posterior(exact: None, gradient: str, particles: int) -> None:
    x, posterior = normal(4, 2), family("MeanField", latent_dim=2, context_dim=2)
    params = jax.tree.map(jnp.zeros_like, module_params(posterior=posterior))
    params["posterior$params"]["loc"]["kernel"] = 0.5 * jnp.eye(2)
    params["posterior$params"]["log_scale"]["bias"] = jnp.full(2, 0.5 * np.log(0.5))
    model, guide = models.conjugate, models.amortised(posterior)
    found, plain = (
        gradient_of(name, particles, model, guide, x)(params, KEY) for name in (gradient, "reparam")
    )
    assert largest(found) < 1e-6 * largest(plain)


def hierarchy(auxiliary: str):
    """Two latent layers, a parameter in both programs, a reverse model, and unscored sites."""
    posterior = family("IAF", latent_dim=2, context_dim=3, hidden_dims=(4,), num_flows=1)

    def model(x: jax.Array) -> None:
        shared = numpyro.param("shared", jnp.array([0.3, -0.2]))
        weight = numpyro.param("weight", 0.7 * jnp.ones((2, 2)))
        with numpyro.plate("data", len(x)):
            top = numpyro.sample("top", dist.Normal(shared, 1.0).to_event(1))
            low = numpyro.sample("low", dist.Normal(jnp.tanh(top @ weight), 0.8).to_event(1))
            numpyro.sample("x", dist.Normal(low + 0.5 * top, 0.6).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        shared = numpyro.param("shared", jnp.array([0.3, -0.2]))
        spread = numpyro.param("spread", jnp.array(0.6), constraint=dist.constraints.positive)
        reverse = numpyro.param("reverse", jnp.array(0.4))
        post = nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x)):
            if auxiliary == "delta":
                side = numpyro.sample(
                    "side",
                    dist.Delta(jnp.tanh(x[:, :1] * spread), event_dim=1),
                    infer={"is_auxiliary": True},
                )
            else:
                law = dist.Normal(x[:, :1], spread).to_event(1)
                law = law.mask(False) if auxiliary == "masked" else law
                side = numpyro.sample("side", law, infer={"is_auxiliary": True})
            top = post("top", jnp.concatenate([x + shared, side], -1))
            low = dist.Normal(0.5 * (x + top) * shared + side, spread).to_event(1)
            numpyro.sample("low", low)
            if auxiliary == "factor":
                law = dist.Normal(reverse * top[:, :1], 0.9).to_event(1)
                numpyro.factor("r", -law.log_prob(side))

    params = {
        **module_params(posterior=shaken(posterior, 0.2)),
        "shared": jnp.array([0.3, -0.2]),
        "weight": 0.7 * jnp.eye(2),
        "spread": jnp.array(0.6),
        "reverse": jnp.array(0.4),
    }
    return model, guide, params


@pytest.mark.parametrize("auxiliary", ["factor", "delta", "masked"])
def test_dreg_has_the_mean_of_reparam(auxiliary: str) -> None:
    """Hierarchies, shared parameters, reverse models, and sites without a score."""
    model, guide, params = hierarchy(auxiliary)
    x, repetitions = 0.7 * normal(2, 2), 10_000
    reparam, dreg, again = (
        many(gradient_of(name, 3, model, guide, x), params, repetitions, seed)
        for name, seed in (("reparam", 0), ("dreg", 1), ("reparam", 2))
    )
    scores = z_scores(reparam, dreg)
    assert len(scores) > 30
    assert np.abs(scores).max() < 4.5 and np.sqrt((scores**2).mean()) < 1.5
    assert np.abs(z_scores(reparam, again)).max() < 4.5


@pytest.mark.parametrize("auxiliary", ["factor", "delta", "masked"])
def test_stl_has_the_mean_of_reparam_at_one_particle(auxiliary: str) -> None:
    model, guide, params = hierarchy(auxiliary)
    x = 0.7 * normal(2, 2)
    reparam, stl = (
        many(gradient_of(name, 1, model, guide, x), params, 10_000, seed)
        for name, seed in (("reparam", 0), ("stl", 1))
    )
    scores = z_scores(reparam, stl)
    assert np.abs(scores).max() < 4.5 and np.sqrt((scores**2).mean()) < 1.5


def test_the_comparison_sees_a_bias() -> None:
    """STL is biased at several particles, and a Delta's parameter needs the whole weight."""
    model, guide, params = hierarchy("factor")
    x = 0.7 * normal(2, 2)
    reparam, stl = (
        many(gradient_of(name, 3, model, guide, x), params, 20_000, seed)
        for name, seed in (("reparam", 0), ("stl", 1))
    )
    assert np.abs(z_scores(reparam, stl)).max() > 6


def test_a_host_flow_without_an_inverse_is_told() -> None:
    class OneWay(dist.transforms.ExpTransform):
        def _inverse(self, y: jax.Array) -> jax.Array:
            raise NotImplementedError

    def model() -> None:
        numpyro.sample("z", dist.LogNormal(0.0, 1.0))

    def guide() -> None:
        loc = numpyro.param("loc", jnp.array(0.1))
        numpyro.sample("z", dist.TransformedDistribution(dist.Normal(loc, 1.0), OneWay()))

    params = {"loc": jnp.array(0.1)}
    for particles in (1, 2):
        assert jnp.isfinite(ImportanceWeightedELBO(particles).loss(KEY, params, model, guide))
        for gradient in ("stl", "dreg"):
            elbo = ImportanceWeightedELBO(particles, gradient=gradient)
            with pytest.raises(ValueError, match="under path gradients; got site 'z' with a Trans"):
                elbo.loss(KEY, params, model, guide)


@pytest.mark.slow
def test_signal_to_noise_slopes(exact: None) -> None:
    """The ratio grows with K for the model, STL and DReG, and falls for reparam (Rainforth 2018).

    Every datum has a copy of its own of mu and of the guide's location, so that one backward pass
    gives the gradients datum by datum.
    """
    jax.config.update("jax_disable_most_optimizations", False)  # it runs longer than it compiles
    data = signal_to_noise.problem(num_data=256)
    x = jnp.asarray(data.x)
    params = {
        "mu": jnp.broadcast_to(data.mu, x.shape),
        "loc": x @ jnp.asarray(data.A).T + data.b,
    }

    def model() -> None:
        mu = numpyro.param("mu", params["mu"])
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        loc = numpyro.param("loc", params["loc"])
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, np.exp(signal_to_noise.LOG_SCALE)).to_event(1))

    repetitions, counts = 60, signal_to_noise.NUM_PARTICLES
    found: dict[str, list[float]] = {name: [] for name in ("theta", *GRADIENTS)}
    for count in counts:
        moments = {}
        for gradient in GRADIENTS:
            step = gradient_of(gradient, count, model, guide)
            keys = jax.random.split(jax.random.key(count), repetitions)
            draws = (step(params, key) for key in keys)
            mean, variance = signal_to_noise.moments(
                np.stack([draw["mu"], draw["loc"]]) for draw in draws
            )
            moments[gradient] = (mean[1], variance[1])
            moments.setdefault("theta", (mean[0], variance[0]))
        # The plain mean of reparam drowns in its noise; DReG's has the same expectation.
        for name in found:
            variance, signal = moments[name][1], moments["dreg" if name == "reparam" else name]
            found[name].append(signal_to_noise.pooled_ratio(variance, *signal, repetitions))
    slopes = signal_to_noise.slopes({k: np.array(v) for k, v in found.items()})
    assert abs(slopes["theta"][0] - 0.5) < 0.05
    assert abs(slopes["reparam"][0] + 0.5) < 0.08
    assert abs(slopes["stl"][0] - 0.5) < 0.08
    assert slopes["dreg"][1] > 0.45
