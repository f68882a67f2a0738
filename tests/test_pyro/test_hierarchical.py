"""The contract of the hierarchical families: auxiliary sites, a factor, an estimated density."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, HIERARCHICAL, outputs_of_reverse
from reference import auxiliary, complex_step, vgp
from reference import conjugate as oracle
from test_pyro.models import family, shaken, standard_errors, wide_reverse

from pyro_vae_ext import guides
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import VGP, AutoPosterior

MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name in HIERARCHICAL
    for i, case in enumerate(CASES["guides"][name])
]
# The auxiliary variable may have a hierarchical law itself.
NESTED = pytest.param(
    "Auxiliary",
    {
        "latent_dim": 2,
        "context_dim": 4,
        "aux_dim": 1,
        "hidden_dims": (5,),
        "aux_family": {"name": "Auxiliary", "hidden_dims": (5,)},
    },
    id="nested",
)
VGPS = [member for member in MEMBERS if member.values[0] == "VGP"]
REFERENCES: dict[str, Callable] = {"Auxiliary": auxiliary.log_density, "VGP": vgp.log_density}
SITES = {"Auxiliary": ("aux", "z"), "VGP": ("xi", "z")}
ROWS = 5


def build(name: str, case: dict) -> tuple[torch.nn.Module, torch.Tensor | None]:
    # Not far: the inverse of a flow, as a reverse model needs it, leaves all bounds.
    posterior = shaken(family(name, **case), 0.1)
    context = None
    if case["context_dim"] is not None:
        context = torch.randn(ROWS, case["context_dim"])
    return posterior, context


def traced(posterior: torch.nn.Module, context: torch.Tensor | None, *plates: int):
    def guide() -> torch.Tensor:
        with pyro.plate_stack("rows", plates):
            return posterior("z", context)

    return pyro.poutine.trace(guide).get_trace()


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().cpu().numpy()


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: array(parameter) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_starts_near_a_standard_normal(name: str, case: dict) -> None:
    posterior = family(name, **case)
    context = None if case["context_dim"] is None else torch.zeros(1, case["context_dim"])
    z = traced(posterior, context, 4000, 1).nodes["z"]["value"]
    assert (z.std(0).log().abs() < 0.8).all()
    assert (z.mean((0, 1)).abs() < 0.5).all()


@pytest.mark.parametrize(("name", "case"), [*MEMBERS, NESTED])
@pytest.mark.parametrize("plates", [(), (ROWS,), (2, ROWS), (3, 2, ROWS)])
def test_sites_in_plates(name: str, case: dict, plates: tuple[int, ...]) -> None:
    posterior, context = build(name, case)
    if context is not None and not plates:
        context = context[0]
    trace = traced(posterior, context, *plates)
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].shape == (*plates, case["latent_dim"])
    assert not trace.nodes["z"]["infer"].get("is_auxiliary", False)
    assert trace.nodes["z_reverse"]["is_observed"]
    for key, site in trace.nodes.items():
        if site["type"] != "sample" or key.startswith("rows"):
            continue
        assert site["log_prob"].shape == plates, key
        assert key == "z" or site["infer"]["is_auxiliary"]
        if not site["is_observed"]:
            # Every element of a plate has noise of its own.
            flat = site["value"].reshape(-1, site["value"].shape[-1])
            assert len(torch.unique(flat, dim=0)) == len(flat)


@pytest.mark.parametrize("batch", [(), (4,), (2, 1, 4)])
@pytest.mark.parametrize(("name", "case"), [m for m in MEMBERS if m.values[1]["context_dim"]])
def test_any_left_batch(exact: None, name: str, case: dict, batch: tuple[int, ...]) -> None:
    """The density of a batch is that of its rows, one by one."""
    posterior, _ = build(name, case)
    context = torch.randn(*batch, case["context_dim"])
    with pyro.poutine.trace() as tracer:
        value = posterior("z", context)
    tracer.trace.compute_log_prob()
    total = sum(
        site["log_prob"] for site in tracer.trace.nodes.values() if site["type"] == "sample"
    )
    assert value.shape == (*batch, case["latent_dim"]) and total.shape == batch
    values = {
        key: array(tracer.trace.nodes["z" if key == "z" else f"z_{key}"]["value"])
        for key in SITES[name]
    }
    expected = REFERENCES[name](values, arrays(posterior), array(context), **case)
    np.testing.assert_allclose(array(total), expected, rtol=1e-9, atol=1e-9)
    assert posterior.log_prob(value, context, num_samples=3).shape == batch


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_density_and_its_derivatives_are_the_reference(exact: None, name: str, case: dict) -> None:
    """In every parameter and the context, at given values of the sites; by complex steps."""
    posterior, context = build(name, case)
    if context is not None:
        context.requires_grad_()
    # Two plates: a mix-up of rows that share a process would not show in one.
    drawn = traced(posterior, context, 2, ROWS)
    for site in SITES[name]:
        node = drawn.nodes["z" if site == "z" else f"z_{site}"]
        node["value"] = node["value"].detach().clone()
    again = pyro.poutine.trace(
        pyro.poutine.replay(lambda: traced_statement(posterior, context), trace=drawn)
    ).get_trace()
    again.compute_log_prob()
    sites = [key for key in again.nodes if key == "z" or key.startswith("z_")]
    total = sum(again.nodes[key]["log_prob"].sum() for key in sites)
    inputs = dict(posterior.named_parameters())
    if context is not None:
        inputs["context"] = context
    gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)

    values = {
        key: array(drawn.nodes["z" if key == "z" else f"z_{key}"]["value"]) for key in SITES[name]
    }

    def reference(given: dict) -> complex:
        weights = {key: value for key, value in given.items() if key != "context"}
        return REFERENCES[name](values, weights, given.get("context"), **case).sum()

    given = {key: array(value) for key, value in inputs.items()}
    np.testing.assert_allclose(total.item(), reference(given), rtol=1e-9)
    expected = complex_step.gradient(reference, given)
    for (key, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        found = np.zeros(tensor.shape) if gradient is None else array(gradient)
        np.testing.assert_allclose(found, expected[key], rtol=1e-6, atol=1e-8, err_msg=key)


def traced_statement(posterior: torch.nn.Module, context: torch.Tensor | None) -> torch.Tensor:
    with pyro.plate_stack("rows", (2, ROWS)):
        return posterior("z", context)


@pytest.mark.parametrize(("name", "case"), [*MEMBERS, NESTED])
@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_a_gradient_reaches_every_parameter(name: str, case: dict, gradient: str) -> None:
    posterior, context = build(name, case)
    x = torch.randn(ROWS, case["latent_dim"])

    def model() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(case["latent_dim"]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            posterior("z", context)

    elbo = ImportanceWeightedELBO(3, gradient=gradient, max_plate_nesting=1)
    elbo.differentiable_loss(model, guide).backward()
    for key, parameter in posterior.named_parameters():
        # With one dimension a masked net sees no other: its first weights are masked out.
        if "nets" in key and key.endswith("layers.0.weight") and parameter.shape[1] == 1:
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize(("name", "case"), MEMBERS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_dtypes(name: str, case: dict, kind: torch.dtype) -> None:
    posterior, context = build(name, case)
    posterior = posterior.to(kind)
    context = None if context is None else context.to(kind)
    trace = traced(posterior, context, ROWS)
    trace.compute_log_prob()
    for key in ("z", "z_reverse"):
        assert trace.nodes[key]["log_prob"].dtype == kind
    assert posterior.log_prob(trace.nodes["z"]["value"], context).dtype == kind


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_save_and_load(name: str, case: dict, tmp_path) -> None:
    posterior, context = build(name, case)
    torch.save(posterior.state_dict(), tmp_path / "posterior.pt")
    other = family(name, **case)
    other.load_state_dict(torch.load(tmp_path / "posterior.pt"))
    for twin in (other, copy.deepcopy(posterior)):
        draws = []
        for one in (posterior, twin):
            torch.manual_seed(1)
            draws.append(traced(one, context, ROWS).nodes["z"]["value"])
        assert torch.equal(*draws)


def evidence_pair(posterior: torch.nn.Module, case: dict) -> tuple[Callable, Callable, list[float]]:
    """Model, guide and exact evidence of three rows, or of one latent for all of them."""
    dim, mu = case["latent_dim"], 0.3
    x = torch.randn(3, dim)
    local = case["context_dim"] is not None
    encode = torch.nn.Linear(dim, case["context_dim"] or 1)

    def rows():
        return pyro.plate("data", len(x)) if local else pyro.plate("copies", 1)

    def model() -> None:
        with rows():
            z = pyro.sample("z", dist.Normal(torch.full((dim,), mu), 1.0).to_event(1))
            if local:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
            else:
                pyro.sample("x", dist.Normal(z.unsqueeze(-2), 1.0).to_event(2), obs=x)

    def guide() -> None:
        with rows():
            posterior("z", encode(x).detach() if local else None)

    data = x.cpu().numpy()
    truth = oracle.log_evidence(data, mu) if local else [oracle.global_log_evidence(data, mu)]
    return model, guide, [math.exp(value) for value in truth]


def check_evidence(
    model: Callable, guide: Callable, truth: list[float], spread: float = 20.0
) -> None:
    elbo = ImportanceWeightedELBO(40_000, max_plate_nesting=1)
    with torch.no_grad():
        weights = elbo.log_weights(model, guide).exp()
    for draws, evidence in zip(weights.T, truth, strict=True):
        assert abs(standard_errors(draws, evidence)) < 4
        # The weights vary little enough for their standard error to mean something.
        assert draws.std() < spread * draws.mean()


@pytest.mark.parametrize(("name", "case"), [*MEMBERS, NESTED])
def test_mean_weight_is_the_evidence(name: str, case: dict) -> None:
    """E[exp(log_weight)] = p(x) off the start, and after 500 steps of training."""
    posterior = shaken(family(name, **case), 0.02)
    with torch.no_grad():
        outputs = outputs_of_reverse(dict(posterior.named_parameters()))
        for key, parameter in posterior.named_parameters():
            # Wider than the posterior, and a narrow reverse model near it: weights of light tails.
            if outputs and key == f"{outputs[0]}.bias":
                parameter[len(parameter) // 2 :] -= 0.3
            elif key.startswith(tuple(outputs)):
                parameter *= 0.2
            elif key.endswith(("log_scale", "log_scale.bias")):
                parameter += -0.3 if "reverse" in key else 0.3 if name == "Auxiliary" else 1.2
            elif key.startswith(("reverse.loc", "reverse.base.loc")):
                parameter *= 0.2
            elif key.startswith("targets"):
                parameter *= 0.5
    model, guide, truth = evidence_pair(posterior, case)
    check_evidence(model, guide, truth, spread=60.0)
    before = copy.deepcopy(posterior.state_dict())
    elbo = ImportanceWeightedELBO(8, max_plate_nesting=1)
    adam = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    for _ in range(500):
        adam.zero_grad()
        elbo.differentiable_loss(model, guide).backward()
        adam.step()
    for part in ("reverse.", "base." if name == "VGP" else "conditional."):
        moved = [
            (value - before[key]).abs().max()
            for key, value in posterior.state_dict().items()
            if key.startswith(part)
        ]
        assert max(moved) > 0.03
    check_evidence(model, guide, truth)


@pytest.mark.parametrize(("name", "case"), [m for m in MEMBERS if m.values[1]["latent_dim"] == 1])
def test_estimated_density_integrates_to_one(name: str, case: dict) -> None:
    """And is that of the draws: E_q[h(z)] by quadrature over exp(log_prob) and by sampling."""
    posterior, context = build(name, case)
    context = None if context is None else context[:1]
    # Wider than the law that it stands for: estimates of little variance.
    wide_reverse(posterior, 0.5)
    grid = torch.linspace(-30.0, 30.0, 3001).reshape(-1, 1)
    with torch.no_grad():
        density = posterior.log_prob(grid, context, num_samples=2000).exp()
        z = traced(posterior, context, 100_000, 1).nodes["z"]["value"].squeeze(-1)
    step = grid[1, 0] - grid[0, 0]
    assert (density.sum() * step).item() == pytest.approx(1.0, abs=0.02)
    for h in (torch.tanh, lambda value: (value > 0.5).to(value.dtype)):
        by_quadrature = ((density * h(grid[:, 0])).sum() * step).item()
        assert h(z).mean().item() == pytest.approx(by_quadrature, abs=0.02)


@pytest.mark.parametrize(("name", "case"), VGPS)
def test_process_is_the_reference(exact: None, name: str, case: dict) -> None:
    posterior, context = build(name, case)
    inputs = torch.randn(ROWS, 4, case.get("input_dim", case["latent_dim"]))
    mean, covariance = posterior.conditional(inputs, context)
    shape = case.get("jitter", 1e-4), case.get("mean", "identity")
    for row in range(ROWS):
        amortize = case.get("amortize", "none" if context is None else "targets")
        given = vgp.data(
            arrays(posterior), None if context is None else array(context[row]), amortize
        )
        expected = vgp.conditional(array(inputs[row]), *given, *shape)
        np.testing.assert_allclose(array(mean[row]), expected[0], atol=1e-9)
        shared = covariance if covariance.dim() == 2 else covariance[row]
        np.testing.assert_allclose(array(shared), expected[1], atol=1e-9)


def test_process_is_that_of_scikit_learn(exact: None) -> None:
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    kernels = gaussian_process.kernels
    posterior = shaken(VGP(3, input_dim=2, num_inducing=20, jitter=1e-3, mean="zero"), 0.5)
    amplitude = posterior.log_amplitude.mul(2).exp().item()
    kernel = kernels.ConstantKernel(amplitude) * kernels.RBF(
        array(posterior.log_lengthscale.exp())
    ) + kernels.WhiteKernel(1e-3 * amplitude)
    peer = gaussian_process.GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None)
    peer.fit(array(posterior.sources), array(posterior.targets))
    inputs = 1.5 * torch.randn(30, 2)
    mean, covariance = posterior.conditional(inputs)
    expected_mean, expected = peer.predict(array(inputs), return_cov=True)
    np.testing.assert_allclose(array(mean), expected_mean, atol=1e-8)
    np.testing.assert_allclose(array(covariance), expected[..., 0], atol=1e-8)
    np.testing.assert_allclose(array(covariance), expected[..., 2], atol=1e-8)


@pytest.mark.parametrize("lengthscale", [0.1, 1.0, 30.0])
def test_process_of_500_sources_in_single_precision(lengthscale: float) -> None:
    posterior = VGP(2, num_inducing=500).float()
    torch.nn.init.constant_(posterior.log_lengthscale, math.log(lengthscale))
    exact = copy.deepcopy(posterior).double()
    inputs = 2.0 * torch.randn(50, 2, dtype=torch.float32)
    mean, covariance = posterior.conditional(inputs)
    reference_mean, reference = exact.conditional(inputs.double())
    assert (mean - reference_mean).abs().max() < 0.02
    assert (covariance - reference).abs().max() < 1e-3
    elbo = ImportanceWeightedELBO(2, max_plate_nesting=1)

    def model() -> None:
        with pyro.plate("rows", 10):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1))

    def guide() -> None:
        with pyro.plate("rows", 10):
            posterior("z")

    elbo.differentiable_loss(model, guide).backward()
    assert all(torch.isfinite(p.grad).all() for p in posterior.parameters())


@pytest.mark.parametrize("amortize", ["none", "targets", "all"])
def test_one_factor_a_step(monkeypatch: pytest.MonkeyPatch, amortize: str) -> None:
    """The cubic step is taken once, not per row or particle, unless sources are amortised."""
    seen = []
    cholesky = torch.linalg.cholesky

    def counted(matrix: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(matrix.shape))
        return cholesky(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky", counted)
    posterior = VGP(2, 4, num_inducing=7, amortize=amortize)
    context = torch.randn(ROWS, 4)
    with pyro.plate("k", 6, dim=-2), pyro.plate("rows", ROWS):
        posterior("z", context)
    assert seen == [(ROWS, 7, 7) if amortize == "all" else (7, 7)]


class Periodic(torch.nn.Module):
    """A kernel with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.period = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        turns = torch.pi * (a.unsqueeze(-2) - b.unsqueeze(-3)) / self.period
        return (-2.0 * turns.sin().square().sum(-1)).exp()


