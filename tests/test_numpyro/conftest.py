"""Default dtype and device of the NumPyro tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def jax_defaults(dtype: str, device: str) -> Iterator[None]:
    # Here, not above: pytest loads this file also where JAX is not installed.
    import jax

    before = {
        "jax_enable_x64": jax.config.jax_enable_x64,
        "jax_default_device": jax.config.jax_default_device,
        "jax_disable_most_optimizations": jax.config.read("jax_disable_most_optimizations"),
    }
    jax.config.update("jax_enable_x64", dtype == "float64")
    jax.config.update("jax_default_device", jax.devices(device)[0])
    # Small programs that run a few times: their compilation is what the tests wait for.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def fresh_caches() -> Iterator[None]:
    """JAX keeps no program beyond the 8192nd of a process: `_cache_size` would be 0 from there."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture
def exact(dtype: str) -> None:
    """For tests whose tolerance is that of float64."""
    if dtype != "float64":
        pytest.skip("exact to float64 only")
