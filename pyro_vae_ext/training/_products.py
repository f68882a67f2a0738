"""Large matrix products of a graph by oneDNN instead of MKL.

Both are libraries that torch ships for the CPU, and torch's own choice for float32 is MKL, which
takes two to three times as long on some processors that are not Intel's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
# Multiplications from which on a product is worth the call.
LARGE = 4e6


def available() -> bool:
    """Whether this torch can call oneDNN for a product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _operation() -> tuple[Any, Any]:
    """``x @ w.T + b`` as an operation that a compiler leaves alone, and its library."""
    library = torch.library.Library("pyro_vae_ext", "FRAGMENT")
    library.define("linear(Tensor x, Tensor w, Tensor? b) -> Tensor")
    call = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return call(x, w, b, "none", [], "")

    def shape(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], w.shape[0])

    library.impl("linear", linear, "CPU")
    library.impl("linear", shape, "Meta")
    return torch.ops.pyro_vae_ext.linear.default, library


def reroute(gm: torch.fx.GraphModule) -> int:
    """Have oneDNN make the large float32 products of a graph; returns their number."""
    products = [node for node in gm.graph.nodes if available() and _is_large(node)]
    for node in products:
        bias, a, b = node.args if node.target is aten.addmm.default else (None, *node.args)
        with gm.graph.inserting_before(node):
            turned = gm.graph.call_function(aten.t.default, (b,))
            new = gm.graph.call_function(_operation()[0], (a, turned, bias))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    if products:
        gm.recompile()
    return len(products)


def _is_large(node: torch.fx.Node) -> bool:
    if node.target is aten.mm.default:
        bias, (a, b) = None, node.args
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, a, b = node.args
    else:
        return False
    one, other = _value(a), _value(b)
    if one is None or other is None or one.device.type != "cpu":
        return False
    if {one.dtype, other.dtype} != {torch.float32}:
        return False
    if isinstance(bias, torch.fx.Node):
        added = _value(bias)
        if added is None or added.shape != (other.shape[1],):
            return False
    return one.shape[0] * one.shape[1] * other.shape[1] >= LARGE


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value if isinstance(value, Tensor) else None
