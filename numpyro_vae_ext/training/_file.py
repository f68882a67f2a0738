"""Files of a checkpoint: a folder that is complete, or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.example_libraries.optimizers import OptimizerState
from numpyro.infer.svi import SVIState

FORMAT = 1


def write(
    path: str | os.PathLike[str],
    svi_state: SVIState,
    metadata: Mapping[str, Any] | None,
    arrays: Mapping[str, Any] | None,
) -> None:
    """Write a new checkpoint beside the last one, and remove that."""
    for name, value in _named(_params(svi_state.optim_state)):
        if not np.isfinite(np.asarray(value)).all():
            raise ValueError(
                "Expected finite parameters in a checkpoint; got non-finite values in "
                f"'{name}'. The last checkpoint is kept."
            )
    state = [(name, value) for name, value in _named(svi_state)]
    further = dict(arrays or {})
    values = pack([value for _, value in state] + list(further.values()))
    header = {
        "format": FORMAT,
        "state": [[name, list(np.shape(x)), _dtype(x)] for name, x in state],
        "arrays": list(further),
        "metadata": dict(metadata or {}),
    }
    folder = Path(os.path.abspath(path))
    folder.mkdir(parents=True, exist_ok=True)
    done = _complete(folder)
    _remove(folder.glob("writing-*"))
    fresh = folder / f"writing-{uuid.uuid4().hex}"
    fresh.mkdir()
    _write(fresh, header, values)
    for written in sorted(fresh.rglob("*"), reverse=True):
        _flush(written)
    _flush(fresh)
    os.rename(fresh, folder / str(done[-1] + 1 if done else 0))
    _flush(folder)
    _remove(folder / str(number) for number in done)


def read(
    path: str | os.PathLike[str], svi_state: SVIState
) -> tuple[SVIState, dict[str, Any], dict[str, np.ndarray]]:
    """The state, the metadata and the arrays of the newest checkpoint."""
    folder = Path(os.path.abspath(path))
    done = _complete(folder)
    if not done:
        raise ValueError(f"Expected a checkpoint at {path}; got no such file.")
    header, values = _read(folder / str(done[-1]))
    templates = _named(svi_state)
    saved = {name: (tuple(shape), dtype) for name, shape, dtype in header["state"]}
    asked = {name: (np.shape(x), _dtype(x)) for name, x in templates}
    for name in [*asked, *saved]:
        if name not in saved:
            raise mismatch(path, f"one without '{name}'")
        if name not in asked:
            raise mismatch(path, f"one with '{name}', which is not here")
        if saved[name] != asked[name]:
            (shape, dtype), (own_shape, own_dtype) = saved[name], asked[name]
            raise mismatch(
                path,
                f"shape {shape} of {dtype} for '{name}', which has shape {own_shape} of "
                f"{own_dtype} here",
            )
    # By name: the state is that of another process, whose order need not be ours.
    by_name = dict(zip(saved, values, strict=False))
    leaves = unpack([by_name[name] for name, _ in templates], [x for _, x in templates])
    further = dict(zip(header["arrays"], values[len(saved) :], strict=True))
    state = jax.tree.unflatten(jax.tree.structure(svi_state), leaves)
    return state, header["metadata"], further


def mismatch(path: Any, what: str) -> ValueError:
    """The error of a checkpoint that belongs to another run."""
    return ValueError(
        f"Expected the checkpoint of this run at {path}; got {what}. Pass resume=False to start "
        "anew, or another path."
    )


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a complete checkpoint."""
    return bool(_complete(Path(os.path.abspath(path))))


def pack(values: Iterable[Any]) -> list[np.ndarray]:
    """Arrays as NumPy's; keys as their numbers."""
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in values]


def unpack(values: Iterable[np.ndarray], templates: Iterable[Any]) -> list[jax.Array]:
    """Arrays and keys of which :func:`pack` gave the values."""
    found = []
    for value, template in zip(values, templates, strict=True):
        array = jnp.asarray(value)
        if is_key(template):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(template))
        if getattr(template, "committed", False):
            array = jax.device_put(array, template.sharding)
        found.append(array)
    return found


def is_key(x: Any) -> bool:
    """Whether an array is one of typed keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _dtype(x: Any) -> str:
    return str(x.dtype if is_key(x) else jnp.result_type(x))


def _params(optim_state: Any) -> Any:
    """The parameters in the state of an optimiser of Optax's or of NumPyro's."""
    inner = optim_state[1]
    if isinstance(inner, OptimizerState):
        # Each parameter comes first in the state of its own.
        first = [
            jax.tree.leaves(jax.tree.unflatten(tree, packed))[0]
            for tree, packed in zip(inner.subtree_defs, inner.packed_state, strict=True)
        ]
        return jax.tree.unflatten(inner.tree_def, first)
    return inner[0] if isinstance(inner, tuple) and len(inner) == 2 else inner


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Leaves and their places in words."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), x) for path, x in leaves]


def _complete(folder: Path) -> list[int]:
    """Numbers of the complete checkpoints of a folder, the newest last."""
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())


def _write(folder: Path, header: dict[str, Any], values: list[np.ndarray]) -> None:
    from orbax import checkpoint as orbax

    # Orbax refuses arrays without a number in them.
    header["values"] = [[list(x.shape), str(x.dtype)] for x in values]
    tree = {str(place): x for place, x in enumerate(values) if x.size}
    if tree:
        with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as writer:
            writer.save(folder / "arrays", tree)
    (folder / "header.json").write_text(json.dumps(header), encoding="utf-8")


def _read(folder: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    from orbax import checkpoint as orbax

    header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
    filled = [str(i) for i, (shape, _) in enumerate(header["values"]) if 0 not in shape]
    tree = {}
    if filled:
        plain = orbax.RestoreArgs(restore_type=np.ndarray)
        options = orbax.args.PyTreeRestore(restore_args=dict.fromkeys(filled, plain))
        with orbax.Checkpointer(orbax.PyTreeCheckpointHandler()) as reader:
            tree = reader.restore(folder / "arrays", args=options)
    values = [
        np.asarray(tree[str(i)]) if str(i) in tree else np.empty(shape, dtype)
        for i, (shape, dtype) in enumerate(header["values"])
    ]
    return header, values


def _flush(path: Path) -> None:
    """Have a file or folder on the disk, not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
