"""Copied weights and injected noise: the same program in both backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import resolved
from flax import nnx

import numpyro_vae_ext.guides
import pyro_vae_ext.guides


def families(name: str, **kwargs: Any) -> tuple[torch.nn.Module, nnx.Module]:
    """The family in both backends, with the same random weights."""
    ours = getattr(pyro_vae_ext.guides, name)(**resolved(pyro_vae_ext.guides, kwargs))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs = getattr(numpyro_vae_ext.guides, name)(
        **resolved(numpyro_vae_ext.guides, kwargs), rngs=nnx.Rngs(0)
    )
    state = nnx.to_pure_dict(nnx.state(theirs, nnx.Param))
    copied = to_jax(ours, state)
    params = nnx.state(theirs, nnx.Param)
    nnx.replace_by_pure_dict(params, copied)
    nnx.update(theirs, params)
    return ours, theirs


def torch_name(path: tuple) -> str:
    """The torch name of a Flax parameter: kernels are transposed weights."""
    return ".".join("weight" if key == "kernel" else str(key) for key in path)


def walk(tree: Any, path: tuple = ()) -> dict[tuple, Any]:
    if isinstance(tree, dict):
        return {k: v for key, sub in tree.items() for k, v in walk(sub, (*path, key)).items()}
    return {path: tree}


def to_jax(module: torch.nn.Module, like: dict) -> dict:
    """Torch parameters as a pure dictionary of Flax's shape."""
    given = dict(module.named_parameters())

    def fill(tree: dict, path: tuple) -> Any:
        if isinstance(tree, dict):
            return {key: fill(sub, (*path, key)) for key, sub in tree.items()}
        value = given[torch_name(path)].detach().numpy()
        return jnp.asarray(value.T if path[-1] == "kernel" else value)

    return fill(like, ())


def to_torch(tree: dict) -> dict[str, np.ndarray]:
    """A pure dictionary of Flax gradients under torch's names and in its shapes."""
    return {
        torch_name(path): np.asarray(value.T if path[-1] == "kernel" else value)
        for path, value in walk(tree).items()
    }


class Noise:
    """Standard Normal draws that both backends' sites take in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *draws: np.ndarray) -> None:
        self.monkeypatch, self.draws = monkeypatch, draws

    def torch(self, call: Callable[[], Any]) -> Any:
        given = iter(self.draws)

        def draw(shape: tuple, **_: Any) -> torch.Tensor:
            return torch.tensor(next(given)).reshape(shape)

        with self.monkeypatch.context() as patch:
            patch.setattr(torch, "randn", draw)
            patch.setattr(torch.distributions.normal, "_standard_normal", draw)
            return call()

    def jax(self, call: Callable[[], Any]) -> Any:
        """A program that is run again draws the same again, in the same order; also compiled."""
        count = 0
        keys_of: dict[int, bytes] = {}

        def draw(key: Any, shape: tuple = (), dtype: Any = float) -> Any:
            nonlocal count
            place = count % len(self.draws)
            count += 1

            # Under vmap over particles the trace sees one particle: a callback gets all keys.
            def look_up(keys: np.ndarray) -> np.ndarray:
                flat = np.asarray(keys).tobytes()
                assert keys_of.setdefault(place, flat) == flat, "drawn again with another key"
                return np.asarray(self.draws[place], dtype).reshape(keys.shape[:-1] + shape)

            data = key if jnp.issubdtype(key.dtype, jnp.integer) else jax.random.key_data(key)
            like = jax.ShapeDtypeStruct(shape, jnp.result_type(dtype))
            return jax.pure_callback(look_up, like, data, vmap_method="broadcast_all")

        with self.monkeypatch.context() as patch:
            patch.setattr(jax.random, "normal", draw)
            found = call()
        assert count and count % len(self.draws) == 0
        assert len(set(keys_of.values())) == len(self.draws), "two sites share a key"
        return found
