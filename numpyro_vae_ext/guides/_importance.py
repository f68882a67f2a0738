r"""Draws that are picked out of more of them by their importance weights.

Of :math:`M` draws of a guide the :math:`i`-th is kept with probability :math:`w_i / \sum_j w_j`,
:math:`w = p(x, z) / q(z)` (Rubin, 1988, *Using the SIR Algorithm to Simulate Posterior
Distributions*), the weights Pareto-smoothed over the pool of all draws.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro import handlers

from numpyro_vae_ext import _psis, _record, _trace
from numpyro_vae_ext._checks import is_traced
from numpyro_vae_ext.guides._auto import FamilyGuide, Latents, Site, Values


class Pool(NamedTuple):
    """Draws of a guide, and what they weigh.

    Attributes:
        sites: The sites.
        free: Unconstrained values by site, the draws in front.
        rows: Rows of the plates that may be subsampled.
        log_weights: ``(num_draws, *plates)``, the plates from left to right.
        dims: The dimensions of these plates.
    """

    sites: list[Site]
    free: Values
    rows: Values
    log_weights: np.ndarray
    dims: tuple[int, ...]


def pool(
    guide: FamilyGuide,
    rng_key: jax.Array,
    params: dict[str, Any],
    count: int,
    args: Any,
    kwargs: Any,
) -> Pool:
    """Draw ``count`` times from the guide and weigh the draws."""
    if any(map(is_traced, jax.tree.leaves((rng_key, params, args, kwargs)))):
        raise ValueError(
            "Expected num_importance outside of jit; got traced values. Its weights are smoothed "
            "in NumPy: call sample_posterior as it is, its programs are compiled inside."
        )
    check_whole_model(_hides(guide.model))
    pair = _trace.Pair(guide.model, guide, args, kwargs)
    plate_key = _trace.shared_key(rng_key)
    plates = _trace.layout(rng_key, params, pair).plates
    side_by_side = _trace.chunk_sizes(rng_key, params, pair)[1]
    sites: list[list[Site]] = []

    def weighed(pair: _trace.Pair, params: Any, keys: jax.Array) -> Any:
        def one(key: jax.Array) -> Any:
            log_weight = _trace.run(key, plate_key, params, pair).value
            # The same draw once more, as the guide's vectors; the compiler sees that it is one.
            recorded = _record.Recorder(pair, key, plate_key).guide(params)
            known = {
                name: site["value"]
                for name, site in recorded.items()
                if site["type"] == "plate" or (site["type"] == "sample" and not site["is_observed"])
            }
            with handlers.block(), handlers.substitute(data={**params, **known}):
                drawn = handlers.seed(guide._latents, key)(pair.args, pair.kwargs)
            sites.append(drawn.sites)
            return log_weight, drawn.free, drawn.rows

        return lax.map(one, keys, batch_size=side_by_side)

    found = _trace.compiled(weighed, pair)(params, random.split(rng_key, count))
    log_weights, free, rows = found
    rows = {name: value[0] for name, value in rows.items()}
    return Pool(sites[0], free, rows, np.asarray(log_weights), tuple(p.dim for p in plates))


def picked(drawn: Pool, rng_key: jax.Array, num_importance: int) -> Latents:
    """One draw out of every ``num_importance``, each row for itself where it has a weight."""
    groups = jnp.asarray(grouped(drawn.log_weights, num_importance))
    index = random.categorical(rng_key, groups, axis=1)
    free = {}
    for site in drawn.sites:
        value = drawn.free[site.name]
        value = value.reshape(-1, num_importance, *site.shape)
        shape = [len(index), 1, *(1 for _ in site.shape)]
        for dim, size in zip(drawn.dims, index.shape[1:], strict=True):
            shape[2 + site.batch_dim + dim] = size
        free[site.name] = jnp.take_along_axis(value, index.reshape(shape), axis=1)[:, 0]
    return Latents(drawn.sites, free, {}, {}, drawn.rows)


def grouped(log_weights: np.ndarray, num_importance: int) -> np.ndarray:
    """Smoothed log-weights ``(num_draws, num_importance, *rows)``, from all of the pool.

    Raises:
        ValueError: If a log-weight is NaN or infinite, or all of a group are 0.
    """
    smoothed, khat = _psis.psis(log_weights)
    limit = _psis.threshold(len(log_weights))
    poor = ~(khat < limit)
    if poor.any() and _psis.tail_length(len(log_weights)) >= _psis.FEWEST:
        worst = float(np.max(khat))
        which = f", and at {int(poor.sum())} of {khat.size} rows above" if khat.size > 1 else ""
        warnings.warn(
            f"Expected k-hat below {limit:.2f} under num_importance; got {worst:.2f}{which}. The "
            "draws are nearer to the posterior than those of the guide, and still not from it: "
            "train the guide further, or use a richer family.",
            UserWarning,
            stacklevel=4,
        )
    groups = smoothed.reshape(-1, num_importance, *log_weights.shape[1:])
    dead = groups.max(axis=1) == -np.inf
    if dead.any():
        raise ValueError(
            f"Expected a draw with a positive weight among num_importance={num_importance}; got "
            f"none for {int(dead.sum())} of {dead.size} draws. Raise num_importance, or train the "
            "guide."
        )
    return groups


def check_whole_model(hides: bool) -> None:
    """A part of a list knows a part of the density."""
    if hides:
        raise ValueError(
            "Expected a guide of the whole model under num_importance; got one whose model hides "
            "sites, as a part of a list does. Build one guide for all latents."
        )


def _hides(program: Any) -> bool:
    """Whether a handler hides sites of the program."""
    while program is not None:
        if isinstance(program, handlers.block):
            return True
        program = getattr(program, "fn", None)
    return False
