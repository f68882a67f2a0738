"""Free bits: what is free, what counts as a row, and the host's contract."""

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
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from reference import free_bits as oracle
from test_pyro.models import amortised, conjugate, family, shaken, standard_errors
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae_ext.elbos import TraceFreeBits_ELBO
from pyro_vae_ext.guides import AutoPosterior
from pyro_vae_ext.handlers import kl_weight

CASE = CASES["elbos"]["TraceFreeBits_ELBO"]
LOC = [[0.1, 2.0, -0.4], [0.05, -1.0, 1.5], [0.2, 0.5, 0.1], [-0.1, 0.05, 2.5]]
SCALE = [0.95, 0.9, 0.6]


def parameters() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(LOC), torch.tensor(SCALE)


def divergence(loc: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """From the standard Normal, elementwise."""
    return oracle.normal_divergence(loc.numpy(), scale.log().numpy(), 0.0)


def silent(batch_size: int | None = None):
    """A pair whose data say nothing: the loss is the divergence alone, without any noise."""
    loc, scale = parameters()
    rows, width = loc.shape

    def model() -> None:
        with pyro.plate("data", rows, subsample_size=batch_size):
            pyro.sample("z", dist.Normal(torch.zeros(width), 1.0).to_event(1))

    def guide() -> None:
        with pyro.plate("data", rows, subsample_size=batch_size) as index:
            pyro.sample("z", dist.Normal(loc[index], scale).to_event(1))

    return model, guide


@pytest.mark.parametrize("layout", [{}, {"vectorize_particles": False}, {"max_plate_nesting": 1}])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_mean_over_rows_comes_before_the_maximum(num_particles: int, layout: dict) -> None:
    model, guide = silent()
    table = divergence(*parameters())
    means = table.mean(0)
    assert means[0] < 0.3 < means[1] and (table[:, 1] < 0.3).any()
    pairs = means[:2].sum(), means[2]
    expected = {
        "dimension": np.maximum(means, 0.3).sum(),
        "site": max(means.sum(), 0.3),
    }
    for groups, number in expected.items():
        elbo = TraceFreeBits_ELBO(num_particles, free_bits=0.3, groups=groups, **layout)
        assert elbo.loss(model, guide) == pytest.approx(4 * number, rel=1e-5)
    for numbers in ((0, 0, 1), (5, 5, 2)):
        elbo = TraceFreeBits_ELBO(num_particles, free_bits=1.2, groups={"z": numbers}, **layout)
        number = max(pairs[0], 1.2) + max(pairs[1], 1.2)
        assert elbo.loss(model, guide) == pytest.approx(4 * number, rel=1e-5)
    plain = TraceFreeBits_ELBO(num_particles, free_bits=0.0, **layout)
    assert plain.loss(model, guide) == pytest.approx(4 * means.sum(), rel=1e-5)


def test_subsamples_masks_scales_and_weights() -> None:
    table = divergence(*parameters())

    def loss(model: Callable, guide: Callable, *handlers: Callable) -> float:
        for handler in handlers:
            model, guide = handler(model), handler(guide)
        return TraceFreeBits_ELBO(free_bits=0.6).loss(model, guide)

    def expected(kept: Any, count: float) -> float:
        return count * np.maximum(table[kept].mean(0), 0.6).sum()

    full = silent()
    mask = torch.tensor([True, False, True, False])
    assert loss(*full, lambda f: poutine.mask(f, mask=mask)) == pytest.approx(
        expected([0, 2], 2), rel=1e-5
    )
    assert loss(*full, lambda f: poutine.mask(f, mask=False)) == 0.0
    assert loss(*full, lambda f: poutine.scale(f, scale=2.5)) == pytest.approx(
        expected([0, 1, 2, 3], 10), rel=1e-5
    )
    rows = torch.tensor([2.0, 1.0, 2.0, 1.0])
    assert loss(*full, lambda f: poutine.scale(f, scale=rows)) == pytest.approx(
        expected([0, 0, 1, 2, 2, 3], 6), rel=1e-5
    )
    # A weight is one on the whole: the threshold is on the divergence itself.
    for weight in (0.0, 0.3, 2.0):
        found = loss(*full, lambda f, w=weight: kl_weight(f, weight=w))
        assert found == pytest.approx(weight * expected([0, 1, 2, 3], 4), rel=1e-5)
    seen: list[torch.Tensor] = []
    loc, scale = parameters()

    def guide() -> None:
        with pyro.plate("data", 4, subsample_size=2) as index:
            seen.append(index)
            pyro.sample("z", dist.Normal(loc[index], scale).to_event(1))

    found = loss(silent(2)[0], guide)
    assert found == pytest.approx(expected(seen[-1].numpy(), 4), rel=1e-5)


def test_several_latents_in_and_out_of_plates() -> None:
    """A global latent, and one in nested plates: rows are those of a site's own plates."""
    locs = torch.randn(3, 4, 2)

    def model() -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("group", 3, dim=-2), pyro.plate("row", 8, subsample_size=4, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for i in pyro.plate("one by one", 2):
            pyro.sample(f"v{i}", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("w", dist.Normal(torch.tensor(0.2), 0.9))
        with pyro.plate("group", 3, dim=-2), pyro.plate("row", 8, subsample_size=4, dim=-1):
            pyro.sample("z", dist.Normal(locs, 0.5).to_event(1))
        for i in pyro.plate("one by one", 2):
            pyro.sample(f"v{i}", dist.Normal(torch.tensor(2.0 * i), 1.0))

    means = divergence(locs, torch.tensor(0.5)).mean((0, 1))
    expected = max(divergence(torch.tensor(0.2), torch.tensor(0.9)), 0.4)
    expected += 24 * np.maximum(means, 0.4).sum() + 0.4 + 2.0
    for kwargs in ({}, {"num_particles": 3}, {"num_particles": 2, "vectorize_particles": False}):
        found = TraceFreeBits_ELBO(free_bits=0.4, **kwargs).loss(model, guide)
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_factor_belongs_to_the_longest_name_before_its_own() -> None:
    def model() -> None:
        for name in ("z", "z_1"):
            pyro.sample(name, dist.Normal(0.0, 1.0))

    def guide() -> None:
        for name, loc in (("z", 2.0), ("z_1", 0.0)):
            pyro.sample(name, dist.Normal(torch.tensor(loc), 1.0))
        pyro.factor("z_1_reverse", torch.tensor(5.0), has_rsample=True)

    for groups in ("site", "dimension"):
        elbo = TraceFreeBits_ELBO(free_bits=1.0, groups=groups)
        assert elbo.loss(model, guide) == pytest.approx(2.0 + 5.0)


def test_below_the_threshold_there_is_no_pull() -> None:
    """Gradients of the divergence: none below, in full above; the likelihood's always."""
    loc, scale = parameters()
    loc, raw = loc.requires_grad_(), scale.log().requires_grad_()
    slope = torch.ones(3, requires_grad=True)

    def model() -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * slope, 1.0).to_event(1), obs=torch.ones(4, 3))

    def guide() -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    def gradients(elbo: Any, weight: float = 1.0) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        pair = kl_weight(model, weight=weight), kl_weight(guide, weight=weight)
        return torch.autograd.grad(elbo.differentiable_loss(*pair), [loc, raw, slope])

    free = gradients(TraceFreeBits_ELBO(free_bits=0.3))
    likelihood = gradients(TraceFreeBits_ELBO(free_bits=0.0), weight=0.0)
    whole = gradients(infer.TraceMeanField_ELBO())
    for found, without, within in zip(free[:2], likelihood, whole, strict=False):
        torch.testing.assert_close(found[..., 0], without[..., 0])
        torch.testing.assert_close(found[..., 1:], within[..., 1:])
        assert (without - within).abs().min() > 1e-3
    torch.testing.assert_close(free[2], whole[2])


@pytest.mark.parametrize("name", ["MeanField", "IAF", "Auxiliary", "VGP"])
def test_nothing_free_is_the_plain_bound(name: str) -> None:
    x = torch.randn(5, 2)
    posterior = shaken(family(name, latent_dim=2, context_dim=2), 0.15)
    model, guide = conjugate(x, torch.zeros(2)), amortised(posterior, x)
    groups = "dimension" if name in ("MeanField", "IAF") else "site"
    elbo = TraceFreeBits_ELBO(400, free_bits=0.0, groups=groups)
    host = infer.Trace_ELBO(400, vectorize_particles=True, max_plate_nesting=1)
    ours, theirs = (torch.tensor([e.loss(model, guide) for _ in range(10)]) for e in (elbo, host))
    error = math.hypot(ours.std().item(), theirs.std().item()) / math.sqrt(10)
    assert abs(ours.mean() - theirs.mean()).item() < 4 * error
    if name == "IAF":
        torch.manual_seed(1)
        found = TraceFreeBits_ELBO(free_bits=0.0).loss(model, guide)
        torch.manual_seed(1)
        assert found == pytest.approx(infer.Trace_ELBO().loss(model, guide), rel=1e-5)
    taken = TraceFreeBits_ELBO(20, free_bits=30.0, groups=groups).loss(model, guide)
    assert taken > 5 * 30.0 * (2 if groups == "dimension" else 1)


def test_guides_made_from_a_model_have_groups_of_whole_sites() -> None:
    x = torch.randn(6)

    def model() -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    for guide in (AutoNormal(model), AutoPosterior(model)):
        guide()
        for seed in range(3):
            torch.manual_seed(seed)
            found = TraceFreeBits_ELBO(free_bits=0.0, groups="site").loss(model, guide)
            torch.manual_seed(seed)
            assert found == pytest.approx(infer.Trace_ELBO().loss(model, guide), rel=1e-5)


def test_the_closed_form_gives_way_where_the_model_draws_in_another_order() -> None:
    """A top-down model and a bottom-up guide: KL(q(a) || p(a | b)) depends on b, which is later."""
    x = torch.tensor(1.3)

    def model() -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Normal(b, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    def guide() -> None:
        a = pyro.sample("a", dist.Normal(0.8 * x, 0.7))
        pyro.sample("b", dist.Normal(0.9 * a, 0.6))

    # E log p(x, a, b) - log q, by hand: a = .8 x + .7 e, b = .9 a + .6 f.
    mean, spread = 0.8 * 1.3, 0.7
    second = mean**2 + spread**2
    expected = 0.81 * second + 0.36 + (0.01 * second + 0.36) + ((1.3 - mean) ** 2 + spread**2)
    expected = -0.5 * expected - 1.5 * math.log(2 * math.pi)
    expected += math.log(2 * math.pi) + 1.0 + math.log(0.7) + math.log(0.6)
    elbo = TraceFreeBits_ELBO(2000, free_bits=0.0)
    draws = -torch.tensor([elbo.loss(model, guide) for _ in range(20)])
    assert abs(standard_errors(draws, expected)) < 4


@pytest.mark.parametrize("case", CASE)
def test_host_contract(case: dict) -> None:
    x = torch.randn(8, 3)
    posterior = shaken(family("IAF", latent_dim=3, context_dim=3, hidden_dims=(6,)))
    model, guide = conjugate(x, torch.zeros(3), 4), amortised(posterior, x, 4)
    elbo = TraceFreeBits_ELBO(**case)
    assert isinstance(elbo.loss(model, guide), float)
    loss = elbo.loss_and_grads(model, guide)
    assert loss.shape == () and not loss.requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in posterior.parameters())
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    before = posterior.base.loc.weight.clone()
    assert math.isfinite(svi.step()) and math.isfinite(svi.evaluate_loss())
    assert not torch.equal(before, posterior.base.loc.weight)
    elbo(model, guide)().backward()
    # Another pair, of more plates.

    def wider() -> None:
        with pyro.plate("outer", 5, dim=-2), pyro.plate("inner", 4, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    assert math.isfinite(elbo.loss(wider, wider))


def test_a_step_traces_into_one_graph() -> None:
    (loc, scale), x = parameters(), torch.randn(4, 3)
    loc.requires_grad_()

    def step(loc: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def model() -> None:
            with pyro.plate("data", 4):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide() -> None:
            with pyro.plate("data", 4):
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

        loss = TraceFreeBits_ELBO(3, free_bits=0.3, max_plate_nesting=2).differentiable_loss(
            model, guide
        )
        return loss, *torch.autograd.grad(loss, loc)

    with pyro.validation_enabled(False):
        graph = make_fx(step)(loc, x)
        torch.manual_seed(0)
        expected = step(loc, x)
        torch.manual_seed(0)
        for a, b in zip(graph(loc, x), expected, strict=True):
            torch.testing.assert_close(a, b)


def one(fn: Any, name: str = "z") -> Callable[[], Any]:
    return lambda: pyro.sample(name, fn)


def mvn() -> Any:
    return dist.MultivariateNormal(torch.zeros(2), torch.eye(2))


def test_errors() -> None:
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def says(error: type[Exception], text: str, call: Callable[[], object]) -> None:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value).startswith(text)

    def loss(model: Callable, guide: Callable, **kwargs: Any) -> Callable[[], object]:
        return lambda: TraceFreeBits_ELBO(**kwargs).loss(model, guide)

    for wrong in (-0.1, math.nan, math.inf):
        says(
            ValueError,
            f"Expected free_bits >= 0; got {wrong}.",
            lambda wrong=wrong: TraceFreeBits_ELBO(free_bits=wrong),
        )
    says(
        ValueError,
        "Expected groups to be 'dimension' or 'site'; got 'all'.",
        lambda: TraceFreeBits_ELBO(groups="all"),
    )
    says(
        TypeError,
        "Expected groups to be an int; got float.",
        lambda: TraceFreeBits_ELBO(groups={"z": (0.5,)}),
    )
    text = "Expected a density that splits over dimensions at site 'z' under groups='dimension'; "
    says(ValueError, text + "got MultivariateNormal. Use", loss(one(normal), one(mvn())))
    says(ValueError, text + "got MultivariateNormal. Use", loss(one(mvn()), one(normal)))
    flow = family("Auxiliary", latent_dim=2)
    says(
        ValueError,
        text + "got CarryingNormal at its own site 'z_aux'. Use groups='site'.",
        loss(one(normal), lambda: flow("z")),
    )
    assert math.isfinite(loss(one(normal), one(mvn()), groups="site")())
    says(
        ValueError,
        "Expected groups for every latent site; got none for site 'z'.",
        loss(one(normal), one(normal), groups={"y": (0,)}),
    )
    says(
        ValueError,
        "Expected a group for each of the 2 elements of site 'z'; got 3 groups.",
        loss(one(normal), one(normal), groups={"z": (0, 1, 2)}),
    )

    def two(*extra: Callable) -> Callable[[], None]:
        def program() -> None:
            for call in (*extra, one(normal, "u"), one(normal, "z")):
                call()

        return program

    alone = lambda: pyro.sample("a", normal, infer={"is_auxiliary": True})  # noqa: E731
    says(
        ValueError,
        "Expected auxiliary sites named after a latent site, such as 'z_aux' of 'z'; got 'a' "
        "beside the latent sites ['u', 'z']. Rename the site.",
        loss(two(), two(alone), groups="site"),
    )
    says(
        ValueError,
        "Expected reparameterised latent sites under gradient='reparam'; got site 'z' with the "
        "distribution Bernoulli",
        loss(one(dist.Bernoulli(0.5)), one(dist.Bernoulli(0.5))),
    )
    says(
        ValueError,
        "Expected the same KL weight on model and guide; got site 'z' weighted in the guide alone. "
        "Wrap both in handlers.kl_weight.",
        loss(one(normal), kl_weight(one(normal), weight=0.5)),
    )
    says(
        ValueError,
        "Expected every latent site of the model in the guide; got model site 'z'",
        loss(one(normal), lambda: None),
    )
    says(
        ValueError,
        "Expected a model with at least one sample site; got none.",
        loss(lambda: None, lambda: None),
    )
