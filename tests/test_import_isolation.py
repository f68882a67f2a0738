"""Importing one backend loads nothing of the other, and nothing heavy that only few calls need."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = {
    "pyro_vae_ext": (("torch", "pyro"), {"jax", "jaxlib", "numpyro", "flax", "optax"}),
    "numpyro_vae_ext": (("jax", "numpyro", "flax"), {"torch", "pyro"}),
}
# Loaded by the call that needs them, not by the import.
LATE = {"arviz", "arviz_base", "matplotlib", "sklearn", "xarray", "pandas"}

# Every module of the package, private ones included, then the top-level names that are loaded.
PROGRAM = """
import importlib, json, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("package", sorted(BACKENDS))
def test_import_loads_one_backend_alone(package: str) -> None:
    needed, others = BACKENDS[package]
    for name in needed:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, package],
        capture_output=True,
        check=True,
        cwd=ROOT,
        text=True,
    )
    loaded = set(json.loads(found.stdout))
    other_package = set(BACKENDS) - {package}
    assert package in loaded
    assert loaded & (others | other_package) == set()
    assert loaded & LATE == set()
