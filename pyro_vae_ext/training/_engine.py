"""One training step in two halves: gradients, then the optimiser's update.

The host's ``SVI.step`` does both at once. A step whose gradient is not finite must stop between
them, and a compiled step replaces the first half by a graph, one for each kind of arguments.
"""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
import torch.utils._pytree as pytree
from pyro.infer import SVI
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyro_vae_ext import _trace
from pyro_vae_ext.training._effects import (
    Effects,
    Modules,
    RandomState,
    Unrepeatable,
    Untraceable,
    cause,
)
from pyro_vae_ext.training._graph import Graph, can_capture, capture, lower, trace, unique
from pyro_vae_ext.training._update import Update

MAX_GRAPHS = 16
# Graphs that differ in nothing but a number of Python.
MAX_NUMBERS = 3
# Attempts to trace a step that makes tensors for the next one.
MAX_TRIALS = 3
NUMBERS = (int, float)
PLAIN = (bool, str, type(None), *NUMBERS)


class Gradients(NamedTuple):
    """A loss whose gradients lie in the parameters' ``grad``.

    Attributes:
        loss: Scalar tensor without a gradient.
        finite: Scalar bool tensor: whether the loss and all gradients are finite.
        params: Unconstrained parameters by name.
        written: Tensors that a compiled step writes besides, such as running means, and what they
            held before it.
    """

    loss: Tensor
    finite: Tensor
    params: dict[str, Tensor]
    written: tuple[tuple[Tensor, Tensor], ...] = ()


