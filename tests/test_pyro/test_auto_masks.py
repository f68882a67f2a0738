"""Latents under a mask in guides made from a model: the evidence is that of what counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import ExpTransform
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList
from reference import masks as oracle
from test_pyro.models import shaken, standard_errors
from torch.distributions.transforms import StickBreakingTransform

from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import IAF, AutoAmortized, AutoPosterior, MeanField
from pyro_vae_ext.training import pathfinder

COUNTS = torch.as_tensor(oracle.COUNTS)
SmallIAF = partial(IAF, hidden_dims=(5,))


def data() -> torch.Tensor:
    return torch.as_tensor(oracle.X).to(torch.get_default_dtype())


def partly_observed() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=data(), obs_mask=COUNTS)


def masked_rows() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4), poutine.mask(mask=COUNTS):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data())


def masked_entries() -> None:
    """A mask inside of an event, whose support is the positive line."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0)).unsqueeze(-1)
    prior = dist.LogNormal(mu, 1.0).expand((*mu.shape[:-1], 4))
    z = pyro.sample("z", prior.mask(COUNTS).to_event(1))
    pyro.sample("x", dist.Normal(z.log(), 1.0).mask(COUNTS).to_event(1), obs=data())


MODELS = {f.__name__: f for f in (partly_observed, masked_rows, masked_entries)}
SECOND = {"partly_observed": "x_unobserved", "masked_rows": "z", "masked_entries": "z"}


def at(kind: str, family: Callable, wider: float = 1.0) -> AutoPosterior:
    """A guide at the posterior, the family's parameters all 0."""
    pyro.clear_param_store()
    loc, covariance = oracle.posterior(kind)
    sites = {"mu": (), SECOND[kind]: (4,)}
    tril = wider * np.linalg.cholesky(covariance)
    start = SimpleNamespace(loc=loc, scale_tril=tril, sites=sites)
    guide = AutoPosterior(MODELS[kind], family, start=start)
    guide()
    with torch.no_grad():
        for parameter in guide.latent.family.parameters():
            parameter.zero_()
    return guide


def weights(model: Callable, guide: Callable, *args: object, count: int = 20_000) -> torch.Tensor:
    elbo = ImportanceWeightedELBO(count, vectorize_particles=True)
    with torch.no_grad():
        return elbo.log_weights(model, guide, *args)


@pytest.mark.parametrize(
    ("kind", "family"), [*((kind, SmallIAF) for kind in oracle.KINDS), ("masked_rows", MeanField)]
)
@pytest.mark.parametrize("vectorize", [False, True])
def test_every_weight_is_the_evidence_at_the_posterior(
    exact: None, kind: str, family: Callable, vectorize: bool
) -> None:
    """Path gradients are 0 draw by draw, and the host's objectives say the same."""
    guide = at(kind, family)
    model, truth = MODELS[kind], torch.tensor(oracle.evidence(kind))
    for gradient in ("stl", "dreg"):
        elbo = ImportanceWeightedELBO(3, gradient=gradient, vectorize_particles=vectorize)
        torch.testing.assert_close(elbo.log_weights(model, guide), truth.expand(3))
        loss = elbo.differentiable_loss(model, guide)
        trained = [p for p in guide.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(loss, trained, allow_unused=True)
        assert all(slope is None or slope.abs().max() < 1e-8 for slope in slopes)
    for host in (Trace_ELBO, TraceMeanField_ELBO):
        found = host(num_particles=3, vectorize_particles=vectorize).loss(model, guide)
        assert found == pytest.approx(-truth.item(), abs=1e-9)


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_mean_weight_and_gradient_off_the_posterior(exact: None, kind: str) -> None:
    """The evidence by any guide; the gradient of the plain ELBO in closed form."""
    guide, model = at(kind, SmallIAF, wider=1.2), MODELS[kind]
    shaken(guide.latent.family, 0.1)
    found = weights(model, guide)
    assert found.std() > 0.1
    assert abs(standard_errors(found.exp(), np.exp(oracle.evidence(kind)))) < 4
    # With the target N(0, I) and the guide N(l, s^2): the derivatives are l and s^2 - 1.
    guide = at(kind, SmallIAF)
    loc = torch.tensor([0.5, -0.3, 0.2, 0.1, -0.4])
    log_scale = torch.tensor([0.2, -0.3, 0.1, 0.3, -0.1])
    step = guide.latent.step
    with torch.no_grad():
        step.loc.copy_(loc)
        step.log_scale.copy_(log_scale)
    slopes = []
    for _ in range(20):
        elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True)
        loss = elbo.differentiable_loss(model, guide)
        slopes.append(torch.cat(torch.autograd.grad(loss, [step.loc, step.log_scale])))
    found = torch.stack(slopes)
    truth = torch.cat([loc, (2 * log_scale).exp() - 1])
    assert ((found.mean(0) - truth).abs() < 5 * found.std(0) / 20**0.5).all()


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_pathfinder_and_draws(exact: None, kind: str) -> None:
    """What the data left open has the right posterior; what is masked out does not count."""
    start = pathfinder(MODELS[kind], num_paths=2, num_samples=50, progress_bar=False)
    assert start.log_evidence == pytest.approx(oracle.evidence(kind), abs=1e-3)
    guide = AutoPosterior(MODELS[kind], MeanField, start=start)
    draws = guide.sample_posterior(sample_shape=(20_000,))
    second = draws[SECOND[kind]].log() if kind == "masked_entries" else draws[SECOND[kind]]
    values = torch.cat([draws["mu"].unsqueeze(-1), second], 1).numpy()
    counts = np.concatenate([[True], oracle.free(kind)])
    loc, covariance = oracle.posterior(kind)
    np.testing.assert_allclose(values.mean(0)[counts], loc[counts], atol=0.03)
    found = np.cov(values.T)[counts][:, counts]
    np.testing.assert_allclose(found, covariance[counts][:, counts], atol=0.04)


