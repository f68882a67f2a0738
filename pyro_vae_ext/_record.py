r"""Runs a (model, guide) pair and records its sites; declares parameters at a guide's sites.

What every objective shares: an outermost plate of particles, one subsample for all of them, a
sampler of the objective's own, and one noise for continuous sites that stand in several *slices*,
copies of the particles at other values of the discrete sites.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae_ext import _checks, _path, _relaxation

# How the names of an objective's own parameters and state end, after that of the site.
NUMBERS = ("_log_temperature", "_eta")
NETWORKS = ("_surrogate", "_baseline_network")
MOMENTS = ("_baseline",)

Program = Callable[..., Any]
Sites = dict[str, Any]
Sampler = Callable[[Any], Tensor | None]


class PlateCollision(Exception):
    """A plate of the pair stands at the dimension of the particles: more plates than assumed."""


class SitesChanged(Exception):
    """The pair has another number of scored sites than the last one."""


class Record(Messenger):
    """Run a program at given values and record its sites; stands outside of every plate.

    ``particles`` is the frame of an outermost plate, which is entered at sample sites alone: it
    has no business with parameters. The subsample of a plate is that of the first run. Its draw
    is repeated and discarded, so that a run consumes the same random numbers whether it is the
    first one or a recomputation. ``sampler`` returns the value of a latent site from its message,
    or None for the host's own draw.
    """

    def __init__(
        self,
        values: dict[str, Any] | None = None,
        subsamples: dict[str, Tensor] | None = None,
        path: _path.Path | None = None,
        particles: CondIndepStackFrame | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__()
        self.particles = particles
        self.values = {} if values is None else values
        self.subsamples = {} if subsamples is None else subsamples
        self.path = path
        self.sampler = sampler
        self.sites: Sites = {}
        self.rows: dict[str, Tensor] = {}

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "inspect" and self.particles is not None:
            # AutoGuides ask for the plates outside of them.
            msg["cond_indep_stack"] = (self.particles, *msg["cond_indep_stack"])
        if msg["type"] != "sample":
            return
        subsample = site_is_subsample(msg)
        if self.particles is not None and not subsample:
            if any(frame.dim == self.particles.dim for frame in msg["cond_indep_stack"]):
                raise PlateCollision
            msg["cond_indep_stack"] = (self.particles, *msg["cond_indep_stack"])
            BroadcastMessenger._pyro_sample(msg)
        if msg["is_observed"] or msg["value"] is not None:
            return
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
        elif self.sampler is not None and not subsample:
            msg["value"] = self.sampler(msg)
        msg["done"] = msg["value"] is not None

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        name = msg["name"]
        if site_is_subsample(msg):
            self.rows[name] = msg["value"] = self.subsamples.setdefault(name, msg["value"])
            return
        if is_deterministic(msg):
            return
        if name in self.sites:
            raise ValueError(f"Expected one site of each name; got '{name}' twice.")
        if self.path is not None and _path.is_scored(msg):
            msg["value"] = _path.cut(msg["value"], self.path)
            base = msg["fn"]
            while hasattr(base, "base_dist"):
                base = base.base_dist
            if hasattr(base, "carry"):
                base.carry(msg["value"])
        self.sites[name] = msg.copy()


def run_pair(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    particles: CondIndepStackFrame | None = None,
    subsamples: dict[str, Tensor] | None = None,
    path: _path.Path | None = None,
    sampler: Sampler | None = None,
) -> tuple[Sites, Sites, dict[str, Any]]:
    """Sites of the model and of the guide, and the latent values that the model was run at."""
    subsamples = {} if subsamples is None else subsamples
    with Record(None, subsamples, path, particles, sampler) as guide_record:
        guide(*args, **kwargs)
    guide_sites = guide_record.sites
    while isinstance(guide, Tunable):
        guide = guide.guide
    if isinstance(poutine.unwrap(guide), GuideMessenger):
        # Such a guide runs the model; what the model observes is none of the guide's.
        guide_sites = {n: site for n, site in guide_sites.items() if not site["is_observed"]}
    values = {name: site["value"] for name, site in guide_sites.items() if not site["is_observed"]}
    if path is not None and path.weigh:
        for name, value in values.items():
            if value.requires_grad and _path.is_scored(guide_sites[name]):
                event_dim = guide_sites[name]["fn"].event_dim
                values[name] = _path.weigh(value, path, event_dim)
    # A plate of the model alone is shared too, and drawn in every run as one of the guide is.
    with Record({**guide_record.rows, **values}, subsamples, particles=particles) as model_record:
        model(*args, **kwargs)
    return model_record.sites, guide_sites, values


class Watch(Messenger):
    """Shows every sample statement to a function while an objective runs the programs."""

    def __init__(self, look: Callable[[Any], None]) -> None:
        super().__init__()
        self.look = look

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and not is_deterministic(msg):
            self.look(msg)


def particle_frame(size: int, dim: int | None) -> CondIndepStackFrame | None:
    """The frame of the outermost plate; None without a dimension."""
    if dim is None:
        return None
    return CondIndepStackFrame(_checks.PARTICLES, dim, size, 0, full_size=size)


def is_deterministic(site: Any) -> bool:
    """Whether a site only names a value, as one of ``pyro.deterministic`` or a reparameterised."""
    infer, fn = site["infer"], site["fn"]
    observed = site["is_observed"] or infer.get("was_observed", False)
    masked = observed and getattr(fn, "_mask", None) is False
    return infer.get("_deterministic", False) or (
        masked and _checks.distribution_name(fn) == "Delta"
    )


def is_scored(site: Any) -> bool:
    """Whether a site is latent and has no reparameterised sampler: its gradient is a score's."""
    return not site["is_observed"] and not site["fn"].has_rsample


