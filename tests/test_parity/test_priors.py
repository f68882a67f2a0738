"""Priors in both backends: densities, samples, losses and every gradient agree to 1e-9."""

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
from cases import CASES
from flax import nnx
from numpyro.contrib.module import nnx_module
from reference import importance_weighted
from reference import priors as oracle
from test_parity.bridge import Noise, families, to_jax, to_torch

import numpyro_vae_ext.priors
import pyro_vae_ext.priors
from numpyro_vae_ext.elbos import ImportanceWeightedELBO as NumPyroELBO
from pyro_vae_ext.elbos import ImportanceWeightedELBO as PyroELBO

MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name in ("FlowPrior", "Mixture")
    for i, case in enumerate(CASES["priors"][name])
]
ROWS, INPUTS = 4, 3
close = {"rtol": 1e-9, "atol": 1e-9}


def pair(name: str, **case: Any) -> tuple[torch.nn.Module, nnx.Module]:
    """The prior in both backends, with the same random weights."""
    ours = getattr(pyro_vae_ext.priors, name)(**case)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs = getattr(numpyro_vae_ext.priors, name)(**case, rngs=nnx.Rngs(0))
    params = nnx.state(theirs, nnx.Param)
    nnx.replace_by_pure_dict(params, to_jax(ours, nnx.to_pure_dict(params)))
    nnx.update(theirs, params)
    return ours, theirs


