"""Free bits: value and every gradient agree to 1e-9, with each other and with the reference."""

from __future__ import annotations

from collections.abc import Callable
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
from flax import nnx
from numpyro.contrib.module import nnx_module
from reference import free_bits as oracle
from reference import iaf
from test_parity.bridge import Noise, families, to_torch

from numpyro_vae_ext import elbos as numpyro_elbos
from numpyro_vae_ext import handlers as numpyro_handlers
from pyro_vae_ext import elbos as pyro_elbos
from pyro_vae_ext import handlers as pyro_handlers

ROWS, DIM, WIDTH, SCALE = 4, 3, 2, 10.0
close = {"rtol": 1e-9, "atol": 1e-9}
MASK = np.array([True, False, True, True])
WHOLE = ("dimension", "site")


def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "mu": 0.3 * rng.standard_normal(DIM),
        "W": rng.standard_normal((DIM, WIDTH)),
        # One dimension that follows the data, one near the prior, one in between.
        "A": rng.standard_normal((WIDTH, DIM)) * np.array([1.5, 0.05, 0.6]),
        "b": 0.1 * rng.standard_normal(DIM),
        "log_scale": np.array([-1.0, -0.05, -0.4]),
    }


def data() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((ROWS, WIDTH))


def in_pyro(run: Callable[[], torch.Tensor], named: dict[str, torch.Tensor]) -> tuple:
    loss = run()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    gradients = {
        key: np.zeros(tuple(p.shape)) if g is None else g.numpy()
        for (key, p), g in zip(named.items(), found, strict=True)
    }
    return loss.item(), gradients


def agree(found: tuple, expected: tuple) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    assert set(found[1]) == set(expected[1])
    for key, value in expected[1].items():
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(found[1][key] / scale, value / scale, err_msg=key, **close)


@pytest.mark.parametrize(
    ("num_particles", "groups", "free_bits", "options"),
    [
        (1, "dimension", 0.3, {}),
        (3, "dimension", 0.3, {"prior": "student"}),
        (3, "dimension", 0.3, {"weight": 0.4, "mask": True}),
        (3, {"z": (7, 2, 7)}, 0.3, {"prior": "student", "mask": True}),
        (2, "site", 4.0, {"weight": 0.0}),
        (2, "site", 0.3, {"prior": "student", "weight": 2.0}),
    ],
)
def test_linear_gaussian_pair(
    monkeypatch: pytest.MonkeyPatch,
    num_particles: int,
    groups: Any,
    free_bits: float,
    options: dict,
) -> None:
    prior, weight = options.get("prior", "normal"), options.get("weight", 1.0)
    mask = MASK if options.get("mask", False) else np.ones(ROWS, dtype=bool)
    start, x = parameters(), data()
    noise = np.random.default_rng(5).standard_normal((num_particles, ROWS, DIM))
    ids = {"dimension": (0, 1, 2), "site": (0, 0, 0)}[groups] if groups in WHOLE else groups["z"]
    expected, gradients, means = oracle.linear_gaussian(
        noise, x, start, free_bits, ids, SCALE * mask, weight, prior
    )
    if groups == "dimension":
        assert means.min() < free_bits < means.max(), "one side of the threshold is not tested"

    def pair(host: Any, dist: Any, p: Any, x: Any, mask: Any, exp: Any) -> tuple:
        handlers = pyro_handlers if host is pyro else numpyro_handlers
        masked = pyro.poutine.mask if host is pyro else numpyro.handlers.mask

        def model() -> None:
            with host.plate("data", int(SCALE) * ROWS, subsample_size=ROWS):
                law = (
                    dist.Normal(p["mu"], 1.0)
                    if prior == "normal"
                    else dist.StudentT(oracle.DEGREES, p["mu"], 1.0)
                )
                z = host.sample("z", law.to_event(1))
                host.sample("x", dist.Normal(z @ p["W"], 1.0).to_event(1), obs=x)

        def guide() -> None:
            with host.plate("data", int(SCALE) * ROWS, subsample_size=ROWS):
                law = dist.Normal(x @ p["A"] + p["b"], exp(p["log_scale"]))
                host.sample("z", law.to_event(1))

        programs = [model, guide]
        if not bool(np.asarray(mask).all()):
            programs = [masked(program, mask=mask) for program in programs]
        if weight != 1.0:
            programs = [handlers.kl_weight(program, weight=weight) for program in programs]
        return tuple(programs)

    kwargs = {"free_bits": free_bits, "groups": groups}
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in start.items()}

    def run() -> torch.Tensor:
        elbo = pyro_elbos.TraceFreeBits_ELBO(num_particles, max_plate_nesting=1, **kwargs)
        programs = pair(pyro, pdist, tensors, torch.tensor(x), torch.tensor(mask), torch.exp)
        return elbo.differentiable_loss(*programs)

    def in_jax() -> tuple:
        elbo = numpyro_elbos.TraceFreeBits_ELBO(num_particles, **kwargs)

        def loss(p: dict) -> jax.Array:
            programs = pair(numpyro, ndist, p, jnp.asarray(x), mask, jnp.exp)
            return elbo.loss(jax.random.PRNGKey(0), {}, *programs)

        value, found = jax.jit(jax.value_and_grad(loss))(start)
        return float(value), {key: np.asarray(g) for key, g in found.items()}

    draws = Noise(monkeypatch, noise)
    agree(draws.torch(lambda: in_pyro(run, tensors)), (expected, gradients))
    agree(draws.jax(in_jax), (expected, gradients))


