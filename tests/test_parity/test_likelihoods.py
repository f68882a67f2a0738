"""Autoregressive likelihoods: parameters, densities, gradients and draws agree to 1e-9."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES
from flax import nnx
from reference import likelihoods as oracle
from test_parity.bridge import torch_name, walk

import numpyro_vae_ext.likelihoods
import pyro_vae_ext.likelihoods

MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES["likelihoods"].items()
    for i, case in enumerate(cases)
]
PARTICLES, ROWS = 2, 3


def recurrent_name(path: tuple) -> str:
    """Torch has the cells of all layers in one module."""
    if path[0] == "head":
        return torch_name(path)
    _, layer, part, kind = path
    kind = "weight" if kind == "kernel" else kind
    return f"rnn.{kind}_{'ih' if part == 'input' else 'hh'}_l{layer}"


# The torch name of a Flax parameter, where it is another one than that of `bridge`.
NAMES: dict[str, Callable[[tuple], str]] = {"Recurrent": recurrent_name}


def in_torch(name: str, tree: dict) -> dict[str, np.ndarray]:
    """A pure dictionary of Flax's under torch's names and in its shapes."""
    return {
        NAMES.get(name, torch_name)(path): np.asarray(value.T if path[-1] == "kernel" else value)
        for path, value in walk(tree).items()
    }


def modules(name: str, case: dict) -> tuple[torch.nn.Module, nnx.Module]:
    """The likelihood in both backends, with the same random weights."""
    ours = getattr(pyro_vae_ext.likelihoods, name)(**case)
    with torch.no_grad():
        for parameter in ours.parameters():
            # Scales of a chain of real values multiply: closer to the start for them.
            scale = 0.5 if ours.output.is_discrete else 0.2
            parameter.add_(scale * torch.randn_like(parameter))
    theirs = getattr(numpyro_vae_ext.likelihoods, name)(**case, rngs=nnx.Rngs(0))
    given = {key: value.detach().numpy() for key, value in ours.named_parameters()}
    state = nnx.state(theirs, nnx.Param)

    def fill(tree: Any, path: tuple = ()) -> Any:
        if isinstance(tree, dict):
            return {key: fill(sub, (*path, key)) for key, sub in tree.items()}
        value = given.pop(NAMES.get(name, torch_name)(path))
        return jnp.asarray(value.T if path[-1] == "kernel" else value)

    nnx.replace_by_pure_dict(state, fill(nnx.to_pure_dict(state)))
    nnx.update(theirs, state)
    assert not given
    return ours, theirs


def arguments(ours: torch.nn.Module, case: dict) -> dict[str, np.ndarray]:
    """Conditioning: a context for every particle and row, covariates for every row."""
    rng = np.random.default_rng(0)
    rows = (ours.num_positions,) if case.get("context_per_step") else ()
    given = {}
    if ours.context_dim is not None:
        given["context"] = rng.standard_normal((PARTICLES, ROWS, *rows, ours.context_dim))
    if ours.covariate_dim is not None:
        given["covariates"] = rng.standard_normal((ROWS, ours.covariate_dim))
    return given


def side_by_side(given: dict[str, np.ndarray], case: dict) -> np.ndarray | None:
    parts = list(given.values())
    if case.get("context_per_step") and len(parts) == 2:
        parts[1] = parts[1][..., None, :]
    if not parts:
        return None
    batch = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return np.concatenate([np.broadcast_to(p, (*batch, p.shape[-1])) for p in parts], -1)


def close(found: Any, expected: Any, what: str) -> None:
    found, expected = (np.asarray(x, dtype=float) for x in (found, expected))
    assert found.shape == expected.shape, what
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(found / scale, expected / scale, rtol=1e-9, atol=1e-9, err_msg=what)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_all_numbers_agree(name: str, case: dict) -> None:
    ours, theirs = modules(name, case)
    given = arguments(ours, case)
    # The last one of several masks for what one net has; the density is the mixture's.
    number = case.get("num_masks", 1)
    call = {"mask_index": number - 1} if number > 1 else {}
    noise = ours.output.noise((PARTICLES, ROWS, *ours.shape), torch.float64).numpy()
    reparameterised = ours.output.has_rsample

    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in given.items()}
    inputs = dict(ours.named_parameters()) | tensors
    p, net = ours(**tensors), ours(**tensors, **call)
    drawn = ours._draw(torch.tensor(noise), net.conditioned)
    x = drawn.detach()[0]
    params = ours._params(ours.output.encode(x, torch.float64), net.conditioned)
    density = p.log_prob(x)

    def gradients(total: torch.Tensor) -> dict[str, np.ndarray]:
        found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
        return {
            key: np.zeros(value.shape) if slope is None else slope.numpy()
            for (key, value), slope in zip(inputs.items(), found, strict=True)
        }

    @jax.jit
    def program(module: Any, given: dict, x: Any, noise: Any) -> tuple:
        def score(module: Any, given: dict) -> tuple:
            density = module(**given).log_prob(x)
            return density.sum(), density

        def sample(module: Any, given: dict) -> tuple:
            drawn = module._draw(noise, module(**given, **call).conditioned)
            return (drawn**2).sum().astype(float), drawn

        conditioned = module(**given, **call).conditioned
        params = module._params(module.output.encode(x, float), conditioned)
        (_, density), slopes = jax.value_and_grad(score, (0, 1), has_aux=True)(module, given)
        if not reparameterised:
            return params, density, slopes, sample(module, given)[1], None
        (_, drawn), through = jax.value_and_grad(sample, (0, 1), has_aux=True)(module, given)
        return params, density, slopes, drawn, through

    value = jnp.asarray(x.numpy())
    their_params, their_density, slopes, their_drawn, through = program(
        theirs, given, value, jnp.asarray(noise)
    )

    def theirs_in_torch(slopes: tuple) -> dict[str, np.ndarray]:
        of_module, of_given = slopes
        tree = nnx.to_pure_dict(nnx.state(of_module, nnx.Param))
        return in_torch(name, tree) | {k: np.asarray(v) for k, v in of_given.items()}

    close(their_params, params.detach(), "params")
    close(their_density, density.detach(), "log_prob")
    close(their_drawn, drawn.detach(), "draws")
    pairs = [(slopes, density.sum())]
    pairs += [(through, drawn.square().sum())] if reparameterised else []
    for found, total in pairs:
        expected, found = gradients(total), theirs_in_torch(found)
        assert set(found) == set(expected)
        for key, slope in expected.items():
            close(found[key], slope, key)

    weights = {key: parameter.detach().numpy() for key, parameter in ours.named_parameters()}
    conditioning = side_by_side(given, case)
    # Without conditioning nothing but the value has a batch.
    batch = (PARTICLES, ROWS) if conditioning is not None and conditioning.ndim > 2 else (ROWS,)
    wide = np.broadcast_to(value, (*batch, *ours.shape))
    expected = oracle.params(name, wide, weights, conditioning, case, **call)
    close(params.detach().reshape(expected.shape), expected, "params of the reference")
    expected = oracle.log_prob(name, wide, weights, conditioning, case)
    close(density.detach(), expected, "log_prob of the reference")
    expected = oracle.draw(name, noise, weights, conditioning, case, **call)
    close(drawn.detach(), expected, "draws of the reference")
