"""What the handlers share: a program wrapped in one that takes a number, or a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.guide import GuideMessenger

Program = Callable[..., Any]


def wrapped(
    fn: Program,
    number: Any,
    check: Callable[[Any], None],
    handler: Callable[[Any], Any],
) -> Program:
    """``fn`` under ``handler(number)``, the number checked.

    A function in its place is evaluated at every call, with the arguments of ``fn``.
    """
    if isinstance(fn, GuideMessenger):
        # The host's objectives would not know it for one, and count its data as the guide's.
        raise TypeError(
            f"Expected a program that a handler can wrap; got {type(fn).__name__}, a messenger "
            "that runs the model itself. Use AutoNormal, or a guide family."
        )
    if not callable(number):
        check(number)

    def program(*args: Any, **kwargs: Any) -> Any:
        value = number(*args, **kwargs) if callable(number) else number
        check(value)
        with handler(value):
            return fn(*args, **kwargs)

    if isinstance(fn, torch.nn.Module):
        return _Module(fn, program)
    return functools.update_wrapper(program, fn)


class _Module(torch.nn.Module):
    """A wrapped module is a module: its parameters are those of what it runs."""

    def __init__(self, fn: torch.nn.Module, program: Program) -> None:
        super().__init__()
        self.fn = fn
        self._program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._program(*args, **kwargs)
