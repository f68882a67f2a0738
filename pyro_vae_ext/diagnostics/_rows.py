"""Runs of a (model, guide) pair, read row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import Independent, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from pyro_vae_ext import _checks, _divergence, _record, _trace
from pyro_vae_ext.diagnostics._utilisation import (
    Draws,
    Runs,
    data_plates,
    partly_masked,
    too_few_rows,
)

Values = dict[str, Tensor]


class _Term(NamedTuple):
    name: str
    site: Any
    log_prob: Tensor


class PairRuns(Runs):
    """Runs with the draws in an outermost plate.

    A latent site under a ``Delta``, which carries a drawn auxiliary value over, is moved by that
    value; ``moved`` are the guide's sites that make up a latent vector, ``scored`` those of which
    its density is made.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.particle_dim = -1 - _trace.plate_nesting(model, guide, args, kwargs)
        self.subsamples: Values = {}
        asked, given = self._pair(1)
        latents = {name: site for name, site in asked.items() if not site["is_observed"]}
        data = {n: s for n, s in asked.items() if s["is_observed"] and s["value"].numel() > 0}
        names = data_plates(
            {name: _record.plates(site).values() for name, site in data.items()},
            {name: _record.plates(site).values() for name, site in latents.items()},
        )
        self.names = names
        self.latent = tuple(name for name, site in latents.items() if self._is_local(site))
        self.observed = tuple(name for name, site in data.items() if self._is_local(site))
        frames = [
            frame
            for name in self.latent[:1]
            for frame in asked[name]["cond_indep_stack"]
            if frame.name in names
        ]
        self.plates = sorted(((f.name, f.dim) for f in frames), key=lambda plate: plate[1])
        self.num_rows = math.prod(frame.size for frame in frames)
        if not frames or self.num_rows < 2:
            raise too_few_rows(dict.fromkeys(self.latent, self.num_rows))
        own = {n: s for n, s in given.items() if not s["is_observed"] and self._is_local(s)}
        deltas = [
            name for name in self.latent if _checks.distribution_name(given[name]["fn"]) == "Delta"
        ]
        auxiliary = [name for name in own if name not in asked]
        carried = []
        if deltas:
            # A family's own auxiliary sites are called after the site that it draws.
            carried = [a for a in auxiliary if not any(a.startswith(f"{b}_") for b in auxiliary)]
        for name in self.latent:
            if name not in own or (deltas and not carried):
                raise ValueError(
                    f"Expected one log-density per row of plate '{self.plates[0][0]}' at site "
                    f"'{name}'; got a joint draw of all rows. Use a guide that draws the site row "
                    "by row."
                )
        self.moved = [name for name in self.latent if name not in deltas] + carried
        self.scored = [*self.moved, *deltas]
        self.shared = [n for n, s in given.items() if not s["is_observed"] and n not in own]
        self.hierarchical = len(auxiliary) > len(carried)
        self.split = {
            name: not auxiliary and _splits(given[name]["fn"], asked[name]["fn"])
            for name in self.latent
        }
        self.marginal = tuple(
            name
            for name in self.latent
            if not self.split[name] and not _checks.unwrapped(asked[name]["fn"]).support.is_discrete
        )
        self.event_dims = {n: s["fn"].event_dim for n, s in given.items() if not s["is_observed"]}

    def draw(self, start: int, size: int) -> tuple[Draws, Values]:
        """Run both programs."""
        asked, given = self._pair(size)
        kl = {
            name: self._by_row(_terms(name, given, asked), self.event_dims[name])
            for name in self.latent
            if self.split[name]
        }
        local = [name for name, site in given.items() if self._is_local(site)]
        draws = Draws(
            own=_numpy(self._density(given, self.scored)),
            log_q=_numpy(self._density(given, local)),
            log_p=_numpy(self._density(asked, self.latent)),
            log_likelihood=_numpy(self._likelihood(asked)),
            values={
                name: _numpy(self._by_row(asked[name]["value"], self.event_dims[name]))
                for name in self.latent
            },
            kl={name: _numpy(found) for name, found in kl.items()},
            present=self._present(given),
        )
        return draws, {name: given[name]["value"] for name in self.event_dims}

    def prior(self, state: Values, start: int, size: int) -> dict[str, np.ndarray]:
        """Run the model without the values of its latent sites."""
        shared = {name: state[name] for name in self.shared}
        sites = self._run(self.model, shared, size)
        return {
            name: _numpy(self._by_row(sites[name]["value"], self.event_dims[name]))
            for name in self.marginal
        }

    def likelihood(self, state: Values, source: np.ndarray) -> np.ndarray:
        """Run the model at exchanged values."""
        moved = self._exchanged(state, self.latent, source)
        return _numpy(self._likelihood(self._run(self.model, {**state, **moved}, len(source))))

    def density(self, state: Values, source: np.ndarray, stream: int, start: int) -> np.ndarray:
        """Run the guide at exchanged values."""
        values = {name: state[name] for name in self.shared}
        values |= self._exchanged(state, self.moved, source)
        return _numpy(self._density(self._run(self.guide, values, len(source)), self.scored))

    def repeated(self, state: Values, size: int) -> Values:
        """The first draw as if drawn ``size`` times."""
        found = {}
        for name, value in state.items():
            axis = value.dim() - self.event_dims[name] + self.particle_dim
            shape = [*value.shape[:axis], size, *value.shape[axis + 1 :]]
            found[name] = value.narrow(axis, 0, 1).expand(shape)
        return found

    def _is_local(self, site: Any) -> bool:
        return bool(self.names) and self.names <= set(_record.plates(site).values())

    def _pair(self, size: int) -> tuple[Any, Any]:
        return _trace.pair_sites(
            self.model,
            self.guide,
            self.args,
            self.kwargs,
            num_particles=size,
            particle_dim=self.particle_dim,
            subsamples=self.subsamples,
        )

    def _run(self, program: Callable[..., Any], values: Values, size: int) -> Any:
        return _trace.sites_at(
            program,
            self.args,
            self.kwargs,
            values,
            num_particles=size,
            particle_dim=self.particle_dim,
            subsamples=self.subsamples,
        )

    def _axes(self, tensor: Tensor, event_dim: int) -> tuple[Tensor, list[int]]:
        """Where draws and rows stand; dimensions of size 1 are added if there are too few."""
        batch = tensor.dim() - event_dim
        missing = -self.particle_dim - batch
        if missing > 0:
            tensor, batch = tensor.reshape((1,) * missing + tensor.shape), batch + missing
        return tensor, [batch + dim for dim in (self.particle_dim, *(d for _, d in self.plates))]

    def _by_row(self, tensor: Tensor, event_dim: int) -> Tensor:
        """``(num_draws, num_rows, rest)``."""
        tensor, axes = self._axes(tensor, event_dim)
        front = tensor.movedim(axes, list(range(len(axes))))
        return front.reshape(len(front), self.num_rows, -1)

    def _exchanged(self, state: Values, names: Iterable[str], source: np.ndarray) -> Values:
        found = {}
        for name in names:
            tensor, axes = self._axes(state[name], self.event_dims[name])
            places = list(range(len(axes)))
            front = tensor.movedim(axes, places)
            rows = front.reshape(len(front), self.num_rows, -1)
            index = torch.as_tensor(source, device=rows.device).unsqueeze(-1).expand(rows.shape)
            found[name] = rows.gather(1, index).reshape(front.shape).movedim(places, axes)
        return found

    def _density(self, sites: Any, names: Iterable[str]) -> Tensor:
        terms = [_Term(name, sites[name], _trace.masked_log_prob(sites[name])) for name in names]
        _checks.check_rows(terms, self.plates)
        return torch.stack([self._by_row(term.log_prob, 0).sum(-1) for term in terms]).sum(0)

    def _likelihood(self, sites: Any) -> Tensor:
        # Factors of the model count as observed.
        return self._density(
            sites, [n for n, s in sites.items() if s["is_observed"] and self._is_local(s)]
        )

    def _present(self, sites: Any) -> np.ndarray:
        present = torch.ones(self.num_rows, dtype=torch.bool)
        for name in self.scored:
            for mask, event_dim in _masks(sites[name]):
                shape = sites[name]["fn"].shape()
                shape = shape[: len(shape) - sites[name]["fn"].event_dim + event_dim]
                rows = self._by_row(mask.cpu().expand(shape), event_dim)[0]
                if bool((rows.any(-1) != rows.all(-1)).any()):
                    raise partly_masked(name)
                present &= rows.all(-1)
        return present.numpy()


