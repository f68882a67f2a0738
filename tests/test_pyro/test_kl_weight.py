"""Weighted divergences: E log p(x | z) - w KL under every objective that is an expectation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import infer, poutine
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from reference.free_bits import normal_divergence
from scipy.special import expit
from test_pyro.models import amortised, conjugate, family, shaken, standard_errors

from pyro_vae_ext import elbos
from pyro_vae_ext.diagnostics import active_units, log_evidence
from pyro_vae_ext.elbos import ImportanceWeightedELBO, TraceFreeBits_ELBO
from pyro_vae_ext.guides import AutoPosterior, MeanField
from pyro_vae_ext.handlers import kl_weight

WEIGHTS = [case["weight"] for case in CASES["handlers"]["kl_weight"]]
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "Trace_ELBO": infer.Trace_ELBO,
    "Trace_ELBO, vectorised": lambda: infer.Trace_ELBO(
        3, vectorize_particles=True, max_plate_nesting=1
    ),
    "TraceMeanField_ELBO": infer.TraceMeanField_ELBO,
    "TraceGraph_ELBO": infer.TraceGraph_ELBO,
    "TraceEnum_ELBO": lambda: infer.TraceEnum_ELBO(
        max_plate_nesting=1, strict_enumeration_warning=False
    ),
    "reparam": lambda: ImportanceWeightedELBO(1),
    "stl": lambda: ImportanceWeightedELBO(1, gradient="stl"),
    "dreg": lambda: ImportanceWeightedELBO(1, gradient="dreg"),
    "free bits": lambda: TraceFreeBits_ELBO(3, free_bits=0.0, groups="site"),
}


def both(model: Callable, guide: Callable, weight: Any) -> tuple[Callable, Callable]:
    return kl_weight(model, weight=weight), kl_weight(guide, weight=weight)


def gradients(elbo: Any, pair: tuple, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The loss and its gradients, as SVI gets them."""
    for parameter in parameters:
        parameter.grad = None
    loss = torch.as_tensor(elbo.loss_and_grads(*pair))
    return [loss, *(torch.zeros(()) if p.grad is None else p.grad for p in parameters)]


def gaussian(batch_size: int | None = None):
    """z ~ N(mu, I), x ~ N(z, I) for every row, and a Normal guide with free parameters."""
    x = torch.randn(6, 2)
    start = torch.tensor([0.3, -0.2]), torch.randn(6, 2), torch.tensor([-0.4, 0.1])
    own = torch.nn.ParameterList(start)
    mu, loc, log_scale = own

    def guide() -> None:
        pyro.module("own", own)
        with pyro.plate("data", 6, subsample_size=batch_size) as rows:
            pyro.sample("z", dist.Normal(loc[rows], log_scale.exp()).to_event(1))

    return conjugate(x, mu, batch_size), guide, x, list(own)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["MeanField", "IAF", "Auxiliary", "VGP"])
