"""A training step as one graph: loss, gradients and whether they are finite.

The host's own ``loss_and_grads`` is traced once at real tensors, its random draws included, into a
graph of ATen operations whose inputs are the parameters, the tensors among the arguments, and
every other tensor that the programs use. Buffers are therefore read and written in place, never
frozen into the graph. Whatever Python decides by the value of a tensor cannot be in a graph and
raises :class:`Untraceable`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae_ext.training._effects import (
    Effects,
    Modules,
    RandomState,
    Unrepeatable,
    Untraceable,
    Values,
    cause,
    draws,
    foreign_draws,
)
from pyro_vae_ext.training._products import reroute

aten = torch.ops.aten
Function = Callable[..., Any]


class Graph:
    """A traced step.

    Args:
        run: Function of all inputs.
        params: Unconstrained parameters by name; the first inputs, the arguments' tensors next.
        constants: Tensors besides these, the last inputs.
        graded: The parameters that the loss depends on.
        nodes: The traced operations.
        modules: Modules that the programs call.
        written: Those of ``constants`` that a step writes.
    """

    def __init__(
        self,
        run: Function,
        params: dict[str, Tensor],
        constants: list[Tensor],
        graded: list[Tensor],
        nodes: list[torch.fx.Node],
        modules: list[torch.nn.Module],
        written: list[Tensor],
    ) -> None:
        self.run: Any = run
        self.params = params
        self.constants = constants
        self.nodes = nodes
        self.written = written
        self.leaves = unique(params)
        self._graded = graded
        self._kinds = [(n, leaf, leaf.dtype, leaf.device) for n, leaf in params.items()]
        self._frozen = [constant.requires_grad for constant in constants]
        self._modules = modules
        self._training = [module.training for module in modules]

    def alive(self, store: Mapping[str, Tensor]) -> bool:
        """Whether its parameters are still those of the store, and of their kind."""
        for name, leaf, dtype, device in self._kinds:
            if store.get(name) is not leaf or leaf.dtype is not dtype or leaf.device != device:
                return False
            if not leaf.requires_grad:
                return False
        return [constant.requires_grad for constant in self.constants] == self._frozen

    def fits(self) -> bool:
        """Whether its modules train, or do not, as they did."""
        return [module.training for module in self._modules] == self._training

    def __call__(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Loss, and whether all is finite; sets the parameters' gradients."""
        with torch.no_grad():
            loss, finite, *grads = self.run(*self.leaves, *tensors, *self.constants)
        for leaf, grad in zip(self._graded, grads, strict=False):
            leaf.grad = grad
        return loss, finite


def unique(params: dict[str, Tensor]) -> list[Tensor]:
    """The parameters, each once: one may have several names."""
    return list({id(leaf): leaf for leaf in params.values()}.values())


def trace(
    loss_and_grads: Function,
    args: tuple,
    kwargs: dict[str, Any],
    params: dict[str, Tensor],
    before: Effects,
) -> Graph:
    """Trace a step, which changes nothing but the random numbers' state.

    Args:
        loss_and_grads: Function of the arguments; leaves gradients at the parameters.
        args: Positional arguments.
        kwargs: Keyword arguments.
        params: Unconstrained parameters by name.
        before: Those of an ordinary run.

    Returns:
        The graph.

    Raises:
        Untraceable: If the step cannot be one graph.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    # Other objects than the arguments: a program may use one of them as a global as well, which
    # does not change with the next batch.
    flat = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in flat]
    args, kwargs = pytree.tree_unflatten(flat, spec)
    leaves = unique(params)
    graded: list[Tensor] = []

    def step(inputs: list[Tensor]) -> list[Tensor]:
        # Inside of the tracer's own mode, so that it sees the caller.
        with Values():
            loss = loss_and_grads(*args, **kwargs)
        if not isinstance(loss, Tensor):
            raise Untraceable(f"a loss of type {type(loss).__name__}")
        graded[:] = [leaf for leaf in leaves if leaf.grad is not None]
        grads = [_shaped(leaf) for leaf in graded]
        loss = loss.detach()
        finite = torch.isfinite(loss)
        for grad in grads:
            if grad.numel() > 0:
                finite = finite & torch.isfinite(grad.abs().amax())
        return [loss, finite, *grads]

    modules = Modules()
    drawn = foreign_draws()
    effects = Effects(strict=True)
    try:
        with ExitStack() as stack:
            stack.enter_context(_clear_gradients(leaves))
            stack.enter_context(pyro.validation_enabled(False))
            # The ATen operations of cuDNN hide what they write.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(modules)
            stack.enter_context(effects)
            inputs = [*leaves, *(leaf for leaf in flat if isinstance(leaf, Tensor))]
            gm = make_fx(step)(inputs)
    except Exception as error:
        raise Untraceable(cause(error)) from error
    finally:
        replaced = modules.replaced()
        effects.undo()
        modules.undo()
    if drawn != foreign_draws():
        raise Untraceable("random numbers of Python or NumPy")
    constants = _finish(gm)
    text = "a tensor that the programs put another in the place of; write it in place"
    if any(constant.untyped_storage()._cdata in replaced for constant in constants):
        raise Untraceable(text)
    if not all(map(before.found, constants)):
        raise Unrepeatable(text)
    written = [constant for constant in constants if effects.wrote(constant)]
    nodes = list(gm.graph.nodes)
    return Graph(gm, dict(params), constants, graded, nodes, modules.called(), written)


def lower(graph: Graph, tensors: list[Tensor]) -> Function:
    """The graph's function, compiled by inductor."""
    inputs = [*graph.leaves, *tensors, *graph.constants]
    reroute(graph.run)
    with warnings.catch_warnings(), torch.no_grad():
        # Of torch, about itself.
        warnings.simplefilter("ignore")
        # Late: these take seconds to import.
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.lowering import lowerings, make_fallback

        # The host's draws, in the host's order: no draw is made of others.
        with config.patch(fallback_random=True):
            table = {op: fn for op, fn in select_decomp_table().items() if not draws(op)}
            for op in select_decomp_table().keys() - table.keys() - lowerings.keys():
                # Ready-made: where a variable CI is set, making it late is an error.
                make_fallback(op, warn=False, override_decomp=True)
            compiled: Any = compile_fx(graph.run, inputs, decompositions=table)
    return compiled


