"""Both backends in float64, in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    # Here, not above: this file is read even where a backend is missing and its tests are left out.
    import jax
    import torch

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    before = {
        "jax_enable_x64": jax.config.jax_enable_x64,
        "jax_disable_most_optimizations": jax.config.read("jax_disable_most_optimizations"),
    }
    # The programs run once: their compilation is what the tests wait for.
    for name in before:
        jax.config.update(name, True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    torch.set_default_dtype(torch.float32)