def test_linear_in_the_weight_at_one_noise(exact: None, name: str, objective: str) -> None:
    """Value and every gradient; without a weight on the divergence the likelihood is left."""
    x, mu = torch.randn(6, 2), torch.zeros(2, requires_grad=True)
    small = {"hidden_dims": (5,)} if name != "MeanField" else {}
    posterior = shaken(family(name, latent_dim=2, context_dim=2, **small), 0.1)
    model, guide = conjugate(x, mu, 3), amortised(posterior, x, 3)
    parameters = [mu, *posterior.parameters()]

    def evaluated(weight: Any) -> list[torch.Tensor]:
        torch.manual_seed(4)
        pair = (model, guide) if weight is None else both(model, guide, weight)
        return gradients(OBJECTIVES[objective](), pair, parameters)

    none, plain = evaluated(0.0), evaluated(None)
    for weight in (*WEIGHTS, 1.0, torch.tensor(0.7)):
        for a, b, found in zip(none, plain, evaluated(weight), strict=True):
            # In units of the largest entry, of which the others are differences.
            unit = max(1.0, a.abs().max().item(), b.abs().max().item())
            assert (found - (a + weight * (b - a))).abs().max() < 1e-10 * unit
    assert (none[1] == 0.0).all() and (plain[1] != 0.0).all(), "the prior is part of the divergence"
    if objective == "Trace_ELBO":
        torch.manual_seed(4)
        drawn = poutine.trace(guide).get_trace()
        seen = poutine.trace(poutine.replay(model, drawn)).get_trace()
        seen.compute_log_prob()
        assert none[0].item() == pytest.approx(-seen.nodes["x"]["log_prob_sum"].item(), rel=1e-10)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_closed_form(exact: None, weight: float) -> None:
    """The divergence exactly where the host has it, the rest by Monte Carlo; gradients as well."""
    model, guide, x, parameters = gaussian()
    mu, loc, log_scale = (p.detach().numpy() for p in parameters)
    table = normal_divergence(loc, log_scale, mu)
    variance, gap = np.exp(2.0 * log_scale), loc - mu
    of_divergence = [-gap.sum(0), gap, 6.0 * (variance - 1.0)]
    fit = -0.5 * ((x.numpy() - loc) ** 2 + variance + np.log(2.0 * np.pi))
    of_fit = [np.zeros(2), x.numpy() - loc, -6.0 * variance]

    def evaluated(elbo: Any, w: float) -> list[np.ndarray]:
        return [t.numpy() for t in gradients(elbo, both(model, guide, w), parameters)]

    elbo = infer.TraceMeanField_ELBO()
    torch.manual_seed(1)
    found = evaluated(elbo, weight)
    torch.manual_seed(1)
    for a, b, slope in zip(found, evaluated(elbo, 0.0), [table.sum(), *of_divergence], strict=True):
        np.testing.assert_allclose(a - b, weight * slope, rtol=1e-10, atol=1e-10)
    expected = [-fit.sum() + weight * table.sum()]
    expected += [-f + weight * d for f, d in zip(of_fit, of_divergence, strict=True)]
    for objective in (
        infer.Trace_ELBO(400, vectorize_particles=True, max_plate_nesting=1),
        infer.TraceGraph_ELBO(400, vectorize_particles=True, max_plate_nesting=1),
    ):
        draws = [evaluated(objective, weight) for _ in range(30)]
        for number, column in zip(expected, map(np.stack, zip(*draws, strict=True)), strict=True):
            error = column.std(0, ddof=1) / np.sqrt(30) + 1e-10
            assert (np.abs(column.mean(0) - number) / error).max() < 5


X, PRIOR = [0.3, -0.8, 1.4], 0.4


def bits():
    """A bit for each of three rows out of six."""
    x, own = torch.tensor(X), torch.nn.ParameterList([torch.tensor([0.5, -0.7, 1.2])])
    a = own[0]

    def model() -> None:
        with pyro.plate("rows", 6, subsample_size=3):
            b = pyro.sample("b", dist.Bernoulli(logits=torch.full((3,), PRIOR)))
            pyro.sample("x", dist.Normal(2.0 * b - 1.0, 1.0), obs=x)

    def guide() -> None:
        pyro.module("own", own)
        with pyro.plate("rows", 6, subsample_size=3):
            pyro.sample("b", dist.Bernoulli(logits=a))

    return model, guide, a


