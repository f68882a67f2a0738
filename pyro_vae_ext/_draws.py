"""What a pair says of draws from its guide: latents, what the model makes of them, new data.

Numbers come with the draws and the plates first, ``([num_particles], *plates, *rest)``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae_ext import _checks, _trace
from pyro_vae_ext._record import (
    Program,
    Record,
    Watch,
    is_deterministic,
    particle_frame,
    plates,
    run_pair,
)


class Variable(NamedTuple):
    """Numbers of one site: ``([num_particles], *plates, *rest)``, with the plates' names."""

    value: Tensor
    plates: tuple[str, ...]


Variables = dict[str, Variable]


@dataclass
class Draw:
    """Latent values of a guide, the data of the model, and new data drawn from it.

    Attributes:
        latent: Latent sites without auxiliaries.
        deterministic: What the model computes from them, reparameterised sites included.
        observed: Observed sites without factors; without draws in front.
        log_likelihood: Their log-densities, masked and not scaled.
        predictive: New values of the observed sites.
        log_weights: Of these draws.
        shared: By site of the guide, the values that belong to no row of the data.
    """

    latent: Variables
    deterministic: Variables
    observed: Variables
    log_likelihood: Variables
    predictive: Variables
    log_weights: _trace.LogWeights
    shared: dict[str, Tensor]


def draw(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int,
    particle_dim: int,
    subsamples: dict[str, Tensor],
    predictive: bool = False,
    likelihood: bool = False,
    varying: Collection[str] = (),
) -> Draw:
    """Draw latent values from the guide, with their log-weights and, on demand, more."""
    found = Deterministic()
    run = _trace.run(
        _inside(found, model),
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        particle_dim=particle_dim,
        subsamples=subsamples,
    )
    latents = {name: site for name, site in run.guide_sites.items() if not site["is_observed"]}
    data = {
        name: site
        for name, site in run.model_sites.items()
        if site["is_observed"] and site["value"].numel() > 0
    }
    fresh: Variables = {}
    if predictive:
        values = {name: site["value"] for name, site in run.guide_sites.items()}
        with Record(
            {**subsamples, **values}, particles=particle_frame(num_particles, particle_dim)
        ) as record:
            _inside(Uncondition(), model)(*args, **kwargs)
        fresh = {n: _variable(record.sites[n], particle_dim, num_particles) for n in data}
    rows = {plate for site in data.values() for plate in plates(site).values()}
    local = {
        name
        for name, site in latents.items()
        if rows & {*plates(site).values(), *plates(run.model_sites.get(name, site)).values()}
    }
    return Draw(
        latent={
            name: _variable(site, particle_dim, num_particles)
            for name, site in latents.items()
            if not site["infer"].get("is_auxiliary", False)
        },
        deterministic=_deterministic(found, varying, num_particles, particle_dim),
        observed={name: _variable(site, None) for name, site in data.items()},
        log_likelihood={
            name: _density(site, num_particles, particle_dim)
            for name, site in data.items()
            if likelihood
        },
        predictive=fresh,
        log_weights=run,
        shared={name: site["value"] for name, site in latents.items() if name not in local},
    )


def predict(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    shared: dict[str, Tensor],
    data: Collection[str],
    *,
    num_particles: int,
    particle_dim: int,
    subsamples: dict[str, Tensor],
    varying: Collection[str] = (),
) -> Variables:
    """Draw the data of a model at other arguments, and what it computes there.

    The guide is run at these arguments with the shared values of earlier draws; what it does not
    draw, the model does.
    """
    particles = particle_frame(num_particles, particle_dim)
    with Record(dict(shared), subsamples, particles=particles) as given:
        guide(*args, **kwargs)
    _forget_full(subsamples, given.sites)
    values = {name: site["value"] for name, site in given.sites.items() if not site["is_observed"]}

    def look(msg: Any) -> None:
        if msg["name"] in values:
            # Without the particles, which stand in front of both.
            check_fit(msg["name"], tuple(msg["value"].shape[1:]), tuple(msg["fn"].shape()[1:]))

    found = Deterministic()
    rows = {**subsamples, **values}
    with Record(rows, subsamples, particles=particles) as record, Watch(look):
        _inside(found, _inside(Uncondition(), model))(*args, **kwargs)
    _forget_full(subsamples, record.sites)
    wanted = {
        name: site
        for name, site in record.sites.items()
        if name in data or (site["infer"].get("was_observed") and site["value"].numel() > 0)
    }
    drawn = {name: _variable(s, particle_dim, num_particles) for name, s in wanted.items()}
    return {**drawn, **_deterministic(found, varying, num_particles, particle_dim)}


