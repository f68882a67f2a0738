"""The optimiser's update of all parameters at once.

Pyro keeps one optimiser of PyTorch for each parameter. :class:`Update` runs one for all of them
on the same state and with the same hyperparameters, read anew at each step, so that what edits,
schedules, saves or loads the host's objects works as before, and host's steps may follow.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

# Each updates one parameter after another: a group is no more than its members.
MERGED = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
FUSED: dict[type, tuple[str, ...]] = {
    torch.optim.Adagrad: ("cpu",),
    torch.optim.Adam: ("cpu", "cuda"),
    torch.optim.AdamW: ("cpu", "cuda"),
    torch.optim.SGD: ("cpu", "cuda"),
}


class Update:
    """Updates of one set of parameters."""

    def __init__(self, optim: PyroOptim, leaves: list[Tensor]) -> None:
        self.optim = optim
        self.leaves = leaves
        # Those that the host updates, and the merged ones with their own optimisers.
        self._alone: list[Tensor] = []
        self._members: list[Tensor] = []
        self._own: list[Any] = []
        self._merged: dict[type, Any] = {}
        self._clips: list[tuple[Any, Tensor]] = []
        # What tells that the host's side has changed; None where it is about to.
        self._seen: list[list[Any]] | None = None
        self._values: list[list[Any]] = []

    def __call__(self) -> None:
        """One step of all parameters that have a gradient."""
        if self._seen is None or self._ids() != [[*map(id, row)] for row in self._seen]:
            self._collect()
        for clip, leaf in self._clips:
            clip(leaf)
        if self._own:
            values = [[*own.param_groups[0].values()] for own in self._own]
            if values != self._values:
                self._group(values)
            for merged in self._merged.values():
                merged.step()
        if self._alone:
            self.optim(self._alone)

    def _ids(self) -> list[list[int]]:
        objects = self.optim.optim_objs.values()
        return [[*map(id, objects)], [id(own.state) for own in self._own]]

    def _collect(self) -> None:
        """Sort the parameters into those that can be merged and those that the host updates."""
        self._alone, self._members, self._own = [], [], []
        self._clips, self._merged = [], {}
        states: dict[type, defaultdict] = defaultdict(lambda: defaultdict(dict))
        waiting = False
        for leaf in self.leaves:
            own = self.optim.optim_objs.get(leaf)
            # A scheduler holds the optimiser.
            own = getattr(own, "optimizer", own)
            if own is None or not _can_merge(own, leaf):
                self._alone.append(leaf)
                waiting |= own is None
                continue
            if not own.state.get(leaf) and not _is_stateless(own):
                # The host's own first step makes the state.
                self._alone.append(leaf)
                waiting = True
                continue
            self._members.append(leaf)
            self._own.append(own)
            # Where there is none the host's stays without.
            states[type(own)][leaf] = own.state.get(leaf, {})
            if self.optim.grad_clip[leaf] is not None:
                self._clips.append((self.optim.grad_clip[leaf], leaf))
        for own in self._own:
            if type(own) not in self._merged:
                merged = self._merged[type(own)] = copy.copy(own)
                merged.__dict__["state"] = states[type(own)]
        objects, held = [*self.optim.optim_objs.values()], [own.state for own in self._own]
        self._seen = None if waiting else [objects, held]
        self._group([[*own.param_groups[0].values()] for own in self._own])

    def _group(self, values: list[list[Any]]) -> None:
        """One group for each set of hyperparameters."""
        self._values = values
        groups: dict[Any, dict[str, Any]] = {}
        for merged in self._merged.values():
            merged.__dict__["param_groups"] = []
        for leaf, own in zip(self._members, self._own, strict=True):
            options = {k: v for k, v in own.param_groups[0].items() if k != "params"}
            options = _fused(type(own), options, leaf)
            state = own.state.get(leaf, {})
            if not state and not _is_stateless(own):
                return self._collect()  # It was given a momentum.
            if options.get("fused"):
                _move_counter(state, leaf)
            try:
                group = groups.setdefault((type(own), *options.items()), {"params": []})
            except TypeError:  # Something without a hash: a group of its own.
                group = {"params": []}
            if not group["params"]:
                group.update(options)
                self._merged[type(own)].param_groups.append(group)
            group["params"].append(leaf)


def _can_merge(own: Any, leaf: Tensor) -> bool:
    """Whether the parameter's optimiser does what one for many parameters does."""
    if type(own) not in MERGED or [*map(id, own.param_groups[0]["params"])] != [id(leaf)]:
        return False
    return not (own._optimizer_step_pre_hooks or own._optimizer_step_post_hooks)


def _is_stateless(own: Any) -> bool:
    return type(own) is torch.optim.SGD and own.param_groups[0]["momentum"] == 0


def _fused(kind: type, options: dict[str, Any], leaf: Tensor) -> dict[str, Any]:
    """The options with the fused kernel, where the user has not chosen another."""
    chosen = ("foreach", "fused", "capturable", "differentiable")
    if any(options.get(name) for name in chosen) or leaf.device.type not in FUSED.get(kind, ()):
        return options
    if not leaf.is_floating_point():
        return options
    return {**options, "foreach": None, "fused": True}


def _move_counter(state: dict[str, Any], leaf: Tensor) -> None:
    """The fused kernels count steps on the parameter's device."""
    counter = state.get("step")
    if isinstance(counter, Tensor) and counter.device != leaf.device:
        state["step"] = counter.to(device=leaf.device, dtype=torch.float32)