# --- rows with an encoder -------------------------------------------------------------------------


def rows_of(x: torch.Tensor, counts: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=counts)


def masked(x: torch.Tensor, counts: torch.Tensor, batch_size: int | None = None) -> None:
    # Normal in unconstrained space, which has a number less than the simplex.
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    simplex = dist.TransformedDistribution(normal, StickBreakingTransform())
    with pyro.plate("data", len(x), subsample_size=batch_size) as index:
        with poutine.mask(mask=counts[index]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            p = pyro.sample("p", simplex)
            pyro.sample("x", dist.Normal(z[..., 0] + 0 * p[..., 0], 1.0), obs=x[index])


def encode(x: torch.Tensor, counts: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    return torch.where(counts, x, 0.0).unsqueeze(-1)


@pytest.mark.parametrize(("model", "family"), [(rows_of, MeanField), (masked, SmallIAF)])
def test_evidence_of_rows(exact: None, model: Callable, family: Callable) -> None:
    """Row by row; the mask may be another one at every call."""
    guide = AutoAmortized(model, encode, family=family)
    x = data()
    for counts in (COUNTS, ~COUNTS):
        found = weights(model, guide, x, counts).exp()
        truth = torch.where(counts, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0).exp()
        assert found.shape == (20_000, 4)
        assert ((found.mean(0) - truth).abs() < 4 * found.std(0) / 20_000**0.5).all()


def test_mask_of_a_subsample(exact: None) -> None:
    """The guide masks the rows that the model draws."""
    x, counts = torch.zeros(6), torch.arange(6) % 2 == 0
    guide = AutoAmortized(masked, encode, family=MeanField)
    found = torch.stack([weights(masked, guide, x, counts, 2, count=4000) for _ in range(8)]).exp()
    error = 4 * found.std(1) / 4000**0.5
    truth = torch.tensor([1.0, (4 * torch.pi) ** -0.5])
    seen = (found.mean(1).unsqueeze(-1) - truth).abs() < error.unsqueeze(-1)
    assert seen.any(-1).all()
    assert seen.any(1).any(0).all()


# --- what is refused ------------------------------------------------------------------------------


def read() -> None:
    """A flat prior, which is no density."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))


def read_below() -> None:
    with pyro.plate("data", 4):
        with poutine.mask(mask=COUNTS):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(z.mean(), 1.0))


def transformed() -> None:
    base = dist.Normal(0.0, 1.0).expand([4]).mask(COUNTS)
    pyro.sample("z", dist.TransformedDistribution(base, ExpTransform()).to_event(1))


def larger() -> None:
    with poutine.mask(mask=COUNTS):
        pyro.sample("z", dist.Normal(0.0, 1.0))


READS = (
    "Expected latent sites without a mask under {}; got site 'z' with one, and site '{}', whose "
    "density reads what is masked out. Mask site '{}' there as well, or write the guide by hand."
)
EVENTS = "Mask whole events of the site, or write the guide by hand."
ERRORS = {
    "observed": (read, READS.format("{}", "x", "x")),
    "latent": (read_below, READS.format("{}", "w", "w")),
    "hidden": (poutine.block(read, hide=["x"]), READS.format("{}", "x", "x")),
    "transformed": (
        transformed,
        "Expected latent sites without a mask under {}; got site 'z' with one inside of a "
        f"transformed distribution. {EVENTS}",
    ),
    "larger": (
        larger,
        "Expected latent sites without a mask under {}; got site 'z' with one of shape (4,) around "
        f"a batch of shape (). {EVENTS}",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    model, text = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(text.format('AutoPosterior'))}$"):
        AutoPosterior(model)()
    with pytest.raises(ValueError, match=f"^{re.escape(text.format('pathfinder'))}$"):
        pathfinder(model, progress_bar=False)


def test_part_of_a_list(exact: None) -> None:
    """The other part's sites may read what is masked out, and the data do."""
    guide = AutoGuideList(masked_rows)
    for name in ("mu", "z"):
        guide.append(AutoPosterior(poutine.block(masked_rows, expose=[name]), MeanField))
    found = weights(masked_rows, guide, count=200)
    assert found.isfinite().all()
    guide = AutoGuideList(read_below)
    for name in ("z", "w"):
        guide.append(AutoPosterior(poutine.block(read_below, expose=[name]), MeanField))
    with pytest.raises(ValueError, match="site 'w', whose density reads what is masked out"):
        guide()