class Probe(NamedTuple):
    """What one run of a pair shows.

    Attributes:
        nesting: Largest number of nested plates.
        num_scored: Number of scored sites.
        widest: Numbers of one sample of the site that has most.
    """

    nesting: int
    num_scored: int
    widest: int


def probe(model: Program, guide: Program, args: tuple, kwargs: dict) -> Probe:
    """Run a pair once, without a trace of it."""
    # The run leaves no trace: no gradient, no site seen from outside, no random number used up.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.no_grad(), poutine.block(), torch.random.fork_rng(devices):
        model_sites, guide_sites, _ = run_pair(model, guide, args, kwargs)
    sites = [*guide_sites.items(), *model_sites.items()]
    for name, site in sites:
        # With particles an undeclared dimension could pass for theirs.
        _checks.check_shape(name, site, site["fn"].batch_shape)
    dims = [
        frame.dim for _, site in sites for frame in site["cond_indep_stack"] if frame.vectorized
    ]
    widest = max((site["fn"].shape().numel() for _, site in sites), default=1)
    return Probe(-min(dims, default=0), sum(map(is_scored, guide_sites.values())), widest)


def log_prob(site: Any) -> Tensor:
    """Log-density of a site at its value, neither scaled nor masked."""
    return site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])


@dataclass
class Term:
    """A signed log-density, scaled and masked: ``(num_slices * num_particles, *plates)``."""

    log_prob: Tensor
    scored: bool
    plates: dict[int, str]
    order: int | None


def terms(model_sites: Sites, guide_sites: Sites) -> list[Term]:
    """Scaled and masked log-densities of all sites of a run."""
    found = []
    order = 0
    for guides, sites in ((False, model_sites), (True, guide_sites)):
        for name, site in sites.items():
            if not site["is_observed"] and _relaxation.kind(site["fn"]) is not None:
                value = _relaxation.soft_log_prob(site["fn"], site["value"])
            else:
                value = log_prob(site)
            _checks.check_shape(name, site, value.shape)
            value = scale_and_mask(value, site["scale"], site["mask"])
            latent = guides and not site["is_observed"]
            scored = guides and is_scored(site)
            found.append(
                Term(-value if guides else value, scored, plates(site), order if latent else None)
            )
            order += latent
    return found


