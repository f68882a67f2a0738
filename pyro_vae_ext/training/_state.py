"""State of a run outside of the parameters, and what a file can have of it.

Found here are the buffers of the programs' modules and the optimiser's state of each parameter;
values are encoded as JSON has them, tensors aside.
"""

from __future__ import annotations

import collections
import gc
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.distributions import constraints as pyro_constraints
from pyro.infer import SVI
from torch import Tensor
from torch.distributions import constraints

from pyro_vae_ext.training._graph import RandomState


class Place(NamedTuple):
    """Where a buffer is: a module may replace the tensor."""

    module: torch.nn.Module
    name: str

    @property
    def tensor(self) -> Tensor | None:
        """The buffer as it is now."""
        return self.module._buffers.get(self.name)

    def put(self, value: Tensor) -> None:
        """Write into the buffer."""
        tensor = self.tensor
        if tensor is not None and tensor.shape == value.shape:
            with torch.no_grad():
                tensor.copy_(value)
        else:
            self.module._buffers[self.name] = value.clone()


def buffers(roots: dict[str, torch.nn.Module]) -> dict[str, Place]:
    """The buffers of modules and of all in them, by name; each of them once."""
    found: dict[str, Place] = {}
    seen: set[tuple[int, str]] = set()
    for prefix, root in roots.items():
        for path, module in root.named_modules():
            for name in module._buffers:
                if (id(module), name) not in seen:
                    seen.add((id(module), name))
                    found[".".join(filter(None, (prefix, path, name)))] = Place(module, name)
    return found


def modules(svi: SVI) -> dict[str, torch.nn.Module]:
    """Programs that are modules, or methods of one, and modules registered with ``pyro.module``."""
    roots: dict[str, torch.nn.Module] = {}
    for name, program in (("model", svi.model), ("guide", svi.guide)):
        while hasattr(program, "__wrapped__"):
            program = program.__wrapped__
        owner = getattr(program, "__self__", program)
        if isinstance(owner, torch.nn.Module):
            roots[name] = owner
    registered: dict[str, dict[str, Tensor]] = {}
    for full, leaf in leaves(svi).items():
        name, divider, inner = full.partition("$$$")
        if divider:
            registered.setdefault(name, {})[inner] = leaf
    if registered:
        # The store knows a module's parameters and not the module, which may hide in a closure.
        alive = [item for item in gc.get_objects() if issubclass(type(item), torch.nn.Module)]
        for name, wanted in registered.items():
            for module in alive:
                if all(_parameter(module, inner) is leaf for inner, leaf in wanted.items()):
                    roots[name] = module
                    break
    return roots


def _parameter(module: Any, path: str) -> Any:
    """The parameter of a module under a dotted name; None without one."""
    *parts, last = path.split(".")
    for part in parts:
        # Without these dictionaries its __init__ has not run.
        module = vars(module).get("_modules", {}).get(part)
        if module is None:
            return None
    return vars(module).get("_parameters", {}).get(last)


def leaves(svi: SVI) -> dict[str, Tensor]:
    """Unconstrained parameters that the optimiser has seen; all of the store before its first."""
    everything = dict(pyro.get_param_store().named_parameters())
    return {n: leaf for n, leaf in everything.items() if leaf in svi.optim.optim_objs} or everything


def optimiser_state(own: Any) -> dict[str, Any]:
    """As in the host's ``PyroOptim.get_state``: a scheduler holds the optimiser."""
    if hasattr(own, "optimizer"):
        return {"scheduler": own.state_dict(), "optimizer": own.optimizer.state_dict()}
    return own.state_dict()


def load_optimiser(optim: Any, leaf: Tensor, state: dict[str, Any]) -> None:
    """Give a parameter's optimiser its state; it is made first, as at the host's first step."""
    if leaf not in optim.optim_objs:
        optim.optim_objs[leaf] = optim._get_optim(leaf)
        optim.grad_clip[leaf] = optim._get_grad_clip(leaf)
    own = optim.optim_objs[leaf]
    if hasattr(own, "optimizer"):
        own.load_state_dict(state["scheduler"])
        own, state = own.optimizer, state["optimizer"]
    groups, numbers = own.param_groups, own.state[leaf]
    own.load_state_dict(state)
    # The same objects as before: others may hold them.
    for old, new in zip(groups, own.param_groups, strict=True):
        old.clear()
        old.update(new)
    loaded = dict(own.state.get(leaf, {}))
    numbers.clear()
    numbers.update(loaded)
    own.param_groups, own.state[leaf] = groups, numbers


