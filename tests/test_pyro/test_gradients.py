"""The three gradients against the references, at the posterior, and in their signal to noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from reference import iaf, importance_weighted, mean_field, signal_to_noise
from test_pyro.models import amortised, conjugate, family, shaken

from pyro_vae_ext.elbos import ImportanceWeightedELBO

GRADIENTS = ("reparam", "stl", "dreg")
K, ROWS, DIM = 4, 3, 2


@pytest.fixture(autouse=True)
def float64(exact: None) -> None:
    """All of this is exact, to float64."""


def with_noise(monkeypatch: pytest.MonkeyPatch, *draws: torch.Tensor) -> None:
    """Let the sites draw the given noise, in their order."""
    given = iter(draws)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: next(given).reshape(shape))


def objective(gradient: str, num_particles: int = K) -> ImportanceWeightedELBO:
    return ImportanceWeightedELBO(num_particles, gradient=gradient, max_plate_nesting=1)


def gradients(loss: torch.Tensor, **parameters: torch.Tensor) -> dict[str, np.ndarray]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: np.zeros(tuple(p.shape)) if g is None else g.cpu().numpy()
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def check(loss: torch.Tensor, found: dict, bound: float, expected: dict) -> None:
    """The reference ascends the bound; the objective descends the loss."""
    assert loss.item() == pytest.approx(-bound, rel=1e-10)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(-found[name], value, rtol=1e-8, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_linear_gaussian_in_closed_form(monkeypatch: pytest.MonkeyPatch, gradient: str) -> None:
    noise, x = torch.randn(K, ROWS, DIM), torch.randn(ROWS, DIM)
    mu = torch.randn(DIM, requires_grad=True)
    posterior = shaken(family("MeanField", latent_dim=DIM, context_dim=DIM))
    posterior.log_scale.weight.data.zero_()
    with_noise(monkeypatch, noise)
    loss = objective(gradient).differentiable_loss(conjugate(x, mu), amortised(posterior, x))
    named = {
        "mu": mu,
        "A": posterior.loc.weight,
        "b": posterior.loc.bias,
        "log_scale": posterior.log_scale.bias,
    }
    bound, expected = importance_weighted.linear_gaussian(
        noise.cpu().numpy(),
        x.cpu().numpy(),
        {name: p.detach().cpu().numpy() for name, p in named.items()},
        gradient,
    )
    check(loss, gradients(loss, **named), bound, expected)


@pytest.mark.parametrize("num_particles", [1, K])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_shared_parameters_get_both_parts(
    monkeypatch: pytest.MonkeyPatch, name: str, gradient: str, num_particles: int
) -> None:
    """Model and guide share the family's parameters; the reference differentiates by steps."""
    noise, x = torch.randn(num_particles, ROWS, DIM), torch.randn(ROWS, DIM)
    posterior = shaken(family(name, latent_dim=DIM, context_dim=DIM))
    mu = torch.randn(DIM, requires_grad=True)
    shared = (posterior if name == "MeanField" else posterior.base).loc.bias

    def model() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(mu + shared, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * shared.exp(), 1.0).to_event(1), obs=x)

    with_noise(monkeypatch, noise)
    loss = objective(gradient, num_particles).differentiable_loss(model, amortised(posterior, x))
    parameters = dict(posterior.named_parameters())
    found = gradients(loss, mu=mu, **parameters)
    key = "loc.bias" if name == "MeanField" else "base.loc.bias"
    data = x.cpu().numpy()

    def log_joint(z, theta, phi):
        half_log = 0.5 * np.log(2 * np.pi)
        prior = -0.5 * (z - theta["mu"] - phi[key]) ** 2 - half_log
        return (prior - 0.5 * (data - z * np.exp(phi[key])) ** 2 - half_log).sum(-1)

    def sample(eps, phi):
        if name == "MeanField":
            return mean_field.sample(eps, *mean_field.heads(phi, data))
        return iaf.forward(eps, phi, data)[0]

    def log_q(z, phi):
        if name == "MeanField":
            return mean_field.log_prob(z, *mean_field.heads(phi, data))
        return iaf.log_prob(z, phi, data)

    bound, theta, phi = importance_weighted.gradients(
        log_joint,
        sample,
        log_q,
        noise.cpu().numpy(),
        {"mu": mu.detach().cpu().numpy()},
        {n: p.detach().cpu().numpy() for n, p in parameters.items()},
        gradient,
    )
    check(loss, found, bound, {**theta, **phi})


