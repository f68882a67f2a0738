"""Variance and time of the gradients of a sigmoid belief net, ours against the hosts' own.

    python benchmarks/discrete.py --backend pyro --data-dir DIR
    python benchmarks/discrete.py --backend numpyro --data-dir DIR --num-layers 2

The nets are the linear ones of Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein (2017, arXiv
1703.07370): 784-200, or 784-200-200, batches of 24 rows. One net is trained with REBAR for
`--train-steps`; at that point what an estimator learns for itself (temperatures, surrogates,
baselines) is tuned for `--tune-steps` with the net held fixed, one batch after the other. The
variance is that of the gradient of one batch's loss, the sum over its rows, and is summed over
the parameters of the guide. A step is gradient and update of one Adam; the candidates take turns
in short blocks, and the ratio is the median, over the rounds, of a candidate's time over that of
hand-written REINFORCE in the same round.

Without `--data-dir` the rows are random bits: right for times, not for variances.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import step_time

HEAD = f"{'estimator':36}  {'variance':>10}  {'ms/step':>8}  {'var x ms':>10}  {'ratio':>6}"


def rows(data_dir):
    """Rows of bits: the training part of static MNIST, or noise."""
    if data_dir is None:
        return (np.random.default_rng(0).random((2000, 784)) < 0.13).astype(np.uint8)
    with np.load(data_dir / "binarized_mnist_static.npz") as file:
        return np.unpackbits(file["train"], axis=1)


def main(args):
    """Measure all candidates and print a table; return its rows."""
    module = importlib.import_module(f"discrete_{args.backend}")
    if args.smoke_test:
        args.train_steps = args.tune_steps = args.repetitions = 4
        args.rounds, args.block = 2, 2
    candidates = module.candidates(args, rows(args.data_dir))
    for candidate in candidates.values():
        candidate.tune(args.tune_steps)
    variances = {name: c.variance(args.repetitions) for name, c in candidates.items()}
    steps = {name: candidate.step for name, candidate in candidates.items()}
    times = step_time.measure(steps, args.rounds, args.block, 2 if args.smoke_test else 20)
    print(HEAD)
    results = []
    for name, time in times.items():
        row = {
            "estimator": name,
            "layers": args.num_layers,
            "variance": variances[name],
            "milliseconds": time["microseconds"] / 1000,
            "ratio": time["ratio"],
        }
        row["variance x time"] = row["variance"] * row["milliseconds"]
        results.append(row)
        print(
            f"{name:36}  {row['variance']:>10.4g}  {row['milliseconds']:>8.3f}  "
            f"{row['variance x time']:>10.4g}  {row['ratio']:>6.2f}"
        )
    for reason in module.left_out(args):
        print(reason)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("pyro", "numpyro"), required=True)
    parser.add_argument("--data-dir", type=Path, help="folder of binarized_mnist_static.npz")
    parser.add_argument("--num-layers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--train-steps", type=int, default=20_000)
    parser.add_argument("--tune-steps", type=int, default=5_000)
    parser.add_argument("--repetitions", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--block", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--smoke-test", action="store_true")
    settings = step_time.ONE_THREAD
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    main(parser.parse_args())