def _masks(site: Any) -> list[tuple[Tensor, int]]:
    """The masks of a site, and how many dimensions of its event each of them has."""
    fn = site["fn"]
    found = [] if site["mask"] is None else [(torch.as_tensor(site["mask"]), 0)]
    outer = fn.event_dim
    while isinstance(fn, ExpandedDistribution | Independent | MaskedDistribution):
        if isinstance(fn, MaskedDistribution):
            found.append((torch.as_tensor(fn._mask), outer - fn.event_dim))
        fn = fn.base_dist
    return found


def _splits(*fns: Any) -> bool:
    """Whether densities are sums over the elements of a value."""
    bases = [_checks.unwrapped(fn) for fn in fns]
    return all(not base.event_shape and type(base).__name__ != "Delta" for base in bases)


def _terms(name: str, given: Any, asked: Any) -> Tensor:
    """Divergence of every element of a site: in closed form where that is right, or sampled."""
    q, p = (_checks.unwrapped(sites[name]["fn"]) for sites in (given, asked))
    value = given[name]["value"]
    latent = [other for other, site in asked.items() if not site["is_observed"]]
    exact = _divergence.is_exact(name, list(given), latent)
    found = _divergence.closed_form(q, p) if exact else None
    if found is None:
        found = q.log_prob(value) - p.log_prob(value)
    return found.expand(value.shape)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
