r"""The only file that touches Pyro's traces: a (model, guide) pair in, log-weights out.

:func:`run` executes guide and model once, for one particle or for a stack of them in an outermost
plate, and returns what an objective needs: the log-weights with the plate bookkeeping done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from pyro_vae_ext import _checks, _path, _relaxation
from pyro_vae_ext._record import (
    Program,
    Record,
    Sites,
    is_scored,
    log_prob,
    particle_frame,
    probe,
    run_pair,
)

# Numbers that one site of a chunk of samples may have: 64 MiB in single precision.
MOST_NUMBERS = 2**24


@dataclass
class LogWeights:
    """Log-weights of one run.

    Attributes:
        layout: Log-weights in the trace's layout: the particle dimension, if there is one, is
            ``particle_dim``, other plates stand at their own negative dimension, reduced ones have
            size 1.
        particle_dim: Negative dimension of the particles, or None.
        plates: Name and dimension of the common plates, outermost first.
        scale: The one scale of all sites, which multiplies the bound.
        score: The guide's log-density of its sites without a reparameterised sampler, neither
            scaled nor masked, in the same layout; None where it was not asked for.
    """

    layout: Tensor
    particle_dim: int | None
    plates: list[tuple[str, int]]
    scale: float | Tensor
    guide_sites: Sites
    model_sites: Sites
    score: Tensor | None = None

    def stacked(self, layout: Tensor | None = None) -> Tensor:
        """Log-weights, or other numbers, of shape ``(num_particles, *common_plates)``."""
        layout = self.layout if layout is None else layout
        if self.particle_dim is None:
            return layout.reshape([1, *(layout.shape[dim] for _, dim in self.plates)])
        dims = sorted([self.particle_dim, *(dim for _, dim in self.plates)])
        if dims == list(range(-layout.dim(), 0)) and dims[0] == self.particle_dim:
            return layout
        stacked = layout.reshape([layout.shape[dim] for dim in dims])
        # The particles stand outermost, unless the pair has more plates than was declared.
        return stacked.movedim(dims.index(self.particle_dim), 0)

    def in_layout(self, stacked: Tensor) -> Tensor:
        """Numbers of the shape of :meth:`stacked`, in the layout of the trace."""
        if self.particle_dim is not None:
            dims = sorted([self.particle_dim, *(dim for _, dim in self.plates)])
            stacked = stacked.movedim(0, dims.index(self.particle_dim))
        return stacked.reshape(self.layout.shape)


@dataclass
class _Term:
    """Log-density of one site, masked but not reduced; ``sign`` is its sign in the weight."""

    name: str
    site: Any
    sign: float
    log_prob: Tensor = field(init=False)


def host_traces(model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """Pyro's own traces of model and guide, for the parts of its base class that ask for them."""
    return get_importance_trace("flat", math.inf, model, guide, args, kwargs)


