"""Checkpoints of an SVI state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpyro.infer.svi import SVIState

from numpyro_vae_ext.training import _file


def save_checkpoint(
    path: str | os.PathLike[str],
    svi_state: SVIState,
    *,
    metadata: Mapping[str, Any] | None = None,
    arrays: Mapping[str, Any] | None = None,
) -> None:
    """Save an SVI state.

    All of it is kept exactly: parameters, the optimiser whichever it is, mutable state and the
    random key, typed or not. The checkpoint is a folder, written with Orbax. A new one is written
    beside the last one and takes its place when it is complete on the disk: a process that is
    killed, at whatever moment, leaves the one or the other.

    Args:
        path: The folder, on a local disk; made if it is not there.
        svi_state: The state, of ``svi.init`` or ``svi.update``.
        metadata: What else is to be kept, as JSON can hold it.
        arrays: Further arrays, by name.

    Raises:
        ValueError: If a parameter is not finite; the last checkpoint is kept.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, optax, tempfile
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     numpyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     numpyro.sample("z", dist.Normal(numpyro.param("loc", 1.0), 1.0))
        >>> svi = SVI(model, guide, optax.adam(0.1), Trace_ELBO())
        >>> state, loss = svi.update(svi.init(jax.random.key(0)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/run", state, metadata={"step": 1})
        ...     again, metadata, _ = load_checkpoint(f"{folder}/run", svi.init(jax.random.key(1)))
        >>> svi.update(again)[1] == svi.update(state)[1], metadata
        (Array(True, dtype=bool), {'step': 1})
    """
    _file.write(path, svi_state, metadata, arrays)


def load_checkpoint(
    path: str | os.PathLike[str], svi_state: SVIState
) -> tuple[SVIState, dict[str, Any], dict[str, np.ndarray]]:
    """Load what :func:`save_checkpoint` saved.

    Args:
        path: The folder.
        svi_state: A state with the structure of the saved one, as ``svi.init`` gives it. Where
            its arrays have been put on devices, those of the checkpoint are put there.

    Returns:
        The state, the metadata and the further arrays.

    Raises:
        ValueError: If there is no checkpoint, or if names, shapes or types are others.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, optax, tempfile
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     numpyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     numpyro.sample("z", dist.Normal(numpyro.param("loc", 1.0), 1.0))
        >>> svi = SVI(model, guide, optax.adam(0.1), Trace_ELBO())
        >>> state = svi.init(jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(folder, state)
        ...     again, _, _ = load_checkpoint(folder, state)
        >>> svi.get_params(again)["loc"]
        Array(1., dtype=float32)
    """
    return _file.read(path, svi_state)
