"""What the guides made from a model share: the layout of its latents, and the host's interface.

A latent site is unconstrained by ``biject_to``; unconstrained sites are concatenated to vectors,
which a family draws at auxiliary sites. Every site of the model is then a ``Delta`` at its drawn
value, in the plates of the model, whose log-density carries the Jacobian. Under a mask it has the
model's mask, and a factor cancels what the family says of what is masked out.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, register_kl

from pyro_vae_ext import _masks
from pyro_vae_ext._checks import distribution_name
from pyro_vae_ext._record import Record
from pyro_vae_ext.guides._hierarchy import reverse_factor

# What a copy shares with its original; none of it is changed in place.
_SHARED = ("prototype_trace", "_prototype_frames", "_sites", "_found", "_names", "plates")


class Delta(dist.Delta):
    """The host's, whose KL divergence in ``TraceMeanField_ELBO`` forgets the log-density."""


@register_kl(Delta, dist.Distribution)
def _kl_delta(p: Delta, q: Any) -> Tensor:
    return p.log_density - q.log_prob(p.v)


class Site(NamedTuple):
    """A latent site and its place in a vector of unconstrained numbers.

    Attributes:
        name: Name of the site.
        transform: Bijection from unconstrained values onto the support.
        batch: Plate dimensions within the vector; those that the vector itself lies in are 1.
        event: Shape of an unconstrained event.
        event_dim: Number of dimensions of a constrained event.
        frames: The plates around the site, outermost first.
    """

    name: str
    transform: Any
    batch: tuple[int, ...]
    event: tuple[int, ...]
    event_dim: int
    frames: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return math.prod(self.batch + self.event)

    def unpack(self, part: Tensor) -> Tensor:
        """Unconstrained value ``(*outer + batch, *event)`` from the site's ``(*outer, size)``.

        The dimensions of ``outer`` are plates as well, counted from the right as those of
        ``batch`` are; of two that stand at the same place one has size 1.
        """
        outer = tuple(part.shape[:-1])
        rank = max(len(outer), len(self.batch))
        outer = (1,) * (rank - len(outer)) + outer
        batch = (1,) * (rank - len(self.batch)) + self.batch
        part = part.reshape(outer + batch + self.event)
        pairs = [dim for pair in range(rank) for dim in (pair, rank + pair)]
        part = part.permute(pairs + list(range(2 * rank, part.dim())))
        return part.reshape([a * b for a, b in zip(outer, batch, strict=True)] + list(self.event))


def split(sites: Sequence[Site], vector: Tensor) -> Iterator[tuple[Site, Tensor]]:
    """Every site with its unconstrained value, from vectors ``(*outer, latent_dim)``."""
    parts = vector.split([site.size for site in sites], -1)
    for site, part in zip(sites, parts, strict=True):
        yield site, site.unpack(part)


def latent_sites(prototype: Any) -> list[Site]:
    """The latent sites of a run of the model."""
    sites = []
    for name, site in prototype.iter_stochastic_nodes():
        fn, value = site["fn"], site["value"]
        with helpful_support_errors(site):
            transform = biject_to(fn.support)
        rank = value.dim() - fn.event_dim
        event = tuple(transform.inv(value).shape[rank:])
        stack = site["cond_indep_stack"]
        sites.append(Site(name, transform, tuple(value.shape[:rank]), event, fn.event_dim, stack))
    if not sites:
        raise ValueError("Expected at least one continuous latent site in the model; got none.")
    return sites


def _initial_value(init_loc_fn: Callable[..., Any], guide: str, site: Any) -> Tensor:
    """``init_loc_fn`` for what has an unconstrained space; it may fail on anything else."""
    fn = site["fn"]
    if fn.support.is_discrete:
        raise ValueError(
            f"Expected continuous latent sites under {guide}; got site '{site['name']}' with the "
            f"distribution {distribution_name(fn)}. Marginalise it with the host's TraceEnum_ELBO "
            "and hide it from this guide, or use an objective for discrete latents."
        )
    return init_loc_fn(site)


def _is_foreign(names: set[str], msg: Any) -> bool:
    latent = msg["type"] == "sample" and not msg["is_observed"] and not site_is_subsample(msg)
    return latent and bool(names) and msg["name"] not in names


