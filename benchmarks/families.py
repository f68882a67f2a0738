"""Time of one training step of the digits VAE by guide family, against the mean-field one.

    python benchmarks/families.py --backend pyro
    python benchmarks/families.py --backend numpyro

The networks, the batch and the way of measuring are those of `step_time.py`; the families have
their default options (VGP: 50 variational data). In Pyro the step is the objective as a module
with one Adam of PyTorch, in NumPyro the host's compiled `SVI.update`.
"""

import argparse
import importlib
import os
import sys
from functools import partial
from pathlib import Path

import step_time

CASES = ((1, "reparam"), (1, "stl"), (5, "reparam"), (5, "dreg"))
FAMILIES = ("MeanField", "IAF", "Auxiliary", "VGP")


def main(args):
    """Run all cases and print a table; return the results."""
    module = importlib.import_module(f"steps_{args.backend}")
    cases = CASES[:1] if args.smoke_test else CASES
    return step_time.compare(args, cases, "family", partial(module.families, FAMILIES))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("pyro", "numpyro"), required=True)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--smoke-test", action="store_true")
    settings = step_time.ONE_THREAD
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    main(parser.parse_args())