def _forget_full(subsamples: dict[str, Tensor], sites: dict[str, Any]) -> None:
    """Leave out plates that are whole: guide and model may have them at different sizes."""
    for site in sites.values():
        for frame in site["cond_indep_stack"]:
            if frame.full_size == frame.size:
                subsamples.pop(frame.name, None)


def varying(
    model: Program, guide: Program, args: tuple, kwargs: dict, particle_dim: int
) -> frozenset[str]:
    """What the model names and has one value of per draw, not one for all; found by two runs."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    shapes: list[dict[str, Any]] = []
    for size in (2, 3):
        found = Deterministic()
        # The runs leave no trace: no gradient, no site seen from outside, no random number used.
        with torch.no_grad(), poutine.block(), torch.random.fork_rng(devices):
            run_pair(_inside(found, model), guide, args, kwargs, particle_frame(size, particle_dim))
        shapes.append({name: site["value"].shape for name, site in found.sites.items()})
    return frozenset(name for name, shape in shapes[0].items() if shape != shapes[1].get(name))


def check_fit(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """A guide's value at new arguments must have the shape that the model has there."""
    width = max(len(got), len(wanted))
    padded = [(1,) * (width - len(shape)) + shape for shape in (got, wanted)]
    if padded[0] != padded[1]:
        raise ValueError(
            f"Expected site '{name}' to be drawn for the new arguments; got shape {got} from the "
            f"guide and {wanted} in the model. Use a guide that takes the new rows, as "
            "AutoAmortized does, or predict for as many rows as it was made for."
        )


class Uncondition(UnconditionMessenger):
    """Pyro's, without what the program only names: that would be expanded to all plates."""

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


class Deterministic(Messenger):
    """Keeps what a program only names: ``pyro.deterministic`` and reparameterised sites."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and is_deterministic(msg):
            self.sites[msg["name"]] = msg.copy()


def _inside(messenger: Messenger, program: Program) -> Program:
    """The program, seen by the messenger."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with messenger:
            return program(*args, **kwargs)

    return run


def _density(site: Any, num_particles: int, particle_dim: int) -> Variable:
    density = _trace.masked_log_prob(site)
    return _rows_first(density, 0, _frames(site), num_particles, particle_dim)


def _deterministic(
    found: Deterministic, varying: Collection[str], num_particles: int, particle_dim: int
) -> Variables:
    variables = {}
    for name, site in found.sites.items():
        value, event_dim, frames = site["value"], site["fn"].event_dim, _frames(site)
        if event_dim == value.dim():
            # By default all dimensions are the event's, plates and particles among them. The first
            # ones are taken as those of the particles and plates, if they have the sizes.
            depth = -particle_dim if name in varying else -min((f.dim for f in frames), default=0)
            event_dim = max(0, value.dim() - depth)
        batch = value.shape[: value.dim() - event_dim]
        sizes = [batch[frame.dim] if len(batch) >= -frame.dim else 0 for frame in frames]
        fits = all(size in (1, f.size) for size, f in zip(sizes, frames, strict=True))
        place = particle_dim
        if not fits or (name in varying and len(batch) != -particle_dim):
            place, frames, event_dim = -1, [], value.dim() - (name in varying)
        variables[name] = _rows_first(value, event_dim, frames, num_particles, place)
    return variables


def _frames(site: Any) -> list[Any]:
    """The plates of a site without the particles', outermost first."""
    frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != _checks.PARTICLES]
    return sorted(frames, key=lambda frame: frame.dim)


def _variable(site: Any, particle_dim: int | None, num_particles: int = 1) -> Variable:
    event_dim = site["fn"].event_dim
    return _rows_first(site["value"], event_dim, _frames(site), num_particles, particle_dim)


def _rows_first(
    value: Tensor, event_dim: int, frames: list[Any], num_particles: int, particle_dim: int | None
) -> Variable:
    """``([num_particles], *plates, *rest)``, other dimensions of size 1 dropped."""
    sizes = {frame.dim: frame.size for frame in frames}
    if particle_dim is not None:
        sizes = {particle_dim: num_particles, **sizes}
    rank = value.dim() - event_dim
    depth = max([rank, *(-dim for dim in sizes)])
    value = value.reshape((1,) * (depth - rank) + tuple(value.shape))
    rows = [depth + dim for dim in sizes]
    others = [axis for axis in range(depth) if axis not in rows]
    dropped = [axis for axis in others if value.shape[axis] == 1]
    rest = [axis for axis in others if axis not in dropped]
    value = value.permute([*rows, *dropped, *rest, *range(depth, value.dim())])
    shape = (*sizes.values(), *value.shape[len(rows) + len(dropped) :])
    value = value.reshape([*value.shape[: len(rows)], *value.shape[len(rows) + len(dropped) :]])
    return Variable(value.expand(shape), tuple(frame.name for frame in frames))
