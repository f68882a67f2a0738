"""Hierarchical families: samples, log-densities and estimates of log q agree to 1e-9."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import numpyro
import pyro
import pytest
import torch
from cases import CASES, HIERARCHICAL
from flax import nnx
from reference import auxiliary, vgp
from test_parity.bridge import Noise, families

ROWS = 4
MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name in HIERARCHICAL
    for i, case in enumerate(CASES["guides"][name])
]
REFERENCES: dict[str, Callable] = {"Auxiliary": auxiliary.log_density, "VGP": vgp.log_density}
SITES = {"Auxiliary": ("z_aux", "z"), "VGP": ("z_xi", "z")}
close = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_samples_and_log_densities(monkeypatch: pytest.MonkeyPatch, name: str, case: dict) -> None:
    ours, theirs = families(name, **case)
    rng = np.random.default_rng(0)
    context = None
    if case["context_dim"] is not None:
        context = rng.standard_normal((ROWS, case["context_dim"]))
    dim = case["latent_dim"]
    widths = {
        "Auxiliary": (case.get("aux_dim", dim), dim),
        "VGP": (case.get("input_dim", dim), dim),
    }[name]
    noise = [rng.standard_normal((3, ROWS, width)) for width in widths]
    given = None if context is None else torch.tensor(context)

    def in_torch() -> tuple:
        with pyro.poutine.trace() as tracer, pyro.plate("k", 3, dim=-2), pyro.plate("n", ROWS):
            ours("z", given)
        nodes = tracer.trace.nodes
        values = [nodes[site]["value"].detach().numpy() for site in SITES[name]]
        total = sum(
            nodes[site]["fn"].log_prob(nodes[site]["value"]) for site in (*SITES[name], "z_reverse")
        )
        return values, total.detach().numpy()

    def run_in_jax(theirs: nnx.Module, context: np.ndarray | None) -> tuple:
        tracer = numpyro.handlers.trace(numpyro.handlers.seed(theirs, rng_seed=0))
        with numpyro.plate("k", 3, dim=-2), numpyro.plate("n", ROWS):
            nodes = tracer.get_trace("z", context)
        values = [nodes[site]["value"] for site in SITES[name]]
        total = 0.0
        for site in (*SITES[name], "z_reverse"):
            node = nodes[site]
            kept = (node["intermediates"],) if node["intermediates"] else ()
            total = total + node["fn"].log_prob(node["value"], *kept)
        return values, total

    def in_jax() -> tuple:
        return jax.tree.map(np.asarray, jax.jit(run_in_jax)(theirs, context))

    found = Noise(monkeypatch, *noise)
    (values, total), (other_values, other_total) = found.torch(in_torch), found.jax(in_jax)
    for x, y in zip(values, other_values, strict=True):
        assert x.shape[:2] == (3, ROWS)
        np.testing.assert_allclose(x, y, **close)
    np.testing.assert_allclose(total, other_total, **close)
    weights = {n: p.detach().numpy() for n, p in ours.named_parameters()}
    named = {site.removeprefix("z_"): v for site, v in zip(SITES[name], values, strict=True)}
    np.testing.assert_allclose(total, REFERENCES[name](named, weights, context, **case), **close)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_estimates_of_log_q(monkeypatch: pytest.MonkeyPatch, name: str, case: dict) -> None:
    ours, theirs = families(name, **case)
    rng = np.random.default_rng(0)
    context = None
    if case["context_dim"] is not None:
        context = rng.standard_normal((ROWS, case["context_dim"]))
    value = rng.standard_normal((ROWS, case["latent_dim"]))
    width = case.get("aux_dim" if name == "Auxiliary" else "input_dim", case["latent_dim"])
    found = Noise(monkeypatch, rng.standard_normal((5, ROWS, width)))
    given = None if context is None else torch.tensor(context)
    ours_log_q = found.torch(lambda: ours.log_prob(torch.tensor(value), given, num_samples=5))

    @jax.jit
    def estimate(theirs: nnx.Module, context: np.ndarray | None) -> jax.Array:
        return theirs.log_prob(value, context, num_samples=5, rng_key=jax.random.PRNGKey(0))

    theirs_log_q = found.jax(lambda: estimate(theirs, context))
    np.testing.assert_allclose(ours_log_q.detach().numpy(), theirs_log_q, **close)
