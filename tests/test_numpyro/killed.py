"""A training run that is killed again and again: ``killed.py FOLDER NUM_KILLS``.

Modules are imported once, and XLA's programs are kept in the folder; each attempt is a fork of this
process, ended by SIGKILL at a random moment. Leaves ``killed`` and, from a run in peace, ``whole``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI
from orbax import checkpoint  # noqa: F401 (before the fork)

from numpyro_vae_ext.elbos import TraceNVIL_ELBO
from numpyro_vae_ext.training import fit

ROWS, EPOCHS = 37, 12


def run(path: Path) -> None:
    """Baselines with a state, a schedule, patience, and a row that is skipped."""
    x = (np.random.default_rng(0).random((ROWS, 4)) < [0.1, 0.3, 0.6, 0.9]).astype(float)
    bad = x.copy()
    bad[5, 1] = np.nan

    def model(x: jax.Array) -> None:
        logits = numpyro.param("logits", lambda key: jax.random.normal(key, (3, 4)))
        with numpyro.plate("data", ROWS, subsample_size=len(x)):
            b = numpyro.sample("b", dist.Bernoulli(0.5 * jnp.ones(3)).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=b @ logits).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        weight = numpyro.param("weight", jnp.zeros((4, 3)))
        with numpyro.plate("data", ROWS, subsample_size=len(x)):
            numpyro.sample("b", dist.Bernoulli(logits=jnp.nan_to_num(x) @ weight).to_event(1))

    elbo = TraceNVIL_ELBO(baselines=("running", "learned"), hidden_dims=(5,))
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
    fit(
        jax.random.key(0),
        SVI(model, elbo.tunable(guide), adam, elbo),
        bad,
        num_epochs=EPOCHS,
        batch_size=8,
        validation_data=x[:9],
        validation_every=2,
        patience=100,
        schedules={"learning_rate": lambda step: 0.02 / (1 + step)},
        checkpoint=path,
        checkpoint_every=3,
        progress_bar=False,
    )


def newest(path: Path) -> int:
    """Number of the last complete checkpoint."""
    if not path.exists():
        return -1
    return max((int(p.name) for p in path.iterdir() if p.name.isdecimal()), default=-1)


def saved_step(path: Path) -> int:
    header = json.loads((path / str(newest(path)) / "header.json").read_text())
    return header["metadata"]["now"]["step"]


def attempt(path: Path, seconds: float | None) -> int | None:
    """A run to its end: None; or the step that it had saved when it was killed.

    That is so many seconds after its first checkpoint, so that each attempt comes further.
    """
    before = newest(path)
    child = os.fork()
    if child == 0:
        try:
            run(path)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if seconds is None:
        return ended(os.waitpid(child, 0)[1])
    while newest(path) <= before:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return ended(status)
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return saved_step(path) if os.WIFSIGNALED(status) else ended(status)


def ended(status: int) -> None:
    if status:
        raise SystemExit(f"the run failed with status {status}")


def main(folder: Path, num_kills: int) -> None:
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    rng, path, steps = random.Random(0), folder / "killed", []
    attempt(folder / "whole", None)
    while len(steps) < num_kills:
        step = attempt(path, rng.uniform(0.0, 1.5 / (1 + num_kills)))
        if step is None:
            # It came to its end; once more from the start.
            os.rename(path, folder / f"done-{len(steps)}-{time.monotonic_ns()}")
        else:
            steps.append(step)
    attempt(path, None)
    print(f"{len(steps)} kills, with {steps} of {saved_step(path)} steps saved")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