def gradients(loss: torch.Tensor, named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        key: np.zeros(tuple(p.shape)) if g is None else g.numpy()
        for (key, p), g in zip(named.items(), found, strict=True)
    }


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(theirs[key] / scale, value / scale, err_msg=key, **close)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_densities_samples_and_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, case: dict
) -> None:
    ours, theirs = pair(name, **case)
    rng = np.random.default_rng(0)
    z, noise = rng.standard_normal((2, 5, ROWS, case["latent_dim"]))
    value = torch.tensor(z, requires_grad=True)
    total = ours().log_prob(value)
    named = {**dict(ours.named_parameters()), "z": value}
    found = gradients(total.sum(), named)

    @jax.jit
    def run(theirs: nnx.Module, z: jax.Array) -> tuple:
        law = theirs().expand((ROWS,))
        grads = jax.grad(lambda m, z: m().log_prob(z).sum(), (0, 1))(theirs, z)
        drawn = law.sample(jax.random.PRNGKey(0), (5,)) if name == "FlowPrior" else z
        return law.log_prob(z), grads, drawn

    draws = Noise(monkeypatch, noise)
    if name == "FlowPrior":
        log_prob, (module, in_z), drawn = draws.jax(lambda: run(theirs, z))
        sample = draws.torch(lambda: ours().expand((ROWS,)).sample((5,)))
        np.testing.assert_allclose(sample.numpy(), drawn, **close)
    else:
        log_prob, (module, in_z), _ = run(theirs, z)
    np.testing.assert_allclose(total.detach().numpy(), log_prob, **close)
    other = to_torch(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    compare(found, {**other, "z": np.asarray(in_z)})


OPTIONS: dict[str, dict] = {
    "MeanField": {},
    "IAF": {"hidden_dims": (5,)},
    "Auxiliary": {"aux_dim": 1, "hidden_dims": (5,)},
    "VGP": {"input_dim": 1, "num_inducing": 4, "hidden_dims": (5,)},
}
SETTINGS = [
    *(
        ("MeanField", gradient, count)
        for gradient in ("reparam", "stl", "dreg")
        for count in (1, 5)
    ),
    *(("IAF", gradient, 5) for gradient in ("reparam", "stl", "dreg")),
    *((name, gradient, 5) for name in ("Auxiliary", "VGP") for gradient in ("reparam", "dreg")),
]


@pytest.mark.parametrize(("name", "gradient", "count"), SETTINGS)
def test_vamp_prior_shares_the_guide(
    monkeypatch: pytest.MonkeyPatch, name: str, gradient: str, count: int
) -> None:
    """Loss and gradients of a prior made of the guide: parameters get the parts of both.

    Where the family has a density of its own, they are those of the reference, whose gradient is a
    sum of what comes through the model and what comes through the guide's samples.
    """
    ours, theirs = families(name, latent_dim=2, context_dim=2, **OPTIONS[name])
    case = {"input_shape": INPUTS, "num_pseudo_inputs": 3, "num_samples": 2}
    prior, other_prior = pair("VampPrior", **case)
    rng = np.random.default_rng(2)
    shapes = {"encoder": (INPUTS, 2), "decoder": (2, INPUTS)}
    weights = {key: 0.5 * rng.standard_normal(shape) for key, shape in shapes.items()}
    x = rng.standard_normal((ROWS, INPUTS))
    sites = {"Auxiliary": (1, 2), "VGP": (1, 2)}.get(name, (2,))
    noise = [rng.standard_normal((count, ROWS, width)) for width in sites]
    if name in ("Auxiliary", "VGP"):
        # Of the estimates: samples of the reverse model for every pseudo-input.
        noise.append(rng.standard_normal((count, 2, ROWS, 3, 1)))
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in weights.items()}

    def model_in_pyro() -> None:
        law = prior(ours, lambda u: torch.tanh(u @ tensors["encoder"]))
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", law)
            pyro.sample(
                "x", pdist.Normal(z @ tensors["decoder"], 1.0).to_event(1), obs=torch.tensor(x)
            )

    def guide_in_pyro() -> None:
        with pyro.plate("data", ROWS):
            ours("z", torch.tanh(torch.tensor(x) @ tensors["encoder"]))

    def in_torch() -> tuple:
        elbo = PyroELBO(count, gradient=gradient, max_plate_nesting=1)
        loss = elbo.differentiable_loss(model_in_pyro, guide_in_pyro)
        named = {**dict(ours.named_parameters()), **dict(prior.named_parameters()), **tensors}
        return loss.item(), gradients(loss, named)

    def model_in_numpyro() -> None:
        decoder = numpyro.param("decoder", weights["decoder"])
        encoder = numpyro.param("encoder", weights["encoder"])
        posterior = nnx_module("posterior", theirs)
        law = nnx_module("prior", other_prior)(posterior, lambda u: jnp.tanh(u @ encoder))
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", law)
            numpyro.sample("x", ndist.Normal(z @ decoder, 1.0).to_event(1), obs=x)

    def guide_in_numpyro() -> None:
        encoder = numpyro.param("encoder", weights["encoder"])
        posterior = nnx_module("posterior", theirs)
        with numpyro.plate("data", ROWS):
            posterior("z", jnp.tanh(x @ encoder))

    params = {
        "posterior$params": nnx.to_pure_dict(nnx.state(theirs, nnx.Param)),
        "prior$params": nnx.to_pure_dict(nnx.state(other_prior, nnx.Param)),
        **{key: jnp.asarray(value) for key, value in weights.items()},
    }

    def in_jax() -> tuple:
        elbo = NumPyroELBO(count, gradient=gradient)
        step = jax.value_and_grad(
            lambda p: elbo.loss(jax.random.PRNGKey(0), p, model_in_numpyro, guide_in_numpyro)
        )
        loss, found = jax.jit(step)(params)
        flat = {**to_torch(found.pop("posterior$params")), **to_torch(found.pop("prior$params"))}
        return float(loss), {**flat, **{key: np.asarray(g) for key, g in found.items()}}

    # Pyro draws the estimate's noise for all particles at once, with the samples in front.
    in_pyro = [*noise[:2], noise[2].swapaxes(0, 1)] if len(noise) == 3 else noise
    loss, found = Noise(monkeypatch, *in_pyro).torch(in_torch)
    other_loss, other = Noise(monkeypatch, *noise).jax(in_jax)
    assert loss == pytest.approx(other_loss, rel=1e-9)
    compare(found, other)
    assert np.abs(found["pseudo_inputs"]).max() > 1e-3
    if name in ("Auxiliary", "VGP"):
        return

    def parameters(phi: dict) -> tuple[dict, np.ndarray, np.ndarray]:
        own = {k: v for k, v in phi.items() if k not in ("encoder", "pseudo_inputs", "decoder")}
        encode = phi["encoder"]
        return own, np.tanh(x @ encode), np.tanh(phi["pseudo_inputs"] @ encode)

    def log_joint(z: np.ndarray, theta: dict, phi: dict) -> np.ndarray:
        own, _, inner = parameters({**phi, **theta})
        residual = x - z @ theta["decoder"]
        log_x = (-0.5 * residual**2 - 0.5 * np.log(2 * np.pi)).sum(-1)
        return oracle.vamp(name, z, own, inner) + log_x

    def sample(eps: np.ndarray, phi: dict) -> np.ndarray:
        own, context, _ = parameters({**phi, **theta})
        if name == "IAF":
            return oracle.iaf.forward(eps, own, context)[0]
        return oracle.mean_field.sample(eps, *oracle.mean_field.heads(own, context))

    def log_q(z: np.ndarray, phi: dict) -> np.ndarray:
        own, context, _ = parameters({**phi, **theta})
        if name == "IAF":
            return oracle.iaf.log_prob(z, own, context)
        return oracle.mean_field.log_prob(z, *oracle.mean_field.heads(own, context))

    theta = {"decoder": weights["decoder"], "pseudo_inputs": prior.pseudo_inputs.detach().numpy()}
    phi = {n: p.detach().numpy() for n, p in ours.named_parameters()}
    phi["encoder"] = weights["encoder"]
    bound, in_theta, in_phi = importance_weighted.gradients(
        log_joint, sample, log_q, noise[0], theta, phi, gradient
    )
    assert loss == pytest.approx(-bound, rel=1e-9)
    compare({k: -g for k, g in found.items()}, {**in_theta, **in_phi})
