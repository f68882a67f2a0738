"""Suite `evidence`: `log_evidence` of many images against bare forward passes of the same chunks.

A variational autoencoder of MNIST's size with random weights, and binarised images: static MNIST's
test part with `--data-dir`, else noise. Two hand-written programs stand beside it, chunk for chunk:
"by hand" is the estimator, forward passes, log-weights and their log-mean-exp; "networks only" are
the forward passes of encoder and decoder and nothing else.

Time and peak memory have cells of their own: the memory is measured in a process for each
candidate with all the rows and a few chunks, since it does not grow with the number of samples.
"""

import importlib
import json
import os
import subprocess
import sys
from argparse import ArgumentParser

import cells
from sizes import MNIST, TINY
from suite_memory_and_compile import peak, reset_peak

CHUNK = 5
CANDIDATES = ("by hand", "vae-ext", "networks only")


def amounts(options):
    """Rows and samples of the time, rows and samples of the memory."""
    if options.smoke_test:
        return (6, 4), (6, 4)
    if options.full:
        return (10_000, 5_000), (10_000, 4 * CHUNK)
    return ((200, 200) if options.quick else (1000, 500)), (10_000, 4 * CHUNK)


def programs(backend, num_rows, num_samples, options):
    """The candidates, callables without arguments."""
    module = importlib.import_module(f"evidence_{backend}")
    sizes = TINY if options.smoke_test else MNIST
    data = cells.images(options, num_rows, sizes.num_pixels)
    chunk = 2 if options.smoke_test else CHUNK
    return module.programs(data, sizes, num_samples, chunk)


def memory(backend, name, options):
    """Peak memory of one candidate above the data, in this process."""
    _, (num_rows, num_samples) = amounts(options)
    program = programs(backend, num_rows, num_samples, options)[name]
    reset_peak()
    before = peak()
    program()
    return {
        "what": "memory",
        "num_rows": num_rows,
        "candidate": name,
        "peak_mib": round(peak() - before, 1),
    }


def rows(backend, options):
    """Rows of the suite, and what is missing."""
    (num_rows, num_samples), _ = amounts(options)
    steps = programs(backend, num_rows, num_samples, options)
    if options.smoke_test:
        del steps["networks only"]
    rounds = 1 if options.full else min(options.rounds, 5)
    found = cells.take_turns(
        steps,
        options._replace(rounds=rounds),
        what="time",
        num_rows=num_rows,
        num_samples=num_samples,
        data="MNIST" if options.data_dir else "noise",
    )
    if options.smoke_test:
        return [*found, memory(backend, "networks only", options)], []
    for name in CANDIDATES:
        asked = json.dumps([backend, name, options._asdict()])
        command = [sys.executable, __file__, asked]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Expected a row of {asked}; got:\n{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found, []


if __name__ == "__main__":
    parser = ArgumentParser(description="Measure one candidate's memory; called by the suite.")
    parser.add_argument("asked", help="JSON list")
    *case, settings = json.loads(parser.parse_args().asked)
    print(json.dumps(memory(*case, cells.Options(**settings))))
