"""One fit of a guide to a posterior, in the coordinates of its start.

The vector of the model is :math:`u = m + A w` with the Normal of the start. The pair that is
trained has :math:`w` for its only latent: the model is one factor, the guide the family of
``AutoPosterior``, with the parameters that this has, so that it needs no more than these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae_ext import _trace
from pyro_vae_ext._flat import FlatModel
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import AutoPosterior
from pyro_vae_ext.training._course import Look
from pyro_vae_ext.training._effects import RandomState
from pyro_vae_ext.training._state import buffers

# Draws of a look, and the norm that a gradient is shortened to.
LOOKED_AT, LONGEST = 1000, 10.0
# Adam's.
DECAYS, TINY = (0.9, 0.999), 1e-8


class State(NamedTuple):
    """What a step changes."""

    random: RandomState
    numbers: Tensor  # parameters, their mean, and Adam's two moments, (4, P)
    count: int
    buffers: list[Tensor]


class PosteriorTrainer:
    """The trainer of a course.

    Args:
        flat: The model as a density of one vector.
        guide: The guide, whose family is trained; it has found its sites.
        num_particles: Draws of a step.
    """

    def __init__(self, flat: FlatModel, guide: AutoPosterior, num_particles: int) -> None:
        self._pair = _Whitened(flat, guide)
        self._rows = max(1, _trace.MOST_NUMBERS // max(flat.widest, flat.size))
        self._elbo = ImportanceWeightedELBO(
            num_outer=num_particles,
            gradient="stl",
            chunk_size=self._rows if self._rows < num_particles else None,
        )
        located = guide.latent
        parts = [located.family] if located.step is None else [located.family, located.step]
        self._leaves = [p for part in parts for p in part.parameters() if p.requires_grad]
        self._buffers = buffers({"": located}).values()
        # The parameters become views of one row: an update is that of one vector.
        self._numbers = torch.zeros(
            (4, sum(p.numel() for p in self._leaves)), dtype=flat.dtype, device=flat.device
        )
        self._params, self._mean, self._first, self._second = self._numbers
        with torch.no_grad():
            self._params.copy_(torch.cat([p.reshape(-1) for p in self._leaves]))
            self._mean.copy_(self._params)
        for leaf, view in zip(self._leaves, self._views(), strict=True):
            leaf.data = view
        self._count = 0
        seeds = torch.randint(2**62, (2,), device="cpu").tolist()
        with _random(None):
            torch.manual_seed(seeds[0])
            self._random = RandomState.now()
        self._look_seed = seeds[1]

    def advance(self, rate: float, powers: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Run a block of steps; return their bounds, NaN where a step was skipped."""
        bounds = []
        with _random(self._random):
            for power, share in zip(powers.tolist(), shares.tolist(), strict=True):
                bounds.append(self._step(rate, power))
                self._mean.lerp_(self._params, share)
            self._random = RandomState.now()
        return np.array(bounds)

    def _step(self, rate: float, power: float) -> float:
        pair = self._pair
        with torch.enable_grad():
            loss = self._elbo.differentiable_loss(pair.model, pair.guide, power)
            slopes = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        slope = torch.cat(
            [
                torch.zeros_like(p).reshape(-1) if s is None else s.reshape(-1)
                for p, s in zip(self._leaves, slopes, strict=True)
            ]
        )
        bound, norm = -loss.item(), torch.linalg.vector_norm(slope).item()
        if not (math.isfinite(bound) and math.isfinite(norm)):
            return math.nan
        self._count += 1
        slope *= min(1.0, LONGEST / norm) if norm else 1.0
        one, two = DECAYS
        self._first.lerp_(slope, 1 - one)
        self._second.mul_(two).addcmul_(slope, slope, value=1 - two)
        root = (self._second / (1 - two**self._count)).sqrt_().add_(TINY)
        self._params.addcdiv_(self._first, root, value=-rate / (1 - one**self._count))
        return bound

    def look(self) -> Look:
        """Draw with the mean parameters; always the same noise."""
        return self._drawn(self._look_seed, LOOKED_AT)

    def draw(self, num_draws: int) -> Look:
        """Draw anew with the mean parameters."""
        return self._drawn(self._look_seed + 1, num_draws)

    @torch.no_grad()
    def _drawn(self, seed: int, num_draws: int) -> Look:
        pair, params = self._pair, self._params.clone()
        self.settle()
        looks = []
        with _random(None):
            torch.manual_seed(seed)
            for start in range(0, num_draws, min(self._rows, LOOKED_AT)):
                rows = min(self._rows, LOOKED_AT, num_draws - start)
                found = _trace.run(
                    pair.model, pair.guide, (1.0,), {}, num_particles=rows, particle_dim=-1
                )
                points = found.guide_sites[pair.site]["value"]
                looks.append((found.stacked(), points))
        self._params.copy_(params)
        parts = (torch.cat(part).double().cpu().numpy() for part in zip(*looks, strict=True))
        return Look(*parts)

    def settle(self) -> None:
        """Put the parameters where their mean is."""
        self._params.copy_(self._mean)

    def save(self) -> State:
        """A copy of everything."""
        held = [torch.as_tensor(place.tensor).clone() for place in self._buffers]
        return State(self._random, self._numbers.clone(), self._count, held)

    def restore(self, saved: State) -> None:
        """Go back to a copy."""
        self._random, self._count = saved.random, saved.count
        self._numbers.copy_(saved.numbers)
        for place, value in zip(self._buffers, saved.buffers, strict=True):
            place.put(value)

    def finish(self) -> None:
        """Leave the guide with the mean parameters, each with a memory of its own."""
        self.settle()
        for leaf, view in zip(self._leaves, self._views(), strict=True):
            leaf.data = view.clone()

    def _views(self) -> Iterator[Tensor]:
        """The row of the parameters in their shapes."""
        parts = self._params.split([p.numel() for p in self._leaves])
        return (part.view(p.shape) for part, p in zip(parts, self._leaves, strict=True))


class _Whitened:
    """The pair of ``w``, called with the power of the model's density."""

    def __init__(self, flat: FlatModel, owner: AutoPosterior) -> None:
        self.site = owner._aux_name("latent")
        self._flat = flat
        self._latent = owner.latent
        self._loc, self._scale_tril = (
            x.detach().to(flat.dtype) for x in (owner.latent.loc, owner.latent.scale_tril)
        )
        self._log_det = self._scale_tril.diagonal().log().sum()
        self._flat_prior = dist.ImproperUniform(constraints.real_vector, (), (flat.size,))

    def model(self, power: float) -> None:
        w = pyro.sample(self.site, self._flat_prior)
        pyro.factor("target", self._log_density(w, power))

    def guide(self, power: float) -> None:
        self._latent.drawn(self.site, {})

    def _log_density(self, w: Tensor, power: float) -> Tensor:
        u = self._loc + w @ self._scale_tril.mT
        rows = self._flat.log_density(u.reshape(-1, u.shape[-1]))
        whole = rows.reshape(u.shape[:-1]) + self._log_det
        if power == 1:
            return whole
        start = dist.Normal(torch.zeros_like(w), torch.ones_like(w)).log_prob(w).sum(-1)
        return power * whole + (1 - power) * start


@contextmanager
def _random(state: RandomState | None) -> Iterator[None]:
    """With other random numbers, after which those of the user go on as before."""
    before = RandomState.now()
    try:
        if state is not None:
            state.restore()
        yield
    finally:
        before.restore()
