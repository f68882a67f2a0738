r"""What REBAR and RELAX share: a relaxed control variate at every site, and its tuning.

Every scored site :math:`i` has two *slices*, runs of guide and model at relaxed values from the
noise of the hard run. Sites before it keep their hard values, its own is
:math:`\sigma_t(z_i)` in one slice and the conditionally relaxed :math:`\sigma_t(\tilde z_i)` in the
other, and sites after it are relaxed in turn. All slices run at once, under one ``vmap``, with the
parameters of model and guide held fixed: the hard run alone has a derivative in these.
"""

from __future__ import annotations

import functools
import math
from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import lax, random

from numpyro_vae_ext import _record, _relaxation, _trace
from numpyro_vae_ext.elbos._discrete import DiscreteELBO, Play, Scored, play, setting

Arrays = dict[str, jax.Array]


class Relaxed(NamedTuple):
    """A scored site, its noise and how it is relaxed.

    Attributes:
        site: The site of the hard run.
        kind: ``"bernoulli"`` or ``"one_hot"``.
        u: Noise of the hard and the relaxed value.
        v: Noise of the conditionally relaxed value.
        temperature: Of the relaxation.
        eta: What multiplies the cost in the control variate.
        surrogate: Network of the unrelaxed value and the logits, or None.
    """

    site: Scored
    kind: str
    u: jax.Array
    v: jax.Array
    temperature: Any
    eta: Any
    surrogate: Any

    def unrelaxed(self, pair: jax.Array) -> jax.Array:
        """``z`` and ``z`` given the hard value, each from logits of its own."""
        free = _relaxation.noisy(self.kind, pair[0], self.u)
        given = _relaxation.conditional(self.kind, pair[1], self.site.site["value"], self.v)
        return jnp.stack([free, given])

    def relaxed(self, z: jax.Array) -> jax.Array:
        """The relaxed value."""
        return _relaxation.soften(self.kind, z, self.temperature)

    def learned(self, z: jax.Array) -> jax.Array:
        """The surrogate's part of the control variate, of the batch's shape."""
        logits = jnp.broadcast_to(lax.stop_gradient(self.site.logits), z.shape)
        batch = z.shape[: z.ndim - self.site.event_dim]
        flat = [jnp.reshape(x, (*batch, -1)) for x in (z, logits)]
        value = self.surrogate(jnp.concatenate(flat, axis=-1))
        return self.site.scale * jnp.reshape(value, batch).astype(z.dtype)


