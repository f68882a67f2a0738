"""What the handlers share: a program wrapped in one that takes a number, or a function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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
    if not callable(number):
        check(number)

    def program(*args: Any, **kwargs: Any) -> Any:
        value = number(*args, **kwargs) if callable(number) else number
        check(value)
        with handler(value):
            return fn(*args, **kwargs)

    # An object's attributes are none of the function's.
    return functools.update_wrapper(program, fn, updated=())
