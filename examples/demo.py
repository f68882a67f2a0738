"""The main job in both backends: digits and eight schools, mean-field against IAF.

Trains a variational autoencoder on scikit-learn's digits and a global guide on the eight
schools, with `MeanField` and the ELBO and with `IAF` and the importance-weighted bound,
prints one table (`seconds` is the training alone), and writes an ArviZ file per fit and
one picture.

    python examples/demo.py
    python examples/demo.py --backend numpyro --smoke-test

The backends run side by side, each in a process and on a thread of its own.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time

import data
import matplotlib.pyplot as plt
import numpy as np
import report

DIGITS = {"MeanField": (1, "reparam"), "IAF": (5, "dreg")}


def parser(description):
    """Options of the demo."""
    result = report.fit_parser(description)
    result.add_argument("--backend", choices=("installed", "pyro", "numpyro"), default="installed")
    result.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return result


def run_backend(args):
    """Run every fit of one backend in this process and write its rows."""
    vae = importlib.import_module(f"vae_{args.backend}")
    schools = importlib.import_module(f"eight_schools_{args.backend}")
    shared = ["--output-dir", str(args.output_dir), "--seed", str(args.seed)]
    shared += ["--num-evaluation-samples", str(args.num_evaluation_samples)]
    shared += ["--smoke-test"] * args.smoke_test
    rows = []
    for guide, (num_particles, gradient) in DIGITS.items():
        options = ["--guide", guide, "--num-particles", str(num_particles)]
        options += ["--gradient", gradient, "--num-steps", str(args.num_steps or 8_000)]
        rows.append(vae.main(report.vae_parser(__doc__).parse_args(shared + options)))
    rows += schools.main(report.fit_parser(__doc__).parse_args(shared))
    report.write_row(args.output_dir / f"demo_{args.backend}.json", rows)


def run_apart(backends):
    """Run the backends in processes of their own, one thread in each."""
    processes = []
    for line, backend in enumerate(backends):
        environment = {
            **os.environ,
            # Networks this small gain nothing from threads, and lose much if cores are shared.
            "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
            "TQDM_POSITION": str(line),
            "TQDM_MININTERVAL": "0.5" if sys.stderr.isatty() else "10",
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--backend", backend, "--child"]
        processes.append(subprocess.Popen(command, env=environment))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"Expected every backend to finish; got exit codes {codes}.")


def picture(args, backends):
    """Digits on the left, eight schools on the right, one line per backend."""
    names_of_schools = data.eight_schools().schools
    figure = plt.figure(figsize=(13, 4.6 * len(backends)), layout="constrained")
    lines = figure.subfigures(len(backends), 1, squeeze=False)[:, 0]
    for line, backend in zip(lines, backends, strict=True):
        title = {"pyro": "Pyro", "numpyro": "NumPyro"}[backend]
        line.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        left, right = line.subfigures(1, 2, width_ratios=(1, 1.5))
        fits = []
        for guide, (num_particles, gradient) in DIGITS.items():
            args.dataset, args.guide = "digits", guide
            args.num_particles, args.gradient = num_particles, gradient
            with np.load(report.vae_stem(backend, args).with_suffix(".npz")) as file:
                fits.append(dict(file))
        top, bottom = left.subplots(2, 1, height_ratios=(3, 4))
        shape = tuple(fits[0]["shape"])
        columns = 10
        rows = [fits[0]["data"], *(fit["reconstruction"] for fit in fits)]
        report.draw_mosaic(
            top,
            [row[:columns] for row in rows],
            shape,
            "Test digits and their reconstructions",
            ["data", *DIGITS],
        )
        samples = [half for fit in fits for half in np.split(fit["prior"][: 2 * columns], 2)]
        names = [name for guide in DIGITS for name in (guide, "")]
        report.draw_mosaic(bottom, samples, shape, "Means of prior samples", names)
        with np.load(args.output_dir / f"eight_schools_{backend}.npz") as file:
            schools = report.unflatten(file)
        axes = right.subplots(1, 3, width_ratios=(1.5, 1, 1))
        report.draw_schools(axes, schools, names_of_schools)
    figure.savefig(args.output_dir / "demo.png", dpi=130)
    plt.close(figure)


def main(args):
    """Run the backends, print the table, draw the picture; return the rows."""
    if args.child:
        return run_backend(args)
    start = time.perf_counter()
    backends = report.BACKENDS if args.backend == "installed" else (args.backend,)
    run_apart(backends)
    rows = []
    for backend in backends:
        rows += json.loads((args.output_dir / f"demo_{backend}.json").read_text())
    rows.append(
        {"data": "eight schools", "guide": "exact", "NLL": -data.eight_schools_log_evidence()}
    )
    picture(args, backends)
    print(report.table(rows))
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} seconds in all; picture and ArviZ files in {args.output_dir}/")
    return rows


if __name__ == "__main__":
    main(parser(__doc__).parse_args())