@pytest.mark.parametrize(
    ("name", "groups", "options"),
    [
        ("IAF", "dimension", {"hidden_dims": (6,)}),
        ("IAF", "site", {"hidden_dims": (6,), "update": "affine"}),
        ("Auxiliary", "site", {"aux_dim": 2, "hidden_dims": (6,)}),
        ("VGP", "site", {"num_inducing": 4, "hidden_dims": (6,)}),
    ],
)
def test_families(monkeypatch: pytest.MonkeyPatch, name: str, groups: str, options: dict) -> None:
    ours, theirs = families(name, latent_dim=DIM, context_dim=WIDTH, **options)
    x = data()
    sites = {"Auxiliary": (2, 3), "VGP": (3, 3)}.get(name, (3,))
    rng = np.random.default_rng(6)
    noise = [rng.standard_normal((2, ROWS, width)) for width in sites]
    decoder = torch.tensor(parameters()["W"], requires_grad=True)

    def model_in_pyro() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", pdist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", pdist.Normal(z @ decoder, 1.0).to_event(1), obs=torch.tensor(x))

    def guide_in_pyro() -> None:
        with pyro.plate("data", ROWS):
            ours("z", torch.tensor(x))

    def model_in_numpyro() -> None:
        weight = numpyro.param("W", jnp.zeros((DIM, WIDTH)))
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(DIM), 1.0).to_event(1))
            numpyro.sample("x", ndist.Normal(z @ weight, 1.0).to_event(1), obs=x)

    def guide_in_numpyro() -> None:
        posterior = nnx_module("posterior", theirs)
        with numpyro.plate("data", ROWS):
            posterior("z", jnp.asarray(x))

    free_bits = 0.4
    kwargs = {"free_bits": free_bits, "groups": groups}
    named = {**dict(ours.named_parameters()), "W": decoder}

    def run() -> torch.Tensor:
        elbo = pyro_elbos.TraceFreeBits_ELBO(2, max_plate_nesting=1, **kwargs)
        return elbo.differentiable_loss(model_in_pyro, guide_in_pyro)

    def in_jax() -> tuple:
        elbo = numpyro_elbos.TraceFreeBits_ELBO(2, **kwargs)
        params = {
            "posterior$params": nnx.to_pure_dict(nnx.state(theirs, nnx.Param)),
            "W": jnp.asarray(parameters()["W"]),
        }
        step = jax.value_and_grad(
            lambda p: elbo.loss(jax.random.PRNGKey(0), p, model_in_numpyro, guide_in_numpyro)
        )
        value, found = jax.jit(step)(params)
        flat = to_torch(found.pop("posterior$params"))
        return float(value), {**flat, "W": np.asarray(found["W"])}

    draws = Noise(monkeypatch, *noise)
    found = draws.torch(lambda: in_pyro(run, named))
    agree(draws.jax(in_jax), found)
    if name == "IAF" and groups == "site":
        weights = {key: p.detach().numpy() for key, p in ours.named_parameters()}
        z, log_q = iaf.forward(noise[0], weights, x, update="affine")
        likelihood = oracle.normal(x, z @ parameters()["W"]).sum(-1)
        divergence = (log_q - oracle.normal(z, 0.0).sum(-1))[..., None]
        expected = oracle.loss(likelihood, divergence, free_bits, (0,), np.ones(ROWS))
        assert found[0] == pytest.approx(expected, rel=1e-9)
