r"""The contract of an objective for discrete latent sites: the ELBO, with a score's gradient.

A *scored* site is a latent site of the guide without a reparameterised sampler. For each the base
hands a member the *cost* of its value: the signed, scaled and masked log-densities of model and
guide, without latent sites that the guide drew before it, per row of the plates that the site
stands in. A member returns an estimate of the derivative of the expected cost in the site's
logits; everything else keeps its ordinary derivative. The scored sites' own log-densities count
as numbers there, since their score has mean zero.

A member may ask for *slices*: copies of the particles in which some sites take other values, such
as relaxed ones, made of the same noise. Slices and particles are one outermost plate, slice by
slice, so that guide and model run once; or they run one after another.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vae_ext import _checks, _record, _relaxation
from pyro_vae_ext._record import Program, Sites, Term, Tunable, add, pad
from pyro_vae_ext._relaxation import Site
from pyro_vae_ext.elbos._host import HostELBO


@dataclass
class Run:
    """What all slices of all particles gave."""

    sites: list[Site]
    terms: list[Term]
    num_slices: int
    num_particles: int
    nesting: int
    looped: bool

    def totals(self) -> tuple[Tensor, Tensor]:
        """Sums of the scored sites' terms and of all others, ``(num_slices, num_particles)``."""
        sums: dict[bool, Tensor] = {}
        groups: dict[tuple[bool, torch.Size], Tensor] = {}
        for term in self.terms:
            key = term.scored, term.log_prob.shape
            groups[key] = groups[key] + term.log_prob if key in groups else term.log_prob
        for (scored, _), value in groups.items():
            total = value.flatten(1).sum(1) if value.dim() > 1 else value
            sums[scored] = sums[scored] + total if scored in sums else total
        if False not in sums:
            raise ValueError("Expected a model with at least one sample site; got none.")
        size = (self.num_slices, self.num_particles)
        others = sums[False].reshape(size)
        return sums[True].reshape(size) if True in sums else torch.zeros_like(others), others

    def costs(self, site: Site) -> Tensor:
        """Costs of a site in its rows, ``(num_slices, num_particles, *plates)``.

        Terms are summed over plates that the site does not stand in.
        """
        reduced = []
        for term in self.terms:
            if term.order is not None and term.order < site.order:
                continue
            value = term.log_prob
            dims = [
                dim
                for dim in range(-self.nesting, 0)
                if value.shape[dim] != 1 and term.plates.get(dim) != site.plates.get(dim, "")
            ]
            reduced.append(value.sum(dims, keepdim=True) if dims else value)
        return add(reduced).unflatten(0, (self.num_slices, self.num_particles))

    def gather(self, tensors: Sequence[Tensor], event_dim: int) -> Tensor:
        """Tensors of all runs as one, ``(num_particles, *plates, *event)``."""
        if not self.looped:
            return tensors[0]
        return torch.stack([pad(tensor, self.nesting + event_dim) for tensor in tensors])