def exact_bits(weight: float) -> tuple[float, np.ndarray]:
    """Loss and its derivative in the logits, by summing over the values of every bit."""
    x, a = np.array(X), np.array([0.5, -0.7, 1.2])
    q, p = expit(a), expit(PRIOR)
    fit = q * -0.5 * (x - 1.0) ** 2 + (1 - q) * -0.5 * (x + 1.0) ** 2 - 0.5 * np.log(2 * np.pi)
    divergence = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    slope = q * (1 - q) * (2.0 * x - weight * (a - PRIOR))
    return -2.0 * (fit - weight * divergence).sum(), -2.0 * slope


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name, cases in CASES["elbos"].items()
        if hasattr(getattr(elbos, name), "tunable")
        for case in cases
    ],
)
def test_discrete_latents(exact: None, weight: float, name: str, case: dict) -> None:
    """The mean gradient is the exact one, and all numbers are finite without a weight."""
    model, guide, a = bits()
    at_once = case.get("vectorize_particles", True)
    elbo = getattr(elbos, name)(**{**case, "num_particles": 200 if at_once else 2})
    pair = both(model, elbo.tunable(guide), weight)
    loss, slope = exact_bits(weight)
    values, slopes = [], []
    for _ in range(25 if at_once else 200):
        value, found = gradients(elbo, pair, [a])
        values.append(value)
        slopes.append(found)
    found = torch.stack(slopes)
    assert abs(standard_errors(torch.tensor(values), loss)) < 4.5
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - torch.tensor(slope)) / error).abs().max() < 4.5
    own = [p.grad for p in pair[1].parameters()] if isinstance(pair[1], torch.nn.Module) else []
    assert all(g is None or torch.isfinite(g).all() for g in own)


