"""What a step does besides its result, and what of it no graph can follow.

:class:`Effects` remembers what is written in place, so that a step can be run and undone, and
refuses, with :class:`Untraceable`, what would be frozen into a graph.
"""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
import torch.utils._pytree as pytree
from pyro.infer.util import torch_item
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Untraceable(Exception):
    """The step cannot be one graph; the message is the cause, in one line."""


class Unrepeatable(Untraceable):
    """The step used a tensor that the last run of it made, and may make again."""


class RandomState(NamedTuple):
    """States of all random number generators that a step may use."""

    host: Any
    devices: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> RandomState:
        """The present states."""
        used = torch.cuda.is_initialized()
        return cls(pyro.util.get_rng_state(), tuple(torch.cuda.get_rng_state_all()) if used else ())

    def restore(self) -> None:
        """Set the generators to these states."""
        pyro.util.set_rng_state(self.host)
        if self.devices:
            torch.cuda.set_rng_state_all(list(self.devices))

    def same(self, other: RandomState) -> bool:
        """Whether the tensor library's generators are at the same point."""
        mine = [self.host["torch"], *self.devices]
        theirs = [other.host["torch"], *other.devices]
        return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


class Effects(TorchDispatchMode):
    """Remembers what tensors held before they were first written, and which it found.

    With ``strict=True`` it raises where Python reads the value of a tensor that the run did not
    make itself, where a shape depends on values, and where random numbers are set back.
    """

    # Their schemas do not say that they write the running statistics.
    NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default)

    def __init__(self, *, strict: bool = False) -> None:
        super().__init__()
        self.strict = strict
        self._before: dict[int, tuple[Any, Any]] = {}
        self._found: dict[int, Any] = {}
        self._made: set[int] = set()
        self._numbers: dict[int, Tensor] = {}
        self._random: RandomState | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What happens here is no part of the graph.
        with disable_proxy_modes_tracing():
            if self.strict:
                self._check(func, args, kwargs)
            for tensor in _tensors((args, kwargs)):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._made:
                    self._found[storage._cdata] = storage
            for written in _written(func, args, kwargs):
                storage = written.untyped_storage()
                if storage._cdata not in self._before:
                    self._before[storage._cdata] = storage, storage.clone()
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in self._found:
                self._made.add(tensor.untyped_storage()._cdata)
        if self.strict:
            if draws(func):
                with disable_proxy_modes_tracing():
                    self._random = RandomState.now()
            # Constants that the programs make are one number each: Python may read these.
            for tensor in _tensors(args if func is aten.lift_fresh.default else result):
                if tensor.numel() <= 1:
                    self._numbers[tensor.untyped_storage()._cdata] = tensor
        return result

    def _check(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        tensors = _tensors((args, kwargs))
        if torch.Tag.data_dependent_output in func.tags:
            if any(t.untyped_storage()._cdata not in self._numbers for t in tensors):
                raise Untraceable("a tensor's value read in Python")
        elif func is aten.index.Tensor:
            kinds = [tensor.dtype for tensor in _tensors(args[1])]
            if torch.bool in kinds or torch.uint8 in kinds:
                raise Untraceable("a shape that depends on a mask's values")
        elif torch.Tag.dynamic_output_shape in func.tags:
            raise Untraceable(f"a shape that depends on values, of {func.__name__}")
        elif draws(func) and self._random is not None:
            if not self._random.same(RandomState.now()):
                raise Untraceable("random numbers that are set back within the step")

    def undo(self) -> None:
        """Give all written tensors what they held before."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def found(self, tensor: Tensor) -> bool:
        """Whether the tensor, which the run used, was there before it."""
        return tensor.untyped_storage()._cdata in self._found

    def wrote(self, tensor: Tensor) -> bool:
        """Whether the tensor was written in place."""
        return tensor.untyped_storage()._cdata in self._before


class Modules:
    """The modules that a run calls, and their attributes before it."""

    def __init__(self) -> None:
        self._before: dict[torch.nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}

    def __enter__(self) -> Modules:
        self._hook = register_module_forward_pre_hook(self._see)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _see(self, module: torch.nn.Module, args: Any) -> None:
        if module not in self._before:
            for inner in module.modules():
                self._before.setdefault(inner, (dict(vars(inner)), dict(inner._buffers)))

    def called(self) -> list[torch.nn.Module]:
        """The modules, and those inside of them."""
        return list(self._before)

    def replaced(self) -> set[int]:
        """Storages of tensors that had names in the modules which are others' now."""
        found = set()
        for module, befores in self._before.items():
            for before, now in zip(befores, (vars(module), module._buffers), strict=True):
                for name, value in before.items():
                    if isinstance(value, Tensor) and now.get(name) is not value:
                        found.add(value.untyped_storage()._cdata)
        return found

    def undo(self) -> None:
        """Give them the attributes and buffers that they had, as the same objects."""
        for module, (attributes, buffers) in self._before.items():
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


class Values(TorchFunctionMode):
    """Values that leave the tensors' world without an operation, and the hosts' own checks."""

    READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
    # Objects made under validation test their values, and the host's objectives look for NaN: a
    # graph goes on as if all were well.
    TESTS = {
        torch.distributions.Distribution._validate_sample.__code__: True,
        pyro.util.warn_if_nan.__code__: False,
        pyro.util.warn_if_inf.__code__: False,
    }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__bool__ and sys._getframe(1).f_code in self.TESTS:
            return self.TESTS[sys._getframe(1).f_code]
        if func is Tensor.item and sys._getframe(1).f_code is torch_item.__code__:
            return args[0].detach()  # The host's objectives add these up, and no more.
        if func in self.READS:
            raise Untraceable("a tensor's value read in Python")
        return func(*args, **(kwargs or {}))


def foreign_draws() -> tuple[Any, ...]:
    """States of the generators that no graph can replay."""
    state: Any = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["pos"], bytes(state["key"])


def draws(op: Any) -> bool:
    """Whether an operation takes numbers from a generator."""
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments that an operation writes."""
    if func in Effects.NORMS:
        yield from (value for value in args[3:5] if args[5] and value is not None)
    if not func._schema.is_mutable:
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def cause(error: BaseException) -> str:
    """What went wrong, in one line, with the innermost line of code outside of torch."""
    if isinstance(error, Untraceable):
        text = str(error)
    elif "get value out of a tracing tensor" in str(error):
        text = "a tensor's value read in Python"
    else:
        text = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    torch_folder, here = str(Path(torch.__file__).parent), __file__
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((torch_folder, here, "<")):
            return f"{text} ({Path(frame.filename).name}, line {frame.lineno})"
    return text
