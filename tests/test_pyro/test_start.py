"""Where guides made from a model start: the affine step of a family, and a whitened start."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer.autoguide import AutoNormal, init_to_value
from reference import starts
from test_pyro.models import conjugate

from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import IAF, AutoAmortized, AutoPosterior, MeanField
from pyro_vae_ext.guides._base import GuideFamily
from pyro_vae_ext.guides._flow import FlowDistribution

FAMILIES = [pytest.param(f, id=f.__name__) for f in (MeanField, IAF)]
SHIFT, FACTOR = np.array([0.5, -1.0, 2.0]), np.array([2.0, 0.5, 3.0])


@pytest.fixture(autouse=True)
def empty_store() -> None:
    pyro.clear_param_store()


def given(x: Any) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.get_default_dtype())


def badly_scaled() -> None:
    """A Normal whose numbers have scales of 1e-4 and 1e3; there are no data: the evidence is 1."""
    slope, root = map(given, starts.conditional())
    loc = given(starts.LOC)
    a = pyro.sample("a", dist.Normal(loc[0], starts.SCALES[0]))
    noise = (a - loc[0]) / starts.SCALES[0]
    mean = loc[1:] + slope * noise.unsqueeze(-1)
    pyro.sample("b", dist.MultivariateNormal(mean, scale_tril=root))


def global_model(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def at_the_posterior() -> AutoPosterior:
    """A guide whose IAF is the identity: the step does the rest."""
    guide = AutoPosterior(badly_scaled, IAF, start=starts.moved(SHIFT, FACTOR))
    guide()
    with torch.no_grad():
        for parameter in guide.latent.family.parameters():
            parameter.zero_()
        guide.latent.step.loc.copy_(given(SHIFT))
        guide.latent.step.log_scale.copy_(given(FACTOR).log())
    return guide


@pytest.mark.parametrize("gradient", ["stl", "dreg", "reparam"])
def test_path_gradient_vanishes_at_the_posterior(exact: None, gradient: str) -> None:
    """Draw by draw, also in the parameters of the step; every weight is the evidence."""
    guide = at_the_posterior()
    elbo = ImportanceWeightedELBO(4, gradient=gradient, max_plate_nesting=0)
    loss = elbo.differentiable_loss(badly_scaled, guide)
    parameters = dict(guide.named_parameters())
    slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = dict(zip(parameters, slopes, strict=True))
    assert found.pop("latent.loc") is None and found.pop("latent.scale_tril") is None
    sizes = {name: 0.0 if x is None else x.abs().max().item() for name, x in found.items()}
    log_weights = elbo.log_weights(badly_scaled, guide)
    torch.testing.assert_close(log_weights, torch.zeros(4), rtol=0, atol=1e-8)
    if gradient == "reparam":
        assert min(sizes["latent.step.loc"], sizes["latent.step.log_scale"]) > 0.1
    else:
        assert max(sizes.values()) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_all_sizes(family: Any) -> None:
    """From a start that is a whole sd off and 1.5 times too wide; the divergence is the loss."""
    start = starts.start(starts.LOC + starts.SCALE_TRIL @ np.ones(3), 1.5 * starts.SCALE_TRIL)
    guide = AutoPosterior(badly_scaled, family, start=start)
    elbo = ImportanceWeightedELBO(1, gradient="stl")
    svi = infer.SVI(badly_scaled, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(300):
        svi.step()
    many = infer.Trace_ELBO(200, vectorize_particles=True, max_plate_nesting=0)
    assert many.loss(badly_scaled, guide) < 0.05
    draws = guide.sample_posterior(sample_shape=(4000,))
    for name, place in (("a", 0), ("b", slice(1, 3))):
        loc, spread = given(starts.LOC)[place], given(starts.SPREADS)[place]
        assert ((draws[name].mean(0) - loc) / spread).abs().max() < 0.15
        assert (draws[name].std(0) / spread).log().abs().max() < 0.15


def test_init_scale_is_no_brake() -> None:
    """Far from the data every step of Adam is one of its rate, in ours as in the host's guide."""
    x = 2500 + torch.randn(2, 5)

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 500.0))
        b = pyro.sample("b", dist.Normal(0.0, 500.0))
        loc = torch.stack([a, b], -1).unsqueeze(-1)
        pyro.sample("x", dist.Normal(loc, torch.ones(2, 5)).to_event(2), obs=x)

    def moved(kind: Any, *family: Any) -> Any:
        pyro.clear_param_store()
        # The host's guide trains what it is given, in place.
        values = {"a": torch.zeros(()), "b": torch.zeros(())}
        start = init_to_value(values=values)
        guide = kind(model, *family, init_loc_fn=start, init_scale=0.1)
        svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
        for _ in range(40):
            svi.step()
        return guide

    theirs = moved(AutoNormal)
    locs = torch.stack([theirs.locs.a, theirs.locs.b]).detach()
    torch.testing.assert_close(locs, torch.full((2,), 40 * 0.01), rtol=0.02, atol=0)
    ours = moved(AutoPosterior, MeanField)
    torch.testing.assert_close(ours.latent.family.loc.detach(), locs, rtol=1e-3, atol=0)
    flow = moved(AutoPosterior, IAF)
    torch.testing.assert_close(flow.latent.step.loc.detach(), locs, rtol=0.02, atol=0)
    assert torch.equal(flow.latent.loc.detach(), torch.zeros(2))


