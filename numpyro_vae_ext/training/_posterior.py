"""One fit of a guide to a posterior, in the coordinates of its start.

The vector of the model is :math:`u = m + A w` with the Normal of the start. The pair that is
trained has :math:`w` for its only latent: the model is one factor, the guide the family of
``AutoPosterior``, with the parameters that this has, so that it needs no more than these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI

from numpyro_vae_ext import _trace
from numpyro_vae_ext._flat import FlatModel
from numpyro_vae_ext._record import Pair, log_probs
from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import AutoPosterior
from numpyro_vae_ext.training._course import BLOCK, Look

# Draws of a look, and the norm that a gradient is shortened to.
LOOKED_AT, LONGEST = 1000, 10.0


class State(NamedTuple):
    """What a step changes; parameters are unconstrained, and one vector: less to compile."""

    rng_key: jax.Array
    params: jax.Array
    optim: Any
    mean: jax.Array


class PosteriorTrainer:
    """The trainer of a course.

    Args:
        rng_key: Key of the first parameters and of all draws.
        flat: The model as a density of one vector.
        guide: The guide, whose family is trained.
        start: Normal that the guide starts from.
        num_particles: Draws of a step.
    """

    def __init__(
        self,
        rng_key: jax.Array,
        flat: FlatModel,
        guide: AutoPosterior,
        start: Any,
        num_particles: int,
    ) -> None:
        init_key, step_key, self._look_key = random.split(rng_key, 3)
        self._flat = flat
        args, kwargs = flat.pair.args, flat.pair.kwargs
        # Sites, family and a look at the start; nothing is computed.
        jax.eval_shape(lambda: guide._prepare(args, kwargs))
        pair = _Whitened(
            guide, jnp.asarray(start.loc, flat.dtype), jnp.asarray(start.scale_tril, flat.dtype)
        )
        at_a_time = _trace.NUMBERS_AT_A_TIME.get(jax.default_backend(), _trace.MOST_NUMBERS)
        self._rows = max(1, at_a_time // max(flat.widest, flat.size))
        elbo = ImportanceWeightedELBO(
            num_outer=num_particles,
            gradient="stl",
            chunk_size=self._rows if self._rows < num_particles else None,
        )
        self._svi = SVI(pair.model, pair.guide, optax.scale(1.0), elbo)
        optim = optax.chain(optax.clip_by_global_norm(LONGEST), optax.scale_by_adam())
        one = jnp.ones((), flat.dtype)
        first = flat.compiled(lambda flat, key: self._svi.init(key, flat, one))(init_key)
        params, unravel = ravel_pytree(self._svi.optim.get_params(first.optim_state))
        # Types as steps leave them, so that these are compiled once.
        params = jnp.asarray(params, params.dtype)
        self._state = State(step_key, params, optim.init(params), params)
        self._named = lambda vector: self._svi.constrain_fn(unravel(vector))
        self._steps = flat.compiled(_steps(self._svi, optim, self._named))
        self._draws = flat.compiled(_draws(pair, self._named, self._rows))
        # A block that is thrown away: what is compiled is compiled here, and not in the race.
        before = self.save()
        self.advance(0.0, np.ones(BLOCK), np.zeros(BLOCK))
        self.look()
        self.restore(before)

    def advance(self, rate: float, powers: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Run a block of steps; return their bounds, NaN where a step was skipped."""
        numbers = (np.asarray(x, self._flat.dtype) for x in (rate, powers, shares))
        self._state, bounds = self._steps(self._state, *numbers)
        return np.asarray(bounds, float)

    def look(self) -> Look:
        """Draw with the mean parameters; always the same noise."""
        return self._drawn(self._look_key)

    def draw(self, num_draws: int) -> Look:
        """Draw anew with the mean parameters."""
        blocks = -(-num_draws // LOOKED_AT)
        keys = random.split(random.fold_in(self._look_key, 1), blocks)
        looks = [self._drawn(key) for key in keys]
        return Look(*(np.concatenate(parts)[:num_draws] for parts in zip(*looks, strict=True)))

    def _drawn(self, key: jax.Array) -> Look:
        found = self._draws(self._state.mean, random.split(key, LOOKED_AT))
        return Look(*(np.asarray(each, float) for each in found))

    def settle(self) -> None:
        """Put the parameters where their mean is."""
        self._state = self._state._replace(params=self._state.mean)

    def save(self) -> State:
        """A copy of everything; arrays are never changed."""
        return self._state

    def restore(self, saved: State) -> None:
        """Go back to a copy."""
        self._state = saved

    def params(self) -> dict[str, Any]:
        """The mean parameters, as the guide takes them."""
        return self._named(self._state.mean)


class _Whitened(NamedTuple):
    """The pair of ``w``, called with the flat model and its power."""

    owner: AutoPosterior
    loc: jax.Array
    scale_tril: jax.Array

    @property
    def site(self) -> str:
        return f"_{self.owner.prefix}_latent"

    def model(self, flat: FlatModel, power: jax.Array) -> None:
        """The density at ``w``, of the model and, for the rest, of the start."""
        flat_prior = dist.ImproperUniform(constraints.real_vector, (), (flat.size,))
        w = numpyro.sample(self.site, flat_prior)
        # In full precision also where a device's default is less, as the guide has it.
        u = self.loc + jnp.matmul(self.scale_tril, w, precision=lax.Precision.HIGHEST)
        with handlers.block():
            whole = flat.log_density(u) + jnp.log(jnp.diagonal(self.scale_tril)).sum()
        start = -0.5 * (w**2 + math.log(2 * math.pi)).sum()
        mixed = power * whole + (1 - power) * start
        numpyro.factor("target", jnp.where(power < 1, mixed, whole))

    def guide(self, flat: FlatModel, power: jax.Array) -> None:
        """Draw; the power changes nothing."""
        self.owner._drawn_vector(flat.pair.args, flat.pair.kwargs, {})


def _steps(svi: SVI, optim: Any, named: Callable[..., Any]) -> Callable[..., Any]:
    """A block of steps."""

    def step(flat: FlatModel, rate: jax.Array, state: State, now: Any) -> tuple[State, jax.Array]:
        power, share = now
        rng_key, key = random.split(state.rng_key)

        def loss_of(params: jax.Array) -> jax.Array:
            return svi.loss.loss(key, named(params), svi.model, svi.guide, flat, power)

        loss, slope = jax.value_and_grad(loss_of)(state.params)
        good = jnp.isfinite(loss) & jnp.isfinite(slope).all()
        direction, moments = optim.update(slope, state.optim, state.params)
        params, moments = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (state.params - rate * direction, moments),
            (state.params, state.optim),
        )
        mean = state.mean + share * (params - state.mean)
        return State(rng_key, params, moments, mean), jnp.where(good, -loss, jnp.nan)

    def run(
        flat: FlatModel, state: State, rate: jax.Array, powers: jax.Array, shares: jax.Array
    ) -> tuple[State, jax.Array]:
        return lax.scan(lambda s, now: step(flat, rate, s, now), state, (powers, shares))

    return run


def _draws(pair: _Whitened, named: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """Log-weights and points, one for every key."""

    def run(flat: FlatModel, params: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        known, one = named(params), jnp.ones((), flat.dtype)

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            both = Pair(pair.model, pair.guide, (flat, one), {})
            modelled, drawn = _trace.pair_sites(key, key, known, both)
            log_p, log_q = (
                jnp.stack([term.sum() for term in log_probs(sites).values()]).sum()
                for sites in (modelled, drawn)
            )
            return log_p - log_q, drawn[pair.site]["value"]

        return lax.map(draw, keys, batch_size=min(rows, LOOKED_AT))

    return run
