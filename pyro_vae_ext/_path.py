r"""Path derivatives of log-weights: the direct derivative of the guide in its parameters left out.

Every latent value :math:`z` passes a *cut*, an
identity that blocks gradients while :math:`u = \partial \log q / \partial z` is computed from
the guide's own graph; afterwards :math:`\log q` is replaced by the constant
:math:`\overline{\log q}` plus :math:`\bar u^\top (z - \bar z)`. No second pass of the guide is
needed and every host distribution and any hierarchy of sites works. The model sees the values
through a *weigh*, an identity that multiplies gradients by numbers which the objective supplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Path:
    """State of the path derivatives of one run; the objective sets ``weights`` before backward.

    ``weights`` multiplies the gradient that reaches a sample from the densities, in the layout of
    :attr:`LogWeights.layout`; None leaves it as it is.
    """

    weigh: bool = False
    open: bool = True
    weights: Tensor | None = None


class Cut(torch.autograd.Function):
    """Identity that lets gradients pass while ``path.open``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Path) -> Tensor:
        """The value itself."""
        ctx.path = path
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient, as the state says."""
        return (gradient if ctx.path.open else None), None


class Weigh(torch.autograd.Function):
    """Identity that multiplies gradients by ``path.weights``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Path, event_dim: int) -> Tensor:
        """The value itself."""
        ctx.path, ctx.event_dim = path, event_dim
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient, as the state says."""
        weights = ctx.path.weights
        if weights is not None:
            gradient = gradient * weights.reshape(weights.shape + (1,) * ctx.event_dim)
        return gradient, None, None


def depends_on_parameters(tensor: Any) -> bool:
    """Whether a tensor depends on parameters otherwise than through cut values."""
    seen = set()
    nodes = [tensor.grad_fn] if isinstance(tensor, Tensor) else []
    if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.grad_fn is None:
        return True
    while nodes:
        node = nodes.pop()
        if node is None or node in seen or node.name() == "CutBackward":
            continue
        if hasattr(node, "variable"):
            return True
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
    return False


def take_path_derivatives(terms: Sequence[Any], values: dict[str, Any], path: Path) -> None:
    """Replace the guide's log-densities by their path derivatives, in place."""
    sampled = [t for t in terms if t.sign < 0 and not t.site["is_observed"]]
    latent = [term for term in sampled if term.site["value"].requires_grad]
    if not latent:
        return
    cuts = [term.site["value"] for term in latent]

    def partials(group: list[Any]) -> list[Tensor | None]:
        total = sum(term.log_prob.sum() for term in group)
        if not (isinstance(total, Tensor) and total.requires_grad):
            return [None] * len(cuts)
        path.open = False
        try:
            return list(torch.autograd.grad(total, cuts, retain_graph=True, allow_unused=True))
        finally:
            path.open = True

    def linear(term: Any, partial: Tensor | None, origin: Tensor) -> Tensor | float:
        if partial is None:
            return 0.0
        event = tuple(range(-term.site["fn"].event_dim, 0))
        product = partial * (values[term.name] - origin)
        return product.sum(event) if event else product

    scores = partials(sampled)
    # Factors of the guide (reverse models) belong to the weight like the model: their parameters
    # keep their gradient. Their graph hangs on the cut values, so what flows on to the samples
    # is exchanged for the weighed flow.
    factors = [t for t in terms if t.sign < 0 and t.site["is_observed"]]
    factor_scores = partials(factors) if factors and path.weigh else [None] * len(cuts)
    for term in sampled:
        term.log_prob = term.log_prob.detach()
    for term, cut, score, factor in zip(latent, cuts, scores, factor_scores, strict=True):
        term.log_prob = (
            term.log_prob
            + linear(term, score, values[term.name].detach())
            + linear(term, factor, cut)
        )