class ControlVariateELBO(DiscreteELBO, ABC):
    """Base of the objectives with a relaxed control variate.

    Args:
        num_particles: number of particles `K`.
        temperature: temperature of the relaxation, one number or one for each site by name.
        eta: what multiplies the relaxed cost, one number or one for each site by name.
        vectorize_particles: run the particles side by side, or one at a time.
    """

    _extra = ""

    def __init__(
        self,
        num_particles: int,
        *,
        temperature: float | Mapping[str, float],
        eta: float | Mapping[str, float],
        vectorize_particles: bool,
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        values = temperature.values() if isinstance(temperature, Mapping) else [temperature]
        for value in values:
            _relaxation.check_temperature(value)
        self.temperature = temperature
        self.eta = eta

    def _declare(self, site: Any, modules: dict[str, Any]) -> dict[str, Any]:
        name = site["name"]
        if _relaxation.kind(site["fn"]) is None:
            return {}
        temperature = setting("temperature", self.temperature, name)
        eta = setting("eta", self.eta, name)
        return {
            "log_temperature": numpyro.param(
                f"{name}_log_temperature", jnp.log(jnp.asarray(temperature, float))
            ),
            "eta": numpyro.param(f"{name}_eta", jnp.asarray(eta, float)),
        }

    def _tuned(self, site: Scored) -> tuple[dict[str, Any], Callable[[Any], Any]]:
        """What the variance tunes at a site, and what makes a network of its part of that."""
        if not self._is_tuned:
            return {}, lambda params: None
        tuning = self._tuning(site, self._extra)
        knobs = {key: tuning[key] for key in ("log_temperature", "eta")}
        if "surrogate" not in tuning:
            return knobs, lambda params: None
        # The host's module is a function with its parameters filled in.
        network = tuning["surrogate"]
        knobs["surrogate"] = network.args[0]
        return knobs, functools.partial(functools.partial, network.func)

    def _numbers(self, site: Scored, knobs: dict[str, Any]) -> tuple[Any, Any]:
        """Temperature and eta of a site."""
        if not knobs:
            temperature = setting("temperature", self.temperature, site.name)
            return temperature, setting("eta", self.eta, site.name)
        dtype = site.logits.dtype
        return jnp.exp(knobs["log_temperature"]).astype(dtype), knobs["eta"].astype(dtype)

    def _particle(
        self,
        rng_key: jax.Array,
        plate_key: jax.Array,
        params: dict[str, Any],
        pair: _trace.Pair,
    ) -> dict[str, Any]:
        noise: Arrays = {}
        choose = _record.hard(noise)
        hard = self._checked(play(rng_key, plate_key, params, pair, choose, self._check))
        surrogate = hard.total()
        out = {"value": surrogate, "state": hard.state, "surrogate": surrogate}
        if not hard.sites:
            return out
        costs = lax.stop_gradient(hard.costs())
        tuned = [self._tuned(site) for site in hard.sites]

        def run(choose: _record.Choose) -> Play:
            return play(rng_key, plate_key, lax.stop_gradient(params), pair, choose)

        def objective(tree: list[dict[str, Any]]) -> tuple[jax.Array, list[jax.Array]]:
            layers = [
                self._relaxed(site, noise, knobs, merge(knobs.get("surrogate")))
                for site, knobs, (_, merge) in zip(hard.sites, tree, tuned, strict=True)
            ]
            gradients = _gradients(layers, costs, run)
            squares = map(_variance, hard.sites, gradients)
            return functools.reduce(jnp.add, squares), gradients

        tree = [knobs for knobs, _ in tuned]
        if self._is_tuned:
            # Here, and not in the caller's derivative: numbers that reach the logits past the
            # parameters, from an argument or a closure, must not get any of it.
            slopes, gradients = jax.grad(objective, has_aux=True)(lax.stop_gradient(tree))
            parts = jax.tree.map(
                lambda x, slope: jnp.sum(x * lax.stop_gradient(slope)), tree, slopes
            )
            out["objective"] = sum(jax.tree.leaves(parts))
        else:
            gradients = objective(tree)[1]
        for site, g in zip(hard.sites, gradients, strict=True):
            surrogate = surrogate + jnp.sum(site.logits * lax.stop_gradient(g))
        out["surrogate"] = surrogate
        return out

    def _check(self, name: str, fn: Any) -> None:
        _relaxation.check_relaxable(type(self).__name__, name, fn)

    def _relaxed(
        self, site: Scored, noise: Arrays, knobs: dict[str, Any], surrogate: Any
    ) -> Relaxed:
        u = noise[site.name]
        key = random.fold_in(site.site["kwargs"]["rng_key"], 1)
        v = _relaxation.uniform(key, u.shape, u.dtype)
        temperature, eta = self._numbers(site, knobs)
        return Relaxed(site, str(site.kind), u, v, temperature, eta, surrogate)


def _gradients(
    layers: list[Relaxed], costs: Arrays, run: Callable[[_record.Choose], Play]
) -> list[jax.Array]:
    """The estimate for every site: the derivative of the expected cost in its logits."""

    def controls(leaves: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        zs = [layer.unrelaxed(pair) for layer, pair in zip(layers, leaves, strict=True)]
        rows, totals = _slices(layers, zs, run)
        total, given = jnp.zeros((), zs[0].dtype), []
        for layer, z, row, sums in zip(layers, zs, rows, totals, strict=True):
            total, row = total + layer.eta * jnp.sum(sums), layer.eta * row[1]
            if layer.surrogate is not None:
                learned = layer.learned(z)
                total, row = total + jnp.sum(learned), row + learned[1]
            given.append(row)
        return total, given

    fixed = [lax.stop_gradient(layer.site.logits) for layer in layers]
    slopes, given = jax.grad(controls, has_aux=True)([jnp.stack([a, a]) for a in fixed])
    found = []
    for layer, a, (free_slope, given_slope), row in zip(layers, fixed, slopes, given, strict=True):
        score = _relaxation.score(layer.kind, a, layer.site.site["value"])
        left = layer.site.rows(costs[layer.site.name] - row)
        found.append(left * score + free_slope - given_slope)
    return found


def _slices(
    layers: list[Relaxed], zs: list[jax.Array], run: Callable[[_record.Choose], Play]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """By site, its cost and the sum of its cost's terms in its two slices."""
    order = {layer.site.name: i for i, layer in enumerate(layers)}
    values = []
    for i, (layer, z) in enumerate(zip(layers, zs, strict=True)):
        hard = [layer.site.site["value"][None]]
        # In the slices of earlier sites the value is made anew, and what stands here is not used.
        after = len(layers) - 1 - i
        values.append(jnp.concatenate([*hard * 2 * i, layer.relaxed(z), *hard * 2 * after]))

    def one(index: jax.Array, fixed: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        def choose(msg: Any) -> jax.Array:
            i = order[msg["name"]]
            if i == 0:
                return fixed[0]
            layer = layers[i]
            z = _relaxation.noisy(layer.kind, _record.site_logits(msg), layer.u)
            return jnp.where(index < i, layer.relaxed(z), fixed[i])

        found = run(choose)
        costs, totals = found.costs(), found.totals()
        return [costs[name] for name in order], [totals[name] for name in order]

    costs, totals = jax.vmap(one)(jnp.arange(2 * len(layers)) // 2, values)
    own = [slice(2 * i, 2 * i + 2) for i in range(len(layers))]
    return (
        [cost[s] for cost, s in zip(costs, own, strict=True)],
        [total[s] for total, s in zip(totals, own, strict=True)],
    )


def _variance(site: Scored, g: jax.Array) -> jax.Array:
    """The squared estimate, whose mean changes with the tuning as its variance does."""
    rows = math.prod(g.shape[: g.ndim - site.event_dim])
    return jnp.sum((g / site.rows(site.scale)) ** 2) / rows
