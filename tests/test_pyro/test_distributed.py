"""Two processes of ``DistributedDataParallel`` against one, with the same rows and noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

TESTS = Path(__file__).resolve().parent.parent
PROGRAM = TESTS / "test_pyro" / "ranks.py"

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch was built without gloo",
)


def test_two_processes_are_one(tmp_path: Path, dtype: str) -> None:
    """One start of the processes for everything: it takes longer than what they compute."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(PROGRAM), str(rank), str(tmp_path), dtype],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)[-5000:]

    tolerance = 1e-10 if dtype == "float64" else 1e-6
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {name: x for name, x in found["zero"].items() if not x < tolerance} == {}
        assert found["own noise"] > 0.01
