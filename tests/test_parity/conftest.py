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
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
    torch.set_default_dtype(torch.float32)
