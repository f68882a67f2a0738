"""Options, seeds and what is collected; imports with neither backend installed."""

from __future__ import annotations

import os
import random
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest

os.environ["MPLBACKEND"] = "Agg"

BACKENDS = {"test_pyro": ("torch", "pyro"), "test_numpyro": ("jax", "numpyro", "flax", "optax")}
BACKENDS["test_parity"] = BACKENDS["test_pyro"] + BACKENDS["test_numpyro"]
MISSING = {
    folder: [name for name in modules if find_spec(name) is None]
    for folder, modules in BACKENDS.items()
}

collect_ignore = [folder for folder, missing in MISSING.items() if missing]

# XLA's older code generator compiles the small programs of the tests in a third of the time. Only
# for releases that know the options: others end the process at an option that they do not know.
QUICK_COMPILATION = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
QUICK_RELEASES = ("0.10.",)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vae-ext")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda", "gpu"), help="default: cpu")
    group.addoption(
        "--dtype", default="float64", choices=("float64", "float32"), help="default: float64"
    )
    group.addoption(
        "--cases",
        type=int,
        help="run at most so many cases of every test function, evenly spread",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        # Before JAX is imported: it would take a GPU that it finds.
        os.environ["JAX_PLATFORMS"] = "cpu"
    if find_spec("jaxlib") is not None and version("jaxlib").startswith(QUICK_RELEASES):
        # In front: XLA reads no further than the first word that is no option.
        given = os.environ.get("XLA_FLAGS", "")
        if QUICK_COMPILATION not in given:
            os.environ["XLA_FLAGS"] = f"{QUICK_COMPILATION} {given}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("--cases")
    if most is None:
        return
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = set()
    for cases in functions.values():
        kept |= {cases[round(i)] for i in np.linspace(0, len(cases) - 1, min(most, len(cases)))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"device: {config.getoption('--device')}, dtype: {config.getoption('--dtype')}"]
    lines += [
        f"{folder}: left out, not installed: {', '.join(missing)}"
        for folder, missing in MISSING.items()
        if missing
    ]
    return lines


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """``"cpu"`` or ``"cuda"``, a name that both torch and JAX know."""
    name = request.config.getoption("--device")
    return "cuda" if name == "gpu" else name


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> str:
    """``"float64"`` or ``"float32"``."""
    return request.config.getoption("--dtype")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers and an empty parameter store for every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    # Only a test that uses a backend has loaded it.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "pyro" in sys.modules and hasattr(sys.modules["pyro"], "clear_param_store"):
        sys.modules["pyro"].clear_param_store()
