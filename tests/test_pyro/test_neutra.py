"""The bijection of `AutoPosterior`: Jacobians, the host's NeuTra, and NUTS on the funnel."""

from __future__ import annotations

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import AffineTransform, ExpTransform, LowerCholeskyAffine
from pyro.infer import MCMC, NUTS, SVI
from pyro.infer.autoguide import init_to_value
from pyro.infer.reparam import NeuTraReparam
from test_pyro.models import shaken

from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import IAF, AutoAmortized, AutoPosterior, Auxiliary, MeanField
from pyro_vae_ext.guides._base import DirectFamily


class Custom(DirectFamily):
    """A user's family: of one of several distributions that the hosts have."""

    def __init__(self, latent_dim: int, context_dim: int | None, *, kind: str) -> None:
        super().__init__(latent_dim, context_dim)
        self.kind = kind
        self.loc = torch.nn.Parameter(torch.zeros(latent_dim))
        self.root = torch.nn.Parameter(torch.eye(latent_dim))

    def distribution(self, context: torch.Tensor | None = None) -> dist.TorchDistribution:
        root = self.root.tril()
        if self.kind == "full":
            return dist.MultivariateNormal(self.loc, scale_tril=root)
        if self.kind == "student":
            return dist.StudentT(4.0, self.loc).to_event(1)
        base = dist.Normal(0.0, 0.9).expand(self.loc.shape).to_event(1)
        if self.kind == "narrow":
            return base
        parts = [LowerCholeskyAffine(self.loc, root), ExpTransform()]
        return dist.TransformedDistribution(base, parts)


FAMILIES = {
    "IAF": partial(IAF, hidden_dims=(5,)),
    **{kind: partial(Custom, kind=kind) for kind in ("full", "mapped", "narrow")},
}


def rows(x: torch.Tensor) -> None:
    """A positive site, one on an interval, and one in a plate."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
    part = pyro.sample("part", dist.Uniform(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(part, 1.0))
        pyro.sample("x", dist.Normal(z, rate), obs=x)


def through(guide: AutoPosterior, model: object) -> tuple[NeuTraReparam, object]:
    neutra = NeuTraReparam(guide)
    return neutra, poutine.reparam(model, config=lambda _: neutra)


def log_density(model: object, values: dict[str, torch.Tensor], *args: object) -> torch.Tensor:
    return poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()


@pytest.mark.parametrize("name", FAMILIES)
def test_density_through_the_guide(exact: None, name: str) -> None:
    """The host's NeuTra scores noise by the model's density and the whole map's Jacobian."""
    x = torch.randn(2)
    guide = AutoPosterior(rows, FAMILIES[name], init_scale=[0.5, 1.0, 2.0, 0.3])
    guide(x)
    shaken(guide.latent.family)
    noise = 0.5 * torch.randn(4)
    neutra, model = through(guide, rows)
    # Of the reparameterised model the shared noise, which the host masks, is a latent.
    found = log_density(model, {"rate_shared_latent": noise}, x)

    def values(noise: torch.Tensor) -> torch.Tensor:
        site = neutra.transform_sample(noise)
        return torch.cat([site["rate"].reshape(1), site["part"].reshape(1), site["z"]])

    truth = log_density(rows, neutra.transform_sample(noise), x)
    truth = truth + torch.autograd.functional.jacobian(values, noise).slogdet()[1]
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=0)
    transform, batch = guide.get_transform(), torch.randn(3, 4)
    vectors = transform(batch)
    torch.testing.assert_close(transform.inv(vectors), batch, rtol=1e-8, atol=1e-8)
    expected = guide.get_base_dist().log_prob(batch)
    expected = expected - transform.log_abs_det_jacobian(batch, vectors)
    posterior = guide.get_posterior()
    assert posterior.event_shape == (guide.latent_dim,) == (4,)
    torch.testing.assert_close(posterior.log_prob(vectors), expected, rtol=1e-8, atol=0)
    # The posterior's derivative at a vector, against that along the map.
    noise.requires_grad_(True)
    along = guide.get_base_dist().log_prob(noise) - transform.log_abs_det_jacobian(noise, None)
    (truth,) = torch.autograd.grad(along, noise)
    vector = transform(noise).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(posterior.log_prob(vector), vector)
    jacobian = torch.autograd.functional.jacobian(transform, noise)
    torch.testing.assert_close(jacobian.mT @ slope, truth, rtol=1e-8, atol=0)
    shapes = {k: v.shape for k, v in neutra.transform_sample(batch[:, None]).items()}
    assert shapes == {"rate": (3, 1), "part": (3, 1), "z": (3, 2)}
    assert torch.equal(copy.deepcopy(guide).get_transform()(noise), transform(noise))


