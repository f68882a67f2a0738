"""Samples, log-densities, losses and every gradient agree to 1e-9, with the references too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import pytest
import torch
from cases import CASES, DIRECT
from flax import nnx
from numpyro.contrib.module import nnx_module
from reference import iaf, mean_field
from test_parity.bridge import Noise, families, to_torch

from numpyro_vae_ext.elbos import ImportanceWeightedELBO as NumPyroELBO
from pyro_vae_ext.elbos import ImportanceWeightedELBO as PyroELBO

ROWS = 4
MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name in DIRECT
    for i, case in enumerate(CASES["guides"][name])
]
close = {"rtol": 1e-9, "atol": 1e-9}


def context_of(case: dict) -> np.ndarray | None:
    if case["context_dim"] is None:
        return None
    return np.random.default_rng(1).standard_normal((ROWS, case["context_dim"]))


def as_torch(value: np.ndarray | None) -> torch.Tensor | None:
    return None if value is None else torch.tensor(value)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_samples_and_log_densities(monkeypatch: pytest.MonkeyPatch, name: str, case: dict) -> None:
    ours, theirs = families(name, **case)
    context = context_of(case)
    noise = np.random.default_rng(0).standard_normal((3, ROWS, case["latent_dim"]))

    def in_torch() -> tuple:
        distribution = ours.distribution(as_torch(context)).expand((3, ROWS))
        z = distribution.rsample()
        return z, distribution.log_prob(z), ours.log_prob(z.detach() + 0.1, as_torch(context))

    def run_in_jax(theirs: nnx.Module, context: np.ndarray | None) -> tuple:
        distribution = theirs.distribution(context).expand((3, ROWS))
        z, kept = distribution.sample_with_intermediates(jax.random.PRNGKey(0))
        density = distribution.log_prob(z, kept) if kept else distribution.log_prob(z)
        return z, density, theirs.log_prob(z + 0.1, context)

    found = Noise(monkeypatch, noise)
    a, b = found.torch(in_torch), found.jax(lambda: jax.jit(run_in_jax)(theirs, context))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.detach().numpy(), y, **close)
    weights = {n: p.detach().numpy() for n, p in ours.named_parameters()}
    activation = case.get("activation", "elu")
    if name == "MeanField":
        heads = mean_field.heads(weights, context, activation)
        z, density = mean_field.sample(noise, *heads), None
        density = mean_field.log_prob(z, *heads)
    else:
        update = case.get("update", "affine")
        z, density = iaf.forward(noise, weights, context, update=update, activation=activation)
    np.testing.assert_allclose(a[0].detach().numpy(), z, **close)
    np.testing.assert_allclose(a[1].detach().numpy(), density, **close)


CHOICES = [
    ("MeanField", {}),
    ("IAF", {"hidden_dims": (6,), "update": "gated"}),
    ("IAF", {"hidden_dims": (6,), "update": "affine"}),
    ("Auxiliary", {"aux_dim": 2, "hidden_dims": (6,)}),
    (
        "Auxiliary",
        {
            "aux_dim": 2,
            "hidden_dims": (6,),
            "latent_family": {"name": "IAF", "hidden_dims": (6,)},
            "reverse_family": {"name": "IAF", "hidden_dims": (7,)},
        },
    ),
    ("VGP", {"num_inducing": 4, "hidden_dims": (6,)}),
    (
        "VGP",
        {
            "input_dim": 2,
            "num_inducing": 4,
            "reverse_family": {"name": "IAF", "hidden_dims": (5,)},
        },
    ),
]
# One particle is the objective's other branch, which does not depend on the family.
LAYOUTS = [
    pytest.param(name, options, count, 1, id=f"{name}-{i}-{count}")
    for i, (name, options) in enumerate(CHOICES)
    for count in ((1, 5) if name in DIRECT else (5,))
]
# Nor do groups of particles.
LAYOUTS += [
    pytest.param(*CHOICES[0], count, outer, id=f"groups-{outer}-of-{count}")
    for count, outer in ((1, 4), (3, 2))
]


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
@pytest.mark.parametrize(("name", "options", "num_particles", "num_outer"), LAYOUTS)
@pytest.mark.parametrize("amortised", [True, False])
def test_loss_and_every_gradient(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict,
    gradient: str,
    num_particles: int,
    num_outer: int,
    amortised: bool,
) -> None:
    """Encoder, family and decoder of a Bernoulli model, with a scaled data plate."""
    width = 5 if amortised else None
    ours, theirs = families(name, latent_dim=3, context_dim=width, **options)
    rng = np.random.default_rng(2)
    shapes = {"encoder": (7, 5), "decoder": (3, 7)}
    weights = {key: 0.5 * rng.standard_normal(shape) for key, shape in shapes.items()}
    x = (rng.random((ROWS, 7)) < 0.4).astype(float)
    sites = {"Auxiliary": (2, 3), "VGP": (options.get("input_dim", 3), 3)}.get(name, (3,))
    noise = [rng.standard_normal((num_particles * num_outer, ROWS, width)) for width in sites]
    settings = {"num_outer": num_outer, "gradient": gradient}
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in weights.items()}

    def model_in_pyro(x: torch.Tensor) -> None:
        with pyro.plate("data", 10 * ROWS, subsample_size=ROWS):
            z = pyro.sample("z", pdist.Normal(torch.zeros(3), 1.0).to_event(1))
            logits = z @ tensors["decoder"]
            pyro.sample("x", pdist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide_in_pyro(x: torch.Tensor) -> None:
        with pyro.plate("data", 10 * ROWS, subsample_size=ROWS):
            ours("z", torch.tanh(x @ tensors["encoder"]) if amortised else None)

    def in_torch() -> tuple:
        elbo = PyroELBO(num_particles, **settings, max_plate_nesting=1)
        loss = elbo.differentiable_loss(model_in_pyro, guide_in_pyro, torch.tensor(x))
        named = {**dict(ours.named_parameters()), **tensors}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return loss.item(), {
            key: np.zeros(tuple(p.shape)) if g is None else g.numpy()
            for (key, p), g in zip(named.items(), found, strict=True)
        }

    def model_in_numpyro(x: jax.Array) -> None:
        decoder = numpyro.param("decoder", weights["decoder"])
        with numpyro.plate("data", 10 * ROWS, subsample_size=ROWS):
            z = numpyro.sample("z", ndist.Normal(jnp.zeros(3), 1.0).to_event(1))
            numpyro.sample("x", ndist.Bernoulli(logits=z @ decoder).to_event(1), obs=x)

    def guide_in_numpyro(x: jax.Array) -> None:
        encoder = numpyro.param("encoder", weights["encoder"])
        posterior = nnx_module("posterior", theirs)
        with numpyro.plate("data", 10 * ROWS, subsample_size=ROWS):
            posterior("z", jnp.tanh(x @ encoder) if amortised else None)

    params = {
        "posterior$params": nnx.to_pure_dict(nnx.state(theirs, nnx.Param)),
        **{key: jnp.asarray(value) for key, value in weights.items()},
    }

    def in_jax() -> tuple:
        elbo = NumPyroELBO(num_particles, **settings)
        step = jax.value_and_grad(
            lambda p: elbo.loss(jax.random.PRNGKey(0), p, model_in_numpyro, guide_in_numpyro, x)
        )
        loss, found = jax.jit(step)(params)
        flat = to_torch(found.pop("posterior$params"))
        return float(loss), {**flat, **{key: np.asarray(g) for key, g in found.items()}}

    draws = Noise(monkeypatch, *noise)
    (loss, gradients), (other_loss, other) = draws.torch(in_torch), draws.jax(in_jax)
    assert loss == pytest.approx(other_loss, rel=1e-9)
    assert set(gradients) == set(other)
    for key, value in gradients.items():
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(other[key] / scale, value / scale, err_msg=key, **close)
