"""Masked layers against the reference and against autodiff."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CASES
from reference import masked
from test_pyro.models import shaken

from pyro_vae_ext.nn import MaskedLinear, MaskedMLP

MLPS = CASES["nn"]["MaskedMLP"]


def build(case: dict) -> tuple[MaskedMLP, torch.Tensor, torch.Tensor | None, dict]:
    net = shaken(MaskedMLP(**case))
    z = torch.randn(6, case["features"])
    context = torch.randn(6, case["context_dim"]) if case.get("context_dim") else None
    options = {"order": case.get("order"), "activation": case.get("activation", "elu")}
    return net, z, context, options


def arrays(net: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in net.named_parameters()}


@pytest.mark.parametrize("case", CASES["nn"]["MaskedLinear"])
def test_masked_linear_cuts_connections(case: dict) -> None:
    mask = torch.tensor(case["mask"], dtype=torch.bool)
    layer = shaken(MaskedLinear(case["in_features"], case["out_features"], mask))
    x = torch.randn(5, case["in_features"], requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).sum(0), x)[:, 0]
    assert torch.equal(jacobian != 0, mask)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad[~mask], torch.zeros_like(layer.weight.grad[~mask]))


@pytest.mark.parametrize("case", MLPS)
def test_masked_mlp_is_the_reference(exact: None, case: dict) -> None:
    net, z, context, options = build(case)
    outputs, jacobian = net.jacobian(z, context)
    given = (z.cpu().numpy(), arrays(net), None if context is None else context.cpu().numpy())
    np.testing.assert_allclose(
        net(z, context).detach().cpu(), masked.forward(*given, **options), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(outputs.detach().cpu(), net(z, context).detach().cpu(), rtol=1e-12)
    np.testing.assert_allclose(
        jacobian.detach().cpu(), masked.jacobian(*given, **options), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("case", MLPS)
def test_masked_mlp_is_autoregressive(case: dict) -> None:
    net, z, context, options = build(case)
    order = options["order"] or tuple(range(case["features"]))
    rank = torch.argsort(torch.tensor(order))
    found = torch.autograd.functional.jacobian(lambda z: net(z, context).sum(0), z).movedim(2, 0)
    before = rank[None, :] < rank[:, None]
    assert torch.equal((found != 0).any(0).any(0), before)


@pytest.mark.parametrize("case", MLPS)
def test_masked_mlp_takes_any_left_batch(case: dict) -> None:
    net, z, context, _ = build(case)
    wide = z + torch.zeros(2, 3, 1, 1)
    expected = net(z, context).expand(2, 3, -1, -1, -1)
    torch.testing.assert_close(net(wide, context), expected)


def test_first_feature_sees_the_context() -> None:
    net = shaken(MaskedMLP(3, (8,), 2, context_dim=2))
    z = torch.zeros(1, 3)
    change = net(z, torch.ones(1, 2)) - net(z, torch.zeros(1, 2))
    assert (change[..., 0].abs() > 1e-3).all()


@pytest.mark.parametrize("case", MLPS)
def test_save_and_load(case: dict) -> None:
    net, z, context, _ = build(case)
    other = MaskedMLP(**case)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(z, context), other(z, context))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3, (), 2), "Expected at least one hidden layer; got hidden_dims=()."),
        ((0, (4,), 2), "Expected features >= 1; got 0."),
        ((3, (0,), 2), "Expected hidden_dims >= 1; got 0."),
    ],
)
def test_bad_widths(arguments: tuple, text: str) -> None:
    with pytest.raises(ValueError) as error:
        MaskedMLP(*arguments)
    assert str(error.value) == text


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"permutation of range\(3\); got \(0, 0, 1\)"):
        MaskedMLP(3, (4,), 2, order=(0, 0, 1))
    with pytest.raises(ValueError, match="one of 'elu', 'relu', 'tanh'; got 'x'"):
        MaskedMLP(3, (4,), 2, activation="x")
    with pytest.raises(ValueError, match=r"a mask of shape \(2, 3\); got \(3, 2\)"):
        MaskedLinear(3, 2, torch.ones(3, 2))
