"""Checkpoints of a training run: one safetensors file."""

from __future__ import annotations

import os
from typing import Any

from pyro.infer import SVI
from torch import Tensor

from pyro_vae_ext.training._file import read, write
from pyro_vae_ext.training._state import buffers, modules


def save_checkpoint(
    path: str | os.PathLike,
    svi: SVI,
    *,
    metadata: dict[str, Any] | None = None,
    arrays: dict[str, Any] | None = None,
) -> None:
    """Write all that a training run needs to go on to a file.

    These are the unconstrained parameters with their constraints, the optimiser's state of each,
    the states of the global random numbers (torch on all devices in use, NumPy, Python), and the
    buffers of the modules (running statistics of a BatchNorm, baselines of ``TraceNVIL_ELBO``).
    Pyro's store is shared by all programs: parameters are those that ``svi`` has updated, or all
    of the store before its first step. Modules are the programs themselves if they are modules
    or methods of one, and those registered with ``pyro.module`` that have a parameter.

    The file is complete at any time: a new one takes the place of the old one after it has been
    written to the disk.

    Args:
        path: The file, whose folder exists.
        svi: The host's ``SVI``.
        metadata: Further numbers, strings, lists and dictionaries, as JSON has them.
        arrays: Further arrays by name.

    Raises:
        ValueError: If a parameter is not finite; the file stays as it was. If the optimiser has a
            state that is neither numbers, strings nor tensors.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, tempfile
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(()))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        >>> loss = svi.step(torch.ones(5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/run.safetensors", svi, metadata={"epoch": 3})
        ...     loss = svi.step(torch.ones(5))
        ...     metadata, arrays = load_checkpoint(f"{folder}/run.safetensors", svi)
        >>> metadata, round(pyro.param("loc").item(), 6)
        ({'epoch': 3}, 0.1)
    """
    write(path, svi, buffers(modules(svi)), metadata, arrays)


def load_checkpoint(path: str | os.PathLike, svi: SVI) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put a training run back to where it was saved.

    Parameters and buffers that exist are written into, so that the tensors of modules stay the
    same objects; a parameter that the programs have not made yet is put into Pyro's store. Modules
    inside of functions make their parameters at the first run: call ``svi.evaluate_loss`` on a
    batch before. The global random numbers are set, too.

    Args:
        path: A file that :func:`save_checkpoint` or ``fit`` wrote.
        svi: The host's ``SVI`` with the same programs and optimiser.

    Returns:
        The metadata and the arrays that were saved.

    Raises:
        ValueError: If there is no such file, or it is one of other programs. Nothing is changed
            then.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, tempfile
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(x):
        ...     scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        ...     pyro.sample("x", dist.Normal(0.0, scale), obs=x)
        >>> def new():
        ...     return SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        >>> svi, x = new(), torch.tensor(3.0)
        >>> loss = svi.step(x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/run.safetensors", svi)
        ...     loss = svi.step(x)
        ...     pyro.clear_param_store()
        ...     svi = new()
        ...     _ = load_checkpoint(f"{folder}/run.safetensors", svi)
        >>> svi.step(x) == loss
        True
    """
    stored = read(path)
    stored.apply(svi, buffers(modules(svi)))
    return stored.metadata, stored.arrays