def test_any_kernel() -> None:
    posterior = shaken(VGP(2, 4, num_inducing=6, kernel=Periodic()), 0.02)
    posterior.base.log_scale.bias.data += 1.2
    wide_reverse(posterior, -0.3)
    model, guide, truth = evidence_pair(posterior, {"latent_dim": 2, "context_dim": 4})
    check_evidence(model, guide, truth)
    elbo = ImportanceWeightedELBO(3, max_plate_nesting=1)
    elbo.differentiable_loss(model, guide).backward()
    assert posterior.kernel.period.grad.abs() > 0


def test_targets_and_sources_may_be_given() -> None:
    grid = np.linspace(-2.0, 2.0, 9)[:, None]
    posterior = VGP(1, sources=grid, targets=np.sin(grid), jitter=1e-6)
    mean, _ = posterior.conditional(torch.as_tensor(grid, dtype=torch.get_default_dtype()))
    np.testing.assert_allclose(array(mean), np.sin(grid), atol=1e-2)


def test_errors() -> None:
    with pytest.raises(ValueError, match="Expected as many targets as sources; got 4 targets and"):
        VGP(2, sources=np.zeros((5, 2)), targets=np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"Expected sources of shape \(num_inducing, 2\); got"):
        VGP(2, sources=np.zeros((5, 3)))
    with pytest.raises(ValueError, match="Expected amortize='none' without a context; got 'all'"):
        VGP(2, amortize="all")
    with pytest.raises(ValueError, match="Expected amortize to be one of .*; got 'some'"):
        VGP(2, 3, amortize="some")
    with pytest.raises(ValueError, match="Expected jitter > 0; got 0"):
        VGP(2, jitter=0.0)
    with pytest.raises(ValueError, match=r"Expected inputs of shape \(\*batch, n, 2\)"):
        VGP(2).conditional(torch.zeros(4, 3))
    with pytest.raises(TypeError, match="Expected a guide family from aux_family.*; got Linear"):
        family(
            "Auxiliary", latent_dim=2, context_dim=3, aux_family=lambda a, b: torch.nn.Linear(a, b)
        )
    with pytest.raises(TypeError, match="with a density of its own from reverse_family; got Aux"):
        family("Auxiliary", latent_dim=2, context_dim=3, reverse_family={"name": "Auxiliary"})
    with pytest.raises(TypeError, match="with a density of its own from latent_family; got VGP"):
        family("Auxiliary", latent_dim=2, context_dim=3, latent_family={"name": "VGP"})
    with pytest.raises(ValueError, match="Expected num_samples >= 1; got 0"):
        family("Auxiliary", latent_dim=2).log_prob(torch.zeros(2), num_samples=0)
    with pytest.raises(ValueError, match="Expected aux_dim >= 1; got 0"):
        family("Auxiliary", latent_dim=2, aux_dim=0)
    with pytest.raises(ValueError, match="Expected a context of width 3 at site 'z'; got None"):
        VGP(2, 3)("z")


