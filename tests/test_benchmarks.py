"""The benchmark suites run at tiny sizes, and their page tells the truth; nothing is timed here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = {"pyro": ("torch", "pyro"), "numpyro": ("jax", "numpyro", "flax", "optax")}

DEVICE = {"name": "a processor", "cores": 2, "threads_used": 1}
COMMAND = "python benchmarks/run.py"


def run_of(suite: str, backend: str, rows: list[dict], missing: tuple[str, ...] = ()) -> dict:
    """One run of a suite as the JSON has it."""
    return {
        "suite": suite,
        "backend": backend,
        "seconds": 1.0,
        "clock": "wall clock",
        "versions": {"python": "3.11"},
        "missing": list(missing),
        "date": "2026-01-01",
        "device": DEVICE,
        "command": COMMAND,
        "rows": rows,
    }


def row(candidate: str, *rounds: float, **labels: object) -> dict:
    """One row with its times."""
    middle = sorted(rounds)[len(rounds) // 2]
    return {**labels, "candidate": candidate, "microseconds": middle, "rounds": list(rounds)}


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Those modules of benchmarks/ that need no backend."""
    pytest.importorskip("matplotlib")
    names = ("page", "plots", "targets")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = {name: importlib.import_module(name) for name in names}
    yield found
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("backend", MODULES)
def test_every_suite_runs(backend: str, tmp_path: Path) -> None:
    for name in (*MODULES[backend], "matplotlib"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--smoke-test", "--backend", backend]
    command += ["--output", str(tmp_path / "results.json"), "--page-output", str(tmp_path)]
    # Programs that run twice: their compilation is what takes time.
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    suites = ["steps", "fit", "curves", "memory_and_compile", "flows", "evidence"]
    assert [run["suite"] for run in runs] == [s for s in suites if s != "fit" or backend != "pyro"]
    for run in runs:
        assert any(row["candidate"].startswith("vae-ext") for row in run["rows"]) or (
            run["suite"] == "memory_and_compile"
        )
    text = (tmp_path / "benchmark_results.md").read_text()
    assert str(tmp_path) not in text + json.dumps(runs)
    for name in ("steps", "curves", "memory_and_compile", "flows"):
        assert f"_static/benchmarks/{name}_{backend}.png" in text
        picture = tmp_path / "_static" / "benchmarks" / f"{name}_{backend}.png"
        assert 0 < picture.stat().st_size < 80 * 1024


def test_a_ratio_is_the_median_of_paired_rounds(benchmarks: dict[str, ModuleType]) -> None:
    # The ratio of the medians would be 2/10.
    slow, fast = row("a", 10.0, 30.0, 2.0), row("b", 20.0, 10.0, 1.0)
    assert benchmarks["targets"].ratio(slow, fast) == 2.0


def test_targets_are_met_or_missed(benchmarks: dict[str, ModuleType]) -> None:
    of = benchmarks["targets"].of
    cell = {"model": "digits", "K": 5}
    rows = [row("plain JAX", 100.0, **cell), row("vae-ext, SVI", 103.0, **cell)]
    rows += [row("RenyiELBO, SVI", 102.0, **cell)]
    found = of(run_of("steps", "numpyro", rows))
    assert [(t.against, t.met) for t in found] == [("plain JAX", False), ("RenyiELBO, SVI", True)]

    cell = {"kind": "score", "D": 256}
    rows = [row("one pass a coordinate", 400.0, **cell), row("vae-ext", 100.0, **cell)]
    (target,) = of(run_of("flows", "pyro", rows))
    assert (target.value, target.met) == (4.0, False)

    rows = [{"what": "memory", "num_rows": 9, "candidate": "vae-ext", "peak_mib": 2047.0}]
    (target,) = of(run_of("evidence", "pyro", rows))
    assert target.met


def test_the_page_is_made_of_the_rows(benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    cell = {"model": "digits", "K": 1}
    steps = [row("plain JAX", 200.0, **cell), row("vae-ext, SVI", 300.0, **cell)]
    sizes = {"first_steps_seconds": 1.5, "peak_mib": 120.0, "peak_of_steps_mib": 3.0}
    memory = [{**cell, "candidate": "vae-ext, SVI", **sizes}]
    curves = [row("vae-ext, SVI", 100.0 * k, axis="K", value=k) for k in (1, 5)]
    runs = [
        run_of("memory_and_compile", "numpyro", memory),
        run_of("curves", "numpyro", curves),
        run_of("steps", "numpyro", steps, missing=("FlowJAX",)),
    ]
    benchmarks["page"].write(runs, tmp_path)
    text = (tmp_path / "benchmark_results.md").read_text()
    assert "| digits, K = 1 | vae-ext, SVI | plain JAX | 1.500 | ≤ 1.02 | **missed** |" in text
    assert "0 of 1 targets met." in text
    assert "| digits, 1 | 0.2 (1.00) | 0.3 (1.50) |" in text
    assert "| digits, 1 | vae-ext, SVI | 1.5 | 120 | 3 |" in text
    assert "Missing: FlowJAX." in text
    assert f"`{COMMAND}`" in text
    assert "a processor, 2 cores" in text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[0] == "## One training step"