class Random(NamedTuple):
    """States of the global random numbers, and of generators that a run has besides."""

    state: RandomState
    others: list[Tensor]

    @classmethod
    def now(cls, generators: Iterable[torch.Generator] = ()) -> Random:
        """The present states."""
        return cls(RandomState.now(), [generator.get_state() for generator in generators])

    def restore(self, generators: Iterable[torch.Generator] = ()) -> None:
        """Make these the present states."""
        self.state.restore()
        for generator, state in zip(generators, self.others, strict=True):
            generator.set_state(state)

    def flat(self) -> tuple[dict[str, Tensor], dict[str, list]]:
        """The same as tensors by name, and what JSON has of it."""
        kind, words, *numbers = self.state.host["numpy"]
        version, inner, gauss = self.state.host["random"]
        tensors = {
            "torch": self.state.host["torch"],
            "numpy": torch.from_numpy(words.astype(np.int64)),
            "python": torch.tensor(inner, device="cpu"),
        }
        for name, states in (("device", self.state.devices), ("generator", self.others)):
            tensors |= {f"{name}{place}": state for place, state in enumerate(states)}
        return tensors, {"numpy": [kind, *numbers], "python": [version, gauss]}

    @classmethod
    def unflat(cls, tensors: dict[str, Tensor], numbers: dict[str, list]) -> Random:
        """The states of which :meth:`flat` returned the parts."""
        kind, *others = numbers["numpy"]
        version, gauss = numbers["python"]
        host = {
            "torch": tensors["torch"].clone(),
            "numpy": (kind, tensors["numpy"].numpy().astype(np.uint32), *others),
            "random": (version, tuple(tensors["python"].tolist()), gauss),
        }
        lists: dict[str, list[Tensor]] = {}
        for name in ("device", "generator"):
            count = sum(key.startswith(name) for key in tensors)
            lists[name] = [tensors[f"{name}{place}"].clone() for place in range(count)]
        return cls(RandomState(host, tuple(lists["device"])), lists["generator"])


class Encoder:
    """Values as JSON has them, with the tensors put aside."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, name: str, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Tensor):
            self.tensors[name] = value
            return {"tensor": name}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [*self._all(name, enumerate(value))]}
        if isinstance(value, dict):
            kind = "Counter" if isinstance(value, collections.Counter) else "dict"
            keys = [self(f"{name}/key{place}", key) for place, key in enumerate(value)]
            return {kind: [*map(list, zip(keys, self._all(name, value.items()), strict=True))]}
        if isinstance(value, constraints.Constraint) and _constraint(type(value).__name__):
            return {"constraint": [type(value).__name__, self(name, dict(vars(value)))]}
        raise ValueError(
            "Expected numbers, strings and tensors in the state of a checkpoint; got "
            f"{type(value).__name__} in {name}. Use an optimiser and constraints of torch or Pyro."
        )

    def _all(self, name: str, items: Any) -> Iterator[Any]:
        for key, value in items:
            yield self(f"{name}/{key}", value)


class Decoder:
    """The values that :class:`Encoder` was given."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return self.tensors[inner].clone()
        if kind == "constraint":
            name, state = inner
            found = object.__new__(_constraint(name))
            vars(found).update(self(state))
            return found
        if kind in ("dict", "Counter"):
            items = {self(key): self(item) for key, item in inner}
            return collections.Counter(items) if kind == "Counter" else items
        return (list if kind == "list" else tuple)(self(item) for item in inner)


def _constraint(name: str) -> Any:
    """A class of constraints of torch or Pyro."""
    return getattr(constraints, name, None) or getattr(pyro_constraints, name, None)


class Guard:
    """What buffers held before a step, to undo what the step wrote."""

    def __init__(self, places: dict[str, Place]) -> None:
        self.places: dict[str, Place] = {}
        self._copies: dict[str, Tensor] = {}
        self._changing: set[str] = set()
        self.add(places)

    def add(self, places: dict[str, Place]) -> None:
        """Guard more buffers, as they are now."""
        known = {(id(place.module), place.name) for place in self.places.values()}
        for name, place in places.items():
            if place.tensor is not None and (id(place.module), place.name) not in known:
                self.places[name] = place
                self._copies[name] = place.tensor.detach().clone()

    def take_over(self, other: Guard) -> None:
        """Guard what another one does, too, under its names if there are none."""
        self.add(other.places)
        changing = {(id(p.module), p.name) for n, p in other.places.items() if n in other._changing}
        for name, place in self.places.items():
            if (id(place.module), place.name) in changing:
                self._changing.add(name)

    def look(self) -> None:
        """Find the buffers that steps write; the others need no copy after each of them."""
        for name, place in self.places.items():
            if _changed(place.tensor, self._copies[name]):
                self._changing.add(name)

    def keep(self) -> None:
        """Hold on to what the buffers are now."""
        for name in self._changing:
            tensor, copy = self.places[name].tensor, self._copies[name]
            if tensor is not None and tensor.shape == copy.shape:
                copy.copy_(tensor)
            elif tensor is not None:
                self._copies[name] = tensor.detach().clone()

    def undo(self) -> None:
        """Put back what the buffers were at the last :meth:`keep`."""
        for name, place in self.places.items():
            if _changed(place.tensor, self._copies[name]):
                place.put(self._copies[name])


def _changed(tensor: Tensor | None, copy: Tensor) -> bool:
    if tensor is None or tensor.shape != copy.shape:
        return True
    # NaN is no change of NaN.
    return not bool(((tensor == copy) | ((tensor != tensor) & (copy != copy))).all())
