"""The programs that users copy: the scripts of examples/, the Python of README and docs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Programs that run a few times: their compilation is what the tests wait for.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# Scripts that measure something else than a fit, and write a picture alone.
WITHOUT_FITS = {"signal_to_noise", "energies_pyro", "energies_numpyro"}
# What the user of a page that says "continues" has defined already.
PRELUDE = {
    "pyro": """
import pyro, torch
import pyro.distributions as dist
from pyro.infer import SVI
from pyro_vae_ext.guides import MeanField
x = torch.zeros(8, 6)
encoder, decoder = torch.nn.Linear(6, 100), torch.nn.Linear(10, 6)
posterior = MeanField(latent_dim=10, context_dim=100)
optim, num_steps = pyro.optim.Adam({"lr": 1e-3}), 2
def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)
def guide(x):
    pyro.module("encoder", encoder); pyro.module("posterior", posterior)
    with pyro.plate("data", len(x)):
        posterior("z", encoder(x))
""",
    "numpyro": """
import jax, numpyro
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI
from numpyro_vae_ext.guides import MeanField
x, rng_key = jnp.zeros((8, 6)), jax.random.key(0)
encoder, decoder = nnx.Linear(6, 100, rngs=nnx.Rngs(0)), nnx.Linear(10, 6, rngs=nnx.Rngs(1))
posterior = MeanField(latent_dim=10, context_dim=100, rngs=nnx.Rngs(2))
optim, num_steps = numpyro.optim.Adam(1e-3), 2
def model(x):
    decode = nnx_module("decoder", decoder)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(10), 1.0).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)
def guide(x):
    encode, family = nnx_module("encoder", encoder), nnx_module("posterior", posterior)
    with numpyro.plate("data", len(x)):
        family("z", encode(x))
svi = SVI(model, guide, optim, numpyro.infer.Trace_ELBO())
params = svi.get_params(svi.init(rng_key, x))
""",
}


def imported(path: Path) -> set[str]:
    """Top-level modules that a script imports, and those of the other examples that it uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A script may run another one by its name, in a process of its own.
            name = node.value.removesuffix(".py")
            found |= {name} if name.isidentifier() and (EXAMPLES / f"{name}.py").exists() else set()
    local = {name for name in found if (EXAMPLES / f"{name}.py").exists()} - {path.stem}
    return found.union(*(imported(EXAMPLES / f"{name}.py") for name in local))


def scripts() -> list[Path]:
    return [
        path
        for path in sorted(EXAMPLES.glob("*.py"))
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "main"
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    ]


def skip_without(modules: set[str]) -> None:
    optional = ("torch", "pyro", "lightning", "jax", "numpyro", "flax", "arviz", "matplotlib")
    for name in (*optional, "sklearn"):
        if name in modules and find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def run(*command: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", **QUICK},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def check_arviz_file(path: Path) -> None:
    """The groups of a fit, real chains and draws, and a finite log-weight per draw."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path) as file:
        assert {"posterior", "posterior_predictive", "observed_data", "sample_stats"} <= set(file)
        log_weight = np.asarray(file["sample_stats"]["log_weight"])
        chains, draws = len(file["posterior"]["chain"]), len(file["posterior"]["draw"])
        assert log_weight.shape[:2] == (chains, draws)
        assert np.isfinite(log_weight).all()


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_example_runs_and_writes_its_files(path: Path, tmp_path: Path) -> None:
    skip_without(imported(path))
    text = run(str(path), "--smoke-test", "--output-dir", "out", cwd=tmp_path)
    out = tmp_path / "out"
    assert [item.name for item in tmp_path.iterdir()] == ["out"], "wrote elsewhere as well"
    assert text.strip(), "printed nothing"
    assert any(item.stat().st_size > 1000 for item in out.rglob("*.png"))
    fits = sorted(out.rglob("*.nc"))
    assert fits or path.stem in WITHOUT_FITS
    for fit in fits:
        check_arviz_file(fit)


def test_there_is_a_demo() -> None:
    assert EXAMPLES / "demo.py" in scripts()


BLOCK = re.compile(r"(<!-- continues -->\n)?```python\n(.*?)```", re.DOTALL)


def blocks() -> list[pytest.param]:
    """(backend, program) of every Python block in the README and the docs."""
    found = []
    for page in PAGES:
        if {"_build", "generated"} & set(page.parts):
            continue
        for number, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8"))):
            continues, program = match.groups()
            backend = "numpyro" if "numpyro_vae_ext" in program else "pyro"
            text = (PRELUDE[backend] if continues else "") + program
            name = page.relative_to(ROOT).with_suffix("").as_posix()
            found.append(pytest.param(backend, text, id=f"{name}-{number}-{backend}"))
    return found


@pytest.mark.parametrize(("backend", "program"), blocks())
def test_python_of_the_pages_runs(backend: str, program: str, tmp_path: Path) -> None:
    skip_without({"pyro": {"torch", "pyro"}, "numpyro": {"jax", "numpyro", "flax"}}[backend])
    if "to_arviz" in program:
        skip_without({"arviz"})
    run("-c", program, cwd=tmp_path)
