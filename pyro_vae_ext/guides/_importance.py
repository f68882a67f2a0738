r"""Draws that are picked out of more of them by their importance weights.

Of :math:`M` draws of a guide the :math:`i`-th is kept with probability :math:`w_i / \sum_j w_j`,
:math:`w = p(x, z) / q(z)` (Rubin, 1988, *Using the SIR Algorithm to Simulate Posterior
Distributions*), the weights Pareto-smoothed over the pool of all draws.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyro_vae_ext import _psis, _record, _trace
from pyro_vae_ext.guides._auto import FamilyGuide, Site


class Pool(NamedTuple):
    """Draws of a guide, and what they weigh.

    Attributes:
        values: Constrained values by site, the draws in front.
        log_weights: ``(num_draws, *plates)``, the plates from left to right.
        dims: The dimensions of these plates.
    """

    values: dict[str, Tensor]
    log_weights: Tensor
    dims: tuple[int, ...]


def pool(guide: FamilyGuide, sites: list[Site], count: int, args: tuple, kwargs: dict) -> Pool:
    """Draw ``count`` times from the guide and weigh the draws."""
    model = guide._model[1]
    check_whole_model(_hides(model))
    probe = _record.probe(model, guide, args, kwargs)
    size = max(1, _trace.MOST_NUMBERS // max(1, probe.widest))
    subsamples: dict[str, Tensor] = {}
    weights: list[Tensor] = []
    values: list[dict[str, Tensor]] = []
    for start in range(0, count, size):
        number = min(size, count - start)
        found = _trace.run(
            model,
            guide,
            args,
            kwargs,
            num_particles=number,
            particle_dim=-1 - probe.nesting,
            subsamples=subsamples,
        )
        weights.append(found.stacked())
        values.append({})
        for site in sites:
            value = found.guide_sites[site.name]["value"]
            own = value.shape[value.dim() - len(site.batch) - site.event_dim :]
            values[-1][site.name] = value.reshape(number, *own)
    joined = {site.name: torch.cat([part[site.name] for part in values]) for site in sites}
    return Pool(joined, torch.cat(weights), tuple(dim for _, dim in found.plates))


def picked(drawn: Pool, sites: list[Site], num_importance: int) -> dict[str, Tensor]:
    """One draw out of every ``num_importance``, each row for itself where it has a weight."""
    groups = torch.as_tensor(grouped(drawn.log_weights.double().cpu().numpy(), num_importance))
    # The largest of log-weights plus Gumbel noise is a draw by the weights.
    index = (groups - torch.empty_like(groups).exponential_().log()).argmax(1)
    result = {}
    for site in sites:
        value = drawn.values[site.name]
        shape = [len(index), 1, *(1 for _ in value.shape[1:])]
        for dim, size in zip(drawn.dims, index.shape[1:], strict=True):
            shape[2 + len(site.batch) + dim] = size
        value = value.reshape(-1, num_importance, *value.shape[1:])
        place = index.reshape(shape).to(value.device)
        result[site.name] = torch.take_along_dim(value, place, 1).squeeze(1)
    return result


def grouped(log_weights: np.ndarray, num_importance: int) -> np.ndarray:
    """Smoothed log-weights ``(num_draws, num_importance, *rows)``, from all of the pool.

    Raises:
        ValueError: If a log-weight is NaN or infinite, or all of a group are 0.
    """
    smoothed, khat = _psis.psis(log_weights)
    limit = _psis.threshold(len(log_weights))
    poor = ~(khat < limit)
    if poor.any() and _psis.tail_length(len(log_weights)) >= _psis.FEWEST:
        worst = float(np.max(khat))
        which = f", and at {int(poor.sum())} of {khat.size} rows above" if khat.size > 1 else ""
        warnings.warn(
            f"Expected k-hat below {limit:.2f} under num_importance; got {worst:.2f}{which}. The "
            "draws are nearer to the posterior than those of the guide, and still not from it: "
            "train the guide further, or use a richer family.",
            UserWarning,
            stacklevel=4,
        )
    groups = smoothed.reshape(-1, num_importance, *log_weights.shape[1:])
    dead = groups.max(axis=1) == -np.inf
    if dead.any():
        raise ValueError(
            f"Expected a draw with a positive weight among num_importance={num_importance}; got "
            f"none for {int(dead.sum())} of {dead.size} draws. Raise num_importance, or train the "
            "guide."
        )
    return groups


def check_whole_model(hides: bool) -> None:
    """A part of a list knows a part of the density."""
    if hides:
        raise ValueError(
            "Expected a guide of the whole model under num_importance; got one whose model hides "
            "sites, as a part of a list does. Build one guide for all latents."
        )


def _hides(program: Any) -> bool:
    """Whether a handler hides sites of the program."""
    while isinstance(program, partial):
        # What a handler returns holds a partial of the handler and the program.
        inner = program.func
        if isinstance(inner, partial):
            handler, program = inner.args[:2]
            if isinstance(handler, BlockMessenger):
                return True
        else:
            return False
    return False
