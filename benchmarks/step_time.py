"""Time of one training step of the digits VAE against a hand-written loop.

    python benchmarks/step_time.py --backend pyro
    python benchmarks/step_time.py --backend numpyro

Every candidate trains the same networks (64-100-100-10 and back, 50 rows a batch) on the
same objective with Adam, validation off, one thread. The candidates take turns in short
blocks; a ratio is the median, over the rounds, of a candidate's time over the plain
loop's time in the same round, so a machine that slows down slows both.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

CASES = ((1, "reparam"), (1, "stl"), (5, "reparam"), (5, "dreg"), (50, "reparam"), (50, "dreg"))
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def take_turns(steps, rounds, block, warmup, clock=time.perf_counter):
    """Microseconds per step of every candidate in every round."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    times = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        # Another order each round: nobody always runs after the same neighbour.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            for _ in range(block):
                steps[name]()
            times[name].append((clock() - start) / block * 1e6)
    return times


def measure(steps, rounds, block, warmup):
    """Microseconds per step of every candidate, and its ratio to the first one."""
    times = take_turns(steps, rounds, block, warmup)
    plain = next(iter(times.values()))
    return {
        name: {
            "microseconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, plain, strict=True)),
        }
        for name, values in times.items()
    }


def compare(args, cases, column, steps_of, steps_per_call=1):
    """Time all candidates of all cases, print a table and write it; return the rows.

    Args:
        args: options `rounds`, `block`, `output` and `smoke_test`.
        cases: pairs of particles and gradient.
        column: what a candidate is called.
        steps_of: the named candidates of particles and gradient.
        steps_per_call: steps that one call of a candidate runs.
    """
    rounds, block, warmup = (2, 2, 2) if args.smoke_test else (args.rounds, args.block, 20)
    results = []
    print(f"{'K':>3}  {'gradient':8}  {column:18}  {'us/step':>9}  {'ratio':>6}")
    for num_particles, gradient in cases:
        steps = steps_of(num_particles, gradient)
        for name, result in measure(steps, rounds, block, warmup).items():
            result["microseconds"] /= steps_per_call
            results.append({"K": num_particles, "gradient": gradient, column: name, **result})
            print(
                f"{num_particles:>3}  {gradient:8}  {name:18}  "
                f"{result['microseconds']:>9.1f}  {result['ratio']:>6.3f}",
                flush=True,
            )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def main(args):
    """Run all cases and print a table; return the results."""
    module = importlib.import_module(f"steps_{args.backend}")
    options = {"scan": args.scan} if args.backend == "numpyro" else {}

    def steps_of(num_particles, gradient):
        return module.steps(num_particles, gradient, hosts=gradient == "reparam", **options)

    return compare(args, CASES, "candidate", steps_of, args.scan)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("pyro", "numpyro"), required=True)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--scan", type=int, default=1, help="NumPyro: steps in one compiled call")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--smoke-test", action="store_true")
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    main(parser.parse_args())
