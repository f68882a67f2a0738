"""The contract of a prior: its density, its samples, and the evidence under every family."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, HIERARCHICAL
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from reference import masked_flow
from reference import priors as oracle
from test_pyro.models import family, shaken, standard_errors, wide_reverse

from pyro_vae_ext import priors
from pyro_vae_ext.elbos import ImportanceWeightedELBO

MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES["priors"].items()
    for i, case in enumerate(cases)
]
FAMILIES = ("MeanField", "IAF", "Auxiliary", "VGP")
NAMES = tuple(CASES["priors"])
ROWS, CONTEXT = 3, 2


def small(name: str, latent_dim: int, context_dim: int = CONTEXT) -> torch.nn.Module:
    """A family with few weights."""
    options = {
        "MeanField": {},
        "IAF": {"hidden_dims": (5,)},
        "Auxiliary": {"aux_dim": 1, "hidden_dims": (5,)},
        "VGP": {"input_dim": 1, "num_inducing": 4, "hidden_dims": (5,)},
    }[name]
    return family(name, latent_dim=latent_dim, context_dim=context_dim, **options)


def build(name: str, case: dict, guide: str = "MeanField") -> tuple[torch.nn.Module, Callable]:
    """A module away from its start, and the function that makes its distribution."""
    prior = shaken(getattr(priors, name)(**case))
    if name != "VampPrior":
        return prior, prior
    width = math.prod(prior.input_shape)
    encoder = shaken(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, CONTEXT)))
    posterior = shaken(small(guide, case.get("latent_dim", 2)), 0.2)
    return prior, lambda: prior(posterior, encoder)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: array(parameter) for name, parameter in module.named_parameters()}


def reference(name: str, case: dict, law: object, prior: torch.nn.Module, guide: str) -> Callable:
    """The log-density in NumPy."""
    if name == "Mixture":
        return lambda z: oracle.mixture(z, *arrays(prior).values())
    if name == "FlowPrior":
        return lambda z: masked_flow.log_prob(z, arrays(prior), None, case.get("activation", "elu"))
    components = law.law
    weights, context = arrays(components.posterior), array(components.context)
    return lambda z: oracle.vamp(guide, z, weights, context)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_shapes(name: str, case: dict) -> None:
    prior, make = build(name, case)
    dim = case.get("latent_dim", 2)
    law = make()
    assert law.batch_shape == () and law.event_shape == (dim,) and not law.has_rsample
    assert law.sample().shape == (dim,)
    assert law.sample((4, 2)).shape == (4, 2, dim)
    wide = law.expand((3, 5))
    z = wide.sample((2,))
    assert z.shape == (2, 3, 5, dim) and not z.requires_grad
    assert wide.log_prob(z).shape == (2, 3, 5)
    assert wide.log_prob(z[0, 0, 0]).shape == (3, 5)
    assert len(torch.unique(z.reshape(-1, dim), dim=0)) == 30
    assert law.support.check(z).all() and law.support.event_dim == 1
    # What a value scores does not depend on its neighbours.
    torch.testing.assert_close(wide.log_prob(z)[1, 2], law.log_prob(z[1, 2]))


@pytest.mark.parametrize(
    ("name", "case", "guide"),
    [pytest.param(*m.values, "MeanField", id=m.id) for m in MEMBERS]
    + [pytest.param(*m.values, "IAF", id=f"{m.id}-IAF") for m in MEMBERS if "Vamp" in m.id],
)
def test_density_is_the_reference(exact: None, name: str, case: dict, guide: str) -> None:
    prior, make = build(name, case, guide)
    law = make()
    z = 1.5 * torch.randn(4, ROWS, case.get("latent_dim", 2))
    expected = reference(name, case, law, prior, guide)(array(z))
    np.testing.assert_allclose(array(law.log_prob(z)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "case"), [m for m in MEMBERS if m.values[0] == "FlowPrior"])
def test_samples_of_a_flow_are_sequential(
    exact: None, monkeypatch: pytest.MonkeyPatch, name: str, case: dict
) -> None:
    """The very numbers of the reference, which draws one coordinate after the other."""
    prior, make = build(name, case)
    noise = np.random.default_rng(0).normal(size=(7, case["latent_dim"]))
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.tensor(noise).reshape(shape))
    expected = masked_flow.sample(noise, arrays(prior), None, case.get("activation", "elu"))
    np.testing.assert_allclose(array(make().sample((7,))), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("num_flows", "total"), [(1, 3.0), (2, 6.0), (8, 12.0)])
def test_scales_of_a_flow_are_bounded(exact: None, num_flows: int, total: float) -> None:
    """Whatever the nets say: at their bounds the flow is a Normal whose scale is known."""
    prior = priors.FlowPrior(2, num_flows=num_flows)
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            for net in prior.nets:
                net.layers[-1].weight.zero_()
                net.layers[-1].bias.copy_(torch.tensor([0.0, 0.0, 1e6, 1e6]) * sign)
        value = torch.tensor([0.3, -1.2]) * math.exp(sign * total)
        expected = dist.Normal(0.0, math.exp(sign * total)).log_prob(value).sum()
        torch.testing.assert_close(prior().log_prob(value), expected)


LAWS = [
    pytest.param("Mixture", {"latent_dim": 2, "num_components": 3}, "", id="Mixture"),
    pytest.param("FlowPrior", {"latent_dim": 2, "hidden_dims": (6,)}, "", id="FlowPrior"),
    *(
        pytest.param("VampPrior", {"input_shape": 2, "num_pseudo_inputs": 3}, guide, id=guide)
        for guide in ("MeanField", "IAF")
    ),
]


@pytest.mark.parametrize(("name", "case", "guide"), LAWS)
def test_density_integrates_to_one_and_samples_follow_it(name: str, case: dict, guide: str) -> None:
    """Expectations of several functions by quadrature over the density and by sampling."""
    _, make = build(name, case, guide or "MeanField")
    law = make()
    points, volume = oracle.grid(2, 30.0, 481)
    points = torch.tensor(points, dtype=torch.get_default_dtype())
    with torch.no_grad():
        mass = law.log_prob(points).exp() * volume
        z = law.sample((200_000,))
    assert mass.sum().item() == pytest.approx(1.0, abs=2e-4)
    for h in FUNCTIONS:
        expected = (mass * h(points)).sum().item()
        assert abs(standard_errors(h(z), expected)) < 4


FUNCTIONS = (
    lambda z: z[..., 0],
    lambda z: z[..., -1],
    lambda z: z[..., 0] * z[..., -1],
    lambda z: z[..., 0] ** 2,
    lambda z: torch.tanh(2.0 * z[..., 0] - z[..., -1]),
    lambda z: torch.cos(2.0 * z[..., 0] + z[..., -1]),
)


@pytest.mark.parametrize("guide", HIERARCHICAL)
def test_mixture_of_hierarchical_posteriors(exact: None, guide: str) -> None:
    """The estimate's exponential has the density as its mean; samples follow the density."""
    case = {"input_shape": 2, "num_pseudo_inputs": 3, "num_samples": 4, "latent_dim": 1}
    prior = shaken(priors.VampPrior(2, num_pseudo_inputs=3, num_samples=4))
    posterior = shaken(small(guide, 1), 0.2)
    wide_reverse(posterior, 0.4)
    law = prior(posterior)
    points, volume = oracle.grid(1, 30.0, 2001)
    log_p = reference("VampPrior", case, law, prior, guide)(points)
    assert np.exp(log_p).sum() * volume == pytest.approx(1.0, abs=1e-6)
    with torch.no_grad():
        z = law.sample((200_000,))
        for h in FUNCTIONS:
            expected = (np.exp(log_p) * volume * array(h(torch.tensor(points)))).sum()
            assert abs(standard_errors(h(z), expected)) < 4
        at = torch.tensor([[-1.0], [0.2], [1.5]])
        draws = law.log_prob(at.expand(20_000, 3, 1)).exp()
    expected = np.exp(reference("VampPrior", case, law, prior, guide)(array(at)))
    assert draws.std(0).min() > 0.0
    for estimates, density in zip(draws.T, expected, strict=True):
        assert abs(standard_errors(estimates, density)) < 4