class DiscreteELBO(HostELBO, ABC):
    """Base of objectives for discrete latent sites; a member defines :meth:`_surrogate`."""

    # Slices that each scored site asks for, and what an error says besides passing the guide.
    copies: ClassVar[int] = 0
    remedy: ClassVar[str] = ""

    def __init__(
        self,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(
            num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        # Plates and scored sites of the last pair.
        self._layout: tuple[int, int] | None = None
        self._least_nesting = 0 if math.isinf(max_plate_nesting) else int(max_plate_nesting)

    def tunable(self, guide: Program) -> Program:
        """The guide, which declares the objective's own parameters at its discrete sites.

        Args:
            guide: Program of Pyro primitives.

        Returns:
            A program to use in the place of the guide; the guide itself where there is nothing
            to declare.
        """
        return Tunable(guide, self._declare) if self._has_parameters() else guide

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The negative ELBO as a scalar tensor whose gradient is the estimate."""
        gradient = torch.is_grad_enabled()
        run = self._run(model, guide, args, kwargs, self.copies if gradient else 0)
        if not run.sites:
            warnings.warn(
                f"Expected discrete latent sites under {type(self).__name__}; got none. Use the "
                "host's Trace_ELBO, or ImportanceWeightedELBO.",
                UserWarning,
                stacklevel=2,
            )
        scored, others = run.totals()
        exact = self._exact(run)
        loss = -(scored[:exact] + others[:exact]).detach().mean()
        if not gradient:
            return loss
        surrogate = -others[:exact].mean()
        if run.sites:
            surrogate = surrogate + self._surrogate(run, scored + others)
        return loss + (surrogate - surrogate.detach())

    @abstractmethod
    def _surrogate(self, run: Run, totals: Tensor) -> Tensor:
        """A number whose derivative is that of the loss in the logits and own parameters.

        Args:
            run: All slices.
            totals: Sampled ELBOs, ``(num_slices, num_particles)``.
        """

    def _has_parameters(self) -> bool:
        """Whether the objective has parameters or state at a site."""
        return False

    def _declare(self, owner: Tunable, name: str, msg: Any) -> dict[str, Any]:
        """Make the parameters of a site."""
        return {}

    def _check_site(self, name: str, fn: Any) -> None:
        """Raise for a scored site that the objective cannot have."""

    def _draw(self, site: Site) -> None:
        """Set the hard value of a site from its noise, and its values in its own slices.

        A site without a relaxation has the host's value, which is not drawn yet.
        """
        if site.kind is None:
            return
        a = site.logits.detach()
        site.value = _relaxation.harden(site.kind, _relaxation.noisy(site.kind, a, site.noise))

    def _downstream(self, site: Site, logits: Tensor) -> Tensor:
        """Values of a site in the slices of earlier sites, at its logits there."""
        return _relaxation.harden(site.kind, _relaxation.noisy(site.kind, logits, site.noise))

    def _exact(self, run: Run) -> int:
        """The number of slices, from the first, that are draws of the guide."""
        return 1

    def _tuning(self, name: str, infer: dict[str, Any], *keys: str) -> dict[str, Any]:
        """What :meth:`_declare` gave a site."""
        tuning = infer.get("tuning", {})
        if not all(key in tuning for key in keys):
            raise ValueError(
                f"Expected the guide that {type(self).__name__}.tunable(guide) returns; got site "
                f"'{name}' without its tuning parameters. Pass that guide to SVI{self.remedy}."
            )
        return tuning

    def _run(self, model: Program, guide: Program, args: tuple, kwargs: dict, copies: int) -> Run:
        if not self.vectorize_particles or (copies == 0 and self.num_particles == 1):
            return self._looped(model, guide, args, kwargs, copies)
        failure: Exception | None = None
        if self._layout is not None:
            try:
                return self._stacked(model, guide, args, kwargs, copies, *self._layout)
            except Exception as error:
                failure = error  # Perhaps another pair than the last one, with more plates.
        nesting, num_sites, _ = _record.probe(model, guide, args, kwargs)
        layout = max(nesting, self._least_nesting), num_sites
        if failure is not None and layout == self._layout:
            raise failure
        self._layout = layout
        return self._stacked(model, guide, args, kwargs, copies, *layout)

    def _stacked(
        self,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: dict,
        copies: int,
        nesting: int,
        num_sites: int,
    ) -> Run:
        """All slices of all particles at once."""
        num_slices = 1 + copies * num_sites
        size = num_slices * self.num_particles
        sampler = _Stack(self, copies, num_sites)
        particles = _record.particle_frame(size, -1 - nesting)
        pair = _record.run_pair(model, guide, args, kwargs, particles, sampler=sampler)
        if copies and len(sampler.sites) != num_sites:
            raise _record.SitesChanged
        sites = _check(self, pair, sampler.sites)
        terms = _record.terms(pair[0], pair[1])
        for term in terms:
            padded = pad(term.log_prob, nesting + 1)
            # A site that is masked out, or that no plate reaches, has no dimension of its own.
            term.log_prob = padded.expand(size, *padded.shape[1:])
        return Run(sites, terms, num_slices, self.num_particles, nesting, looped=False)

    def _looped(
        self, model: Program, guide: Program, args: tuple, kwargs: dict, copies: int
    ) -> Run:
        """Particles, and their slices, one after another."""
        subsamples: dict[str, Tensor] = {}
        runs: list[list[list[Term]]] = []
        drawn: list[list[Site]] = []
        for _ in range(self.num_particles):
            sampler = _Loop(self, copies)
            pair = _record.run_pair(
                model, guide, args, kwargs, subsamples=subsamples, sampler=sampler
            )
            drawn.append(_check(self, pair, sampler.sites))
            runs.append([_record.terms(pair[0], pair[1])])
            state = _relaxation.random_state() if copies else None
            for _ in range(copies * len(drawn[-1])):
                sampler.slice += 1
                pair = _record.run_pair(
                    model, guide, args, kwargs, subsamples=subsamples, sampler=sampler
                )
                runs[-1].append(_record.terms(pair[0], pair[1]))
            if state is not None:
                _relaxation.set_random_state(state)
        nesting = -min((dim for term in runs[0][0] for dim in term.plates), default=0)
        run = Run([], [], len(runs[0]), self.num_particles, nesting, looped=True)
        run.terms = [
            # Slice by slice, as they stand in a stack.
            replace(parts[0], log_prob=torch.stack([pad(t.log_prob, nesting) for t in parts]))
            for parts in zip(
                *(particle[s] for s in range(run.num_slices) for particle in runs), strict=True
            )
        ]
        run.sites = [_gather_site(run, parts) for parts in zip(*drawn, strict=True)]
        return run


class _Loop:
    """Values of latent sites in one slice after another of one particle."""

    def __init__(self, elbo: DiscreteELBO, copies: int) -> None:
        self.elbo, self.copies = elbo, copies
        self.sites: dict[str, Site] = {}
        self.slice = 0
        self.states: dict[str, Any] = {}

    def __call__(self, msg: Any) -> Tensor | None:
        name = msg["name"]
        if msg["fn"].has_rsample:
            # Every slice draws it with the noise of the first.
            if self.slice:
                _relaxation.set_random_state(self.states[name])
            elif self.copies:
                self.states[name] = _relaxation.random_state()
            return None
        if self.slice == 0:
            site = _new_site(self.elbo, msg)
            self.sites[name] = site
            return site.value
        site = self.sites[name]
        owner, copy = divmod(self.slice - 1, self.copies)
        place = list(self.sites).index(name)
        if place < owner:
            return site.value
        if place == owner:
            return site.own[copy]
        return self.elbo._downstream(site, _relaxation.logits(msg["fn"]))


class _Stack:
    """Values of latent sites in all slices of all particles."""

    def __init__(self, elbo: DiscreteELBO, copies: int, num_sites: int) -> None:
        self.elbo, self.copies, self.num_sites = elbo, copies, num_sites
        self.sites: dict[str, Site] = {}

    def __call__(self, msg: Any) -> Tensor | None:
        num_slices = 1 + self.copies * self.num_sites
        if msg["fn"].has_rsample:
            return _relaxation.shared_draw(msg, num_slices) if num_slices > 1 else None
        place, size = len(self.sites), self.elbo.num_particles
        if self.copies and place >= self.num_sites:
            raise _record.SitesChanged
        site = _new_site(self.elbo, msg, size)
        self.sites[msg["name"]] = site
        if site.value is None or num_slices == 1:
            return site.value
        before, after = self.copies * place, self.copies * (self.num_sites - 1 - place)
        values = [site.value]
        if before:
            logits = _relaxation.logits(msg["fn"])[size : (1 + before) * size]
            logits = logits.unflatten(0, (before, size))
            values.append(self.elbo._downstream(site, logits).flatten(0, 1))
        return torch.cat([*values, *site.own, *[site.value] * after])


def _new_site(elbo: DiscreteELBO, msg: Any, num_particles: int | None = None) -> Site:
    """A scored site at its sample statement; ``num_particles`` of a stack, or None in a loop."""
    fn = msg["fn"]
    elbo._check_site(msg["name"], fn)
    site = Site(msg["name"], _relaxation.kind(fn), fn, msg["infer"])
    if site.kind is not None:
        a = _relaxation.logits(fn)
        site.logits = a = a if num_particles is None else a[:num_particles]
        site.noise = _relaxation.uniform(a.shape, a.dtype, a.device)
    elbo._draw(site)
    return site


def _check(elbo: DiscreteELBO, pair: tuple[Sites, ...], drawn: dict[str, Site]) -> list[Site]:
    """Check the pair, and complete the scored sites by what is known after the run."""
    model_sites, guide_sites, _ = pair
    _checks.check_match(model_sites, guide_sites)
    _checks.check_same_weight(model_sites, guide_sites)
    _checks.check_discrete(model_sites, guide_sites)
    _checks.check_data(model_sites)
    latent = [name for name, site in guide_sites.items() if not site["is_observed"]]
    for name, site in drawn.items():
        msg = guide_sites[name]
        elbo._check_site(name, (model_sites[name] if name in model_sites else msg)["fn"])
        # The unit of a cost: without a KL weight, which may be 0.
        site.scale = msg["infer"].get("unweighted_scale", msg["scale"])
        site.plates, site.order = _record.plates(msg), latent.index(name)
        if site.kind is None:
            site.value = msg["value"]
            site.log_prob = _relaxation.unmasked_log_prob(msg)
    return list(drawn.values())


def _gather_site(run: Run, parts: Sequence[Site]) -> Site:
    """The sites of all particles of a loop as one."""
    first = parts[0]
    event_dim = first.fn.event_dim

    def gather(name: str, event_dim: int = event_dim) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], list):
            return [run.gather(row, event_dim) for row in zip(*values, strict=True)]
        return None if values[0] is None else run.gather(values, event_dim)

    return replace(
        first,
        logits=gather("logits"),
        value=gather("value"),
        own=gather("own"),
        features=gather("features", 1),
        log_prob=gather("log_prob", 0),
        leaf=[leaf for part in parts for leaf in part.leaf],
    )