def test_a_kernel_that_is_not_positive_definite() -> None:
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cdist(a, b)

    text = "Expected a positive definite kernel; got distance, .* 50 sources with jitter=0.0001"
    with pytest.raises(ValueError, match=text):
        VGP(2, kernel=distance)("z")


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_data_far_from_the_start(name: str) -> None:
    """Two parameters, data near 2500: no step sends a scale, and with it the loss, to infinity."""
    torch.set_default_dtype(torch.float32)  # where infinity is near; the fixture sets it back
    x = 2500.0 + 50.0 * torch.randn(30)

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 500.0))
        scale = pyro.sample("scale", dist.HalfNormal(500.0))
        with pyro.plate("data", 30):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    guide = AutoPosterior(model, getattr(guides, name))
    elbo = ImportanceWeightedELBO(16, gradient="stl")(model, guide)
    losses = [elbo()]
    adam = torch.optim.Adam(guide.parameters(), lr=1e-2)
    for _ in range(60):
        losses[-1].backward()
        adam.step()
        adam.zero_grad()
        losses.append(elbo())
    found = torch.stack(losses).detach()
    assert found.isfinite().all()
    assert found[-10:].mean() < found[0]


@pytest.mark.parametrize(("latent_dim", "aux_dim"), [(3, 2), (2, 3)])
def test_default_parts_start_as_exact_reverses(latent_dim: int, aux_dim: int) -> None:
    """Without its small heads the start is a standard Normal, whose bound is exact."""
    posterior = guides.Auxiliary(latent_dim, aux_dim=aux_dim)
    for part in (posterior.conditional, posterior.reverse):
        for head in (part.loc, part.log_scale):
            head.weight.data.zero_()
    both = min(latent_dim, aux_dim)
    for _ in range(5):
        sites = pyro.poutine.trace(lambda: posterior("z")).get_trace()
        a, z = sites.nodes["z_aux"]["value"], sites.nodes["z"]["value"]
        exact = dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum()
        torch.testing.assert_close(sites.log_prob_sum(), exact)
        mean = posterior.conditional.distribution(a).mean
        torch.testing.assert_close(mean[:both], math.sqrt(0.5) * a[:both])