def widened(posterior: torch.nn.Module, name: str) -> torch.nn.Module:
    """Wider than the exact posterior, and a reverse model near the prior of what it stands for."""
    with torch.no_grad():
        for key, parameter in posterior.named_parameters():
            if key.startswith("reverse"):
                if key.endswith("log_scale.bias"):
                    parameter -= 0.15
                else:
                    parameter *= 0.2
            elif key.endswith("log_scale.bias") and "aux" not in key:
                parameter += 1.2 if name == "VGP" else 0.3
            elif key.startswith("targets"):
                parameter *= 0.5
    return posterior


@pytest.mark.parametrize("guide", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_mean_weight_is_the_evidence(exact: None, name: str, guide: str) -> None:
    """E[exp(log_weight)] = p(x) where z has the prior and x ~ N(z, I)."""
    dim = 1 if name == "VampPrior" and guide in HIERARCHICAL else 2
    posterior = widened(shaken(small(guide, dim), 0.1), guide)
    x = torch.randn(ROWS, dim)
    encoder = torch.nn.Linear(dim, CONTEXT)
    with torch.no_grad():
        encoder.weight *= 0.3
    case = {
        "Mixture": {"latent_dim": dim, "num_components": 3},
        "FlowPrior": {"latent_dim": dim, "hidden_dims": (6,)},
        "VampPrior": {"input_shape": dim, "num_pseudo_inputs": 3, "num_samples": 5},
    }[name]
    prior = shaken(getattr(priors, name)(**case), 0.5 if name == "VampPrior" else 0.2)

    def law() -> object:
        return prior(posterior, encoder) if name == "VampPrior" else prior()

    def model() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", law())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def program() -> None:
        with pyro.plate("data", ROWS):
            posterior("z", encoder(x))

    if name == "Mixture":
        truth = oracle.mixture_evidence(array(x), *arrays(prior).values())
    elif name == "VampPrior" and guide == "MeanField":
        context = encoder(prior.pseudo_inputs)
        loc, log_scale = map(array, posterior.loc_and_log_scale(context))
        truth = oracle.mixture_evidence(array(x), np.zeros(3), loc, log_scale)
    else:
        points, volume = oracle.grid(dim, 12.0, 161 if dim == 2 else 2001)
        log_p = reference(name, case, law(), prior, guide)(points)
        truth = oracle.evidence(array(x), log_p, points, volume)
    with torch.no_grad():
        weights = ImportanceWeightedELBO(20_000, max_plate_nesting=1).log_weights(model, program)
    for draws, log_evidence in zip(weights.T, truth, strict=True):
        draws = (draws - log_evidence).exp()
        assert abs(standard_errors(draws, 1.0)) < 4
        # The weights vary little enough for their standard error to mean something.
        assert 0.0 < draws.std() < 20.0


@pytest.mark.parametrize("guide", FAMILIES)
def test_a_draw_of_the_posterior_is_no_site_of_the_model(guide: str) -> None:
    """Drawn inside a program, in plates, under a handler: one site, one draw for each element."""
    _, make = build("VampPrior", CASES["priors"]["VampPrior"][0], guide)
    with pyro.poutine.trace() as tracer, pyro.plate_stack("rows", (3, 5)):
        z = pyro.sample("z", make())
    names = [name for name in tracer.trace.nodes if not name.startswith("rows")]
    assert names == ["z"] and z.shape == (3, 5, 2)
    assert len(torch.unique(z.reshape(-1, 2), dim=0)) == 15


class VAE:
    """A small model of eight rows with a prior, and its guide."""

    def __init__(self, name: str, guide: str, *, share: bool = True, batch: int | None = None):
        self.x, self.batch = torch.rand(8, 4), batch
        self.encoder = torch.nn.Linear(4, CONTEXT)
        self.decoder = torch.nn.Linear(2, 4)
        self.posterior = shaken(small(guide, 2), 0.1)
        self.name, self.share = name, share
        # Within the bounds, where pseudo-inputs have a gradient.
        options = {
            "Mixture": {"latent_dim": 2, "num_components": 3},
            "FlowPrior": {"latent_dim": 2, "hidden_dims": (6,)},
            "VampPrior": {
                "input_shape": 4,
                "num_pseudo_inputs": 3,
                "bounds": (-0.1, 1.1),
                "pseudo_inputs": torch.rand(3, 4),
                "num_samples": 2,
            },
        }[name]
        self.prior = getattr(priors, name)(**options)
        if name != "VampPrior":
            shaken(self.prior, 0.1)

    def law(self) -> object:
        if self.name != "VampPrior":
            return self.prior()
        if self.share:
            return self.prior(self.posterior, self.encoder)
        return self.prior(copy.deepcopy(self.posterior), copy.deepcopy(self.encoder))

    def model(self) -> None:
        pyro.module("prior", self.prior)
        pyro.module("decoder", self.decoder)
        if self.name == "VampPrior" and self.share:
            pyro.module("posterior", self.posterior)
            pyro.module("encoder", self.encoder)
        law = self.law()
        with pyro.plate("data", len(self.x), subsample_size=self.batch) as rows:
            z = pyro.sample("z", law)
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=self.x[rows].round())

    def guide(self) -> None:
        pyro.module("posterior", self.posterior)
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(self.x), subsample_size=self.batch) as rows:
            self.posterior("z", self.encoder(self.x[rows]))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        parts = ("prior", "decoder", "posterior", "encoder")
        return {
            f"{part}.{name}": value
            for part in parts
            for name, value in getattr(self, part).named_parameters()
        }


