"""Guides made from a model: the loss and every gradient agree to 1e-9."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import pytest
import torch
from cases import CASES, resolved
from test_parity.bridge import Noise, to_jax, to_torch

import numpyro_vae_ext.guides
import pyro_vae_ext.guides
from numpyro_vae_ext.elbos import ImportanceWeightedELBO as NumPyroELBO
from pyro_vae_ext.elbos import ImportanceWeightedELBO as PyroELBO

COUNTS = np.array([[2.0, 1.0], [4.0, 0.0], [1.0, 3.0]])


class Start(NamedTuple):
    """A Normal to start from."""

    loc: np.ndarray
    scale_tril: np.ndarray
    sites: dict[str, tuple[int, ...]]


START = Start(
    np.array([0.5, 0.4, -0.2]),
    np.array([[0.6, 0.0, 0.0], [-0.3, 0.9, 0.0], [0.2, 0.4, 0.5]]),
    {"rate": (), "shape": (2,)},
)
# Noise of one particle's draws at the three numbers of the model, by family.
SITES = {"MeanField": 1, "IAF": 1, "Auxiliary": 2, "VGP": 2}
CHOICES = [
    pytest.param(case, id=case["family"]["name"]) for case in CASES["guides"]["AutoPosterior"]
]


def model_in_pyro(counts: torch.Tensor) -> None:
    rate = pyro.sample("rate", pdist.Gamma(torch.tensor(2.0), 1.0))
    start = torch.zeros(2)
    shape = pyro.sample("shape", pdist.Normal(start, 1.0).to_event(1))
    with pyro.plate("data", len(counts)):
        mean = rate.unsqueeze(-1) * shape.exp()
        pyro.sample("counts", pdist.Poisson(mean).to_event(1), obs=counts)


def model_in_numpyro(counts: jax.Array) -> None:
    rate = numpyro.sample("rate", ndist.Gamma(2.0, 1.0))
    shape = numpyro.sample("shape", ndist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("data", len(counts)):
        numpyro.sample("counts", ndist.Poisson(rate * jnp.exp(shape)).to_event(1), obs=counts)


def local_in_pyro(counts: torch.Tensor) -> None:
    with pyro.plate("data", len(counts)):
        rate = pyro.sample("rate", pdist.Gamma(2.0, torch.ones(2)).to_event(1))
        pyro.sample("counts", pdist.Poisson(rate).to_event(1), obs=counts)


def local_in_numpyro(counts: jax.Array) -> None:
    with numpyro.plate("data", len(counts)):
        rate = numpyro.sample("rate", ndist.Gamma(2.0, jnp.ones(2)).to_event(1))
        numpyro.sample("counts", ndist.Poisson(rate).to_event(1), obs=counts)


@pytest.mark.parametrize("name", ["AutoPosterior", "AutoAmortized"])
@pytest.mark.parametrize("case", CHOICES)
def test_loss_and_every_gradient(monkeypatch: pytest.MonkeyPatch, name: str, case: dict) -> None:
    """Of the family, and of the step that an AutoPosterior with a start ends in."""
    joint = name == "AutoPosterior"
    pyro.clear_param_store()
    ours_model, theirs_model = local_in_pyro, local_in_numpyro
    families = [
        resolved(module, case)["family"] for module in (pyro_vae_ext.guides, numpyro_vae_ext.guides)
    ]
    if joint:
        ours_model, theirs_model = model_in_pyro, model_in_numpyro
        ours = pyro_vae_ext.guides.AutoPosterior(
            ours_model, families[0], init_scale=0.5, start=START
        )
        theirs = numpyro_vae_ext.guides.AutoPosterior(
            theirs_model, families[1], init_scale=0.5, start=START
        )
    else:
        ours = pyro_vae_ext.guides.AutoAmortized(ours_model, lambda x: x, family=families[0])
        theirs = numpyro_vae_ext.guides.AutoAmortized(theirs_model, lambda x: x, family=families[1])
    counts = torch.tensor(COUNTS)
    ours(counts)
    posterior = ours.latent.family if joint else ours.family
    step = list(ours.latent.step.parameters()) if joint and ours.latent.step is not None else []
    with torch.no_grad():
        for parameter in (*posterior.parameters(), *step):
            parameter.add_(0.1 * torch.randn_like(parameter))
    gradient = "dreg" if joint else "reparam"
    key, elbo = jax.random.PRNGKey(0), NumPyroELBO(4, gradient=gradient)
    svi = numpyro.infer.SVI(theirs_model, theirs, numpyro.optim.Adam(1e-3), elbo)
    params = svi.get_params(jax.jit(svi.init)(key, jnp.asarray(COUNTS)))
    site = "auto_family$params" if joint else "auto_local_family$params"
    params[site] = to_jax(posterior, params[site])
    names = ("auto_step_loc", "auto_step_log_scale") if step else ()
    assert not joint or set(params) == {site, "auto_loc", "auto_scale_tril", *names}
    params |= {k: jnp.asarray(p.detach()) for k, p in zip(names, step, strict=True)}

    width = 3 if joint else 2
    shape = (4, width) if joint else (4, len(COUNTS), width)
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal(shape) for _ in range(SITES[case["family"]["name"]])]
    found = Noise(monkeypatch, *noise)

    def in_torch() -> tuple[float, dict]:
        elbo = PyroELBO(4, max_plate_nesting=1, gradient=gradient)
        loss = elbo.differentiable_loss(ours_model, ours, counts)
        named = dict(posterior.named_parameters()) | dict(zip(names, step, strict=True))
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return loss.item(), {
            key: np.zeros(tuple(p.shape)) if g is None else g.numpy()
            for (key, p), g in zip(named.items(), gradients, strict=True)
        }

    def in_jax() -> tuple[float, dict]:
        loss = partial(elbo.loss, key)
        step = jax.value_and_grad(lambda p: loss(p, theirs_model, theirs, jnp.asarray(COUNTS)))
        value, gradients = jax.jit(step)(params)
        fixed = [gradients[k] for k in ("auto_loc", "auto_scale_tril") if joint]
        assert not any(x.any() for x in fixed)
        own = {name: np.asarray(gradients[name]) for name in names}
        return float(value), to_torch(gradients[site]) | own

    (loss, gradients), (other_loss, other) = found.torch(in_torch), found.jax(in_jax)
    assert loss == pytest.approx(other_loss, rel=1e-9)
    assert set(gradients) == set(other)
    for parameter, value in gradients.items():
        scale = max(1.0, np.abs(value).max())
        np.testing.assert_allclose(
            other[parameter] / scale, value / scale, rtol=1e-9, atol=1e-9, err_msg=parameter
        )
