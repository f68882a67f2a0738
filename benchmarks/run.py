"""All benchmark suites: one JSON, and the page made of it.

    python benchmarks/run.py                              what `make bench` runs
    python benchmarks/run.py --quick                      a few minutes
    python benchmarks/run.py --suites flows --peer-python ENVIRONMENT/bin/python
    python benchmarks/run.py --page                       the page anew, from the JSON alone

Every suite of every backend runs in a process of its own, on one thread. The rows of a suite that
runs again replace its earlier ones; those of the other suites stay in the JSON as they are.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cells
import step_time

SUITES = ("steps", "fit", "curves", "memory_and_compile", "flows", "evidence")
FLAGS = ("quick", "full", "cpu-time", "smoke-test")
BACKENDS = ("pyro", "numpyro")
# Suites of one backend only.
OF = {"fit": ("numpyro",)}
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cpu.json"
PACKAGES = {
    "pyro": ("vae-ext", "pyro-ppl", "torch", "zuko"),
    "numpyro": ("vae-ext", "numpyro", "jax", "jaxlib", "flax", "optax", "flowjax", "equinox"),
}


def versions(backend):
    """Versions of what a backend's suites import, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES[backend]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device():
    """Name of the processor and number of its cores; nothing that tells whose machine it is."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {"name": model, "cores": os.cpu_count(), "threads_used": 1}


def command(args, suite, backend):
    """The command of one suite's run, without paths of the machine."""
    words = ["python", "benchmarks/run.py", "--suites", suite, "--backend", backend]
    words += ["--rounds", str(args.rounds)]
    words += [f"--{name}" for name in FLAGS if getattr(args, name.replace("-", "_"))]
    for name in ("data_dir", "peer_python"):
        if getattr(args, name):
            words += [f"--{name.replace('_', '-')}", name.split("_")[1].upper()]
    return shlex.join(words)


def work(suite, backend, options):
    """Run one suite of one backend in this process."""
    start = time.perf_counter()
    rows, missing = importlib.import_module(f"suite_{suite}").rows(backend, options)
    return {
        "suite": suite,
        "backend": backend,
        "seconds": round(time.perf_counter() - start, 1),
        "clock": "CPU time of the process" if options.cpu_time else "wall clock",
        "versions": versions(backend),
        "missing": missing,
        "rows": rows,
    }


def in_process_of_its_own(suite, backend, options):
    """The same in another process."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "run.json"
        asked = json.dumps([suite, backend, options._asdict(), str(target)])
        subprocess.run([sys.executable, __file__, "--work", asked], check=True)
        return json.loads(target.read_text())


def write(path, runs):
    """The JSON, one row a line, so that versions of it can be compared."""
    text = []
    for run in runs:
        head = json.dumps({key: value for key, value in run.items() if key != "rows"})
        rows = ",\n".join(json.dumps(row) for row in run["rows"])
        text.append(f'{head[:-1]}, "rows": [\n{rows}\n]}}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"runs": [\n' + ",\n".join(text) + "\n]}\n")


def main(args):
    """Run the suites, write the JSON and the page; return the runs."""
    page = importlib.import_module("page")  # first: what it needs must not be missing at the end
    runs = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
    if not args.page:
        options = cells.Options(**{name: getattr(args, name) for name in cells.Options._fields})
        worker = work if args.smoke_test else in_process_of_its_own
        for suite in args.suites:
            for backend in (name for name in args.backend if name in OF.get(suite, BACKENDS)):
                print(f"{suite}, {backend} ...", flush=True)
                run = worker(suite, backend, options)
                run["date"] = datetime.date.today().isoformat()
                run |= {"device": device(), "command": command(args, suite, backend)}
                runs = [r for r in runs if (r["suite"], r["backend"]) != (suite, backend)]
                runs.append(run)
                write(args.output, runs)
                print(f"{suite}, {backend}: {run['seconds']} s", flush=True)
    page.write(runs, args.page_output)
    return runs


def parse(argv=None):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="fewer cells: a few minutes")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="the process's time, not the clock's, for a machine that others use; without TFP",
    )
    parser.add_argument("--full", action="store_true", help="evidence: 10,000 rows, 5,000 samples")
    parser.add_argument("--data-dir", help="folder of binarized_mnist_static.npz; noise without")
    parser.add_argument("--peer-python", help="interpreter with TensorFlow Probability")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file")
    parser.add_argument("--page", action="store_true", help="make the page anew, measure nothing")
    parser.add_argument("--page-output", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--smoke-test", action="store_true", help="tiny sizes, one process")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    settings = {} if arguments.smoke_test else step_time.ONE_THREAD
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    if arguments.work:
        *case, fields, where = json.loads(arguments.work)
        Path(where).write_text(json.dumps(work(*case, cells.Options(**fields))))
    else:
        main(arguments)