OBJECTIVES = {
    "Trace_ELBO": lambda: Trace_ELBO(),
    "vectorised": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceMeanField_ELBO": lambda: TraceMeanField_ELBO(),
    "TraceGraph_ELBO": lambda: TraceGraph_ELBO(),
    **{
        f"{gradient}-{count}": lambda gradient=gradient, count=count: ImportanceWeightedELBO(
            count, gradient=gradient
        )
        for gradient in ("reparam", "stl", "dreg")
        for count in (1, 5)
    },
    "loop": lambda: ImportanceWeightedELBO(3, vectorize_particles=False),
    "chunks": lambda: ImportanceWeightedELBO(4, gradient="dreg", chunk_size=2),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", NAMES)
def test_trains_under_every_objective(name: str, objective: str) -> None:
    """On minibatches; every parameter is declared once, gets a gradient and moves."""
    vae = VAE(name, "Auxiliary" if objective in ("dreg-5", "loop") else "IAF", batch=4)
    before = {key: value.detach().clone() for key, value in vae.parameters().items()}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), OBJECTIVES[objective]())
    losses = [svi.step() for _ in range(4)]
    assert all(map(math.isfinite, losses))
    store = dict(pyro.get_param_store().named_parameters())
    assert {key.replace("$$$", ".") for key in store} == set(before)
    assert len({value.data_ptr() for value in store.values()}) == len(store)
    for key, value in vae.parameters().items():
        assert (value - before[key]).abs().max() > 0.0, key


