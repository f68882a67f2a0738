"""The file of a checkpoint: written whole or not at all, and checked before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions import transform_to

from pyro_vae_ext.training._state import (
    Decoder,
    Encoder,
    Place,
    Random,
    leaves,
    load_optimiser,
    optimiser_state,
)

HEADER = "vae_ext"
REMEDY = "Pass resume=False to start anew, or another path."


class NotFinite(ValueError):
    """A parameter is not finite, and nothing has been written."""


def write(
    path: str | os.PathLike,
    svi: SVI,
    places: dict[str, Place],
    metadata: dict[str, Any] | None = None,
    arrays: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint with the buffers given."""
    own = leaves(svi)
    for name, leaf in own.items():
        if not bool(torch.isfinite(leaf).all()):
            raise NotFinite(
                f"Expected finite parameters in a checkpoint; got non-finite values in '{name}'. "
                "The last checkpoint is kept."
            )
    tensors: dict[str, Tensor] = {f"param/{name}": leaf for name, leaf in own.items()}
    tensors |= {f"buffer/{n}": p.tensor for n, p in places.items() if p.tensor is not None}
    tensors |= {f"array/{name}": torch.as_tensor(x) for name, x in (arrays or {}).items()}
    encode = Encoder(tensors)
    domains = pyro.get_param_store().get_state()["constraints"]
    random, numbers = Random.now().flat()
    tensors |= {f"random/{name}": state for name, state in random.items()}
    header = {
        "optimiser": {
            name: encode(f"optimiser/{name}", optimiser_state(svi.optim.optim_objs[leaf]))
            for name, leaf in own.items()
            if leaf in svi.optim.optim_objs
        },
        "constraints": {
            name: encode(f"constraint/{name}", domains[name]) for name in own if name in domains
        },
        "kind": _kind_of(svi),
        "random": numbers,
        "metadata": metadata or {},
    }
    # Copies: safetensors takes no two views of one memory.
    copies = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    path = Path(path)
    # A folder, since the library writes by way of a file of its own; under one name, so that what a
    # killed process has left is removed.
    folder = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        save_file(copies, folder / path.name, {HEADER: json.dumps(header)})
        _sync(folder / path.name)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Stored(NamedTuple):
    """What a file holds."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def metadata(self) -> dict[str, Any]:
        """The user's own."""
        return self.header["metadata"]

    @property
    def arrays(self) -> dict[str, Tensor]:
        """The user's own."""
        return self.part("array")

    def part(self, kind: str) -> dict[str, Tensor]:
        """Tensors of one kind, by name."""
        start = f"{kind}/"
        return {n[len(start) :]: x for n, x in self.tensors.items() if n.startswith(start)}

    def mismatch(self, got: str) -> ValueError:
        """The error about a file of another run."""
        return ValueError(
            f"Expected the checkpoint of this run at {self.path}; got {got}. {REMEDY}"
        )

    def apply(self, svi: SVI, places: dict[str, Place], names: Iterable[str] = ()) -> None:
        """Put parameters, optimiser, buffers and random numbers back; check first.

        ``names`` are of parameters that there must be.
        """
        store = pyro.get_param_store()
        params = self.part("param")
        decode = Decoder(self.tensors)
        domains = {n: decode(value) for n, value in self.header["constraints"].items()}
        for name in names:
            if name not in params:
                raise self.mismatch(f"one without the parameter '{name}'")
        self._check(svi, params, domains, places)
        for name, value in params.items():
            if name not in store:
                start = transform_to(domains[name])(value)
                store.setdefault(name, start, domains[name])
        own = dict(store.named_parameters())
        with torch.no_grad():
            for name, value in params.items():
                # Not by a constrained value: its way back loses digits.
                own[name].copy_(value)
        for name in own:
            if name in self.header["optimiser"]:
                state = decode(self.header["optimiser"][name])
                load_optimiser(svi.optim, own[name], state)
            elif name in params:
                svi.optim.optim_objs.pop(own[name], None)
        for name, value in self.part("buffer").items():
            places[name].put(value)
        Random.unflat(self.part("random"), self.header["random"]).restore()

    def _check(
        self,
        svi: SVI,
        params: dict[str, Tensor],
        domains: dict[str, Any],
        places: dict[str, Place],
    ) -> None:
        if self.header["kind"] != _kind_of(svi):
            raise self.mismatch(
                f"the optimiser {self.header['kind']}, where {_kind_of(svi)} is used here"
            )
        store = pyro.get_param_store()
        own = dict(store.named_parameters())
        now = store.get_state()["constraints"]
        for name, value in params.items():
            if name not in own and "$$$" in name:
                raise _unregistered(name)
            if name in own and (own[name].shape != value.shape or own[name].dtype != value.dtype):
                raise self.mismatch(
                    f"{_kind(value)} for the parameter '{name}', which has {_kind(own[name])} here"
                )
            if name in now and name in domains and str(now[name]) != str(domains[name]):
                raise self.mismatch(
                    f"the constraint {domains[name]} for the parameter '{name}', which has "
                    f"{now[name]} here"
                )
        for name, value in self.part("buffer").items():
            if name not in places or places[name].tensor is None:
                raise _unregistered(name)
            here: Any = places[name].tensor
            if here.shape != value.shape or here.dtype != value.dtype:
                raise self.mismatch(
                    f"{_kind(value)} for the buffer '{name}', which has {_kind(here)} here"
                )


def _kind_of(svi: SVI) -> str:
    """Name of the optimiser."""
    maker = svi.optim.pt_optim_constructor
    return getattr(maker, "__name__", type(maker).__name__)


def _kind(value: Tensor) -> str:
    return f"shape {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _unregistered(name: str) -> ValueError:
    return ValueError(
        f"Expected modules to be registered before a checkpoint is loaded; got none with '{name}'. "
        "Call svi.evaluate_loss on a batch before, or load it with the programs that it is of."
    )


def read(path: str | os.PathLike) -> Stored:
    """Read a file; nothing is changed."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"Expected a checkpoint at {path}; got no such file.")
    stored = Stored(path, {}, {})
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise stored.mismatch("a file that is no checkpoint") from error
    if header is None:
        raise stored.mismatch("a file that save_checkpoint did not write")
    return Stored(path, json.loads(header), tensors)
