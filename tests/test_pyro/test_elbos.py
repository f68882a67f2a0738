"""The contract of an objective: bounds under every layout, one value, one traced graph."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from reference import conjugate as oracle
from test_pyro.models import amortised, conjugate, family, shaken, standard_errors
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae_ext.elbos import ImportanceWeightedELBO

MEMBERS = [
    pytest.param(case, id="-".join(str(value) for value in case.values()))
    for case in CASES["elbos"]["ImportanceWeightedELBO"]
]
LAYOUTS = [{}, {"vectorize_particles": False}, {"chunk_size": 7}]


def wide_posterior(dim: int = 1) -> torch.nn.Module:
    """A guide that is off the posterior, so that the bound is off the evidence."""
    posterior = shaken(family("MeanField", latent_dim=dim, context_dim=dim), 0.1)
    posterior.log_scale.bias.data += 0.4
    return posterior


def losses(elbo, model, guide, count: int) -> torch.Tensor:
    return torch.tensor([elbo.loss(model, guide) for _ in range(count)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_size", [1000, 100, 10])
def test_one_bound_for_every_batch_size_and_layout(batch_size: int, layout: dict) -> None:
    """1,000 data, K = 20: the bound of the full batch, below the evidence."""
    x, mu = math.sqrt(2.0) * torch.randn(1000, 1) + 0.5, torch.tensor([0.5])
    evidence = oracle.log_evidence(x.cpu().numpy(), 0.5).sum()
    posterior = wide_posterior()
    exact = ImportanceWeightedELBO(20, max_plate_nesting=1)
    full = losses(exact, conjugate(x, mu), amortised(posterior, x), 400)
    truth, error = full.mean().item(), (full.std() / 20.0).item()
    assert -truth < evidence - 4 * error
    elbo = ImportanceWeightedELBO(20, **layout)
    model, guide = conjugate(x, mu, batch_size), amortised(posterior, x, batch_size)
    draws = losses(elbo, model, guide, 100)
    combined = math.hypot(error, (draws.std() / 10.0).item())
    assert abs(draws.mean().item() - truth) < 4 * combined
    if batch_size == 1000:
        assert combined < 3.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bound_is_that_of_its_log_weights(layout: dict) -> None:
    x, mu = torch.randn(6, 2), torch.zeros(2)
    model, guide = conjugate(x, mu, 3), amortised(wide_posterior(2), x, 3)
    elbo = ImportanceWeightedELBO(20, max_plate_nesting=2, **layout)
    torch.manual_seed(3)
    loss = elbo.loss(model, guide)
    torch.manual_seed(3)
    weights = elbo.log_weights(model, guide)
    assert weights.shape == (20, 3)
    expected = -2.0 * (weights.logsumexp(0) - math.log(20)).sum()
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_subsample_is_shared_by_all_particles() -> None:
    seen = []

    def guide() -> None:
        with pyro.plate("data", 50, subsample_size=5) as rows:
            seen.append(rows)
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    def model() -> None:
        with pyro.plate("data", 50, subsample_size=5) as rows:
            seen.append(rows)
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    for layout in LAYOUTS:
        elbo = ImportanceWeightedELBO(20, max_plate_nesting=2, **layout)
        runs = []
        for _ in range(2):
            seen.clear()
            elbo.loss(model, guide)
            assert all(torch.equal(rows, seen[0]) for rows in seen[1:])
            runs.append(seen[0])
        assert not torch.equal(*runs)


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_chunks_recompute_the_same_gradient(gradient: str) -> None:
    """One chunk of all particles: recomputed activations, same noise, same subsample."""
    x, mu = torch.randn(50, 2), torch.zeros(2, requires_grad=True)
    posterior = wide_posterior(2)
    model, guide = conjugate(x, mu, 10), amortised(posterior, x, 10)
    results = []
    for chunk_size in (None, 20, 30):
        elbo = ImportanceWeightedELBO(
            20, gradient=gradient, chunk_size=chunk_size, max_plate_nesting=1
        )
        torch.manual_seed(5)
        loss = elbo.differentiable_loss(model, guide)
        results.append((loss, *torch.autograd.grad(loss, [mu, *posterior.parameters()])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_layouts_agree_on_value_and_gradient(
    exact: None, monkeypatch: pytest.MonkeyPatch, gradient: str, name: str
) -> None:
    """Vectorised, looped, chunked: the same noise gives the same loss and gradients."""
    noise = torch.randn(9, 4, 2)
    x, mu = torch.randn(4, 2), torch.zeros(2, requires_grad=True)
    posterior = shaken(family(name, latent_dim=2, context_dim=2))
    real = torch.randn
    results = []
    for layout in ({}, {"vectorize_particles": False}, {"chunk_size": 4}):
        starts: dict[bytes, int] = {}
        taken = 0

        def draw(shape: tuple, starts: dict = starts, **kwargs) -> torch.Tensor:
            """Rows of the noise, told apart by the random state: a recomputation restores it."""
            nonlocal taken
            state = torch.get_rng_state().numpy().tobytes()
            real(1)
            count = shape[0] if len(shape) == 3 else 1
            if state not in starts:
                starts[state], taken = taken, taken + count
            return noise[starts[state] : starts[state] + count].reshape(shape)

        elbo = ImportanceWeightedELBO(9, gradient=gradient, max_plate_nesting=1, **layout)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", draw)
            loss = elbo.differentiable_loss(conjugate(x, mu), amortised(posterior, x))
            results.append((loss, *torch.autograd.grad(loss, [mu, *posterior.parameters()])))
        assert taken == 9
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", MEMBERS)
def test_host_contract(case: dict) -> None:
    """loss, differentiable_loss, loss_and_grads, SVI and the objective as a module."""
    x, mu = torch.randn(8, 2), torch.zeros(2)
    posterior = shaken(family("IAF", latent_dim=2, context_dim=2, hidden_dims=(6,)))
    model, guide = conjugate(x, mu, 4), amortised(posterior, x, 4)
    elbo = ImportanceWeightedELBO(**case)
    assert isinstance(elbo.loss(model, guide), float)
    loss = elbo.loss_and_grads(model, guide)
    assert loss.shape == () and not loss.requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in posterior.parameters())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    before = posterior.base.loc.weight.clone()
    assert math.isfinite(svi.step()) and math.isfinite(svi.evaluate_loss())
    assert not torch.equal(before, posterior.base.loc.weight)
    module = elbo(model, guide)
    module().backward()


@pytest.mark.parametrize("num_particles", [1, 5])
def test_one_particle_is_the_elbo(num_particles: int) -> None:
    """K = 1 is Trace_ELBO with the same noise; more particles give a tighter bound."""
    x, mu = torch.randn(30, 2), torch.zeros(2)
    model, guide = conjugate(x, mu, 10), amortised(wide_posterior(2), x, 10)
    torch.manual_seed(1)
    ours = ImportanceWeightedELBO(num_particles).loss(model, guide)
    torch.manual_seed(1)
    host = Trace_ELBO().loss(model, guide)
    if num_particles == 1:
        assert ours == pytest.approx(host, rel=1e-5)
    draws = losses(ImportanceWeightedELBO(num_particles), model, guide, 300)
    plain = losses(Trace_ELBO(), model, guide, 300)
    gain = plain - draws
    if num_particles > 1:
        assert standard_errors(gain, 0.0) > 4


def test_one_particle_is_as_free_as_the_host() -> None:
    """A global latent beside a subsampled plate, and scales: fine with one particle."""
    x = torch.randn(20, 1)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample_size=5) as rows, poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(w, 1.0).expand([5, 1]).to_event(1), obs=x[rows])

    def guide() -> None:
        pyro.sample("w", dist.Normal(torch.tensor(0.1), torch.tensor(0.7)))

    for gradient in ("reparam", "stl", "dreg"):
        torch.manual_seed(2)
        ours = ImportanceWeightedELBO(1, gradient=gradient).loss(model, guide)
        torch.manual_seed(2)
        assert ours == pytest.approx(Trace_ELBO().loss(model, guide), rel=1e-5)


def test_no_common_plate_gives_one_joint_bound() -> None:
    x = torch.randn(6, 1)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    posterior = shaken(family("IAF", latent_dim=1, hidden_dims=(6,)))

    def guide() -> None:
        posterior("z")

    elbo = ImportanceWeightedELBO(400)
    assert elbo.log_weights(model, guide).shape == (400,)
    evidence = oracle.global_log_evidence(x.cpu().numpy(), 0.0)
    draws = -losses(ImportanceWeightedELBO(5, max_plate_nesting=1), model, guide, 500)
    assert draws.mean().item() < evidence + 4 * (draws.std() / math.sqrt(500)).item()


@pytest.mark.parametrize("layout", [{}, {"chunk_size": 3}])
def test_nested_plates(layout: dict) -> None:
    """Groups and rows common to all sites, an inner plate of measurements summed out."""
    x = torch.randn(2, 3, 4)

    def model() -> None:
        with pyro.plate("group", 2, dim=-3), pyro.plate("row", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            with pyro.plate("measurement", 4, dim=-1):
                pyro.sample("x", dist.Normal(z.squeeze(-1), 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("group", 2, dim=-3), pyro.plate("row", 3, dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True).unsqueeze(-1), 0.7).to_event(1))

    elbo = ImportanceWeightedELBO(5000, max_plate_nesting=3, **{**layout, "chunk_size": None})
    weights = elbo.log_weights(model, guide)
    assert weights.shape == (5000, 2, 3)
    for group in range(2):
        for row in range(3):
            evidence = oracle.global_log_evidence(x[group, row, :, None].cpu().numpy(), 0.0)
            draws = weights[:, group, row].exp()
            assert abs(standard_errors(draws, math.exp(evidence))) < 4
    chunked = ImportanceWeightedELBO(7, gradient="dreg", max_plate_nesting=3, **layout)
    assert math.isfinite(chunked.loss(model, guide))


def test_more_plates_than_declared() -> None:
    """An objective that guessed its nesting on a smaller pair stays right on a larger one."""
    x = torch.randn(3, 2)
    elbo = ImportanceWeightedELBO(4, gradient="dreg")
    elbo.loss(conjugate(x, torch.zeros(2)), amortised(wide_posterior(2), x))
    loc = torch.zeros(5, requires_grad=True)

    def model() -> None:
        with pyro.plate("row", 5), pyro.plate("group", 6):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        with pyro.plate("row", 5), pyro.plate("group", 6):
            pyro.sample("z", dist.Normal(loc, 2.0))

    assert elbo.log_weights(model, guide).shape == (4, 6, 5)
    fresh = ImportanceWeightedELBO(4, gradient="dreg", max_plate_nesting=2)
    results = []
    for objective in (elbo, fresh):
        torch.manual_seed(0)
        loss = objective.differentiable_loss(model, guide)
        results.append((loss.shape, torch.autograd.grad(loss, loc)[0].shape))
    assert results[0] == results[1]


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
@pytest.mark.parametrize("num_particles", [1, 6])
def test_row_mask_is_dropping_the_rows(
    exact: None, monkeypatch: pytest.MonkeyPatch, gradient: str, num_particles: int
) -> None:
    x, mu = torch.randn(5, 2), torch.zeros(2, requires_grad=True)
    mask = torch.tensor([True, False, True, True, False])
    posterior = shaken(family("IAF", latent_dim=2, context_dim=2))
    noise = torch.randn(num_particles, 5, 2)
    elbo = ImportanceWeightedELBO(num_particles, gradient=gradient, max_plate_nesting=1)
    results = []
    for keep in (torch.ones_like(mask), mask):
        rows = x[keep]
        kept = noise[:, keep]
        monkeypatch.setattr(torch, "randn", lambda shape, kept=kept, **_: kept.reshape(shape))
        model, guide = conjugate(rows, mu), amortised(posterior, rows)
        if keep.all():
            model, guide = poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask)
            masked = elbo.log_weights(model, guide)[:, ~mask]
            assert torch.equal(masked, torch.zeros_like(masked))
        loss = elbo.differentiable_loss(model, guide)
        results.append((loss, *torch.autograd.grad(loss, [mu, *posterior.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_scale_of_all_sites_multiplies_the_bound() -> None:
    x, mu = torch.randn(6, 2), torch.zeros(2)
    model, guide = conjugate(x, mu), amortised(wide_posterior(2), x)
    elbo = ImportanceWeightedELBO(5, max_plate_nesting=1)
    rows = torch.arange(1.0, 7.0)
    values = {}
    for scale in (1.0, 0.25, torch.tensor(0.25), rows):
        torch.manual_seed(0)
        loss = elbo.loss(poutine.scale(model, scale=scale), poutine.scale(guide, scale=scale))
        values[scale] = loss
    plain, number, tensor, weighted = values.values()
    assert number == pytest.approx(0.25 * plain, rel=1e-6)
    assert tensor == pytest.approx(0.25 * plain, rel=1e-6)
    torch.manual_seed(0)
    weights = elbo.log_weights(model, guide)
    bound = weights.logsumexp(0) - math.log(5)
    assert weighted == pytest.approx(-(rows * bound).sum().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["MeanField", "IAF"])
@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
@pytest.mark.parametrize("num_particles", [1, 5])
def test_a_step_traces_into_one_graph(name: str, gradient: str, num_particles: int) -> None:
    """make_fx turns loss and gradients of a whole step into one graph, with fresh noise."""
    encoder, decoder = torch.nn.Linear(6, 4), torch.nn.Linear(2, 6)
    posterior = shaken(family(name, latent_dim=2, context_dim=4))
    modules = {"encoder": encoder, "decoder": decoder, "posterior": posterior}
    names = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            posterior("z", encoder(x))

    elbo = ImportanceWeightedELBO(num_particles, gradient=gradient)

    def step(parameters: dict, x: torch.Tensor) -> tuple:
        with torch.nn.utils.parametrize.cached():
            holder = torch.nn.ModuleDict(modules)
            call = _Call(holder, lambda: elbo.differentiable_loss(model, guide, x))
            given = {f"holder.{n}": p for n, p in parameters.items()}
            loss = torch.func.functional_call(call, given, ())
            return loss, *torch.autograd.grad(loss, list(parameters.values()))

    x = torch.rand(3, 6).round()
    with pyro.validation_enabled(False):
        elbo.loss(model, guide, x)
        parameters = {n: p.detach().clone().requires_grad_() for n, p in names.items()}
        graph = make_fx(step)(parameters, x)
        assert isinstance(graph, torch.fx.GraphModule)
        torch.manual_seed(7)
        traced = graph(parameters, x)
        torch.manual_seed(7)
        eager = step(parameters, x)
    assert len(traced) == 1 + len(names)
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a, b)
    torch.manual_seed(8)
    assert not torch.equal(graph(parameters, x)[0], traced[0])
    moved = {n: (p + 0.1).detach().requires_grad_() for n, p in parameters.items()}
    torch.manual_seed(7)
    assert not torch.equal(graph(moved, x)[0], traced[0])


class _Call(torch.nn.Module):
    def __init__(self, holder: torch.nn.Module, function) -> None:
        super().__init__()
        self.holder, self.function = holder, function

    def forward(self) -> torch.Tensor:
        return self.function()


def test_ragged_last_batch() -> None:
    """The sum of the losses of all batches, each scaled, is N/B times their share."""
    x, mu = torch.randn(10, 2), torch.zeros(2)
    posterior = wide_posterior(2)
    elbo = ImportanceWeightedELBO(20_000, max_plate_nesting=1)
    shares = []
    for rows in torch.arange(10).split(4):

        def model(rows: torch.Tensor = rows) -> None:
            with pyro.plate("data", 10, subsample=rows):
                z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

        def guide(rows: torch.Tensor = rows) -> None:
            with pyro.plate("data", 10, subsample=rows):
                posterior("z", x[rows])

        shares.append(elbo.loss(model, guide) * len(rows) / 10)
    evidence = oracle.log_evidence(x.cpu().numpy(), 0.0).sum()
    assert sum(shares) == pytest.approx(-evidence, abs=0.2)
    assert np.isfinite(shares).all()