def test_start_of_an_improper_prior() -> None:
    """The model is first run where the start is: nothing is drawn from a prior."""
    seen = []

    def model() -> None:
        flat = dist.ImproperUniform(dist.constraints.positive, (), (2,))
        z = pyro.sample("z", flat)
        seen.append(z.detach())
        pyro.sample("x", dist.LogNormal(z.log(), 1.0).to_event(1), obs=torch.ones(2))

    start = starts.start(np.array([1.0, -2.0]), np.eye(2), {"z": (2,)})
    AutoPosterior(model, MeanField, start=start)()
    torch.testing.assert_close(seen[0], given([1.0, -2.0]).exp())


class Own(GuideFamily):
    """A family of the user's: a statement, and a density that nothing asks for."""

    nests = True

    def _sample(self, name: str, context: Any, infer: Any) -> torch.Tensor:
        site = name if self.nests else f"{name}_of_another_name"
        zeros = torch.zeros(self.latent_dim)
        self.seen = pyro.sample(site, dist.Normal(zeros, 1.0).to_event(1), infer=infer)
        return self.seen

    def _log_prob(self, value: Any, context: Any, num_samples: int) -> Any:
        raise NotImplementedError


def test_family_of_ones_own(exact: None) -> None:
    """Its site has the step as well, and what the family goes on with is before it."""
    guide = AutoPosterior(global_model, Own, init_scale=[0.5, 2.0])
    x = torch.randn(3, 2)
    guide(x)
    shift, factor = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        guide.latent.step.loc.copy_(shift)
    site = poutine.trace(guide).get_trace(x).nodes["_auto_latent"]
    torch.testing.assert_close(site["value"], shift + factor * guide.latent.family.seen)
    law = dist.Normal(shift, factor).to_event(1)
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), law.log_prob(site["value"]))
    other = site["value"].detach() + 1
    torch.testing.assert_close(site["fn"].log_prob(other), law.log_prob(other))


def test_a_family_without_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "nests", False)
    text = (
        "Expected the family to sample the site '_auto_latent' that it is called for; got no such "
        "site. Pass the name on to the sample statement of its latent vector."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        AutoPosterior(global_model, Own)(torch.zeros(3, 2))


def test_a_family_before_the_step_is_what_it_was() -> None:
    """Outside of an AutoPosterior no family has a step."""
    assert isinstance(IAF(2).distribution(None), FlowDistribution)


def test_saved_with_the_parameters() -> None:
    """In the ``state_dict``, in Pyro's store, and in a copy."""
    start = starts.moved(SHIFT, FACTOR)
    guide = AutoPosterior(badly_scaled, IAF, start=start)
    optim = pyro.optim.Adam({"lr": 0.1})
    svi = infer.SVI(badly_scaled, guide, optim, ImportanceWeightedELBO(2, gradient="stl"))
    svi.step()
    state = {name: x.clone() for name, x in guide.state_dict().items()}
    torch.testing.assert_close(state["latent.scale_tril"], given(start.scale_tril))
    torch.testing.assert_close(state["latent.loc"], given(start.loc))
    assert state["latent.step.loc"].abs().min() > 0 and "latent.step.log_scale" in state

    def draws(guide: Any) -> torch.Tensor:
        guide()  # The first call of a guide takes random numbers for its weights.
        torch.manual_seed(1)
        return guide()["b"]

    expected = draws(guide)
    assert torch.equal(draws(copy.deepcopy(guide)), expected)
    again = AutoPosterior(badly_scaled, IAF, start=start)
    assert torch.equal(draws(again), expected)  # Pyro's store has the parameters
    pyro.clear_param_store()
    fresh = AutoPosterior(badly_scaled, IAF, start=starts.start())
    assert not torch.equal(draws(fresh), expected)
    fresh.load_state_dict(state)
    assert torch.equal(draws(fresh), expected)


# --- amortised --------------------------------------------------------------------------------


def hierarchy(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z + a + b.sum(-1), 1.0), obs=x[:, 0])


def test_marginal_start_of_the_global_latents(exact: None) -> None:
    """Of a start for all sites; one for the global sites alone is taken as it is."""
    rng = np.random.default_rng(1)
    root = np.tril(rng.standard_normal((7, 7)), -1) + np.diag(rng.uniform(0.5, 1.5, 7))
    whole = starts.start(rng.standard_normal(7), root, {"z": (4,), **starts.SITES})
    x = torch.randn(4, 1)
    for start in (whole, starts.start()):
        pyro.clear_param_store()
        guide = AutoAmortized(hierarchy, lambda x: x, family=MeanField, start=start)
        guide(x)
        latent = guide.global_guide.latent
        np.testing.assert_allclose(latent.loc.detach(), start.loc[-3:], rtol=1e-12)
        found, covariance = latent.scale_tril.detach(), start.scale_tril @ start.scale_tril.T
        np.testing.assert_allclose(found @ found.T, covariance[-3:, -3:], rtol=1e-9)
        assert (found.diagonal() > 0).all() and not found.triu(1).any()


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", starts.FAULTS)
def test_start_of_another_model(name: str) -> None:
    start, error, text = starts.FAULTS[name]
    guide = AutoPosterior(badly_scaled, MeanField, start=start)
    for _ in range(2):
        with pytest.raises(error, match=f"^{re.escape(text)}"):
            guide()


def test_start_without_global_latents() -> None:
    guide = AutoAmortized(
        conjugate(torch.zeros(3, 1), torch.zeros(1)),
        lambda: torch.zeros(3, 1),
        start=starts.start(),
    )
    text = (
        "Expected a latent site outside of the plate for start under AutoAmortized; got sites in "
        "plate 'data' alone. Leave start out: the encoder's rows have none."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        guide()
