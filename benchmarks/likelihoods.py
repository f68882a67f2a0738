"""Time of the likelihoods: log-density with gradient, and sampling cached and naive.

    python benchmarks/likelihoods.py --backend pyro
    python benchmarks/likelihoods.py --backend numpyro
    python benchmarks/likelihoods.py --backend pyro --peer-python ENVIRONMENT/bin/python

Batches of 64 images of 28 x 28 with a context of 10 numbers, on one thread: `PixelCNN` with five
gated layers of 64 channels, binary and 8-bit (five components), `MADE` with two hidden layers of
500 units, and `Recurrent`, a GRU of 200 units. "Cached" is a batch of samples as the distribution
gives it. "Naive" takes one pass of the network for each of the 784 pixels: the time of one pass, of
which `--passes` are timed together, times 784; with `--naive` all of them run.

The peer is the PixelCNN of TensorFlow Probability, in an environment of its own, with the same
images, context and mixture, at two sizes: with as many filters as we have channels and the least
depth that it can have, which is about twice our weights; and with so few filters that it has no
more weights than we. Both as plain `tf.function` and through XLA. It has no map of the context, so
ours stands there without one as well. Its sampler takes a pass for each pixel and one more: one
pass times 785, and with `--naive` the sampler itself.

The programs of a table take turns; a ratio is the median, over the rounds, of a program's time over
that of the first one in the same round.
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import step_time

CASES = {
    "PixelCNN": {"name": "PixelCNN", "channels": 64, "num_layers": 5},
    "PixelCNN, 8-bit": {
        "name": "PixelCNN",
        "channels": 64,
        "num_layers": 5,
        "output": "discretized_logistic_mixture",
        "num_components": 5,
    },
    "MADE": {"name": "MADE", "hidden_dims": (500, 500)},
    "Recurrent": {"name": "Recurrent", "hidden_dim": 200},
}
PEERS = {
    "TFP, 64 filters": {"num_filters": 64, "xla": False},
    "TFP, 64 filters, XLA": {"num_filters": 64, "xla": True},
    "TFP, 44 filters": {"num_filters": 44, "xla": False},
    "TFP, 44 filters, XLA": {"num_filters": 44, "xla": True},
}
CONTEXT_DIM = 10
HEAD = f"{'program':34}  {'weights':>9}  {'seconds':>9}  {'ratio':>8}"


class Peer:
    """The peer's programs, in a process of its own that waits for their names."""

    def __init__(self, python, options, script="likelihoods_tfp.py"):
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name(script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.sizes = self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("Expected an answer of the peer; got none. Run its script by hand.")
        return json.loads(line)

    def run(self, program):
        """Run a program once, and wait for it."""
        self.process.stdin.write(f"{program}\n")
        self.process.stdin.flush()
        self._answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def show(rows, title, weights, times, factors):
    """Print one table and add its rows; a program's times count `factors` fold."""
    print(f"\n{title}\n{HEAD}")
    first = factors[next(iter(times))]
    for name, time in times.items():
        row = {
            "what": title,
            "program": name,
            "weights": weights[name],
            "seconds": time["microseconds"] * factors[name] / 1e6,
            "ratio": time["ratio"] * factors[name] / first,
        }
        rows.append(row)
        print(f"{name:34}  {row['weights']:>9}  {row['seconds']:>9.4g}  {row['ratio']:>8.4g}")
    sys.stdout.flush()


def compare(args, rows, title, weights, steps, factors=None):
    """Time named programs in turns."""
    times = step_time.measure(steps, args.rounds, 1, args.warmup)
    show(rows, title, weights, times, factors or dict.fromkeys(steps, 1))


def main(args):
    """Run all comparisons and print their tables; return the rows."""
    candidate = importlib.import_module(f"likelihoods_{args.backend}").Candidate
    if args.smoke_test:
        args.size, args.batch_size, args.rounds = 4, 2, 2
    args.warmup = 2
    num_pixels = args.size**2
    passes = num_pixels if args.naive else min(args.passes, num_pixels)
    common = {"batch_size": args.batch_size, "context_dim": CONTEXT_DIM}
    rows = []
    for title, case in CASES.items():
        shape = (args.size, args.size)
        made = candidate(**{"shape": shape, **common, **case})
        steps = {
            "cached sample": made.cached,
            "naive sample": partial(made.naive, passes),
            "log_prob and gradient": made.density,
        }
        factors = dict.fromkeys(steps, 1) | {"naive sample": num_pixels / passes}
        weights = dict.fromkeys(steps, made.num_parameters)
        compare(args, rows, f"{title} ({args.backend})", weights, steps, factors)
        if args.peer_python and title == "PixelCNN, 8-bit":
            other = candidate(**{"shape": shape, "spatial_channels": 0, **common, **case})
            peers(args, rows, {"ours": made, "ours, without the map": other}, common)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def peers(args, rows, ours, common):
    """Ours and the peer, density by density and sample by sample."""
    with contextlib.ExitStack() as stack:
        others = {}
        for name, sizes in PEERS.items():
            options = common | sizes | {"size": args.size, "num_components": 5}
            others[name] = Peer(args.peer_python, options)
            stack.callback(others[name].close)
        weights = {name: made.num_parameters for name, made in ours.items()}
        weights |= {name: peer.sizes["parameters"] for name, peer in others.items()}
        print(f"\n{others[name].sizes['versions']}")
        steps = {name: made.density for name, made in ours.items()}
        steps |= {name: partial(peer.run, "density") for name, peer in others.items()}
        compare(args, rows, f"8-bit, log_prob and gradient ({args.backend})", weights, steps)
        program = "sample" if args.naive else "pass"
        steps = {name: made.cached for name, made in ours.items()}
        steps |= {name: partial(peer.run, program) for name, peer in others.items()}
        passes = 1 if args.naive else args.size**2 + 1
        factors = dict.fromkeys(steps, passes) | dict.fromkeys(ours, 1)
        compare(args, rows, f"8-bit, a batch of samples ({args.backend})", weights, steps, factors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("pyro", "numpyro"), required=True)
    parser.add_argument("--peer-python", help="interpreter with TensorFlow Probability")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--naive", action="store_true", help="run the naive samplers to the end")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--smoke-test", action="store_true")
    settings = step_time.ONE_THREAD
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    main(parser.parse_args())
