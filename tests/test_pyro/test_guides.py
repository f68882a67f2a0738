"""The contract of a guide family, over every registered member."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, DIRECT
from reference import complex_step, iaf, mean_field
from reference import conjugate as oracle
from test_pyro.models import family, shaken, standard_errors

from pyro_vae_ext.elbos import ImportanceWeightedELBO

MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name in DIRECT
    for i, case in enumerate(CASES["guides"][name])
]
IAFS = [member for member in MEMBERS if member.values[0] == "IAF"]
AMORTISED = [member for member in MEMBERS if member.values[1]["context_dim"] is not None]
ROWS = 5


def build(name: str, case: dict) -> tuple[torch.nn.Module, torch.Tensor | None]:
    posterior = shaken(family(name, **case))
    context = None
    if case["context_dim"] is not None:
        context = torch.randn(ROWS, case["context_dim"])
    return posterior, context


def reference_log_prob(name: str, case: dict, weights: dict, value, context):
    if name == "MeanField":
        heads = mean_field.heads(weights, context, case.get("activation", "elu"))
        return mean_field.log_prob(value, *heads)
    options = {"update": case.get("update", "affine"), "activation": case.get("activation", "elu")}
    return iaf.log_prob(value, weights, context, **options)


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().cpu().numpy()


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: array(parameter) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_starts_near_a_standard_normal(name: str, case: dict) -> None:
    """Around the origin at a zero context, with scales near 1 at any."""
    posterior = family(name, **case)
    for scale in (0.0, 1.0):
        context = None
        if case["context_dim"] is not None:
            context = scale * torch.randn(1, case["context_dim"])
        z = posterior.distribution(context).rsample((4000,))
        assert (z.std(0).log().abs() < 0.8).all()
        if scale == 0.0:
            assert (z.mean((0, 1)).abs() < 0.3).all()


@pytest.mark.parametrize(("name", "case"), MEMBERS)
@pytest.mark.parametrize("plates", [(), (ROWS,), (2, ROWS), (3, 2, ROWS)])
def test_shapes_in_plates(name: str, case: dict, plates: tuple[int, ...]) -> None:
    posterior, context = build(name, case)
    if case["context_dim"] is not None and not plates:
        context = context[0]

    def guide() -> torch.Tensor:
        with pyro.plate_stack("rows", plates):
            return posterior("z", context)

    trace = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (*plates, case["latent_dim"])
    assert site["log_prob"].shape == plates
    assert site["fn"].event_dim == 1
    # Every element of a plate has noise of its own.
    flat = site["value"].reshape(-1, case["latent_dim"])
    assert len(torch.unique(flat, dim=0)) == len(flat)


@pytest.mark.parametrize(("name", "case"), AMORTISED)
@pytest.mark.parametrize("batch", [(), (4,), (2, 1, 4)])
def test_any_left_batch(name: str, case: dict, batch: tuple[int, ...]) -> None:
    posterior, _ = build(name, case)
    context = torch.randn(*batch, case["context_dim"])
    distribution = posterior.distribution(context)
    assert distribution.batch_shape == batch
    draws = distribution.rsample((3,))
    assert draws.shape == (3, *batch, case["latent_dim"])
    assert distribution.log_prob(draws).shape == (3, *batch)
    flat = posterior.log_prob(
        draws.reshape(3, -1, case["latent_dim"]), context.reshape(-1, case["context_dim"])
    )
    torch.testing.assert_close(flat.reshape(3, *batch), distribution.log_prob(draws))


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_density_is_the_reference(exact: None, name: str, case: dict) -> None:
    posterior, context = build(name, case)
    distribution = posterior.distribution(context).expand((2, ROWS))
    z = distribution.rsample()
    expected = reference_log_prob(name, case, arrays(posterior), array(z), array(context))
    carried = distribution.log_prob(z).detach().cpu()
    foreign = posterior.log_prob(z.clone(), context).detach().cpu()
    np.testing.assert_allclose(carried, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(foreign, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_density_is_the_change_of_variables(
    exact: None, monkeypatch: pytest.MonkeyPatch, name: str, case: dict
) -> None:
    """log q = log N(noise) - log |det dz/dnoise|, the Jacobian by autodiff."""
    posterior, context = build(name, case)
    noise = torch.randn(ROWS, case["latent_dim"])

    def sample(noise: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
        return posterior.distribution(context).expand((ROWS,)).rsample()

    jacobian = torch.autograd.functional.jacobian(lambda n: sample(n).sum(0), noise)
    log_det = torch.linalg.slogdet(jacobian.movedim(1, 0)).logabsdet
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - log_det
    torch.testing.assert_close(posterior.log_prob(sample(noise), context), expected)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_foreign_density_has_exact_derivatives(exact: None, name: str, case: dict) -> None:
    """In value, context and parameters, against the reference by complex steps."""
    posterior, context = build(name, case)
    inputs = {"value": torch.randn(ROWS, case["latent_dim"], requires_grad=True)}
    if context is not None:
        inputs["context"] = context.requires_grad_()
    inputs.update(posterior.named_parameters())
    total = posterior.log_prob(inputs["value"], context).sum()
    gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)

    def reference(given: dict) -> complex:
        weights = {n: v for n, v in given.items() if n not in ("value", "context")}
        return reference_log_prob(name, case, weights, given["value"], given.get("context")).sum()

    expected = complex_step.gradient(reference, {n: array(v) for n, v in inputs.items()})
    for (key, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        found = np.zeros(tensor.shape) if gradient is None else array(gradient)
        np.testing.assert_allclose(found, expected[key], rtol=1e-8, atol=1e-9, err_msg=key)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_a_gradient_reaches_every_parameter(name: str, case: dict) -> None:
    posterior, context = build(name, case)
    z = posterior.distribution(context).expand((ROWS,)).rsample()
    (z.square().sum() - posterior.log_prob(z.detach(), context).sum()).backward()
    for parameter_name, parameter in posterior.named_parameters():
        # With one latent dimension the nets see no other: their first weights are masked out.
        if case["latent_dim"] == 1 and parameter_name.endswith("layers.0.weight"):
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize(("name", "case"), MEMBERS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_dtypes(name: str, case: dict, kind: torch.dtype) -> None:
    posterior, context = build(name, case)
    posterior = posterior.to(kind)
    context = None if context is None else context.to(kind)
    distribution = posterior.distribution(context)
    z = distribution.rsample()
    assert z.dtype == kind and distribution.log_prob(z).dtype == kind
    tolerance = 2e-3 if kind == torch.float32 else 1e-9
    torch.testing.assert_close(
        posterior.log_prob(z.clone(), context), distribution.log_prob(z), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_save_and_load(name: str, case: dict, tmp_path) -> None:
    posterior, context = build(name, case)
    torch.save(posterior.state_dict(), tmp_path / "posterior.pt")
    other = family(name, **case)
    other.load_state_dict(torch.load(tmp_path / "posterior.pt"))
    z = torch.randn(ROWS, case["latent_dim"])
    assert torch.equal(posterior.log_prob(z, context), other.log_prob(z, context))
    clone = copy.deepcopy(posterior)
    assert torch.equal(posterior.log_prob(z, context), clone.log_prob(z, context))


@pytest.mark.parametrize(("name", "case"), IAFS)
def test_a_density_alone_costs_no_score(
    exact: None, monkeypatch: pytest.MonkeyPatch, name: str, case: dict
) -> None:
    posterior, context = build(name, case)
    foreign = torch.randn(ROWS, case["latent_dim"])
    expected = posterior.log_prob(foreign, context).detach()

    def score(self: object, noise: torch.Tensor) -> torch.Tensor:
        raise AssertionError("Expected no score.")

    monkeypatch.setattr("pyro_vae_ext.guides.iaf._Steps.score", score)
    with torch.no_grad():
        np.testing.assert_allclose(posterior.log_prob(foreign, context).cpu(), expected.cpu())
    with pytest.raises(AssertionError, match="no score"):
        posterior.log_prob(foreign, context)


@pytest.mark.parametrize(("name", "case"), IAFS)
def test_inverse_in_many_dimensions(exact: None, name: str, case: dict) -> None:
    posterior = shaken(family(name, **{**case, "latent_dim": 40}), 0.02)
    context = None if case["context_dim"] is None else torch.randn(ROWS, case["context_dim"])
    transform = posterior.distribution(context).transform
    value = 4.0 * torch.randn(ROWS, 40)
    torch.testing.assert_close(transform.forward(transform.inverse(value))[0], value)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_mean_weight_is_the_evidence(name: str, case: dict) -> None:
    """E[exp(log_weight)] = p(x), amortised per datum and global."""
    dim, mu = case["latent_dim"], 0.3
    posterior = shaken(family(name, **case), 0.05)
    for parameter_name, parameter in posterior.named_parameters():
        # Wider than the posterior, so that the weights have light tails.
        if parameter_name.endswith(("log_scale", "log_scale.bias")):
            parameter.data += 0.4
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
            posterior("z", encode(x) if local else None)

    elbo = ImportanceWeightedELBO(40_000, max_plate_nesting=1)
    with torch.no_grad():
        weights = elbo.log_weights(model, guide).exp()
    assert weights.shape == (40_000, 3 if local else 1)
    data = x.cpu().numpy()
    truth = oracle.log_evidence(data, mu) if local else [oracle.global_log_evidence(data, mu)]
    for draws, log_evidence in zip(weights.T, truth, strict=True):
        assert abs(standard_errors(draws, math.exp(log_evidence))) < 4
        # The weights vary little enough for their standard error to mean something.
        assert draws.std() < 20 * draws.mean()


@pytest.mark.parametrize("update", ["affine", "gated"])
@pytest.mark.parametrize(("num_flows", "total"), [(1, 3.0), (2, 6.0), (8, 12.0)])
def test_scales_are_bounded(exact: None, update: str, num_flows: int, total: float) -> None:
    """Whatever the nets say: at their bounds the flow is a Normal whose scale is known."""
    posterior = family("IAF", latent_dim=2, context_dim=None, num_flows=num_flows, update=update)
    for sign in (-1.0, 1.0):
        with torch.no_grad():
            for net in posterior.nets:
                net.layers[-1].weight.zero_()
                net.layers[-1].bias.copy_(torch.tensor([0.0, 0.0, 1e6, 1e6]) * sign)
        value = torch.tensor([[0.3, -1.2]]) * math.exp(sign * total)
        expected = dist.Normal(0.0, math.exp(sign * total)).log_prob(value).sum(-1)
        torch.testing.assert_close(posterior.log_prob(value), expected)


@pytest.mark.parametrize(
    "name", sorted(CASES["guides"].keys() - {"AutoPosterior", "AutoAmortized"})
)
def test_raw_counts_are_a_context(name: str) -> None:
    """A context of any scale: finite draws and densities, and gradients to learn from."""
    posterior = family(name, latent_dim=2, context_dim=64)
    counts = 1000.0 * torch.rand(50, 64)
    with pyro.plate("rows", 50):
        trace = pyro.poutine.trace(posterior).get_trace("z", counts)
    trace.compute_log_prob()
    loss = -sum(site["log_prob_sum"] for site in trace.nodes.values() if site["type"] == "sample")
    loss = loss + trace.nodes["z"]["value"].square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in posterior.parameters() if p.grad is not None)
    if name == "MeanField":
        law = posterior.distribution(counts)
        assert (law.stddev.log().abs() <= 3.0).all()
        assert posterior.log_scale.weight.grad.abs().min() > 0
        assert posterior.distribution(counts / 1000.0).mean.abs().max() < 0.8
