"""Runs of a (model, guide) pair, read row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import random

from numpyro_vae_ext import _checks, _divergence, _record, _trace
from numpyro_vae_ext.diagnostics._utilisation import (
    Draws,
    Runs,
    data_plates,
    partly_masked,
    too_few_rows,
)

Values = dict[str, jax.Array]


class PairRuns(Runs):
    """Compiled runs of ``size`` draws at a time.

    A latent site under a ``Delta``, which carries a drawn auxiliary value over, is moved by that
    value; ``moved`` are the guide's sites that make up a latent vector, ``scored`` those of which
    its density is made.
    """

    def __init__(
        self,
        rng_key: jax.Array,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        params: dict[str, Any],
        size: int,
    ) -> None:
        pair = _record.Pair(model, guide, args, kwargs)
        self.size, self.params = size, params
        self.plate_key = _trace.shared_key(rng_key)
        self.keys = random.split(rng_key, 4)
        self.seed = int(random.randint(self.keys[3], (), 0, 2**31 - 1, dtype=jnp.int32))
        self._plan(pair)
        self._draws = _trace.compiled(self._draw, pair)
        self._priors = _trace.compiled(self._prior, pair)
        self._likelihoods = _trace.compiled(self._likelihood, pair)
        self._densities = _trace.compiled(self._density, pair)

    def _plan(self, pair: _record.Pair) -> None:
        seen: list[Any] = []

        def look() -> None:
            seen.extend(_trace.pair_sites(self.keys[0], self.plate_key, self.params, pair))

        # Shapes alone; the data are looked at, as a compiled run cannot do.
        jax.eval_shape(look)
        asked, given = seen
        latents = _record.latent_sites(asked)
        data = {name: site for name, site in asked.items() if _checks.is_data(site)}
        names = data_plates(
            {name: _plates(site) for name, site in data.items()},
            {name: _plates(site) for name, site in latents.items()},
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
        self.plates = tuple(sorted(frames, key=lambda frame: frame.dim))
        self.num_rows = math.prod(frame.size for frame in frames)
        if not frames or self.num_rows < 2:
            raise too_few_rows(dict.fromkeys(self.latent, self.num_rows))
        drawn = _record.latent_sites(given)
        own = {name: site for name, site in drawn.items() if self._is_local(site)}
        deltas = [
            name
            for name in self.latent
            if isinstance(_checks.unwrapped(given[name]["fn"]), dist.Delta)
        ]
        auxiliary = [name for name in own if name not in asked]
        carried = []
        if deltas:
            # A family's own auxiliary sites are called after the site that it draws.
            carried = [a for a in auxiliary if not any(a.startswith(f"{b}_") for b in auxiliary)]
        for name in self.latent:
            if name not in own or (deltas and not carried):
                raise ValueError(
                    f"Expected one log-density per row of plate '{self.plates[0].name}' at site "
                    f"'{name}'; got a joint draw of all rows. Use a guide that draws the site row "
                    "by row."
                )
        self.moved = [name for name in self.latent if name not in deltas] + carried
        self.scored = [*self.moved, *deltas]
        self.shared = [name for name in drawn if name not in own]
        self.hierarchical = len(auxiliary) > len(carried)
        self.split = {
            name: not auxiliary and _splits(given[name]["fn"], asked[name]["fn"])
            for name in self.latent
        }
        self.marginal = tuple(
            name
            for name in self.latent
            if not self.split[name] and not _checks.is_discrete(asked[name]["fn"])
        )
        self.shapes = {name: site["fn"].shape() for name, site in drawn.items()}
        self.event_dims = {name: site["fn"].event_dim for name, site in drawn.items()}

    def draw(self, start: int, size: int) -> tuple[Draws, Values]:
        """Run both programs."""
        draws, masks, state = self._draws(self.params, self._keys(0, 0, start))
        for name, (some, every) in masks.items():
            if np.any(np.asarray(some) != np.asarray(every)):
                raise partly_masked(name)
        present = np.ones(self.num_rows, bool)
        for _, every in masks.values():
            present &= np.asarray(every[0])
        return Draws(**_numpy(draws, size), present=present), state

    def prior(self, state: Values, start: int, size: int) -> dict[str, np.ndarray]:
        """Run the model without the values of its latent sites."""
        return _numpy(self._priors(self.params, self._keys(1, 0, start), state), size)

    def likelihood(self, state: Values, source: np.ndarray) -> np.ndarray:
        """Run the model at exchanged values."""
        found = self._likelihoods(self.params, self._keys(0, 0, 0), state, self._padded(source))
        return _numpy(found, len(source))

    def density(self, state: Values, source: np.ndarray, stream: int, start: int) -> np.ndarray:
        """Run the guide at exchanged values."""
        keys = self._keys(2, stream, start)
        return _numpy(self._densities(self.params, keys, state, self._padded(source)), len(source))

    def repeated(self, state: Values, size: int) -> Values:
        """The first draw as if drawn at every place."""
        return {k: jnp.broadcast_to(value[:1], value.shape) for k, value in state.items()}

    def _draw(self, pair: _record.Pair, params: Any, keys: jax.Array) -> Any:
        def one(key: jax.Array) -> Any:
            asked, given = _trace.pair_sites(key, self.plate_key, params, pair)
            local = [name for name, site in given.items() if self._is_local(site)]
            draws = {
                "own": self._sum(given, self.scored),
                "log_q": self._sum(given, local),
                "log_p": self._sum(asked, self.latent),
                "log_likelihood": self._data(asked),
                "values": {name: self._rows(name, given[name]["value"]) for name in self.latent},
                "kl": {
                    name: self._rows(name, _terms(name, given, asked))
                    for name in self.latent
                    if self.split[name]
                },
            }
            masks = {name: self._masks(given[name]) for name in self.scored}
            return draws, masks, {name: given[name]["value"] for name in self.shapes}

        return jax.vmap(one)(keys)

    def _prior(self, pair: _record.Pair, params: Any, keys: jax.Array, state: Values) -> Any:
        def one(key: jax.Array, state: Values) -> Any:
            shared = {name: state[name] for name in self.shared}
            sites = _trace.sites_at(key, self.plate_key, params, pair, shared, guide=False)
            return {name: self._rows(name, sites[name]["value"]) for name in self.marginal}

        return jax.vmap(one)(keys, state)

    def _likelihood(
        self, pair: _record.Pair, params: Any, keys: jax.Array, state: Values, source: jax.Array
    ) -> Any:
        def one(key: jax.Array, state: Values, source: jax.Array) -> jax.Array:
            values = {**state, **self._exchanged(state, self.latent, source)}
            sites = _trace.sites_at(key, self.plate_key, params, pair, values, guide=False)
            return self._data(sites)

        return jax.vmap(one)(keys, state, source)

    def _density(
        self, pair: _record.Pair, params: Any, keys: jax.Array, state: Values, source: jax.Array
    ) -> Any:
        def one(key: jax.Array, state: Values, source: jax.Array) -> jax.Array:
            values = {name: state[name] for name in self.shared}
            values |= self._exchanged(state, self.moved, source)
            sites = _trace.sites_at(key, self.plate_key, params, pair, values, guide=True)
            return self._sum(sites, self.scored)

        return jax.vmap(one)(keys, state, source)

    def _is_local(self, site: Any) -> bool:
        return bool(self.names) and self.names <= set(_plates(site))

    def _keys(self, use: int, stream: int, start: int) -> jax.Array:
        """A key for each draw, whichever chunk it is in."""
        key = random.fold_in(self.keys[use], stream)
        return jax.vmap(random.fold_in, (None, 0))(key, start + jnp.arange(self.size))

    def _padded(self, source: np.ndarray) -> np.ndarray:
        # The last chunk is as long as the others: there is one program, and its rest is cut off.
        return np.concatenate([source, np.repeat(source[:1], self.size - len(source), 0)])

    def _axes(self, ndim: int, event_dim: int) -> list[int]:
        return [ndim - event_dim + plate.dim for plate in self.plates]

    def _rows(self, name: str, value: jax.Array) -> jax.Array:
        """``(num_rows, rest)``."""
        value = jnp.broadcast_to(value, self.shapes[name])
        axes = self._axes(value.ndim, self.event_dims[name])
        return jnp.moveaxis(value, axes, range(len(axes))).reshape(self.num_rows, -1)

    def _exchanged(self, state: Values, names: Iterable[str], source: jax.Array) -> Values:
        found = {}
        for name in names:
            value = jnp.broadcast_to(state[name], self.shapes[name])
            axes = self._axes(value.ndim, self.event_dims[name])
            front = jnp.moveaxis(value, axes, range(len(axes)))
            rows = front.reshape(self.num_rows, -1)[source]
            found[name] = jnp.moveaxis(rows.reshape(front.shape), range(len(axes)), axes)
        return found

    def _sum(self, sites: Any, names: Iterable[str]) -> jax.Array:
        chosen = {name: sites[name] for name in names}
        terms = [
            _checks.per_row(sites[name], log_prob, self.plates).reshape(self.num_rows)
            for name, log_prob in _record.log_probs(chosen).items()
        ]
        return sum(terms, start=jnp.zeros(self.num_rows))

    def _data(self, sites: Any) -> jax.Array:
        # Factors of the model count as observed.
        return self._sum(
            sites, [n for n, s in sites.items() if s["is_observed"] and self._is_local(s)]
        )

    def _masks(self, site: Any) -> tuple[jax.Array, jax.Array]:
        """By row, whether any part counts, and whether every part does."""
        some = every = jnp.ones(self.num_rows, bool)
        fn, event_dim = site["fn"], site["fn"].event_dim
        while isinstance(
            fn, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution
        ):
            if isinstance(fn, dist.MaskedDistribution):
                inner = event_dim - fn.event_dim
                shape = site["fn"].shape()
                shape = shape[: len(shape) - event_dim + inner]
                mask = jnp.broadcast_to(jnp.asarray(fn._mask, bool), shape)
                axes = self._axes(mask.ndim, inner)
                rows = jnp.moveaxis(mask, axes, range(len(axes))).reshape(self.num_rows, -1)
                some, every = some & rows.any(-1), every & rows.all(-1)
            fn = fn.base_dist
        return some, every


def _plates(site: Any) -> list[str]:
    return [frame.name for frame in site["cond_indep_stack"]]


def _splits(*fns: Any) -> bool:
    """Whether densities are sums over the elements of a value."""
    bases = [_checks.unwrapped(fn) for fn in fns]
    return all(not base.event_shape and not isinstance(base, dist.Delta) for base in bases)


def _terms(name: str, given: Any, asked: Any) -> jax.Array:
    """Divergence of every element of a site: in closed form where that is right, or sampled."""
    q, p = (_checks.unwrapped(sites[name]["fn"]) for sites in (given, asked))
    value = given[name]["value"]
    latent = [other for other, site in asked.items() if not site["is_observed"]]
    exact = _divergence.is_exact(name, list(given), latent)
    found = _divergence.closed_form(q, p) if exact else None
    return q.log_prob(value) - p.log_prob(value) if found is None else found


def _numpy(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda x: np.asarray(x[:size], np.float64), jax.device_get(tree))
