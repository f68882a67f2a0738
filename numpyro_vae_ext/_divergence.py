r"""The divergence of a guide from a model by latent site, in groups of a value's elements.

A site's divergence is split over the elements of its value where both densities are products over
them: then each has a term, in closed form where the host knows one and
:math:`\log q - \log p` at the sample elsewhere. Sums are over the rows of the plates that a site
stands in, scaled and masked as the site is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import kl_divergence
from numpyro.distributions.distribution import Unit

from numpyro_vae_ext import _record
from numpyro_vae_ext._checks import unwrapped
from numpyro_vae_ext._record import Sites

Groups = str | Mapping[str, Sequence[int]]


class Divergence(NamedTuple):
    """Sums over rows of one latent site.

    Attributes:
        groups: The divergence of every group of elements, ``(num_groups,)``, scaled.
        rows: The number of rows behind each, scaled and masked likewise.
    """

    groups: jax.Array
    rows: jax.Array


class _Split(NamedTuple):
    """A density over the elements of a value.

    Attributes:
        base: The distribution inside of the host's wrappers.
        mask: Its masks, to broadcast with the value; None without any.
        is_split: Whether there is a term for every element.
    """

    base: Any
    mask: Any
    is_split: bool


def divergences(
    modelled: Sites, drawn: Sites, groups: Groups
) -> tuple[jax.Array, dict[str, Divergence]]:
    """The log-density of what is observed, and the divergence at every latent site.

    Args:
        modelled: Sample sites of the model at the guide's values.
        drawn: Sample sites of the guide.
        groups: ``"dimension"``, ``"site"``, or by site the group of each element.

    Returns:
        A scalar, scaled and masked, and the divergences by site.
    """
    latent = [name for name, site in modelled.items() if not site["is_observed"]]
    own: dict[str, list[str]] = {name: [] for name in latent}
    others = [_total(site) for site in modelled.values() if site["is_observed"]]
    for name, site in drawn.items():
        if name in own:
            continue
        if site["is_observed"] and not isinstance(unwrapped(site["fn"]), Unit):
            others.append(-_total(site))
        else:
            own[_owner(name, latent)].append(name)
    found = {}
    for name in latent:
        ids = _ids(name, drawn[name], groups)
        extra = [drawn[key] for key in own[name]]
        split = [_split(sites[name]["fn"]) for sites in (drawn, modelled)]
        if len(set(ids)) > 1:
            _check_split(name, groups, drawn, modelled, split, own[name])
        exact = is_exact(name, list(drawn), latent)
        found[name] = _divergence(drawn[name], modelled[name], split, extra, ids, exact)
    return sum(others, start=jnp.zeros(())), found


def _divergence(
    ours: Any, theirs: Any, split: list[_Split], extra: list[Any], ids: list[int], exact: bool
) -> Divergence:
    event_dim, shape = ours["fn"].event_dim, _shape(ours)
    # As the host's TraceMeanField_ELBO has it, the guide's scale is that of the divergence.
    weight = _wide(ours["scale"], event_dim)
    masks = [part.mask for part in split]
    if all(part.is_split for part in split):
        terms = closed_form(split[0].base, split[1].base) if exact else None
        if terms is None or (masks[0] is None) != (masks[1] is None):
            terms = weight * _masked(_terms(ours, split[0]), masks[0])
            density = _masked(_terms(theirs, split[1]), masks[1])
            terms = terms - _wide(theirs["scale"], event_dim) * density
        else:
            both = masks[0] if masks[0] is None else masks[0] & masks[1]
            terms = weight * _masked(terms, both)
        terms = _by_element(ours, jnp.broadcast_to(terms, shape))
    else:
        whole = None
        if exact and masks == [None, None]:
            whole = closed_form(ours["fn"], theirs["fn"])
        if whole is None:
            terms = _total(ours) - _total(theirs)
        else:
            terms = jnp.sum(_wide(ours["scale"], 0) * whole)
        terms = terms[None]
        ids = [0]
    present = _masked(jnp.ones((), terms.dtype), masks[0])
    rows = _by_element(ours, jnp.broadcast_to(weight * present, shape))
    count = max(ids) + 1
    # By numbers that are known when the program is traced: no scatter.
    chosen = np.asarray(ids)[:, None] == np.arange(count)
    sums = jnp.where(chosen, terms[:, None], 0.0).sum(0)
    if extra:
        sums = sums + jnp.stack([_total(site) for site in extra]).sum()
    if len(ids) < len(rows):
        most = rows.max()[None]
    else:
        most = jnp.where(chosen, rows[:, None], 0.0).max(0)
    return Divergence(sums, most)


def _owner(name: str, latent: list[str]) -> str:
    """The latent site that an auxiliary site or a factor of the guide belongs to."""
    found = [site for site in latent if name.startswith(f"{site}_")]
    if not found and len(latent) != 1:
        raise ValueError(
            "Expected auxiliary sites named after a latent site, such as 'z_aux' of 'z'; got "
            f"'{name}' beside the latent sites {latent}. Rename the site."
        )
    return max(found or latent, key=len)


def _ids(name: str, site: Any, groups: Groups) -> list[int]:
    """The group of every element of a value, from 0 without a gap."""
    shape, plates = _shape(site), _plate_axes(site)
    size = int(np.prod([n for axis, n in enumerate(shape) if axis not in plates], dtype=int))
    if groups == "site":
        return [0] * size
    if isinstance(groups, str):
        return list(range(size))
    if name not in groups:
        raise ValueError(
            f"Expected groups for every latent site; got none for site '{name}'. Add it to the "
            "mapping, or use groups='dimension'."
        )
    given = list(groups[name])
    if len(given) != size:
        raise ValueError(
            f"Expected a group for each of the {size} elements of site '{name}'; got {len(given)} "
            "groups. List one for every element, flattened."
        )
    places = {group: place for place, group in enumerate(dict.fromkeys(given))}
    return [places[group] for group in given]


def _check_split(
    name: str,
    groups: Groups,
    drawn: Sites,
    modelled: Sites,
    split: list[_Split],
    own: list[str],
) -> None:
    got = None
    if own:
        got = f"{type(unwrapped(drawn[own[0]]['fn'])).__name__} at its own site '{own[0]}'"
    else:
        for part, sites in zip(split, (drawn, modelled), strict=True):
            if not part.is_split:
                got = got or type(unwrapped(sites[name]["fn"])).__name__
    if got is not None:
        raise ValueError(
            f"Expected a density that splits over dimensions at site '{name}' under "
            f"groups={groups!r}; got {got}. Use groups='site'."
        )


def is_exact(name: str, guided: list[str], latent: list[str]) -> bool:
    """Whether the closed form is right: it is not if a later draw of the guide may shape p."""
    return set(latent[: latent.index(name)]) <= set(guided[: guided.index(name)])


def _split(fn: Any) -> _Split:
    if not isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        return _Split(fn, None, fn.event_dim == 0 or hasattr(fn, "log_prob_terms"))
    base, mask, is_split = _split(fn.base_dist)
    if isinstance(fn, dist.MaskedDistribution):
        own = jnp.reshape(fn._mask, (*jnp.shape(fn._mask), *(1,) * fn.event_dim))
        mask = own if mask is None else mask & own
    return _Split(base, mask, is_split)


def closed_form(ours: Any, theirs: Any) -> jax.Array | None:
    """The host's divergence; None without one."""
    if any(isinstance(unwrapped(fn), dist.Delta) for fn in (ours, theirs)):
        return None
    try:
        return kl_divergence(ours, theirs)
    except NotImplementedError:
        return None


