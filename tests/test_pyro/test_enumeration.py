"""Our families for the continuous sites beside a discrete one that the host sums out."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import HIERARCHICAL
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from test_pyro.models import family, shaken

FAMILIES = ("MeanField", "IAF", "Auxiliary", "VGP")
K, ROWS = 3, 4


def posterior(name: str, context_dim: int) -> torch.nn.Module:
    small = {"hidden_dims": (5,)} if name in HIERARCHICAL else {}
    return shaken(family(name, latent_dim=2, context_dim=context_dim, **small))


def loss_and_gradients(elbo, model, guide) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """At one seed. Summing out draws nothing: both ways of it see the same noise."""
    torch.manual_seed(1)
    with poutine.trace(param_only=True) as record:
        loss = elbo.differentiable_loss(model, guide)
    params = {name: site["value"].unconstrained() for name, site in record.trace.nodes.items()}
    gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return loss.detach(), dict(zip(params, gradients, strict=True))


def same(enumerated, by_hand) -> None:
    (loss, gradients), (expected, others) = enumerated, by_hand
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    assert set(gradients) == set(others) and len(gradients) > 4
    for name, gradient in gradients.items():
        if others[name] is None:
            assert gradient is None or (gradient == 0).all()
            continue
        torch.testing.assert_close(gradient, others[name], rtol=1e-8, atol=1e-10, msg=name)


def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loc = pyro.param("loc", torch.linspace(-1.0, 2.0, 2 * K).reshape(K, 2).cos())
    logits = pyro.param("logits", torch.linspace(-0.5, 0.7, K))
    return torch.linspace(-1.5, 2.0, 2 * ROWS).reshape(ROWS, 2), loc, logits


@pytest.mark.parametrize("name", FAMILIES)
def test_summed_in_the_model(exact: None, name: str) -> None:
    """The guide has the continuous site alone; the model's component is summed out."""
    encoder = posterior(name, 2)

    def model() -> None:
        x, loc, logits = parts()
        with pyro.plate("rows", ROWS):
            k = pyro.sample("k", dist.Categorical(logits=logits))
            z = pyro.sample("z", dist.Normal(loc[k], 0.7).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def by_hand() -> None:
        x, loc, logits = parts()
        component = dist.Normal(loc, 0.7).to_event(1)
        with pyro.plate("rows", ROWS):
            mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), component)
            z = pyro.sample("z", mixture)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide() -> None:
        pyro.module("posterior", encoder)
        with pyro.plate("rows", ROWS):
            encoder("z", parts()[0])

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    enumerated = loss_and_gradients(elbo, config_enumerate(model, "parallel"), guide)
    same(enumerated, loss_and_gradients(Trace_ELBO(), by_hand, guide))


@pytest.mark.parametrize("name", FAMILIES)
def test_summed_in_the_guide(exact: None, name: str) -> None:
    """The context of the family depends on the value that is summed over."""
    encoder = posterior(name, 2 + K)

    def context(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        chosen = torch.nn.functional.one_hot(k, K).to(x)
        batch = torch.broadcast_shapes(k.shape, (ROWS,))
        return torch.cat([x.expand(*batch, 2), chosen.expand(*batch, K)], -1)

    def guide_logits(x: torch.Tensor) -> torch.Tensor:
        return x @ pyro.param("slope", torch.linspace(-1.0, 1.0, 2 * K).reshape(2, K))

    def model() -> None:
        x, loc, logits = parts()
        with pyro.plate("rows", ROWS):
            k = pyro.sample("k", dist.Categorical(logits=logits))
            z = pyro.sample("z", dist.Normal(loc[k], 0.7).to_event(1))
            pyro.sample("x", dist.Normal(z + loc[k].tanh(), 1.0).to_event(1), obs=x)

    def guide() -> None:
        pyro.module("posterior", encoder)
        x = parts()[0]
        with pyro.plate("rows", ROWS):
            k = pyro.sample("k", dist.Categorical(logits=guide_logits(x)))
            encoder("z", context(x, k))

    # By hand: every value of k is a row of one more plate, weighed by its probability.
    def weights(x: torch.Tensor) -> torch.Tensor:
        return guide_logits(x).softmax(-1).T

    every = torch.arange(K).unsqueeze(-1).expand(K, ROWS)

    def model_by_hand() -> None:
        x, loc, logits = parts()
        q = weights(x)
        with pyro.plate("k", K, dim=-2), pyro.plate("rows", ROWS), poutine.scale(scale=q):
            pyro.factor("p(k)", logits.log_softmax(-1).unsqueeze(-1) - q.log())
            z = pyro.sample("z", dist.Normal(loc.unsqueeze(-2), 0.7).to_event(1))
            shifted = dist.Normal(z + loc.tanh().unsqueeze(-2), 1.0).to_event(1)
            pyro.sample("x", shifted, obs=x.expand(K, ROWS, 2))

    def guide_by_hand() -> None:
        pyro.module("posterior", encoder)
        x = parts()[0]
        with (
            pyro.plate("k", K, dim=-2),
            pyro.plate("rows", ROWS),
            poutine.scale(scale=weights(x)),
        ):
            encoder("z", context(x, every))

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    enumerated = loss_and_gradients(elbo, model, config_enumerate(guide, "parallel"))
    same(enumerated, loss_and_gradients(Trace_ELBO(), model_by_hand, guide_by_hand))
