r"""The divergence of a guide from a model by latent site, in groups of a value's elements.

A site's divergence is split over the elements of its value where both densities are products over
them: then each has a term, in closed form where the host knows one and
:math:`\log q - \log p` at the sample elsewhere. Sums are over the rows of the plates that a site
stands in, scaled and masked as the site is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae_ext import _record
from pyro_vae_ext._checks import distribution_name
from pyro_vae_ext._record import Sites, add

Groups = str | Mapping[str, Sequence[int]]


class Divergence(NamedTuple):
    """Sums over rows of one latent site.

    Attributes:
        groups: The divergence of every group of elements, ``(num_groups,)``, scaled.
        rows: The number of rows behind each, scaled and masked likewise.
    """

    groups: Tensor
    rows: Tensor


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
    model_sites: Sites, guide_sites: Sites, groups: Groups
) -> tuple[Tensor, dict[str, Divergence]]:
    """The log-density of what is observed, and the divergence at every latent site.

    Args:
        model_sites: Sites of the model at the guide's values.
        guide_sites: Sites of the guide.
        groups: ``"dimension"``, ``"site"``, or by site the group of each element.

    Returns:
        A scalar, scaled and masked, and the divergences by site.
    """
    latent = [name for name, site in model_sites.items() if not site["is_observed"]]
    own: dict[str, list[str]] = {name: [] for name in latent}
    others = [_total(site) for site in model_sites.values() if site["is_observed"]]
    for name, site in guide_sites.items():
        if name in own:
            continue
        if site["is_observed"] and distribution_name(site["fn"]) != "Unit":
            others.append(-_total(site))
        else:
            own[_owner(name, latent)].append(name)
    found = {}
    for name in latent:
        ids = _ids(name, guide_sites[name], groups)
        extra = [guide_sites[key] for key in own[name]]
        split = [_split(sites[name]["fn"]) for sites in (guide_sites, model_sites)]
        if len(set(ids)) > 1:
            _check_split(name, groups, guide_sites, model_sites, split, own[name])
        exact = is_exact(name, list(guide_sites), latent)
        found[name] = _divergence(guide_sites[name], model_sites[name], split, extra, ids, exact)
    return (add(others) if others else torch.zeros(())), found


def _divergence(
    ours: Any, theirs: Any, split: list[_Split], extra: list[Any], ids: list[int], exact: bool
) -> Divergence:
    event_dim = ours["fn"].event_dim
    shape = torch.broadcast_shapes(ours["fn"].shape(), ours["value"].shape)
    masks = [_mask(site, part) for site, part in zip((ours, theirs), split, strict=True)]
    # As the host's TraceMeanField_ELBO has it, the guide's scale is that of the divergence.
    weight = _wide(ours["scale"], event_dim)
    if all(part.is_split for part in split):
        terms = closed_form(split[0].base, split[1].base) if exact else None
        if terms is None or (masks[0] is None) != (masks[1] is None):
            terms = scale_and_mask(_terms(ours, split[0]), weight, masks[0])
            density = _terms(theirs, split[1])
            terms = terms - scale_and_mask(density, _wide(theirs["scale"], event_dim), masks[1])
        else:
            both = masks[0] if masks[0] is None else masks[0] & masks[1]
            terms = scale_and_mask(terms, weight, both)
        terms = _by_element(terms.expand(shape), event_dim)
    else:
        whole = None
        if exact and masks == [None, None]:
            whole = closed_form(ours["fn"], theirs["fn"])
        if whole is None:
            terms = _total(ours) - _total(theirs)
        else:
            terms = scale_and_mask(whole, ours["scale"]).sum()
        terms = terms.reshape(1)
        ids = [0]
    present = scale_and_mask(terms.new_ones(()).expand(shape), weight, masks[0])
    rows = _by_element(present, event_dim)
    places = torch.tensor(ids, device=terms.device)
    count = max(ids) + 1
    sums = terms.new_zeros(count).index_add(0, places, terms)
    if extra:
        sums = sums + torch.stack([_total(site) for site in extra]).sum()
    if len(places) < len(rows):
        most = rows.max().reshape(1)
    else:
        most = rows.new_zeros(count).scatter_reduce(0, places, rows, "amax")
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
    size = site["fn"].event_shape.numel()
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
    guide_sites: Sites,
    model_sites: Sites,
    split: list[_Split],
    own: list[str],
) -> None:
    got = None
    if own:
        got = f"{distribution_name(guide_sites[own[0]]['fn'])} at its own site '{own[0]}'"
    else:
        for part, sites in zip(split, (guide_sites, model_sites), strict=True):
            if not part.is_split:
                got = got or distribution_name(sites[name]["fn"])
    if got is not None:
        raise ValueError(
            f"Expected a density that splits over dimensions at site '{name}' under "
            f"groups={groups!r}; got {got}. Use groups='site'."
        )


def is_exact(name: str, guided: list[str], latent: list[str]) -> bool:
    """Whether the closed form is right: it is not if a later draw of the guide may shape p."""
    return set(latent[: latent.index(name)]) <= set(guided[: guided.index(name)])


def _split(fn: Any) -> _Split:
    kind = type(fn).__name__
    if kind not in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        terms = fn.event_dim == 0 or hasattr(fn, "log_prob_terms")
        return _Split(fn, None, terms)
    base, mask, is_split = _split(fn.base_dist)
    if kind == "MaskedDistribution":
        own = torch.as_tensor(fn._mask)
        own = own.reshape(own.shape + (1,) * fn.event_dim)
        mask = own if mask is None else mask & own
    # A flow's terms are those of its own event.
    return _Split(base, mask, is_split)


def _mask(site: Any, split: _Split) -> Any:
    """All masks of a site, to broadcast with its value; None without any."""
    if site["mask"] is None:
        return split.mask
    own = torch.as_tensor(site["mask"])
    own = own.reshape(own.shape + (1,) * site["fn"].event_dim)
    return own if split.mask is None else split.mask & own


def closed_form(ours: Any, theirs: Any) -> Tensor | None:
    """The host's divergence; None without one. The host's for a point mass lacks its density."""
    if "Delta" in (distribution_name(ours), distribution_name(theirs)):
        return None
    try:
        return kl_divergence(ours, theirs)
    except NotImplementedError:
        return None


def _terms(site: Any, split: _Split) -> Tensor:
    if hasattr(split.base, "log_prob_terms"):
        return split.base.log_prob_terms(site["value"])
    return split.base.log_prob(site["value"])


def _total(site: Any) -> Tensor:
    """The sum of a site's log-densities, scaled and masked."""
    value = scale_and_mask(_record.log_prob(site), site["scale"], site["mask"])
    # What no plate reaches, or is masked out, has no dimensions of its own.
    return value.expand(torch.broadcast_shapes(value.shape, site["fn"].batch_shape)).sum()


def _wide(scale: Any, event_dim: int) -> Any:
    """A scale that broadcasts with values."""
    if not isinstance(scale, Tensor):
        return scale
    return scale.reshape(scale.shape + (1,) * event_dim)


def _by_element(terms: Tensor, event_dim: int) -> Tensor:
    """Sums over rows, one for each element of a value."""
    batch = tuple(range(terms.dim() - event_dim))
    return (terms.sum(batch) if batch else terms).reshape(-1)
