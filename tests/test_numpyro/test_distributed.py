"""Several devices, of one and of two processes, against one device, with the same key."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PROGRAM = TESTS / "test_numpyro" / "ranks.py"


def test_several_devices_are_one(tmp_path: Path, dtype: str) -> None:
    """One start of two processes for everything: it takes as long as what they compute."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        ),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_ENABLE_X64": str(int(dtype == "float64")),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(PROGRAM), str(rank), str(tmp_path), address],
            env=environment,
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

    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert found["devices"] == other["devices"] == 8
    assert found["rows"] == other["rows"] == [2, 6]
    tolerance = 1e-10 if dtype == "float64" else 1e-6
    for layout in ("local", "processes"):
        assert {name: x for name, x in found[layout].items() if not x < tolerance} == {}
    assert found["closest draws"] > 1e-3
