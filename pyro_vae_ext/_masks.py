r"""Latent sites under a mask: what stands in for the density that the mask leaves out.

Where a latent is masked out the model's density is flat, and no guide of the latent can be
compared with it. So the number gets a density of its own in unconstrained space,
:math:`r(u) = N(u; m, 1)`, with a fixed :math:`m`. If nothing else in the model reads the number,

.. math:: \int p(x, z) \, r(u) \, dz \, du = p(x),

and neither the evidence nor the posterior of what counts has changed. A guide enters :math:`r` as
it does a reverse model, a density of a vector adds it to the model's. That nothing reads the
number is checked once: the numbers are changed, and no density may change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae_ext._record import Record, Sites, log_prob

_WRAPPERS = (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)


class Hidden(NamedTuple):
    """What the masks of a latent site leave out of its density.

    Attributes:
        rows: True where an event counts, ``(*batch,)``; None if no mask hides whole events.
        entries: True where an entry counts, ``(*batch, *entries)``: a mask may stand inside of
            ``to_event``, and hide a part of an event.
        depth: Number of dimensions of ``entries``.
        fn: Distribution of the entries.
    """

    rows: Any
    entries: Any
    depth: int
    fn: Any

    def missing(self, free: Tensor, value: Tensor, loc: Any = 0.0) -> Tensor:
        r"""What a guide's log-density lacks for the entries that do not count.

        Their :math:`\log |\partial \theta / \partial u| - \log r(u)`, summed over each event: with
        the guide's own Jacobian, it leaves :math:`-\log r`.

        Args:
            free: Unconstrained value.
            value: The value itself.
            loc: :math:`m`, which broadcasts with ``free``.
        """
        log_det = biject_to(self.fn.support).log_abs_det_jacobian(free, value)
        log_r = -0.5 * (free - loc).square() - 0.5 * math.log(2 * math.pi)
        log_r = sum_rightmost(log_r, log_r.dim() - log_det.dim())
        return sum_rightmost((log_det - log_r).masked_fill(self.entries, 0.0), self.depth)


class _Level(NamedTuple):
    """A mask of a distribution: the mask, what it is of, and whether wrappers alone are around."""

    mask: Any
    fn: Any
    plain: bool


def _levels(fn: Any) -> list[_Level]:
    found, plain = [], True
    while hasattr(fn, "base_dist"):
        plain = plain and isinstance(fn, _WRAPPERS)
        if isinstance(fn, dist.MaskedDistribution):
            found.append(_Level(fn._mask, fn.base_dist, plain))
        fn = fn.base_dist
    return found


def is_masked(site: Any) -> bool:
    """Whether a mask may leave something out of a site."""
    masks = [site["mask"], *(level.mask for level in _levels(site["fn"]))]
    return any(mask is not None and mask is not True for mask in masks)


def hidden(site: Any, value: Tensor | None = None) -> Hidden | None:
    """What the masks of a site leave out of its value, or of a value; None without any."""
    if not is_masked(site):
        return None
    fn, levels = site["fn"], _levels(site["fn"])
    inner = levels[-1].fn if levels else fn
    depth = fn.event_dim - inner.event_dim
    shape = fn.shape() if value is None else value.shape
    batch, wide = (shape[: len(shape) - dim] for dim in (fn.event_dim, inner.event_dim))
    found = [(level.mask, fn.event_dim - level.fn.event_dim) for level in levels]
    rows, entries = None, None
    for mask, inside in [(site["mask"], 0), *found]:
        if mask is None:
            continue
        mask = torch.as_tensor(mask)
        own = mask.reshape(mask.shape + (1,) * (depth - inside))
        entries = own if entries is None else entries & own
        if not inside:
            rows = mask if rows is None else rows & mask
    rows = None if rows is None else rows.expand(batch)
    return Hidden(rows, torch.as_tensor(entries).expand(wide), depth, inner)


def check_unread(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], owner: str
) -> None:
    """Refuse a model in which anything reads what is masked out of a latent site.

    Args:
        model: Program of Pyro primitives.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        owner: What an error calls the caller.

    Raises:
        ValueError: If the density of some site depends on what is masked out of a latent one, or
            if a mask is inside of a transformed distribution or larger than its site.
    """
    programs = [model] if (whole := _whole(model)) is model else [model, whole]
    for program in programs:
        _check_unread(program, args, kwargs, owner)


def _whole(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program without the handlers that hide a part of it: what is hidden may read."""
    whole = program
    # What a handler returns holds a partial of the handler and the program.
    while isinstance(program, partial):
        inner = program.func
        if not isinstance(inner, partial) or len(inner.args) < 2:
            break
        handler, program = inner.args[:2]
        whole = program if isinstance(handler, BlockMessenger) else whole
    return whole


def _check_unread(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], owner: str
) -> None:
    def densities(shift: float) -> tuple[Sites, dict[str, Tensor]]:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        place = partial(_placed, shift, owner)
        with poutine.block(), torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            with Record(sampler=place) as record:
                model(*args, **kwargs)
            sites = record.sites
            return sites, {name: _log_prob(site) for name, site in sites.items()}

    (sites, before), (moved, after) = densities(0.0), densities(1.0)
    latents = [name for name, site in sites.items() if not site["is_observed"]]
    names = [name for name in latents if is_masked(sites[name])]
    for name, old in before.items():
        if name not in moved or not torch.allclose(old, after[name], 1e-6, 1e-6, equal_nan=True):
            raise ValueError(
                f"Expected latent sites without a mask under {owner}; got site '{names[0]}' with "
                f"one, and site '{name}', whose density reads what is masked out. Mask site "
                f"'{name}' there as well, or write the guide by hand."
            )


def _log_prob(site: Any) -> Tensor:
    return torch.as_tensor(scale_and_mask(log_prob(site), 1.0, site["mask"]))


def _placed(shift: float, owner: str, msg: Any) -> Tensor | None:
    """A value for a latent site: what counts is the same for every ``shift``."""
    fn = msg["fn"]
    if fn.support.is_discrete:
        return None
    _check_place(msg, owner)
    transform = biject_to(fn.support)
    shape = transform.inverse_shape(fn.shape())
    try:
        like = fn.sample()
    except NotImplementedError:
        like = torch.zeros(())
    # No two alike, so that differences and means move as well.
    free = (torch.arange(1.0, 1 + shape.numel()).to(like) * 0.618034 % 1).reshape(shape)
    found = hidden(msg)
    if found is not None:
        entries = found.entries
        entries = entries.reshape(entries.shape + (1,) * (len(shape) - entries.dim()))
        free = torch.where(entries, free, free + shift * (0.5 + free))
    return transform(free)


def _check_place(msg: Any, owner: str) -> None:
    """A mask must be of the site's events, or of what they are made of."""
    fn = msg["fn"]
    fault = ""
    if any(not level.plain for level in _levels(fn)):
        fault = "inside of a transformed distribution"
    elif isinstance(msg["mask"], Tensor):
        shape = tuple(msg["mask"].shape)
        if torch.broadcast_shapes(shape, fn.batch_shape) != fn.batch_shape:
            fault = f"of shape {shape} around a batch of shape {tuple(fn.batch_shape)}"
    if fault:
        raise ValueError(
            f"Expected latent sites without a mask under {owner}; got site '{msg['name']}' with "
            f"one {fault}. Mask whole events of the site, or write the guide by hand."
        )