def plates(site: Any) -> dict[int, str]:
    """Names of the plates that a site stands in, by dimension, without the particles'."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    return {frame.dim: frame.name for frame in frames if frame.name != _checks.PARTICLES}


def pad(tensor: Tensor, dims: int) -> Tensor:
    """The tensor with ones before its shape, up to a number of dimensions."""
    return tensor.reshape((1,) * (dims - tensor.dim()) + tuple(tensor.shape))


def add(tensors: list[Tensor]) -> Tensor:
    """Sum of tensors that broadcast; those of one shape are added first."""
    sums: dict[torch.Size, Tensor] = {}
    for tensor in tensors:
        shape = tensor.shape
        sums[shape] = sums[shape] + tensor if shape in sums else tensor
    total, *others = sums.values()
    for other in others:
        total = total + other
    return total


class Running(torch.nn.Module):
    """Running mean, running variance and number of updates, as buffers."""

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("mean", "variance", "count"):
            self.register_buffer(name, torch.zeros(()))


class Tunable(torch.nn.Module):
    """A guide whose scored sites carry parameters of the objective, ``infer["tuning"]``.

    ``declare(self, name, msg)`` returns what a site carries, made by :meth:`number`,
    :meth:`network` and :meth:`running`. The parameters stand in Pyro's store and in this module's
    ``state_dict``; they are made when the site is first run, or loaded.
    """

    def __init__(
        self, guide: Program, declare: Callable[[Tunable, str, Any], dict[str, Any]]
    ) -> None:
        super().__init__()
        self.guide = guide
        self._declare = declare
        self._loaded: dict[str, dict[str, Tensor]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide."""
        with _Declare(self):
            return self.guide(*args, **kwargs)

    def number(self, name: str, value: float, like: Tensor) -> Tensor:
        """A real parameter."""
        key = _key(name)
        if key not in self._parameters:
            start = torch.tensor(value, dtype=like.dtype, device=like.device)
            self.register_parameter(key, torch.nn.Parameter(start))
        # The store's own, if it has one: it was loaded, or another objective made it.
        declared: Any = pyro.param(name, self._parameters[key])
        self._parameters[key] = declared
        return declared

    def network(self, name: str, make: Callable[[], torch.nn.Module], like: Tensor) -> Any:
        """A module with parameters."""
        key = _key(name)
        if key not in self._modules:
            made = make().to(device=like.device, dtype=like.dtype)
            if key in self._loaded:
                made.load_state_dict(self._loaded.pop(key))
            self.add_module(key, made)
        return pyro.module(name, self.get_submodule(key), update_module_params=True)

    def running(self, name: str, like: Tensor) -> Any:
        """Running moments."""
        key = _key(name)
        if key not in self._modules:
            self.add_module(key, Running().to(device=like.device, dtype=like.dtype))
        return self._modules[key]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for full, value in state_dict.items():
            if not full.startswith(prefix) or full.startswith(f"{prefix}guide."):
                continue
            key, _, inner = full[len(prefix) :].partition(".")
            if key in self._parameters or key in self._modules:
                continue
            if not inner and key.endswith(NUMBERS):
                self.register_parameter(key, torch.nn.Parameter(torch.empty_like(value)))
            elif inner and key.endswith(MOMENTS):
                self.add_module(key, Running().to(device=value.device, dtype=value.dtype))
            elif inner and key.endswith(NETWORKS):
                # The first run tells its width.
                self._loaded.setdefault(key, {})[inner] = value
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        waiting = {f"{prefix}{key}.{name}" for key, d in self._loaded.items() for name in d}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in waiting]


def _key(name: str) -> str:
    """A site's name as that of an attribute: torch allows no dots."""
    return name.replace(".", "/")


class _Declare(Messenger):
    def __init__(self, owner: Tunable) -> None:
        super().__init__()
        self.owner = owner

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and is_scored(msg):
            tuning = self.owner._declare(self.owner, msg["name"], msg)
            msg["infer"] = {**msg["infer"], "tuning": tuning}


def mlp(width: int, hidden_dims: Sequence[int]) -> torch.nn.Sequential:
    """A network of tanh layers with one output, which starts at zero."""
    layers: list[torch.nn.Module] = []
    for inner, outer in itertools.pairwise((width, *hidden_dims)):
        layers += [torch.nn.Linear(inner, outer), torch.nn.Tanh()]
    head = torch.nn.Linear((width, *hidden_dims)[-1], 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return torch.nn.Sequential(*layers, head)


def single(network: torch.nn.Module, features: Tensor) -> Tensor:
    """One number per row; a network may or may not have a dimension for it."""
    output = network(features)
    return output.squeeze(-1) if output.dim() == features.dim() else output


def flat_event(tensor: Tensor, event_dim: int) -> Tensor:
    """The event as one dimension."""
    return tensor.flatten(tensor.dim() - event_dim) if event_dim else tensor.unsqueeze(-1)