@pytest.mark.parametrize("guide", FAMILIES)
def test_gradients_of_the_prior_reach_inputs_encoder_and_posterior(guide: str) -> None:
    """At a fixed value: what the model alone contributes."""
    vae = VAE("VampPrior", guide)
    vae.law().log_prob(torch.randn(8, 2)).sum().backward()
    for key, value in vae.parameters().items():
        reached = not key.startswith("decoder")
        assert (value.grad is not None and value.grad.abs().max() > 0.0) == reached, key


def test_rows_and_scales() -> None:
    """A bound on a minibatch is that of its rows times N / B; particles do not mix rows."""
    vae = VAE("VampPrior", "MeanField")
    elbo = ImportanceWeightedELBO(10, max_plate_nesting=1)
    with torch.no_grad():
        assert elbo.log_weights(vae.model, vae.guide).shape == (10, 8)
        whole = torch.tensor([elbo.loss(vae.model, vae.guide) for _ in range(50)])
        vae.batch = 2
        assert elbo.log_weights(vae.model, vae.guide).shape == (10, 2)
        parts = torch.tensor([elbo.loss(vae.model, vae.guide) for _ in range(150)])
    error = (whole.var() / len(whole) + parts.var() / len(parts)).sqrt()
    assert abs(whole.mean() - parts.mean()) < 4 * error < 0.1 * abs(whole.mean())