class Engine:
    """Steps of one SVI.

    Args:
        svi: The host's SVI.
        backend: None for eager steps, or the backend of compiled ones, ``"inductor"`` or ``"fx"``.
    """

    def __init__(self, svi: SVI, *, backend: str | None = None) -> None:
        self.svi = svi
        self.backend = backend
        self.reset()

    def reset(self) -> None:
        """Forget the graphs, and what did not work."""
        self.graphs: dict[Any, list[Graph]] = {}
        self.eager = self.backend is None
        self._full = False
        self._trials = 0
        self._updates: dict[tuple[int, ...], Update] = {}
        self._owner = self._parts()

    @property
    def num_graphs(self) -> int:
        """Number of graphs."""
        return sum(map(len, self.graphs.values()))

    def gradients(self, args: tuple, kwargs: dict[str, Any]) -> Gradients:
        """Compute the loss and its gradients; nothing is updated."""
        # Under a handler a program is another one.
        if self.eager or not torch.is_grad_enabled() or am_i_wrapped():
            return self._eagerly(args, kwargs)
        if self._owner != self._parts():
            self.reset()
        try:
            key, tensors = self._key(args, kwargs)
            found = self.graphs.get(key, [])
        except Untraceable as error:
            self._give_up(str(error), 4)
            return self._eagerly(args, kwargs)
        store = dict(pyro.get_param_store().named_parameters())
        for graph in found:
            if not graph.alive(store):
                self.graphs = {}
                self._updates = {}
                break
            if graph.fits():
                return self._replay(graph, tensors)
        if self._full or self._is_full(key):
            return self._eagerly(args, kwargs)
        return self._make(args, kwargs)

    def update(self, gradients: Gradients) -> None:
        """Let the optimiser step, and clear the gradients."""
        leaves = unique(gradients.params)
        if self.backend is None:
            self.svi.optim(leaves)
        else:
            key = tuple(map(id, leaves))
            if key not in self._updates:
                self._updates[key] = Update(self.svi.optim, leaves)
            self._updates[key]()
        self._clear(gradients.params)

    def discard(self, gradients: Gradients) -> None:
        """Clear the gradients, and undo what a compiled step wrote."""
        self._clear(gradients.params)
        with torch.no_grad():
            for tensor, before in gradients.written:
                tensor.copy_(before)

    def _clear(self, params: dict[str, Tensor]) -> None:
        for leaf in params.values():
            leaf.grad = None

    def _parts(self) -> tuple[Any, ...]:
        svi = self.svi
        return svi.model, svi.guide, svi.loss_and_grads, svi.optim

    def _eagerly(self, args: tuple, kwargs: dict[str, Any]) -> Gradients:
        svi = self.svi
        loss, params = _trace.captured(svi.loss_and_grads, svi.model, svi.guide, *args, **kwargs)
        if isinstance(loss, tuple):
            raise ValueError(
                f"Expected an objective with one loss; got {len(loss)}. Use the host's SVI.step."
            )
        loss = torch.as_tensor(loss).detach()
        finite = torch.isfinite(loss)
        for leaf in params.values():
            if leaf.grad is not None:
                finite = finite & torch.isfinite(leaf.grad).all()
        return Gradients(loss, finite, params)

    def _replay(self, graph: Graph, tensors: list[Tensor]) -> Gradients:
        written = tuple((tensor, tensor.clone()) for tensor in graph.written)
        loss, finite = graph(tensors)
        return Gradients(loss, finite, graph.params, written)

    def _key(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        """What a graph depends on besides the parameters, and the tensors among the arguments."""
        leaves: list[Any] = [*args, *kwargs.values()]
        spec: Any = tuple(kwargs)
        if any(type(leaf) is not Tensor and type(leaf) not in PLAIN for leaf in leaves):
            leaves, spec = pytree.tree_flatten((args, kwargs))
            spec = repr(spec)
        tensors: list[Tensor] = []
        described: list[Any] = [
            len(args),
            spec,
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
            # Numbers of the objective, such as a temperature that follows a schedule.
            *self._settings(),
        ]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if type(leaf) is not Tensor or leaf.layout is not torch.strided:
                    raise Untraceable("an argument that is no ordinary tensor")
                if leaf.requires_grad:
                    raise Untraceable("an argument that requires a gradient")
                tensors.append(leaf)
                described.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
            else:
                if type(leaf).__hash__ is None:
                    raise Untraceable(f"an argument of type {type(leaf).__name__} among tensors")
                described.append((type(leaf), leaf))
        return tuple(described), tensors

    def _settings(self) -> list[Any]:
        owner = getattr(self.svi.loss_and_grads, "__self__", None)
        values = getattr(owner, "__dict__", {})
        return [(type(v), v) for v in values.values() if type(v) in PLAIN]

    def _is_full(self, key: tuple) -> bool:
        """Whether one more graph would be too many; then warns, once."""
        alike = [other for other in self.graphs if _differ_in_numbers(key, other)]
        if len(alike) >= MAX_NUMBERS:
            i = next(i for i in range(len(key)) if key[i] != alike[-1][i])
            got = f"{len(alike) + 1} values of {self._argument(key, i)}"
        elif self.num_graphs >= MAX_GRAPHS:
            got = f"more than {MAX_GRAPHS} kinds of arguments"
        else:
            return False
        self._full = True
        warnings.warn(
            f"Expected arguments that repeat; got {got}, each of which is a graph of its own. Pass "
            "numbers that change as tensors. New ones run eagerly.",
            UserWarning,
            stacklevel=4,
        )
        return True

    def _argument(self, key: tuple, i: int) -> str:
        """Name of the argument behind an entry of a key."""
        num_args, spec = key[:2]
        first = 5 + len(self._settings())
        if i < first:
            return "a number of the objective"
        if isinstance(spec, tuple):
            if i - first >= num_args:
                return f"'{spec[i - first - num_args]}'"
            try:
                names = list(inspect.signature(self.svi.model).parameters)
                return f"'{names[i - first]}'"
            except (IndexError, TypeError, ValueError):
                pass
        return f"a number among the arguments, {key[i][1]}"

    def _give_up(self, cause: str, stacklevel: int = 5) -> None:
        self.eager = True
        warnings.warn(
            f"Expected a step that traces into one graph; got {cause}. Steps run eagerly.",
            UserWarning,
            stacklevel=stacklevel,
        )

    def _replace(self, cause: str) -> None:
        """Do without the compiler from now on."""
        self.backend = "fx"
        warnings.warn(
            f"Expected inductor to compile the step; got {cause}. Its graph is replayed without.",
            UserWarning,
            stacklevel=5,
        )

    def _capture(self, graph: Graph, tensors: list[Tensor]) -> None:
        """Replace the launches of single kernels, where a CUDA graph can hold the step."""
        try:
            graph.run = capture(graph, tensors)
        except Exception as error:
            warnings.warn(
                f"Expected a step that a CUDA graph can hold; got {cause(error)}. Its kernels are "
                "launched one by one.",
                UserWarning,
                stacklevel=5,
            )

    def _make(self, args: tuple, kwargs: dict[str, Any]) -> Gradients:
        """The host's own step; then the same one as a graph, whose result is handed out."""
        svi, store = self.svi, pyro.get_param_store()
        known, before = dict(store.named_parameters()), RandomState.now()
        self._clear(known)  # What somebody left there is no part of the step.
        with Modules() as modules, Effects() as effects:
            host = self._eagerly(args, kwargs)
        after = dict(store.named_parameters())
        if any(after.get(name) is not leaf for name, leaf in known.items()):
            self._give_up("a parameter that the programs replace")
        if self.eager or len(after) > len(known):
            return host  # It made parameters; the next step is the first that can be repeated.
        # The first run of an objective may set one of its numbers.
        key, tensors = self._key(args, kwargs)
        # Copies: they may have been summed in place, which is undone below.
        host = host._replace(loss=host.loss.clone())
        grads = {n: leaf.grad.clone() for n, leaf in host.params.items() if leaf.grad is not None}
        drawn = RandomState.now()

        def rewind() -> None:
            self._clear(host.params)
            effects.undo()
            modules.undo()
            before.restore()

        rewind()
        try:
            step = partial(svi.loss_and_grads, svi.model, svi.guide)
            graph = trace(step, args, kwargs, host.params, effects)
        except Untraceable as error:
            # What was made at first use, such as a mask, is there the next time.
            self._trials += isinstance(error, Unrepeatable)
            if not 0 < self._trials < MAX_TRIALS:
                self._give_up(str(error))
            rewind()
            return self._eagerly(args, kwargs)
        replay = graph.run
        for run in (lower, None) if self.backend == "inductor" else (None,):
            before.restore()
            try:
                graph.run = replay if run is None else run(graph, tensors)
                result = self._replay(graph, tensors)
            except Exception as error:
                if run is None:
                    raise
                self._replace(cause(error))
                graph.run = replay
            else:
                if drawn.same(RandomState.now()) and _agree(host, grads, result):
                    self.graphs.setdefault(key, []).append(graph)
                    if can_capture(graph, tensors):
                        self._capture(graph, tensors)
                    return result
                if run is not None:
                    self._replace("another loss or gradient than the host's")
            rewind()
        self._give_up("a graph with another loss or gradient than the host's")
        return self._eagerly(args, kwargs)


def _agree(host: Gradients, grads: dict[str, Tensor], result: Gradients) -> bool:
    """Whether a graph's first step is the host's, up to rounding."""
    if not host.finite:
        return not result.finite
    tolerance = torch.finfo(host.loss.dtype).eps ** 0.5
    if (host.loss - result.loss).abs() > tolerance * host.loss.abs().clamp(min=1.0):
        return False
    off = total = 0.0
    for name, leaf in host.params.items():
        one, other = grads.get(name), leaf.grad
        if one is None or other is None:
            if one is not other:
                return False
            continue
        off += float((one - other).double().square().sum())
        total += float(one.double().square().sum())
    return off <= 1e-3 * total + 1e-20


def _differ_in_numbers(one: tuple, other: tuple) -> bool:
    """Whether two descriptions of arguments are equal but for the values of numbers."""
    if len(one) != len(other):
        return False
    for a, b in zip(one, other, strict=True):
        if a != b and not (
            isinstance(a, tuple) and isinstance(b, tuple) and a[0] is b[0] and a[0] in NUMBERS
        ):
            return False
    return True
