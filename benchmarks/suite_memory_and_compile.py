"""Suite `memory_and_compile`: peak memory and the time of the first steps.

Every candidate runs in a process of its own, with cold caches. Imports, and the batch, come before
the start. The first three steps include making the programs and compiling them, which a candidate
may do at its second step; then three more follow. The peak is that of the process above the start,
what the compiler needs for itself included.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import cells
import suite_curves
import suite_steps
from sizes import TINY

NUM_STEPS = 3


def reset_peak():
    """Start the peak anew where the system can, so that imports do not hide what follows."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak():
    """Greatest resident memory since the reset, in MiB; without one, since the start."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(backend, name, num_particles, model, options):
    """Measure one candidate in this process."""
    sizes = suite_steps.MODELS.get(model, TINY)
    module = importlib.import_module(f"steps_{backend}")
    module.random_batch(sizes)
    reset_peak()
    before, start = peak(), time.perf_counter()
    step = module.steps(num_particles, "reparam", sizes, [name], compiler=options.compiler)[name]
    for _ in range(NUM_STEPS):
        step()
    first, after = time.perf_counter() - start, peak()
    reset_peak()
    for _ in range(NUM_STEPS):
        step()
    row = {
        "model": model,
        "K": num_particles,
        "candidate": name,
        "first_steps_seconds": round(first, 3),
        "peak_mib": round(max(after, peak()) - before, 1),
        "peak_of_steps_mib": round(peak() - before, 1),
    }
    if hasattr(step, "memory"):
        # What XLA plans for one step beside the state, without what the process holds otherwise.
        row["xla_temporary_mib"] = round(step.memory() / 2**20, 2)
    return row


def cases(options):
    """Model and number of particles of every cell."""
    # With cold caches a compiled candidate takes a minute, so there are few cells.
    return [("digits", 5)] if options.quick else [("digits", 5), ("MNIST", 50)]


def rows(backend, options):
    """Rows of the suite, and what is missing."""
    missing = importlib.import_module(f"steps_{backend}").missing()
    names = [name for name in suite_curves.CANDIDATES[backend] if name not in missing]
    if options.smoke_test:
        return [one(backend, "vae-ext, SVI", 2, "tiny", options)], missing
    cold = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    found = []
    for model, num_particles in cases(options):
        for name in names:
            asked = [backend, name, num_particles, model, options._asdict()]
            command = [sys.executable, __file__, json.dumps(asked)]
            done = subprocess.run(
                command, env={**os.environ, **cold}, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"Expected a row of {asked}; got:\n{done.stderr}")
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return found, missing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure one candidate; called by the suite.")
    parser.add_argument("asked", help="JSON list")
    *case, settings = json.loads(parser.parse_args().asked)
    print(json.dumps(one(*case, cells.Options(**settings))))