class FamilyGuide(AutoGuide):
    """Base of the guides made from a model; a member finds its sites and draws their vectors."""

    prototype_trace: Any

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any],
        create_plates: Callable[..., Any] | None,
    ) -> None:
        init = partial(_initial_value, init_loc_fn, type(self).__name__)
        names: set[str] = set()
        started = InitMessenger(init)(poutine.block(model, hide_fn=partial(_is_foreign, names)))
        # Not that of AutoContinuous, which wraps the model once more.
        AutoGuide.__init__(self, started, create_plates=create_plates)
        # The host's property is the first of these.
        self._model: Any = (started, model)
        self._names = names  # of the latent sites, once they are known
        self._has_arguments = False
        self._has_masks = False

    @abstractmethod
    def _prepare(self, args: tuple, kwargs: dict) -> None:
        """Find the latents of the model, where that has not been done for such arguments."""

    @abstractmethod
    def _latents(
        self, plates: dict[str, Any], args: tuple, kwargs: dict
    ) -> Iterator[tuple[Site, Tensor, Tensor | float]]:
        """Draw; every site, its unconstrained value, and what its log-density lacks per event."""

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # A run that leaves no trace: no gradient, no random number used up.
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            AutoGuide._setup_prototype(self, *args, **kwargs)
        latents = [site for _, site in self.prototype_trace.iter_stochastic_nodes()]
        self._has_masks = any(map(_masks.is_masked, latents))
        if self._has_masks:
            _masks.check_unread(self._model[1], args, kwargs, type(self).__name__)
        if not self._names:
            # What was observed at the first call may be latent later, and is hidden then.
            self._names.update(self.prototype_trace.stochastic_nodes)
            self._has_arguments = bool(args or kwargs)

    def _aux_name(self, kind: str) -> str:
        # The parts of an AutoGuideList are numbered: each has a site of its own.
        numbers = [part for part in self._pyro_name.split(".") if part.isdigit()]
        return "_" + "_".join(["auto", *numbers, kind])

    def _adopt(self, name: str, module: Any) -> None:
        """Take what Pyro's store has for a new submodule, as it does for a new parameter."""
        if isinstance(module, PyroModule):
            return
        shapes = {key: parameter.shape for key, parameter in module.named_parameters()}
        pyro.module(self._pyro_get_fullname(name), module, update_module_params=True)
        for key, parameter in module.named_parameters():
            if parameter.shape != shapes[key]:
                raise ValueError(
                    f"Expected shape {tuple(shapes[key])} for the parameter '{name}.{key}'; got "
                    f"{tuple(parameter.shape)} from Pyro's parameter store. Call "
                    "pyro.clear_param_store() before a guide of another model."
                )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the guide's statements with the arguments of the model; values by site."""
        self._prepare(args, kwargs)
        plates = self._create_plates(*args, **kwargs)
        drawn: Any = self._latents(plates, args, kwargs)
        hidden: dict[str, Any] = {}
        locs: dict[str, Tensor] = {}
        if self._has_masks:
            # The masks may depend on any of the values.
            drawn = list(drawn)
            values = {site.name: site.transform(free) for site, free, _ in drawn}
            hidden, locs = self._hidden(plates, values, args, kwargs), self._locs()
        result = {}
        for site, unconstrained, missing in drawn:
            value = site.transform(unconstrained)
            log_det = site.transform.log_abs_det_jacobian(unconstrained, value)
            log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + site.event_dim)
            fn = Delta(value, log_density=missing - log_det, event_dim=site.event_dim)
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                if (masked := hidden.get(site.name)) is not None:
                    rest = masked.missing(unconstrained, value, locs.get(site.name, 0.0))
                    if masked.rows is not None:
                        rest = rest + fn.log_density.masked_fill(masked.rows, 0.0)
                    reverse_factor(self._aux_name(site.name), -rest)
                    if masked.rows is not None:
                        stack.enter_context(poutine.mask(mask=masked.rows))
                result[site.name] = pyro.sample(site.name, fn)
        return result

    def _locs(self) -> dict[str, Tensor]:
        """Where unconstrained values that are masked out are put, of the sites not at 0."""
        return {}

    @torch.no_grad()
    def _hidden(
        self, plates: dict[str, Any], values: dict[str, Tensor], args: tuple, kwargs: dict
    ) -> dict[str, Any]:
        """What masks leave out of the latent sites, at these values."""
        rows = {name: plate.indices for name, plate in plates.items()}
        # Without the handler that starts its sites.
        model = poutine.block(self._model[1], hide_fn=partial(_is_foreign, self._names))
        with poutine.block(), Record({**rows, **values}) as record:
            model(*args, **kwargs)
        sites = record.sites
        return {name: _masks.hidden(sites[name], values[name]) for name in values if name in sites}

    def __getstate__(self) -> dict[str, Any]:
        # The host's drops the model and the master from the guide itself, too.
        kept = {"_model": self._model, "master": self.master}
        state = dict(super().__getstate__())
        self.__dict__.update(kept)
        return state

    def __deepcopy__(self, memo: dict) -> FamilyGuide:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        state = self.__getstate__()
        shared = {name: state.pop(name) for name in _SHARED if name in state}
        clone.__setstate__({**copy.deepcopy(state, memo), **shared, "_model": self._model})
        return clone