def test_baselines_keep_the_units_of_one_row(exact: None) -> None:
    """Neither the plate's scale nor the weight is in what a baseline learns."""
    x = torch.tensor(X)

    def model() -> None:
        with pyro.plate("rows", 6, subsample_size=3):
            pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    guide = bits()[1]
    for weight in (0.0, 1e-9):
        elbo = elbos.TraceNVIL_ELBO(baselines=("running",), decay=0.9)
        tuned = elbo.tunable(guide)
        elbo.loss_and_grads(*both(model, tuned, weight))
        mean = tuned.b_baseline.mean.item()
        assert mean == pytest.approx(0.1 * dist.Normal(0.0, 1.0).log_prob(x).mean().item(), 1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_hosts_with_discrete_latents(exact: None, weight: float) -> None:
    model, guide, a = bits()
    loss, slope = exact_bits(weight)
    pair = both(model, guide, weight)
    every = pair[0], infer.config_enumerate(pair[1])
    value = infer.TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(*every)
    assert value.item() == pytest.approx(loss, rel=1e-10)
    np.testing.assert_allclose(torch.autograd.grad(value, a)[0], slope, rtol=1e-10)
    for make in (infer.Trace_ELBO, infer.TraceGraph_ELBO):
        elbo = make(500, vectorize_particles=True, max_plate_nesting=1)
        found = [gradients(elbo, pair, [a])[1] for _ in range(30)]
        found = torch.stack(found)
        error = found.std(0) / math.sqrt(30)
        assert ((found.mean(0) - torch.tensor(slope)) / error).abs().max() < 4.5


def scales(program: Callable) -> dict[str, Any]:
    nodes = poutine.trace(program).get_trace().nodes
    return {name: site["scale"] for name, site in nodes.items() if site["type"] == "sample"}


def test_what_is_weighted() -> None:
    """Latent sites, and a guide's factors; not data, a model's factors, and subsamples."""

    def model() -> None:
        pyro.param("p", torch.tensor(1.0))
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2))
            pyro.factor("f", torch.zeros(2))
        pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("d", torch.tensor(1.0))

    def guide() -> None:
        pyro.sample("z_aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.factor("z_reverse", torch.tensor(0.0), has_rsample=True)
        pyro.factor("z_score", torch.tensor(0.0), has_rsample=False)

    found = scales(kl_weight(model, weight=0.25))
    assert {name: found[name] for name in "zxfwd"} == {
        "z": 0.5,
        "x": 2.0,
        "f": 2.0,
        "w": 0.25,
        "d": 1.0,
    }
    assert scales(kl_weight(guide, weight=0.25)) == {
        "z_aux": 0.25,
        "z_reverse": 0.25,
        "z_score": 0.25,
    }
    # Twice is the product, and dictionaries of the user's own stay as they are.
    infer_: dict = {}
    program = kl_weight(lambda: pyro.sample("z", dist.Normal(0.0, 1.0), infer=infer_), weight=0.5)
    assert scales(kl_weight(program, weight=0.25)) == {"z": 0.125} and not infer_


def test_a_factor_of_a_guide_is_weighed_with_it() -> None:
    noise = torch.tensor(0.7)

    def model() -> None:
        pyro.sample("z", dist.Delta(noise, log_density=torch.tensor(-1.0)))

    def guide() -> None:
        pyro.sample("z", dist.Delta(noise, log_density=torch.tensor(-0.25)))
        pyro.factor("z_reverse", torch.tensor(0.5), has_rsample=True)

    for weight in WEIGHTS:
        pair = both(model, guide, weight)
        for objective in ("Trace_ELBO", "TraceGraph_ELBO", "reparam", "free bits"):
            found = OBJECTIVES[objective]().loss(*pair)
            assert found == pytest.approx(weight * 1.25)


def test_weights_by_row() -> None:
    model, guide, _, _ = gaussian()
    rows = torch.arange(6.0)
    losses = []
    for weight in (rows, *torch.eye(6).unbind()):
        torch.manual_seed(0)
        losses.append(infer.Trace_ELBO().loss(*both(model, guide, weight)))
    torch.manual_seed(0)
    none = infer.Trace_ELBO().loss(*both(model, guide, 0.0))
    total = none + sum(i * (loss - none) for i, loss in enumerate(losses[1:]))
    assert losses[0] == pytest.approx(total, rel=1e-5)


def test_schedules() -> None:
    """A function of the program's arguments, and a tensor that is changed in place."""
    model, guide, _, _ = gaussian()

    def plain(step: int, *, rate: float = 0.1) -> None:
        model()

    def drawn(step: int, *, rate: float = 0.1) -> None:
        guide()

    def weight(step: int, *, rate: float = 0.1) -> float:
        return min(1.0, rate * step)

    scheduled = both(plain, drawn, weight)
    assert scheduled[0].__name__ == "plain"
    held = torch.tensor(0.0)
    changed = both(model, guide, held)
    for step in (0, 4, 10, 50):
        held.fill_(min(1.0, 0.1 * step))
        torch.manual_seed(step)
        found = infer.Trace_ELBO().loss(*scheduled, step)
        torch.manual_seed(step)
        assert infer.Trace_ELBO().loss(*changed) == pytest.approx(found, rel=1e-6)
        torch.manual_seed(step)
        number = both(model, guide, min(1.0, 0.1 * step))
        assert infer.Trace_ELBO().loss(*number) == pytest.approx(found, rel=1e-6)
    torch.manual_seed(0)
    slow = infer.Trace_ELBO().loss(*scheduled, 4, rate=0.01)
    torch.manual_seed(0)
    assert infer.Trace_ELBO().loss(*both(model, guide, 0.04)) == pytest.approx(slow, rel=1e-6)


def test_modules_and_guides_made_from_a_model() -> None:
    """Parameters are found under both interfaces; a messenger cannot be wrapped."""
    x = torch.randn(5)

    def model() -> None:
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    elbo = ImportanceWeightedELBO(1)
    with pytest.raises(TypeError) as caught:
        kl_weight(AutoNormalMessenger(model), weight=0.5)
    assert str(caught.value) == (
        "Expected a program that a handler can wrap; got AutoNormalMessenger, a messenger that "
        "runs the model itself. Use AutoNormal, or a guide family."
    )
    for guide in (AutoNormal(model), AutoPosterior(model, family=MeanField)):
        guide()
        losses = []
        for weight in (0.0, 0.5, 1.0):
            torch.manual_seed(0)
            losses.append(elbo.loss(*both(model, guide, weight)))
        torch.manual_seed(0)
        assert losses[2] == pytest.approx(elbo.loss(model, guide), rel=1e-6)
        assert losses[1] == pytest.approx(0.5 * (losses[0] + losses[2]), rel=1e-5)
        assert losses[0] != pytest.approx(losses[2], rel=1e-3)
        pair = both(model, guide, 0.5)
        host = elbo(*pair)
        host().backward()
        named = dict(host.named_parameters())
        # A guide of our own keeps a location that its families do without.
        own = [p.grad for p in named.values()]
        assert all(g is not None for g in own if isinstance(guide, AutoNormal))
        assert any(g is not None for g in own)
        svi = infer.SVI(*pair, pyro.optim.Adam({"lr": 0.01}), elbo)
        assert math.isfinite(svi.step())


def says(text: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == text


WRAP = " Wrap both in handlers.kl_weight."


def test_errors() -> None:
    for wrong in (-0.5, math.nan, math.inf, torch.tensor(-0.5)):
        text = f"Expected weight >= 0; got {wrong}."
        says(text, lambda w=wrong: kl_weight(lambda: None, weight=w))
        late = kl_weight(lambda: None, weight=lambda w=wrong: w)
        says(text, late)
    model, guide, _, _ = gaussian()
    expected = "Expected the same KL weight on model and guide; got "
    elbo = TraceFreeBits_ELBO()
    nvil = elbos.TraceNVIL_ELBO(baselines=())
    for objective in (ImportanceWeightedELBO(1), elbo, nvil):
        for w in (1.0, torch.tensor(0.5)):
            weighted = both(model, guide, w)
            for pair, alone in (((weighted[0], guide), "model"), ((model, weighted[1]), "guide")):
                text = f"{expected}site 'z' weighted in the {alone} alone.{WRAP}"
                says(text, lambda o=objective, p=pair: o.loss(*p))
        pair = both(model, guide, 0.25)[0], both(model, guide, torch.tensor(0.5))[1]
        text = f"{expected}0.25 in the model and 0.5 in the guide at 'z'.{WRAP}"
        says(text, lambda o=objective, p=pair: o.loss(*p))

    def with_factor() -> None:
        guide()
        pyro.factor("f", torch.tensor(0.0))

    text = f"{expected}the guide's own site 'f' without it. Wrap the whole guide, and say of a "
    says(text + "factor whether it has_rsample.", lambda: elbo.loss(*both(model, with_factor, 1.0)))


TEXT = (
    "Expected sites without a KL weight in an importance-weighted bound; got handlers.kl_weight at "
    "site 'z'. A weight inside the logarithm is no weight on a KL divergence; use num_particles=1 "
    "or the host's Trace_ELBO, and the plain pair for evaluation."
)


@pytest.mark.parametrize("weight", [1.0, 0.5, torch.tensor(1.0)])
def test_no_weight_inside_a_logarithm(weight: Any) -> None:
    model, guide, _, _ = gaussian()
    plain = model, guide
    weighted = both(model, guide, weight)
    for pair in (weighted, (plain[0], weighted[1]), (weighted[0], plain[1])):
        for gradient in ("reparam", "stl", "dreg", "vimco"):
            for layout in ({}, {"vectorize_particles": False}, {"chunk_size": 2}):
                elbo = ImportanceWeightedELBO(3, gradient=gradient, **layout)
                says(TEXT, lambda e=elbo, p=pair: e.differentiable_loss(*p))
                says(TEXT, lambda e=elbo, p=pair: e.loss(*p))
        says(TEXT, lambda p=pair: ImportanceWeightedELBO(1).log_weights(*p))
        says(TEXT, lambda p=pair: log_evidence(*p, num_samples=3, progress_bar=False))
        says(TEXT, lambda p=pair: active_units(*p, num_samples=4))
    discrete = bits()[:2]
    vimco = ImportanceWeightedELBO(3, gradient="vimco")
    says(TEXT.replace("'z'", "'b'"), lambda: vimco.loss(*both(*discrete, weight)))
