"""One training step under pytest-benchmark; `step_time.py` prints the paired ratios."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HOSTS = {"pyro": "pyro", "numpyro": "numpyro"}


@pytest.fixture
def steps(request, monkeypatch):
    backend, num_particles, gradient = request.param
    pytest.importorskip(HOSTS[backend])
    monkeypatch.syspath_prepend(str(HERE))
    module = importlib.import_module(f"steps_{backend}")
    yield module.steps(num_particles, gradient, hosts=False)
    sys.modules.pop(f"steps_{backend}")


@pytest.mark.parametrize("candidate", ["plain", "vae-ext"])
@pytest.mark.parametrize(
    "steps",
    [
        (backend, num_particles, gradient)
        for backend in HOSTS
        for num_particles, gradient in ((1, "reparam"), (1, "stl"), (5, "dreg"), (50, "dreg"))
    ],
    indirect=True,
    ids=lambda case: "-".join(map(str, case)),
)
def test_step(benchmark, steps, candidate):
    name = next(name for name in steps if name.startswith(candidate))
    for _ in range(10):
        steps[name]()
    benchmark(steps[name])