@pytest.mark.parametrize("num_particles", [1, K])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("second", ["MeanField", "IAF", "host"])
def test_hierarchy_and_reverse_model(
    monkeypatch: pytest.MonkeyPatch, second: str, gradient: str, num_particles: int
) -> None:
    """An auxiliary a, z given a, and a learned reverse model that enters as a factor."""
    eps = torch.randn(2, num_particles, ROWS, DIM)
    x = torch.randn(ROWS, DIM)
    first = shaken(family("MeanField", latent_dim=DIM, context_dim=DIM))
    name = "MeanField" if second == "host" else second
    upper = shaken(family(name, latent_dim=DIM, context_dim=DIM))
    reverse = shaken(family("MeanField", latent_dim=DIM, context_dim=DIM))
    mu = torch.randn(DIM, requires_grad=True)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            a = pyro.sample("z_aux", first.distribution(x), infer={"is_auxiliary": True})
            if second == "host":
                loc, log_scale = upper.loc_and_log_scale(a)
                z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            else:
                z = upper("z", a)
            pyro.factor("reverse", -reverse.log_prob(a, z), has_rsample=True)

    parts = {"first": first, "upper": upper, "reverse": reverse}
    parameters = {f"{m}.{n}": p for m, part in parts.items() for n, p in part.named_parameters()}
    if second == "host":
        # torch's Normal draws by torch.normal: give it our noise.
        monkeypatch.setattr(
            torch.distributions.normal, "_standard_normal", lambda shape, **_: eps[1].reshape(shape)
        )
    with_noise(monkeypatch, eps[0], eps[1])
    loss = objective(gradient, num_particles).differentiable_loss(conjugate(x, mu), guide)
    found = gradients(loss, mu=mu, **parameters)
    data = x.cpu().numpy()

    def part(phi: dict, prefix: str) -> dict:
        return {n[len(prefix) + 1 :]: v for n, v in phi.items() if n.startswith(prefix + ".")}

    def normal(phi: dict, prefix: str, context) -> tuple:
        return mean_field.heads(part(phi, prefix), context)

    def sample(noise, phi):
        a = mean_field.sample(noise[0], *normal(phi, "first", data))
        if name == "MeanField":
            z = mean_field.sample(noise[1], *normal(phi, "upper", a))
        else:
            z = iaf.forward(noise[1], part(phi, "upper"), a)[0]
        return np.stack([a, z])

    def log_q(values, phi):
        a, z = values
        log_a = mean_field.log_prob(a, *normal(phi, "first", data))
        if name == "MeanField":
            return log_a + mean_field.log_prob(z, *normal(phi, "upper", a))
        return log_a + iaf.log_prob(z, part(phi, "upper"), a)

    def log_joint(values, theta, phi):
        a, z = values
        log_p = -0.5 * (z - theta["mu"]) ** 2 - 0.5 * (data - z) ** 2 - np.log(2 * np.pi)
        return log_p.sum(-1) + mean_field.log_prob(a, *normal(phi, "reverse", z))

    bound, theta, phi = importance_weighted.gradients(
        log_joint,
        sample,
        log_q,
        eps.cpu().numpy(),
        {"mu": mu.detach().cpu().numpy()},
        {n: p.detach().cpu().numpy() for n, p in parameters.items()},
        gradient,
    )
    check(loss, found, bound, {**theta, **phi})


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_delta_that_carries_a_drawn_value_over(
    monkeypatch: pytest.MonkeyPatch, gradient: str
) -> None:
    """A drawn Normal and a Delta at its exponential: the gradients of one log-Normal site."""
    noise, x = torch.randn(K, ROWS, DIM), torch.randn(ROWS, DIM)
    posterior = shaken(family("MeanField", latent_dim=DIM, context_dim=DIM))

    def model() -> None:
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def one() -> None:
        with pyro.plate("data", ROWS):
            loc, log_scale = posterior.loc_and_log_scale(x)
            pyro.sample("z", dist.LogNormal(loc, log_scale.exp()).to_event(1))

    def two() -> None:
        with pyro.plate("data", ROWS):
            site = posterior.distribution(x)
            drawn = pyro.sample("drawn", site, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(drawn.exp(), -drawn.sum(-1), event_dim=1))

    monkeypatch.setattr(
        torch.distributions.normal, "_standard_normal", lambda shape, **_: noise.reshape(shape)
    )
    results = []
    for guide in (one, two):
        with_noise(monkeypatch, noise)
        loss = objective(gradient).differentiable_loss(model, guide)
        results.append((loss, *torch.autograd.grad(loss, list(posterior.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_delta_with_parameters_of_its_own(monkeypatch: pytest.MonkeyPatch, gradient: str) -> None:
    """Standard noise and a Delta that moves it: no score to leave out, so all are reparam."""
    noise, x = torch.randn(K, ROWS, DIM), torch.randn(ROWS, DIM)
    loc, log_scale = torch.randn(DIM, requires_grad=True), torch.randn(DIM, requires_grad=True)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            standard = dist.Normal(torch.zeros(DIM), 1.0).to_event(1)
            drawn = pyro.sample("drawn", standard, infer={"is_auxiliary": True})
            density = -log_scale.sum().expand(drawn.shape[:-1])
            pyro.sample("z", dist.Delta(loc + log_scale.exp() * drawn, density, event_dim=1))

    monkeypatch.setattr(
        torch.distributions.normal, "_standard_normal", lambda shape, **_: noise.reshape(shape)
    )
    results = []
    for name in ("reparam", gradient):
        loss = objective(name).differentiable_loss(conjugate(x, torch.zeros(DIM)), guide)
        results.append((loss, *torch.autograd.grad(loss, [loc, log_scale])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("by_handler", [True, False])
def test_latent_that_is_masked_out(
    monkeypatch: pytest.MonkeyPatch, by_handler: bool, gradient: str
) -> None:
    """Its density is not in the weight and has no score: its parameters keep their gradient."""
    noise, x = torch.randn(2, K, ROWS, DIM), torch.randn(ROWS, DIM)
    hidden, shown = (shaken(family("MeanField", latent_dim=DIM, context_dim=DIM)) for _ in "ab")

    def masked(name: str, distribution: dist.TorchDistribution) -> torch.Tensor:
        if by_handler:
            with pyro.poutine.mask(mask=False):
                return pyro.sample(name, distribution)
        return pyro.sample(name, distribution.mask(False))

    def model() -> None:
        with pyro.plate("data", ROWS):
            a = masked("a", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            masked("a", hidden.distribution(x))
            shown("z", x)

    results = []
    for name in ("reparam", gradient):
        with_noise(monkeypatch, *noise)
        loss = objective(name).differentiable_loss(model, guide)
        results.append((loss, *torch.autograd.grad(loss, list(hidden.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def largest(loss: torch.Tensor, parameters: list[torch.Tensor]) -> float:
    return max(g.abs().max().item() for g in torch.autograd.grad(loss, parameters))


def at_the_posterior(name: str, context_dim: int | None) -> tuple[Callable, Callable, list]:
    """A pair whose guide is its posterior: the prior is a frozen copy, x is independent of z."""
    posterior = shaken(family(name, latent_dim=3, context_dim=context_dim))
    prior = copy.deepcopy(posterior).requires_grad_(False)
    x = torch.randn(ROWS, 3)
    context = None if context_dim is None else torch.randn(ROWS, context_dim)

    def model() -> None:
        with pyro.plate("data", ROWS):
            pyro.sample("z", prior.distribution(context))
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    def guide() -> None:
        with pyro.plate("data", ROWS):
            posterior("z", context)

    return model, guide, list(posterior.parameters())


@pytest.mark.parametrize("context_dim", [None, 4])
@pytest.mark.parametrize(("gradient", "num_particles"), [("stl", 1), ("stl", 6), ("dreg", 6)])
@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_zero_at_the_posterior(
    name: str, gradient: str, num_particles: int, context_dim: int | None
) -> None:
    """Sample by sample, 1e-6 of the reparameterised gradient."""
    model, guide, parameters = at_the_posterior(name, context_dim)
    for _ in range(5):
        plain = objective("reparam", num_particles).differentiable_loss(model, guide)
        path = objective(gradient, num_particles).differentiable_loss(model, guide)
        assert largest(path, parameters) < 1e-6 * largest(plain, parameters)


@pytest.mark.parametrize(("gradient", "num_particles"), [("stl", 1), ("stl", 6), ("dreg", 6)])
def test_zero_at_the_conjugate_posterior(gradient: str, num_particles: int) -> None:
    x, mu = torch.randn(ROWS, 2), torch.tensor([0.3, -0.2])
    posterior = family("MeanField", latent_dim=2, context_dim=2)
    with torch.no_grad():
        posterior.loc.weight.copy_(0.5 * torch.eye(2))
        posterior.loc.bias.copy_(0.5 * mu)
        posterior.log_scale.weight.zero_()
        posterior.log_scale.bias.fill_(0.5 * math.log(0.5))
    model, guide = conjugate(x, mu), amortised(posterior, x)
    parameters = list(posterior.parameters())
    plain = objective("reparam", num_particles).differentiable_loss(model, guide)
    path = objective(gradient, num_particles).differentiable_loss(model, guide)
    assert largest(path, parameters) < 1e-6 * largest(plain, parameters)


def test_dreg_has_the_mean_of_reparam() -> None:
    """On a model that shares parameters with a hierarchical guide, 4 standard errors."""
    x = torch.randn(1, 2)
    options = {"latent_dim": 2, "context_dim": 2, "hidden_dims": (8,)}
    first, second = (shaken(family("IAF", **options), 0.1) for _ in range(2))
    shared = torch.randn(2, requires_grad=True)
    copies = 1000

    def guide() -> None:
        with pyro.plate("copies", copies):
            a = pyro.sample("a", first.distribution((x + shared).expand(copies, 2)))
            second("z", a)

    def model() -> None:
        with pyro.plate("copies", copies):
            a = pyro.sample("a", dist.Normal(shared, 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x.expand(copies, 2))

    parameters = [shared, *first.parameters(), *second.parameters()]
    draws = {gradient: [] for gradient in GRADIENTS}
    for gradient, rows in draws.items():
        for _ in range(40):
            loss = objective(gradient, 3).differentiable_loss(model, guide) / copies
            flat = [g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]
            rows.append(torch.cat(flat))
    plain, stl, dreg = (torch.stack(rows) for rows in draws.values())

    def z_score(other: torch.Tensor) -> float:
        error = ((plain.var(0) + other.var(0)) / 40).sqrt()
        scores = (plain.mean(0) - other.mean(0))[error > 0] / error[error > 0]
        return scores.abs().max().item()

    assert z_score(dreg) < 4
    # With three particles STL is biased: the test sees such a bias.
    assert z_score(stl) > 6


@pytest.mark.slow
def test_signal_to_noise_slopes() -> None:
    """Rainforth's experiment: the ratio grows with K for the model, DReG and STL, not for reparam.

    Every datum has a copy of its own of mu and of the guide's context, so that one backward pass
    gives the gradients datum by datum.
    """
    data = signal_to_noise.problem(num_data=256)
    x = torch.tensor(data.x)
    mu = torch.tensor(data.mu).expand(x.shape).clone().requires_grad_()
    context = (x @ torch.tensor(data.A).T + torch.tensor(data.b)).requires_grad_()
    posterior = family("MeanField", latent_dim=20, context_dim=20)
    with torch.no_grad():
        posterior.loc.weight.copy_(torch.eye(20))
        posterior.log_scale.weight.zero_()
        posterior.log_scale.bias.fill_(float(signal_to_noise.LOG_SCALE))
    model = conjugate(x, mu)

    def guide() -> None:
        with pyro.plate("data", len(x)):
            posterior("z", context)

    repetitions, counts = 60, signal_to_noise.NUM_PARTICLES
    found: dict[str, list[float]] = {name: [] for name in ("theta", *GRADIENTS)}
    with pyro.validation_enabled(False):
        for count in counts:
            moments = {}
            for gradient in GRADIENTS:

                def draws(count: int = count, gradient: str = gradient):
                    for _ in range(repetitions):
                        loss = objective(gradient, count).differentiable_loss(model, guide)
                        yield torch.stack(torch.autograd.grad(loss, [mu, context])).cpu().numpy()

                mean, variance = signal_to_noise.moments(draws())
                moments[gradient] = (mean[1], variance[1])
                moments.setdefault("theta", (mean[0], variance[0]))
            for name, signal in (
                ("theta", "theta"),
                ("reparam", "dreg"),
                ("stl", "stl"),
                ("dreg", "dreg"),
            ):
                ratio = signal_to_noise.pooled_ratio(
                    moments[name][1], *moments[signal], repetitions
                )
                found[name].append(ratio)
    slopes = signal_to_noise.slopes(found)
    assert slopes["theta"][0] == pytest.approx(0.5, abs=0.05)
    assert slopes["reparam"][0] == pytest.approx(-0.5, abs=0.08)
    assert slopes["stl"][0] == pytest.approx(0.5, abs=0.08)
    assert slopes["dreg"][1] >= 0.45
