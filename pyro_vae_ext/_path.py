r"""Path derivatives of log-weights: the direct derivative of the guide in its parameters left out.

Every scored latent value :math:`z` passes a *cut*, an identity that blocks gradients while
:math:`u = \partial \log q / \partial z` is computed from the guide's own graph; afterwards
:math:`\log q` is replaced by the constant :math:`\overline{\log q}` plus
:math:`\bar u^\top (z - \bar z)`. No second pass of the guide is needed and every host distribution
and any hierarchy of sites works. The model sees the values through a *weigh*, an identity that
multiplies gradients by numbers which the objective supplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_vae_ext._checks import distribution_name


@dataclass
class Path:
    """State of the path derivatives of one run; the objective sets ``weights`` before backward.

    ``weights`` multiplies the gradient that reaches a sample from the densities, in the layout of
    :attr:`LogWeights.layout`; None leaves it as it is. ``first`` holds until a value is cut.
    """

    weigh: bool = False
    open: bool = True
    first: bool = True
    weights: Tensor | None = None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, path: Path) -> Tensor:
        ctx.path = path
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient if ctx.path.open else None), None


def cut(value: Tensor, path: Path) -> Tensor:
    """The same value; its gradients pass while ``path.open``."""
    if path.first:
        # No scored value lies behind the first one: its gradients need never be held up.
        path.first = False
        return value.view_as(value)
    return _Cut.apply(value, path)


def weigh(value: Tensor, path: Path, event_dim: int) -> Tensor:
    """The same value; its gradients are multiplied by ``path.weights``."""

    def multiply(gradient: Tensor) -> Tensor:
        if not path.open:
            return torch.zeros_like(gradient)
        if path.weights is None:
            return gradient
        return gradient * path.weights.reshape(path.weights.shape + (1,) * event_dim)

    alias = value.view_as(value)
    alias.register_hook(multiply)
    return alias


def is_scored(site: Any) -> bool:
    """Whether a site of a guide is latent and has a density whose own score is left out."""
    if site["is_observed"] or site["mask"] is False:
        return False
    base = site["fn"]
    while hasattr(base, "base_dist"):
        if getattr(base, "_mask", None) is False:
            return False
        base = base.base_dist
    return distribution_name(site["fn"]) != "Delta"


def carried_score(terms: Sequence[Any]) -> tuple[str, Tensor, Tensor] | None:
    """The only scored site with its log-density and score, where its distribution carries them.

    With one scored site no other cut lies between its score and its value, so that the numbers
    need no graph: those of our families are at hand or come from the noise.
    """
    scored = [term for term in terms if term.sign < 0 and is_scored(term.site)]
    if len(scored) != 1 or scored[0].site["mask"] is not None:
        return None
    site = scored[0].site
    base = site["fn"]
    while isinstance(base, dist.Independent):
        base = base.base_dist
    carried = base.carried_score() if hasattr(base, "carried_score") else None
    if carried is None:
        return None
    log_prob, score = carried
    extra = log_prob.dim() + site["fn"].event_dim - score.dim()
    return scored[0].name, sum_rightmost(log_prob, extra), score


def take_path_derivatives(
    terms: Sequence[Any],
    values: dict[str, Any],
    path: Path,
    carried: tuple[str, Tensor, Tensor] | None,
    scaled: bool,
) -> None:
    """Replace the guide's log-densities by their path derivatives, in place.

    Sites that are not scored (factors such as a reverse model, a ``Delta`` that carries a drawn
    value over) have no score to leave out. They belong to the weight like the model, and all
    their derivatives are kept. Where gradients are weighed, what flows through such sites to the
    cut values is exchanged for its weighed flow.

    Args:
        terms: All sites, with their log-densities.
        values: Latent values that the model was run at.
        path: State of the run.
        carried: Result of :func:`carried_score`.
        scaled: Whether the log-densities are scaled.
    """
    scored = [term for term in terms if term.sign < 0 and is_scored(term.site)]
    latent = [term for term in scored if term.site["value"].requires_grad]
    if not latent:
        return
    aliases = [term.site["value"] for term in latent]

    def partials(group: Sequence[Any]) -> list[Tensor | None]:
        total = -sum(term.log_prob.sum() * term.sign for term in group)
        if not (isinstance(total, Tensor) and total.requires_grad):
            return [None] * len(aliases)
        path.open = False
        try:
            return list(torch.autograd.grad(total, aliases, retain_graph=True, allow_unused=True))
        finally:
            path.open = True

    def linear(term: Any, partial: Tensor | None, origin: Tensor) -> Tensor | float:
        if partial is None:
            return 0.0
        event = tuple(range(-term.site["fn"].event_dim, 0))
        product = partial * (values[term.name] - origin)
        return product.sum(event) if event else product

    if carried is None:
        scores = partials(scored)
    else:
        scale = scored[0].site["scale"] if scaled else 1.0
        if isinstance(scale, Tensor):
            scale = scale.reshape(scale.shape + (1,) * scored[0].site["fn"].event_dim)
        scores = [carried[2] if isinstance(scale, float) and scale == 1.0 else scale * carried[2]]
    rest: list[Tensor | None] = [None] * len(aliases)
    if path.weigh:
        kept = [term for term in terms if term.sign < 0 and not is_scored(term.site)]
        if any(not term.site["is_observed"] for term in kept):
            # The model sees a value that is not weighed: a look through the model as well.
            kept += [term for term in terms if term.sign > 0]
        rest = partials(kept)
    for term in scored:
        term.log_prob = term.log_prob.detach()
    for term, alias, score, other in zip(latent, aliases, scores, rest, strict=True):
        term.log_prob = term.log_prob + linear(term, score, values[term.name].detach())
        if other is not None:
            term.log_prob = term.log_prob + linear(term, other, alias)
