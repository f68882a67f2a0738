"""A training run that is killed again and again: ``killed.py FOLDER NUM_KILLS``.

The tensor library is imported once; each attempt is a fork of this process, ended by SIGKILL at a
random moment. Leaves ``killed.safetensors`` and, from a run in peace, ``whole.safetensors``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from safetensors import safe_open

from pyro_vae_ext.elbos import TraceNVIL_ELBO
from pyro_vae_ext.training import fit

ROWS, EPOCHS = 37, 12


def run(path: Path) -> None:
    """Dropout, running means, baselines, schedules, patience, a loader with its own order."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = (torch.rand(ROWS, 4) < torch.tensor([0.1, 0.3, 0.6, 0.9])).float()
    encoder = torch.nn.Sequential(
        torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 3)
    )

    def model(x: torch.Tensor, **schedules: torch.Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.randn(3, 4))
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(3)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=b @ logits).to_event(1), obs=x)

    def guide(x: torch.Tensor, **schedules: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            pyro.sample("b", dist.Bernoulli(logits=encoder(x)).to_event(1))

    elbo = TraceNVIL_ELBO(baselines=("running", "learned"), hidden_dims=(5,))
    svi = SVI(model, elbo.tunable(guide), pyro.optim.Adam({"lr": 0.01}), elbo)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 8, shuffle=True)
    fit(
        svi,
        loader,
        num_epochs=EPOCHS,
        validation_data=x[:9],
        validation_every=2,
        patience=100,
        schedules={"learning_rate": lambda step: 0.02 / (1 + step)},
        compile=False,
        checkpoint=path,
        checkpoint_every=3,
        progress_bar=False,
    )


def attempt(path: Path, seconds: float | None) -> int | None:
    """A run to its end: None; or the step that it had saved when it was killed.

    That is so many seconds after its first checkpoint, so that each attempt comes further.
    """
    before = path.stat().st_mtime_ns if path.exists() else 0
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
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return ended(status)
        if path.exists() and path.stat().st_mtime_ns != before:
            break
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return ended(status)
    return saved_step(path)


def ended(status: int) -> None:
    if status:
        raise SystemExit(f"the run failed with status {status}")


def saved_step(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["vae_ext"])["metadata"]["fit"]["now"]["step"]


def main(folder: Path, num_kills: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    # What is made at first use need not be made in every fork.
    run(folder / "warm.safetensors")
    start = time.perf_counter()
    attempt(folder / "whole.safetensors", None)
    seconds = time.perf_counter() - start
    path, steps = folder / "killed.safetensors", []
    while len(steps) < num_kills:
        step = attempt(path, rng.uniform(0.0, 1.5 * seconds / (1 + num_kills)))
        if step is None:
            path.unlink()  # It came to its end; once more from the start.
        else:
            steps.append(step)
    attempt(path, None)
    print(f"{len(steps)} kills, with {steps} of {saved_step(path)} steps saved")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
