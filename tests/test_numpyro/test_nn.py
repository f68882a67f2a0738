"""Masked layers against the reference and against autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from reference import masked
from test_numpyro.models import layer, named, normal, shaken

from numpyro_vae_ext.nn import MaskedLinear, MaskedMLP

MLPS = CASES["nn"]["MaskedMLP"]


def build(case: dict) -> tuple[MaskedMLP, jax.Array, jax.Array | None, dict]:
    net = shaken(layer("MaskedMLP", **case))
    z = normal(6, case["features"])
    context = normal(6, case["context_dim"], seed=1) if case.get("context_dim") else None
    options = {"order": case.get("order"), "activation": case.get("activation", "elu")}
    return net, z, context, options


@pytest.mark.parametrize("case", CASES["nn"]["MaskedLinear"])
def test_masked_linear_cuts_connections(case: dict) -> None:
    mask = np.array(case["mask"], bool)
    linear = shaken(layer("MaskedLinear", **case))
    x = normal(5, case["in_features"])
    jacobian = jax.jacobian(lambda x: linear(x).sum(0))(x)[:, 0]
    np.testing.assert_array_equal(np.asarray(jacobian) != 0, mask)
    gradient = jax.grad(lambda linear: linear(x).sum())(linear)
    assert not np.asarray(gradient.kernel[...]).T[~mask].any()


@pytest.mark.parametrize("case", MLPS)
def test_masked_mlp_is_the_reference(exact: None, case: dict) -> None:
    net, z, context, options = build(case)
    outputs, jacobian = net.jacobian(z, context)
    given = (np.asarray(z), named(net), None if context is None else np.asarray(context))
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(net(z, context), masked.forward(*given, **options), **close)
    np.testing.assert_allclose(outputs, net(z, context), **close)
    np.testing.assert_allclose(jacobian, masked.jacobian(*given, **options), **close)


@pytest.mark.parametrize("case", MLPS)
def test_masked_mlp_is_autoregressive(case: dict) -> None:
    net, z, context, options = build(case)
    rank = np.argsort(options["order"] or range(case["features"]))
    found = np.asarray(jax.jacobian(lambda z: net(z, context).sum(0))(z))[:, :, 0]
    before = rank[None, :] < rank[:, None]
    assert not found[:, ~before].any()
    assert found[:, before].all() or options["activation"] == "relu"


@pytest.mark.parametrize("case", MLPS)
def test_masked_mlp_takes_any_left_batch(case: dict) -> None:
    net, z, context, _ = build(case)
    wide = normal(2, 3, 6, case["features"], seed=2)
    outputs = net(wide, context)
    assert outputs.shape == (2, 3, 6, case["num_outputs"], case["features"])
    np.testing.assert_allclose(outputs[1, 2], net(wide[1, 2], context), rtol=1e-5)


def test_first_feature_sees_the_context() -> None:
    net = shaken(layer("MaskedMLP", features=2, hidden_dims=(4,), num_outputs=1, context_dim=3))
    gradient = jax.grad(lambda c: net(jnp.zeros(2), c)[0, 0])(jnp.ones(3))
    assert np.asarray(gradient).all()


def test_masks_are_no_state() -> None:
    """A mask among the state would make every masked net a mutable site of the host."""
    net = layer("MaskedMLP", features=3, hidden_dims=(4,), num_outputs=2)
    assert not nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_param_dtype(exact: None, name: str) -> None:
    net = MaskedMLP(3, (4,), 2, context_dim=2, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(name))
    outputs = net(jnp.ones(3, name), jnp.ones(2, name))
    assert {str(x.dtype) for x in (*jax.tree.leaves(net), outputs)} == {name}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, (4,), 2), "Expected features >= 1; got 0."),
        ((3, (4, 0), 2), "Expected hidden_dims >= 1; got 0."),
        ((3, (4,), 0), "Expected num_outputs >= 1; got 0."),
        ((3, (), 2), r"Expected at least one hidden layer; got hidden_dims=\(\)."),
    ],
)
def test_bad_widths(arguments: tuple, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MaskedMLP(*arguments, rngs=nnx.Rngs(0))


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"to be a permutation of range\(3\); got \(0, 0, 1\)."):
        layer("MaskedMLP", features=3, hidden_dims=(4,), num_outputs=2, order=(0, 0, 1))
    with pytest.raises(ValueError, match="to be one of 'elu', 'relu', 'tanh'; got 'x'."):
        layer("MaskedMLP", features=3, hidden_dims=(4,), num_outputs=2, activation="x")
    with pytest.raises(ValueError, match=r"Expected a mask of shape \(2, 3\); got \(3, 2\)."):
        MaskedLinear(3, 2, np.ones((3, 2), bool), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="Expected features to be an int; got float."):
        layer("MaskedMLP", features=3.0, hidden_dims=(4,), num_outputs=2)
