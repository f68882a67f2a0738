"""Default dtype and device of the Pyro tests, and the models that they share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def torch_defaults(dtype: str, device: str) -> Iterator[None]:
    # Here, not above: pytest loads this file also where torch is not installed.
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    # The default device costs a look at every operation: only where it differs.
    torch.set_default_device(None if device == "cpu" else device)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
    torch.set_default_device(None)


@pytest.fixture
def exact(dtype: str) -> None:
    """For tests whose tolerance is that of float64."""
    if dtype != "float64":
        pytest.skip("exact to float64 only")
