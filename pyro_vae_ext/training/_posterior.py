"""One fit of a guide to a posterior, in the coordinates of its start.

The vector of the model is :math:`u = m + A w` with the Normal of the start. The pair that is
trained has :math:`w` for its only latent: the model is one factor, the guide the family of
``AutoPosterior``, with the parameters that this has, so that it needs no more than these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor
from torch.func import functional_call

from pyro_vae_ext import _trace
from pyro_vae_ext._flat import FlatModel
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.guides import AutoPosterior
from pyro_vae_ext.training._course import Look
from pyro_vae_ext.training._effects import Effects, Modules, RandomState, Untraceable
from pyro_vae_ext.training._graph import Graph, trace
from pyro_vae_ext.training._state import buffers

# Draws of a look, and the norm that a gradient is shortened to.
LOOKED_AT, LONGEST = 1000, 10.0
# Adam's.
DECAYS, TINY = (0.9, 0.999), 1e-8


class State(NamedTuple):
    """What a step changes."""

    random: RandomState
    numbers: Tensor  # parameters, their mean, and Adam's two moments, (4, P)
    updates: int
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
        self._buffers = list(buffers({"": guide.latent}).values())
        # All parameters in one row: an update is that of one vector.
        self._params = self._pair.row()
        self._mean = self._params.clone()
        self._first, self._second = torch.zeros_like(self._mean), torch.zeros_like(self._mean)
        self._count = 0
        self._params.requires_grad_()
        step_seed, self._look_seed = torch.randint(2**62, (2,), device="cpu").tolist()
        with _random(None):
            torch.manual_seed(step_seed)
            self._random = RandomState.now()
            self._graph = self._traced()

    def advance(self, rate: float, powers: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Run a block of steps; return their bounds, NaN where a step was skipped."""
        bounds = []
        with _random(self._random):
            for power, share in zip(self._like(powers), shares.tolist(), strict=True):
                bounds.append(self._step(rate, power))
                self._mean.lerp_(self._params.detach(), share)
            self._random = RandomState.now()
        return np.array(bounds)

    def _step(self, rate: float, power: Tensor) -> float:
        loss, slope = self._loss_and_slope(power)
        bound, norm = -loss.item(), torch.linalg.vector_norm(slope).item()
        if not (math.isfinite(bound) and math.isfinite(norm)):
            return math.nan
        self._count += 1
        slope = slope * min(1.0, LONGEST / max(norm, LONGEST))
        one, two = DECAYS
        self._first.lerp_(slope, 1 - one)
        self._second.mul_(two).addcmul_(slope, slope, value=1 - two)
        root = (self._second / (1 - two**self._count)).sqrt_().add_(TINY)
        with torch.no_grad():
            self._params.addcdiv_(self._first, root, value=-rate / (1 - one**self._count))
        return bound

    def _loss_and_slope(self, power: Tensor) -> tuple[Tensor, Tensor]:
        if self._graph is not None:
            try:
                loss, _ = self._graph([power])
                return loss, self._taken()
            except torch.linalg.LinAlgError:
                pass  # Of one row alone, which the density finds out.
        return self._eager(power)

    def _eager(self, power: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            loss = self._loss_and_grads(power)
        return loss, self._taken()

    def _loss_and_grads(self, power: Tensor) -> Tensor:
        return self._pair.at(self._params, partial(self._elbo.loss_and_grads, power=power))

    def _taken(self) -> Tensor:
        """The gradient, which is there no longer."""
        slope, self._params.grad = self._params.grad, None
        return torch.zeros_like(self._mean) if slope is None else slope

    def _traced(self) -> Graph | None:
        """A step as a graph, which spares what Python does; None where it is another step."""
        (power,) = self._like(np.array([0.5]))
        before = RandomState.now()
        self._eager(power)  # What is made at first use is there from here on.
        before.restore()
        with Modules() as modules, Effects() as effects:
            loss, slope = self._eager(power)
            loss, slope = loss.clone(), slope.clone()
        drawn = RandomState.now()

        def rewind() -> None:
            effects.undo()
            modules.undo()
            before.restore()

        rewind()
        try:
            graph = trace(self._loss_and_grads, (power,), {}, {"": self._params}, effects)
            before.restore()
            again, _ = graph([power])
        except (Untraceable, torch.linalg.LinAlgError):
            return None
        finally:
            same = drawn.same(RandomState.now())
            other = self._taken()
            rewind()
        near = {"rtol": torch.finfo(loss.dtype).eps ** 0.5, "equal_nan": True}
        near["atol"] = near["rtol"] * max(1.0, float(slope.abs().max()))
        same = same and torch.allclose(loss, again, **near)
        return graph if same and torch.allclose(slope, other, **near) else None

    def _like(self, numbers: np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, dtype=self._mean.dtype, device=self._mean.device)

    def look(self) -> Look:
        """Draw with the mean parameters; always the same noise."""
        return self._drawn(self._look_seed, LOOKED_AT)

    def draw(self, num_draws: int) -> Look:
        """Draw anew with the mean parameters."""
        return self._drawn(self._look_seed + 1, num_draws)

    @torch.no_grad()
    def _drawn(self, seed: int, num_draws: int) -> Look:
        pair = self._pair
        (power,) = self._like(np.ones(1))
        looks = []
        with _random(None):
            torch.manual_seed(seed)
            size = min(self._rows, LOOKED_AT)
            for start in range(0, num_draws, size):
                rows = min(size, num_draws - start)
                drawn = partial(
                    _trace.run,
                    args=(),
                    kwargs={"power": power},
                    num_particles=rows,
                    particle_dim=-1,
                )
                found = pair.at(self._mean, drawn)
                looks.append((found.stacked(), found.guide_sites[pair.site]["value"]))
        parts = (torch.cat(part).double().cpu().numpy() for part in zip(*looks, strict=True))
        return Look(*parts)

    def settle(self) -> None:
        """Put the parameters where their mean is."""
        with torch.no_grad():
            self._params.copy_(self._mean)

    def save(self) -> State:
        """A copy of everything."""
        numbers = torch.stack([self._params.detach(), self._mean, self._first, self._second])
        held = [torch.as_tensor(place.tensor).clone() for place in self._buffers]
        return State(self._random, numbers, self._count, held)

    def restore(self, saved: State) -> None:
        """Go back to a copy."""
        self._random, self._count = saved.random, saved.updates
        with torch.no_grad():
            rows = (self._params, self._mean, self._first, self._second)
            for row, value in zip(rows, saved.numbers, strict=True):
                row.copy_(value)
        for place, value in zip(self._buffers, saved.buffers, strict=True):
            place.put(value)

    def finish(self) -> None:
        """Give the guide the mean parameters."""
        self._pair.write(self._mean)


class _Whitened(torch.nn.Module):
    """The pair of ``w``, called with the power of the model's density."""

    def __init__(self, flat: FlatModel, owner: AutoPosterior) -> None:
        super().__init__()
        self.site = owner._aux_name("latent")
        self.latent = owner.latent
        self._flat = flat
        fixed = (owner.latent.loc, owner.latent.scale_tril)
        self._loc, self._scale_tril = (x.detach().to(flat.dtype) for x in fixed if x is not None)
        self._log_det = self._scale_tril.diagonal().log().sum()
        self._prior = dist.ImproperUniform(constraints.real_vector, (), (flat.size,))
        self._trained = {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and all(parameter is not x for x in fixed)
        }

    def row(self) -> Tensor:
        """A copy of the trained parameters."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._trained.values()])

    def write(self, row: Tensor) -> None:
        """Put a row into the trained parameters."""
        with torch.no_grad():
            for name, value in self._shaped(row).items():
                self._trained[name].copy_(value)

    def _shaped(self, row: Tensor) -> dict[str, Tensor]:
        parts = row.split([parameter.numel() for parameter in self._trained.values()])
        pairs = zip(self._trained.items(), parts, strict=True)
        return {name: part.view(parameter.shape) for (name, parameter), part in pairs}

    def at(self, row: Tensor, run: Callable[..., Any]) -> Any:
        """What a function of model and guide returns where the parameters are those of a row."""
        return functional_call(self, self._shaped(row), (run,))

    def forward(self, run: Callable[..., Any]) -> Any:
        """The same where the modules' own are the parameters."""
        # All of it: distributions read them when they are asked.
        return run(self.model, self.guide)

    def guide(self, power: Tensor) -> None:
        """Draw; the power changes nothing."""
        self.latent.drawn(self.site, {})

    def model(self, power: Tensor) -> None:
        """The density at every ``w``, of the model and, for the rest, of the start."""
        w = pyro.sample(self.site, self._prior)
        u = self._loc + w @ self._scale_tril.mT
        rows = self._flat.log_density(u.reshape(-1, u.shape[-1]))
        whole = rows.reshape(u.shape[:-1]) + self._log_det
        start = -0.5 * (w.square() + math.log(2 * math.pi)).sum(-1)
        mixed = power * whole + (1 - power) * start
        pyro.factor("target", torch.where(power < 1, mixed, whole))


@contextmanager
def _random(state: RandomState | None) -> Iterator[None]:
    """With other random numbers, after which those of the user go on.

    No handler sees in, and a density may be no number.
    """
    before = RandomState.now()
    try:
        if state is not None:
            state.restore()
        with poutine.block(), pyro.validation_enabled(False):
            yield
    finally:
        before.restore()