def _terms(site: Any, split: _Split) -> jax.Array:
    if not hasattr(split.base, "log_prob_terms"):
        return split.base.log_prob(site["value"])
    if site["intermediates"]:
        return split.base.log_prob_terms(site["value"], site["intermediates"])
    return split.base.log_prob_terms(site["value"])


def _total(site: Any) -> jax.Array:
    """The sum of a site's log-densities, scaled and masked."""
    sites = {site["name"]: site}
    return jnp.sum(_record.scaled(sites, _record.log_probs(sites))[site["name"]])


def _masked(terms: jax.Array, mask: Any) -> jax.Array:
    return terms if mask is None else jnp.where(mask, terms, 0.0)


def _wide(scale: Any, event_dim: int) -> Any:
    """A scale that broadcasts with values."""
    scale = 1.0 if scale is None else scale
    return jnp.reshape(scale, (*jnp.shape(scale), *(1,) * event_dim)) if jnp.ndim(scale) else scale


def _shape(site: Any) -> tuple[int, ...]:
    return jnp.broadcast_shapes(site["fn"].shape(), jnp.shape(site["value"]))


def _plate_axes(site: Any) -> set[int]:
    """The rows' axes. A batch outside of any plate is the host's way to declare an event."""
    width = len(_shape(site)) - site["fn"].event_dim
    return {plate.dim + width for plate in site["cond_indep_stack"]}


def _by_element(site: Any, terms: jax.Array) -> jax.Array:
    """Sums over rows, one for each element of a value."""
    return jnp.sum(terms, axis=tuple(_plate_axes(site))).reshape(-1)