@pytest.mark.parametrize(("name", "case"), MEMBERS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_dtypes(name: str, case: dict, kind: torch.dtype) -> None:
    torch.set_default_dtype(kind)
    for guide in FAMILIES if name == "VampPrior" else ("",):
        prior, make = build(name, case, guide or "MeanField")
        law = make()
        z = law.sample((5,))
        assert {p.dtype for p in prior.parameters()} == {z.dtype} == {kind}
        assert law.log_prob(z).dtype == kind


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_save_and_load(name: str, case: dict, tmp_path) -> None:
    prior, _ = build(name, case)
    torch.save(prior.state_dict(), tmp_path / "prior.pt")
    other = getattr(priors, name)(**case)
    assert set(prior.state_dict()) == {key for key, _ in prior.named_parameters()}
    other.load_state_dict(torch.load(tmp_path / "prior.pt"))
    for key, value in prior.named_parameters():
        assert torch.equal(other.get_parameter(key), value)
    if name == "VampPrior":
        # The pseudo-inputs alone: posterior and encoder are saved with the guide.
        assert set(prior.state_dict()) == {"pseudo_inputs"}


def test_starts() -> None:
    flow = priors.FlowPrior(3)().sample((4000,))
    assert (flow.std(0).log().abs() < 0.5).all() and (flow.mean(0).abs() < 0.3).all()
    rows = torch.rand(7, 2, 3)
    given = priors.VampPrior((2, 3), pseudo_inputs=rows)
    assert torch.equal(given.pseudo_inputs, rows) and given.num_pseudo_inputs == 7
    rows += 1.0
    assert not torch.equal(given.pseudo_inputs, rows)
    within = priors.VampPrior(5, num_pseudo_inputs=200, bounds=(-1.0, 3.0)).pseudo_inputs
    assert within.shape == (200, 5) and within.min() > -1.0 and within.max() < 3.0
    assert within.mean().item() == pytest.approx(1.0, abs=0.2)
    free = priors.VampPrior(5, num_pseudo_inputs=200).pseudo_inputs
    assert free.std().item() == pytest.approx(0.01, rel=0.2)


def test_bounds_clip_and_let_gradients_pass_up_to_them() -> None:
    """Binary rows start on the bounds themselves, and must be able to move."""
    prior = priors.VampPrior(4, pseudo_inputs=((0.0, 1.0, 0.4, 0.4), (-0.5, 1.5, 0.2, 0.1)))
    prior.bounds = (0.0, 1.0)
    posterior = shaken(small("MeanField", 2, 4))
    law = prior(posterior)
    z = torch.randn(6, 2)
    twin = priors.VampPrior(4, pseudo_inputs=prior.pseudo_inputs.clamp(0.0, 1.0))
    free = twin(posterior)
    torch.testing.assert_close(law.log_prob(z), free.log_prob(z))
    for one in (law, free):
        one.log_prob(z).sum().backward()
    inside = torch.tensor([[True] * 4, [False, False, True, True]])
    assert twin.pseudo_inputs.grad.abs().min() > 0.0
    torch.testing.assert_close(prior.pseudo_inputs.grad, twin.pseudo_inputs.grad * inside)


@pytest.mark.parametrize("guide", FAMILIES)
def test_a_family_scores_a_given_value(guide: str) -> None:
    """The statement with a value is the method, and no site."""
    posterior, context = shaken(small(guide, 2)), torch.randn(5, CONTEXT)
    value = torch.randn(5, 2)
    with pyro.poutine.trace() as tracer:
        torch.manual_seed(1)
        found = posterior("z", context, value=value, num_samples=7)
    assert set(tracer.trace.nodes) == set()
    torch.manual_seed(1)
    torch.testing.assert_close(found, posterior.log_prob(value, context, num_samples=7))
    with pytest.raises(ValueError, match="Expected values of width 2 at log_prob; got shape"):
        posterior("z", context, value=value[:, :1])


def test_errors() -> None:
    for name in ("Mixture", "FlowPrior"):
        with pytest.raises(ValueError, match="Expected latent_dim >= 1; got 0"):
            getattr(priors, name)(0)
        with pytest.raises(ValueError, match=r"Expected values of width 2 at log_prob|event"):
            getattr(priors, name)(2)().log_prob(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="Expected num_components >= 1; got 0"):
        priors.Mixture(2, num_components=0)
    with pytest.raises(ValueError, match="Expected num_flows >= 1; got 0"):
        priors.FlowPrior(2, num_flows=0)
    with pytest.raises(ValueError, match="Expected activation to be one of .*; got 'x'"):
        priors.FlowPrior(2, activation="x")
    with pytest.raises(ValueError, match="Expected at least one hidden layer; got hidden_dims="):
        priors.FlowPrior(2, hidden_dims=())
    with pytest.raises(ValueError, match="Expected input_shape >= 1; got 0"):
        priors.VampPrior((2, 0))
    with pytest.raises(TypeError, match="Expected input_shape to be an int; got float"):
        priors.VampPrior(2.0)
    with pytest.raises(ValueError, match="Expected num_pseudo_inputs >= 1; got 0"):
        priors.VampPrior(2, num_pseudo_inputs=0)
    with pytest.raises(ValueError, match="Expected num_samples >= 1; got 0"):
        priors.VampPrior(2, num_samples=0)
    text = r"Expected pseudo_inputs of shape \(num_pseudo_inputs, 2, 3\); got shape \(5, 6\)"
    with pytest.raises(ValueError, match=text):
        priors.VampPrior((2, 3), pseudo_inputs=torch.zeros(5, 6))
    with pytest.raises(ValueError, match=r"low < high; got \(1.0, 1.0\)"):
        priors.VampPrior(2, bounds=(1.0, 1.0))
    prior = priors.VampPrior((2, 3), num_pseudo_inputs=4)
    for posterior in (family("IAF", latent_dim=2, context_dim=None), torch.nn.Linear(6, 2)):
        name = type(posterior).__name__
        text = f"Expected a posterior with a context at VampPrior; got {name} without one"
        with pytest.raises(ValueError, match=text):
            prior(posterior)
    posterior = small("MeanField", 2)
    text = r"Expected one context for each of 4 pseudo-inputs at VampPrior; got shape \(4, 2, 3\)"
    with pytest.raises(ValueError, match=text):
        prior(posterior)
    with pytest.raises(ValueError, match="Expected a context of width 2 at log_prob; got shape"):
        prior(posterior, torch.nn.Flatten()).log_prob(torch.zeros(2))
    with pytest.raises(ValueError, match="Expected values of width 2 at log_prob; got shape"):
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, CONTEXT))
        prior(posterior, encoder).log_prob(torch.zeros(5, 3))