def test_the_posterior_itself_is_sent_to_a_standard_normal(exact: None) -> None:
    """Then all that is left for the sampler is the noise's own density."""
    loc, scale = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])

    def model() -> None:
        pyro.sample("a", dist.LogNormal(loc, scale).to_event(1))

    start = init_to_value(values={"a": loc.exp()})
    guide = AutoPosterior(model, MeanField, init_loc_fn=start, init_scale=scale)
    guide()
    for noise in torch.randn(3, 2):
        found = log_density(through(guide, model)[1], {"a_shared_latent": noise})
        expected = dist.Normal(0.0, 1.0).log_prob(noise).sum()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("family", ["MeanField", "IAF"])
def test_quantiles_of_a_normal_are_exact(family: str) -> None:
    """Upwards and downwards maps, and one of several numbers, against Monte Carlo."""

    def model() -> None:
        pyro.sample("up", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        parts = [ExpTransform(), AffineTransform(3.0, -1.0)]
        pyro.sample("down", dist.TransformedDistribution(dist.Normal(0.0, 1.0), parts))
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))

    guide = AutoPosterior(model, {**FAMILIES, "MeanField": MeanField}[family], init_scale=0.5)
    guide()
    shaken(guide.latent.family)
    levels = torch.tensor([0.05, 0.5, 0.8, 0.95])
    found, again = guide.quantiles(levels, num_samples=20_000), guide.quantiles(levels)
    for name, value in guide.sample_posterior(sample_shape=(20_000,)).items():
        shares = (value < found[name][:, None]).to(value.dtype).mean(1)
        assert ((shares - levels.reshape(4, *(1 for _ in value.shape[1:]))).abs() < 0.02).all()
        exact = family != "IAF" and name != "share"
        assert torch.equal(found[name], again[name]) == exact
        assert not found[name].requires_grad
    middle = guide.median(num_samples=20_000)
    torch.testing.assert_close(middle["down"], found["down"][1], rtol=2e-3, atol=0)
    torch.testing.assert_close(middle["share"].sum(), torch.tensor(1.0))


def test_nuts_on_the_funnel() -> None:
    def funnel() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    guide = AutoPosterior(funnel, partial(IAF, hidden_dims=(16,)), init_scale=1.0)
    elbo = ImportanceWeightedELBO(4, gradient="stl")
    svi = SVI(funnel, guide, pyro.optim.Adam({"lr": 1e-2}), elbo)
    for _ in range(500):
        svi.step()
    neutra, model = through(guide, funnel)
    # The host's sampler is slow: so few draws that their own error is half a standard deviation.
    mcmc = MCMC(NUTS(model, max_tree_depth=4), 100, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    draws = neutra.transform_sample(mcmc.get_samples()["v_shared_latent"][:, None])
    assert draws["v"].mean().abs() < 1.5 and (draws["v"].std() - 3).abs() < 1
    assert draws["v"].min() < -3 and draws["v"].max() > 3
    assert ((draws["x"] / (draws["v"] / 2).exp()).std() - 1).abs() < 0.2


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (Auxiliary, "a density of its own for get_transform; got Auxiliary. A hierarchical"),
        (partial(Custom, kind="student"), "that maps standard Normal noise for get_transform; got"),
    ],
    ids=["Auxiliary", "StudentT"],
)
def test_families_without_a_bijection(family: object, text: str) -> None:
    guide = AutoPosterior(rows, family)
    with pytest.raises(ValueError, match="^Expected a guide that has been called for get_tra"):
        guide.get_transform()
    guide(torch.randn(2))
    with pytest.raises(ValueError, match=f"^Expected a family .*{text}"):
        guide.get_transform()(torch.zeros(4))


def test_amortised_guide_has_no_transform_of_its_own() -> None:
    with pytest.raises(TypeError, match="AutoAmortized"):
        NeuTraReparam(AutoAmortized(rows, lambda x: x[:, None]))