def plate_nesting(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """Largest number of nested plates of the pair, found by running it once."""
    return probe(model, guide, args, kwargs).nesting


def chunk_size(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """Samples to run at a time: few enough that each site's values fit into memory many times."""
    widest = probe(model, guide, args, kwargs).widest
    return max(1, min(100, MOST_NUMBERS // max(1, widest)))


def run(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int = 1,
    particle_dim: int | None = None,
    subsamples: dict[str, Tensor] | None = None,
    path: _path.Path | None = None,
    gradient: str | None = None,
    joint: bool = False,
) -> LogWeights:
    """Run guide and model once and return their log-weights.

    Args:
        model: Program of Pyro primitives.
        guide: Program of Pyro primitives.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_particles: Size of the particle plate.
        particle_dim: Its negative dimension; None for one particle without a plate.
        subsamples: Subsamples to share, by plate; filled by the first run.
        path: If given, the log-weights carry path derivatives.
        gradient: If given, every latent site must be reparameterised; the name is for the error.
            ``"vimco"`` takes others as well, and returns their score.
        joint: Sum the scaled log-densities of all sites, with no condition on plates and scales.
    """
    particles = particle_frame(num_particles, particle_dim)
    score = gradient == "vimco"
    model_sites, guide_sites, values = run_pair(
        model, guide, args, kwargs, particles, subsamples, path, _hard_draw if score else None
    )
    _checks.check_match(model_sites, guide_sites)
    if joint:
        _checks.check_same_weight(model_sites, guide_sites)
    else:
        _checks.check_unweighted([*guide_sites.items(), *model_sites.items()])
    if score:
        _checks.check_discrete(model_sites, guide_sites)
    elif gradient is not None:
        _checks.check_reparameterised(guide_sites, gradient)
    _checks.check_data(model_sites)

    terms = [_Term(name, site, 1.0) for name, site in model_sites.items()]
    terms += [_Term(name, site, -1.0) for name, site in guide_sites.items()]
    plates: list[tuple[str, int]] = []
    scale: float | Tensor = 1.0
    if not joint:
        plates = _checks.common_plates(terms)
        scale = _checks.common_scale(terms)
        _checks.check_density(model_sites, guide_sites)
    carried = None if path is None else _path.carried_score(terms)
    scores: list[_Term] = []
    for term in terms:
        if carried is not None and carried[0] == term.name and term.sign < 0:
            term.log_prob = carried[1]
        else:
            term.log_prob = _log_prob(term, path)
        _checks.check_shape(term.name, term.site, term.log_prob.shape)
        if score and term.sign < 0 and is_scored(term.site):
            scores.append(_Term(term.name, term.site, 1.0))
            scores[-1].log_prob = _relaxation.unmasked_log_prob(term.site)
        factor = term.site["scale"] if joint else 1.0
        if isinstance(factor, Tensor) or factor != 1.0 or term.site["mask"] is not None:
            term.log_prob = scale_and_mask(term.log_prob, factor, term.site["mask"])
    if not joint:
        _checks.check_rows(terms, plates)
    if path is not None:
        _path.take_path_derivatives(terms, values, path, carried, joint)

    keep = {dim for _, dim in plates} | ({particle_dim} if particle_dim is not None else set())
    if isinstance(scale, Tensor):
        scale = _checks.rows(scale, plates)
    result = LogWeights(_total(terms, keep), particle_dim, plates, scale, guide_sites, model_sites)
    if scores:
        result.score = _total(scores, keep)
    return result


def pair_sites(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int,
    particle_dim: int,
    subsamples: dict[str, Tensor],
) -> tuple[Sites, Sites]:
    """Sites of the model and of the guide, with no condition on plates and scales."""
    particles = particle_frame(num_particles, particle_dim)
    model_sites, guide_sites, _ = run_pair(model, guide, args, kwargs, particles, subsamples)
    _checks.check_match(model_sites, guide_sites)
    _checks.check_data(model_sites)
    _checks.check_density(model_sites, guide_sites)
    return model_sites, guide_sites


def sites_at(
    program: Program,
    args: tuple,
    kwargs: dict,
    values: dict[str, Tensor],
    *,
    particle_dim: int,
    num_particles: int,
    subsamples: dict[str, Tensor],
) -> Sites:
    """Sites of one program at given values of some of them; the others are drawn."""
    particles = particle_frame(num_particles, particle_dim)
    with Record({**subsamples, **values}, particles=particles) as record:
        program(*args, **kwargs)
    return record.sites


def masked_log_prob(site: Any) -> Tensor:
    """Log-density of a site, masked and not scaled."""
    value = log_prob(site)
    _checks.check_shape(site["name"], site, value.shape)
    return value if site["mask"] is None else scale_and_mask(value, 1.0, site["mask"])


def _total(terms: list[_Term], keep: set[int]) -> Tensor:
    """Signed sum of all log-densities over all dimensions but ``keep``; a scalar if it is empty."""
    if not terms:
        raise ValueError("Expected a model with at least one sample site; got none.")
    # Terms of one shape are added before they are reduced.
    sums: dict[torch.Size, Tensor] = {}
    for term in terms:
        value = _reduce(term.log_prob, keep)
        if value.shape in sums:
            before = sums[value.shape]
            sums[value.shape] = before + value if term.sign > 0 else before - value
        else:
            sums[value.shape] = value if term.sign > 0 else -value
    total, *others = [value if keep else value.sum() for value in sums.values()]
    for other in others:
        total = total + other
    for dim in keep:
        # Sites that are all masked out have no dimensions of their own.
        if total.dim() < -dim:
            total = total.reshape((1,) * (-dim - total.dim()) + tuple(total.shape))
    return total


def _hard_draw(msg: Any) -> Tensor | None:
    """The value of a site that has a relaxation, from the same numbers as in all objectives."""
    kind = _relaxation.kind(msg["fn"])
    if kind is None:
        return None
    a = _relaxation.logits(msg["fn"]).detach()
    return _relaxation.harden(
        kind, _relaxation.noisy(kind, a, _relaxation.uniform(a.shape, a.dtype, a.device))
    )


def _reduce(log_prob: Tensor, keep: set[int]) -> Tensor:
    dims = [dim for dim in range(-log_prob.dim(), 0) if dim not in keep]
    return log_prob.sum(dims, keepdim=True) if keep and dims else log_prob


def _log_prob(term: _Term, path: _path.Path | None) -> Tensor:
    site = term.site
    try:
        return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    except (NotImplementedError, KeyError) as error:
        if path is None:
            raise
        # The host's flows score their own sample from a cache; a cut value is another tensor.
        raise ValueError(
            "Expected a distribution that scores any value under path gradients; got site "
            f"'{term.name}' with a {type(site['fn']).__name__} that cannot invert its transforms. "
            "Use gradient='reparam'."
        ) from error


def captured(fn: Program, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    """What a function returns, and the unconstrained parameters that it used, by name."""
    with poutine.trace(param_only=True) as capture:
        result = fn(*args, **kwargs)
    sites: dict[str, Any] = dict(capture.trace.nodes)
    return result, {name: site["value"].unconstrained() for name, site in sites.items()}


def data_scale(msgs: list[Any], rows: int) -> tuple[float, str]:
    """Number of data per row that a loss stands for, and the name of the first observed site.

    The scale of the observed sites, 1 if they differ. A plate that draws its subsample from all
    ``rows`` itself does not count: times ``rows`` it is the number of data that a loss is the sum
    over.
    """
    observed = [msg for msg in msgs if msg["is_observed"]]
    # A factor observes nothing; alone, it stands for the data.
    observed = [msg for msg in observed if msg["value"].numel()] or observed
    found: list[float] = []
    for msg in observed:
        scale = torch.as_tensor(msg["scale"]).double().flatten()
        for frame in msg["cond_indep_stack"]:
            if frame.full_size == rows:
                scale = scale * (frame.size / rows)
        found += scale.unique().tolist()
    same = found and all(math.isclose(scale, found[0], rel_tol=1e-6) for scale in found)
    return found[0] if same else 1.0, observed[0]["name"] if observed else ""
