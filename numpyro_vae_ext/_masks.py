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

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import random
from numpyro.distributions import biject_to
from numpyro.handlers import block

from numpyro_vae_ext._checks import WRAPPERS, is_traced
from numpyro_vae_ext._record import Pair, Recorder, Sites, latent_sites, log_probs, sample_sites

# Of the latent site that the host makes for `obs_mask`, next to one that ends in "_observed".
_UNOBSERVED = "_unobserved"


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

    def missing(self, free: jax.Array, value: jax.Array, loc: Any = 0.0) -> jax.Array:
        r"""What a guide's log-density lacks for the entries that do not count.

        Their :math:`\log |\partial \theta / \partial u| - \log r(u)`, summed over each event: with
        the guide's own Jacobian, it leaves :math:`-\log r`.

        Args:
            free: Unconstrained value.
            value: The value itself.
            loc: :math:`m`, which broadcasts with ``free``.
        """
        log_det = biject_to(self.fn.support).log_abs_det_jacobian(free, value)
        log_r = -0.5 * jnp.square(free - loc) - 0.5 * math.log(2 * math.pi)
        log_r = log_r.reshape(*log_det.shape, -1).sum(-1)
        term = jnp.where(self.entries, 0.0, log_det - log_r)
        return term.sum(tuple(range(-self.depth, 0))) if self.depth else term


class _Level(NamedTuple):
    """A mask of a distribution: the mask, what it is of, and whether wrappers alone are around."""

    mask: Any
    fn: Any
    plain: bool


def _levels(fn: Any) -> list[_Level]:
    found, plain = [], True
    while hasattr(fn, "base_dist"):
        plain = plain and isinstance(fn, WRAPPERS)
        if isinstance(fn, dist.MaskedDistribution):
            found.append(_Level(fn._mask, fn.base_dist, plain))
        fn = fn.base_dist
    return found


def is_masked(fn: Any) -> bool:
    """Whether a mask may leave something out."""
    return any(level.mask is not True for level in _levels(fn))


def hidden(fn: Any) -> Hidden | None:
    """What the masks of a distribution leave out; None without any."""
    if not is_masked(fn):
        return None
    levels = _levels(fn)
    inner = levels[-1].fn
    depth = fn.event_dim - inner.event_dim
    rows, entries = None, jnp.ones(fn.batch_shape + fn.event_shape[:depth], bool)
    for level in levels:
        mask, inside = jnp.asarray(level.mask, bool), fn.event_dim - level.fn.event_dim
        entries = entries & mask.reshape(mask.shape + (1,) * (depth - inside))
        if not inside:
            rows = jnp.broadcast_to(mask if rows is None else rows & mask, fn.batch_shape)
    return Hidden(rows, entries, depth, inner)


def check_unread(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], owner: str
) -> None:
    """Refuse a model in which anything reads what is masked out of a latent site.

    Args:
        model: Program of NumPyro primitives.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        owner: What an error calls the caller.

    Raises:
        ValueError: If the density of some site depends on what is masked out of a latent one, if
            that cannot be seen under jit, or a mask is inside of a transformed distribution.
    """
    programs = [model] if (whole := _whole(model)) is model else [model, whole]
    for program in programs:
        _check_unread(program, args, kwargs, owner)


def _whole(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program without the handlers that hide a part of it: what is hidden may read."""
    whole: Any = program
    inner: Any = program
    while inner is not None:
        whole = inner.fn if isinstance(inner, block) else whole
        inner = getattr(inner, "fn", None)
    return whole


def _check_unread(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], owner: str
) -> None:
    runs: list[Sites] = []

    @jax.jit
    def densities(shift: Any) -> dict[str, jax.Array]:
        record = Recorder(Pair(model, model, args, kwargs), random.key(0), None)
        runs.append(record.started(partial(_placed, shift, owner), {}))
        return log_probs(runs[-1])

    with block(), jax.ensure_compile_time_eval():
        before, after = densities(0.0), densities(1.0)
    sites = runs[0]
    names = [name for name, site in latent_sites(sites).items() if is_masked(site["fn"])]
    if any(map(is_traced, jax.tree.leaves((before, after)))):
        # Nothing can read what the host puts aside itself.
        names = [name for name in names if not _is_put_aside(name, sites)]
        if names:
            raise ValueError(
                f"Expected latent sites without a mask under {owner}; got site '{names[0]}' with "
                "one, and its first call under jit, where it is not seen whether anything reads "
                "what is masked out. Call it once outside of jit."
            )
        return
    for name in sample_sites(sites):
        old, new = (np.asarray(x[name]) for x in (before, after))
        if not np.allclose(old, new, rtol=1e-6, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"Expected latent sites without a mask under {owner}; got site '{names[0]}' with "
                f"one, and site '{name}', whose density reads what is masked out. Mask site "
                f"'{name}' there as well, or write the guide by hand."
            )


def _placed(shift: Any, owner: str, msg: Any) -> Any:
    """A value for a latent site: what counts is the same for every ``shift``."""
    if msg["type"] != "sample" or msg["is_observed"]:
        return None
    fn = msg["fn"]
    if fn.support.is_discrete:
        return None
    if any(not level.plain for level in _levels(fn)):
        raise ValueError(
            f"Expected latent sites without a mask under {owner}; got site '{msg['name']}' with "
            "one inside of a transformed distribution. Mask whole events of the site, or write the "
            "guide by hand."
        )
    transform = biject_to(fn.support)
    shape = transform.inverse_shape(fn.shape(msg["kwargs"].get("sample_shape", ())))
    # No two alike, so that differences and means move as well.
    free = (jnp.arange(1, 1 + math.prod(shape)) * 0.618034 % 1).reshape(shape)
    found = hidden(fn)
    if found is not None:
        wide = found.entries.reshape(found.entries.shape + (1,) * (len(shape) - found.entries.ndim))
        free = jnp.where(wide, free, free + shift * (0.5 + free))
    return transform(free)


def _is_put_aside(name: str, sites: Sites) -> bool:
    start = name.removesuffix(_UNOBSERVED)
    return name != start and {start, f"{start}_observed"} <= set(sites)
