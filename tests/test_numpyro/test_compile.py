"""A compiled SVI: the host's numbers, one program, one copy of the state."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from cases import CASES
from numpyro.infer import SVI
from test_numpyro import models
from test_numpyro.models import family, normal

from numpyro_vae_ext._threads import ask_for_enough, cores
from numpyro_vae_ext.elbos import ImportanceWeightedELBO, TraceNVIL_ELBO
from numpyro_vae_ext.training import CompiledSVI, compile

KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("exact")


def host(num_particles: int = 1) -> SVI:
    posterior = family("IAF", latent_dim=2, context_dim=2, hidden_dims=(4,))
    elbo = ImportanceWeightedELBO(num_particles)
    return SVI(models.conjugate, models.amortised(posterior), optax.adam(0.01), elbo)


@pytest.mark.parametrize("case", CASES["training"]["CompiledSVI"])
def test_same_steps_as_the_host(case: dict) -> None:
    svi, x = host(**case), normal(6, 2)
    ours = compile(svi)
    assert isinstance(ours, CompiledSVI) and isinstance(ours, SVI)
    state = other = svi.init(KEY, x)
    update = jax.jit(svi.update)
    for _ in range(3):
        state, loss = ours.update(state, x)
        other, expected = update(other, x)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(ours.evaluate(state, x), jax.jit(svi.evaluate)(other, x), rtol=1e-12)
    for a, b in zip(*(jax.tree.leaves(svi.get_params(s)) for s in (state, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("case", CASES["training"]["compile"])
def test_is_used_as_the_host(case: dict) -> None:
    """Its parts are those of the given one, from before and after."""
    svi, x = host(**case), normal(6, 2)
    ours = compile(compile(svi))
    assert ours.svi is svi and ours.model is svi.model and ours.loss is svi.loss
    state = ours.init(KEY, x)
    assert svi.constrain_fn is ours.constrain_fn is not None
    assert set(ours.get_params(state)) == set(svi.get_params(state))
    with pytest.raises(AttributeError, match="nothing"):
        _ = ours.nothing


def scaled() -> tuple[SVI, list[Any]]:
    traced: list[Any] = []

    def model(x: jax.Array, *, weight: Any = 1.0, kind: Any = None) -> None:
        traced.append((weight, kind))
        loc = numpyro.param("loc", jnp.ones(()))
        with numpyro.handlers.scale(scale=2.0 if kind is True else 1.0):
            numpyro.sample("x", dist.Normal(loc, 1.0), obs=x * weight)

    return SVI(
        model, lambda *args, **kwargs: None, optax.sgd(0.1), ImportanceWeightedELBO()
    ), traced


def test_what_compiles_again_and_what_does_not() -> None:
    """Numbers do not; flags and words are constants, and 1 is not True."""
    svi, traced = scaled()
    ours, x = compile(svi), jnp.ones(())
    state = svi.init(KEY, x)
    traced.clear()
    losses = []
    for weight in (1.0, 2.0, 3.0):
        state, loss = ours.update(state, x, weight=weight)
        losses.append(float(loss))
    assert len(traced) == 1 and len(set(losses)) == 3
    for kind in (True, False, "a", None, True, "a"):
        ours.evaluate(state, x, kind=kind)
    assert [kind for _, kind in traced[1:]] == [True, False, "a", None]
    expected = jax.jit(lambda s: svi.evaluate(s, x))(state)
    np.testing.assert_allclose(ours.evaluate(state, x, kind=True), 2 * expected)
    np.testing.assert_allclose(ours.evaluate(state, x, kind=1), expected)


def test_states() -> None:
    """What a step returned is consumed by the next; what comes from elsewhere is not."""
    svi, x = host(), normal(6, 2)
    ours = compile(svi)
    first = svi.init(KEY, x)
    second, _ = ours.update(first, x)
    third, _ = ours.update(second, x)
    leaf = jax.tree.leaves(second.optim_state)[1]
    assert leaf.is_deleted() and not any(x.is_deleted() for x in jax.tree.leaves(first)[:-1])
    again, _ = ours.update(first, x)
    ours.evaluate(again, x)
    # Not the last one any more.
    fourth, _ = ours.update(third, x)
    assert not any(x.is_deleted() for x in jax.tree.leaves((third, again, fourth)[0].optim_state))


def test_mutable_state() -> None:
    elbo = TraceNVIL_ELBO(baselines=("running",))

    def model(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: jax.Array) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(()))))

    svi, x = SVI(model, elbo.tunable(guide), numpyro.optim.Adam(0.1), elbo), normal(5)
    ours = compile(svi)
    state = svi.init(KEY, x)
    new, _ = ours.update(state, x)
    ours.evaluate(new, x)
    assert (state.mutable_state["b_baseline"]["count"], new[1]["b_baseline"]["count"]) == (0, 1)


def test_no_svi() -> None:
    with pytest.raises(TypeError, match="Expected svi to be an SVI; got int"):
        compile(3)


def test_run_is_the_hosts() -> None:
    svi, x = scaled()[0], jnp.zeros(())
    losses = compile(svi).run(KEY, 3, x, progress_bar=False).losses
    np.testing.assert_allclose(losses, svi.run(KEY, 3, x, progress_bar=False).losses)


@pytest.mark.parametrize(
    ("given", "available", "asked"),
    [
        ({}, 2, {"PJRT_NPROC": "4"}),
        ({}, 4, {}),
        ({}, 1, {}),
        ({"NPROC": "1"}, 2, {"NPROC": "1"}),
        ({"PJRT_NPROC": "2"}, 3, {"PJRT_NPROC": "2"}),
    ],
)
def test_threads_that_do_not_wait_for_one_another(given: dict, available: int, asked: dict) -> None:
    environment = dict(given)
    ask_for_enough(environment, available)
    assert environment == asked


ASKED = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import numpyro_vae_ext
print(os.environ["PJRT_NPROC"])
"""


@pytest.mark.skipif(
    cores() < 2 or not hasattr(os, "sched_setaffinity"), reason="binds to two cores"
)
@pytest.mark.parametrize(("given", "asked"), [({}, "4"), ({"PJRT_NPROC": "1"}, "1")])
def test_an_import_asks_for_threads(given: dict, asked: str) -> None:
    rest = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "NPROC")}
    command = [sys.executable, "-c", ASKED]
    run = subprocess.run(command, capture_output=True, text=True, env={**rest, **given})
    assert run.stdout.split() == [asked], run.stderr
