"""Cells of the benchmark suites: candidates that take turns in one process, and their rows."""

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import step_time


class Options(NamedTuple):
    """What `run.py` was asked for."""

    rounds: int = 25
    quick: bool = False
    full: bool = False
    smoke_test: bool = False
    cpu_time: bool = False
    data_dir: str | None = None
    peer_python: str | None = None

    @property
    def compiler(self):
        """The compiler of Pyro's compiled steps: none that needs seconds in a smoke test."""
        return "fx" if self.smoke_test else "inductor"


def take_turns(steps, options, seconds=0.03, **labels):
    """One row for each candidate, with its microseconds in every round.

    Args:
        steps: candidates by name, callables without arguments.
        options: the run's options.
        seconds: how long one candidate's turn takes, about; at least one step.
        labels: what the rows say of the cell.
    """
    if options.smoke_test:
        times = step_time.take_turns(steps, 2, 1, 1)
    else:
        for step in steps.values():
            step()
        start = time.perf_counter()
        next(iter(steps.values()))()
        block = max(1, min(20, round(seconds / (time.perf_counter() - start))))
        clock = time.process_time if options.cpu_time else time.perf_counter
        times = step_time.take_turns(steps, options.rounds, block, min(block, 5), clock)
    return [
        {
            **labels,
            "candidate": name,
            "microseconds": round(statistics.median(values), 2),
            "rounds": [float(f"{value:.4g}") for value in values],
        }
        for name, values in times.items()
    ]


def smoke_names(backend):
    """Candidates of a smoke test: those by hand and ours."""
    if backend == "numpyro":
        return ("plain JAX", "vae-ext, SVI", "vae-ext, compiled")
    return ("plain PyTorch", "torch.compile", "vae-ext, SVI", "vae-ext, compiled")


def images(options, num_rows, num_pixels=784):
    """Rows of bits: static MNIST's test part where there is a folder of it, else noise."""
    import numpy as np

    if options.data_dir is not None and num_pixels == 784:
        with np.load(Path(options.data_dir) / "binarized_mnist_static.npz") as file:
            return np.unpackbits(file["test"], axis=1)[:num_rows].astype(np.float32)
    bits = np.random.default_rng(0).random((num_rows, num_pixels)) < 0.13
    return bits.astype(np.float32)