def can_capture(graph: Graph, tensors: list[Tensor]) -> bool:
    """Whether all that changes from step to step is on one CUDA device, draws included."""
    inputs = [*graph.leaves, *tensors, *graph.constants]
    if {tensor.device.type for tensor in inputs} != {"cuda"}:
        return False
    drawn = [node.meta.get("val") for node in graph.nodes if draws(node.target)]
    return all(isinstance(value, Tensor) and value.is_cuda for value in drawn)


def capture(graph: Graph, tensors: list[Tensor]) -> Function:
    """The graph's function as a CUDA graph, all of whose kernels are one launch.

    It reads the parameters and all else where they are, and the arguments from copies.
    """
    run, first, last = graph.run, len(graph.leaves), len(graph.leaves) + len(tensors)
    own = [tensor.clone() for tensor in tensors]
    fixed = [*graph.leaves, *graph.constants]
    addresses: list[int] = []
    outputs: list[Tensor] = []
    recorded: Any = None

    def record() -> None:
        nonlocal recorded
        state, written = RandomState.now(), [tensor.clone() for tensor in graph.written]
        inputs = [*fixed[:first], *own, *fixed[first:]]
        # The first runs, which allocate, are no part of it.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            outputs[:] = run(*inputs)
        for tensor, before in zip(graph.written, written, strict=True):
            tensor.copy_(before)
        state.restore()
        addresses[:] = [tensor.data_ptr() for tensor in fixed]

    def replay(*inputs: Tensor) -> list[Tensor]:
        for copy, tensor in zip(own, inputs[first:last], strict=True):
            copy.copy_(tensor, non_blocking=True)
        if [tensor.data_ptr() for tensor in fixed] != addresses:
            record()
        recorded.replay()
        # The next step writes over its outputs.
        return [outputs[0].clone(), outputs[1].clone(), *outputs[2:]]

    with torch.no_grad():
        record()
    return replay


def _finish(gm: torch.fx.GraphModule) -> list[Tensor]:
    """Make constants inputs, drop what is not used, keep every draw; return the constants."""
    graph = gm.graph
    *_, output = graph.nodes
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    constants: list[Tensor] = []
    inputs: dict[int, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            users = {user.target for user in node.users}
            if users <= {aten.lift_fresh_copy.default}:
                continue  # The program makes this one anew at each step.
            tensor = getattr(gm, str(node.target))
            if id(tensor) not in inputs:
                with graph.inserting_after(last):
                    last = inputs[id(tensor)] = graph.placeholder(f"constant_{len(constants)}")
                constants.append(tensor)
            node.replace_all_uses_with(inputs[id(tensor)])
            graph.erase_node(node)
        elif node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    # A draw that nothing uses moves the generator on all the same: an output survives compilers.
    dead = []
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            continue
        if draws(node.target):
            dead.append(node)
        else:
            graph.erase_node(node)
    output.args = ([*output.args[0], *dead],)
    graph._codegen = torch.fx.graph.CodeGen()
    gm.recompile()
    return constants


def _shaped(leaf: Tensor) -> Tensor:
    """The gradient in the memory layout of its parameter, which optimisers may rely on."""
    grad = leaf.grad
    if grad is None:
        raise Untraceable("a parameter without a gradient")
    if grad.layout is not torch.strided:
        raise Untraceable("a sparse gradient")
    return grad if grad.stride() == leaf.stride() else torch.empty_like(leaf).copy_(grad)


@contextmanager
def _clear_gradients(leaves: list[Tensor]) -> Iterator[None]:
    """Begin and end without gradients."""
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.grad = None
