"""Names the site for which a loss or a gradient is not finite, by running the step once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import SVI
from torch import Tensor

from pyro_vae_ext import _record, _trace
from pyro_vae_ext.training._graph import RandomState


def culprit(
    svi: SVI, args: tuple, kwargs: dict[str, Any], leaves: Sequence[Tensor]
) -> tuple[str | None, str]:
    """The first site to blame, and one of "data", "value", "log_prob" and "gradient".

    None and "loss" if there is no such site. In this order: observed data; sites of the guide as
    the program has them, each with its value and its log-density; those of the model; gradients in
    the same order. The random numbers must be those of the step; they are used up, and what the
    programs write into their modules stays written.
    """
    before = RandomState.now()
    found: list[tuple[str, str]] = []

    def numbers(msg: Any) -> None:
        name = msg["name"]
        if not _is_finite(_unmasked(msg["value"], msg["fn"].event_dim, msg["mask"])):
            found.append((name, "data" if msg["is_observed"] else "value"))
        elif not _is_finite(_log_prob(msg)):
            found.append((name, "log_prob"))

    with _record.Watch(numbers):
        _loss(svi, args, kwargs)
    for row in found:
        if row[1] == "data":
            return row
    if found:
        return found[0]
    before.restore()
    name = _steep(svi, args, kwargs, leaves)
    return (None, "loss") if name is None else (name, "gradient")


def _steep(svi: SVI, args: tuple, kwargs: dict[str, Any], leaves: Sequence[Tensor]) -> str | None:
    """The first site whose log-density has a gradient that is not finite."""
    found: list[str] = []
    densities: list[tuple[str, Tensor]] = []
    # Without it the objective frees its graph at its end: then a look before it goes on.
    later = _differentiable(svi) is not None

    def look(msg: Any) -> None:
        log_prob = _log_prob(msg)
        if later:
            densities.append((msg["name"], log_prob))
        elif _bad_gradient(log_prob, leaves):
            found.append(msg["name"])

    with _record.Watch(look):
        _loss(svi, args, kwargs)
        # Still watched: an objective that runs its chunks again must find the same tensors.
        for name, log_prob in list(densities):
            if not found and _bad_gradient(log_prob, leaves):
                found.append(name)
    return found[0] if found else None


def _differentiable(svi: SVI) -> Any:
    owner = getattr(svi.loss_and_grads, "__self__", None)
    return getattr(owner, "differentiable_loss", None)


def _loss(svi: SVI, args: tuple, kwargs: dict[str, Any]) -> None:
    """The objective once more; it leaves no gradient behind."""
    loss = _differentiable(svi) or svi.loss_and_grads
    _, params = _trace.captured(loss, svi.model, svi.guide, *args, **kwargs)
    for leaf in params.values():
        leaf.grad = None


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _log_prob(msg: Any) -> Tensor:
    """Log-density of a site, masked and not scaled."""
    value = _record.log_prob(msg)
    return value if msg["mask"] is None else scale_and_mask(value, 1.0, msg["mask"])


def _unmasked(value: Tensor, event_dim: int, mask: Any) -> Tensor:
    """The value with zeros where it is masked out, and may be anything."""
    if mask is None:
        return value
    mask = torch.as_tensor(mask, device=value.device)
    return torch.where(mask.reshape(mask.shape + (1,) * event_dim), value, torch.zeros_like(value))


def _bad_gradient(log_prob: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Whether the gradient of a log-density is not finite."""
    if not log_prob.requires_grad:
        return False
    grads = torch.autograd.grad(log_prob.sum(), leaves, retain_graph=True, allow_unused=True)
    return not all(_is_finite(grad) for grad in grads if grad is not None)
