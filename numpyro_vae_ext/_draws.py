"""What a pair says of a draw from its guide: latents, what the model makes of them, new data.

Numbers come with their plates first, ``(*plates, *rest)``; the plates' names are static, so that
callers may ``vmap`` and compile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_vae_ext import _checks
from numpyro_vae_ext._checks import Plates
from numpyro_vae_ext._record import (
    Pair,
    Params,
    Recorder,
    Sites,
    latent_sites,
    log_probs,
    mutable_state,
    sample_sites,
)
from numpyro_vae_ext._trace import LogWeights, model_at, weights_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Variable:
    """Numbers ``(*plates, *rest)`` and the names of the plates; static."""

    value: jax.Array
    plates: tuple[str, ...] = field(metadata={"static": True})


Variables = dict[str, Variable]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw:
    """Latent values of a guide, the data of the model, and new data drawn from it.

    Attributes:
        latent: Latent sites without auxiliaries.
        deterministic: What the model computes from them, reparameterised sites included.
        observed: Observed sites without factors.
        log_likelihood: Their log-densities, masked and not scaled.
        predictive: New values of the observed sites.
        log_weights: Of this draw.
        shared: By site of the guide, the values that belong to no row of the data.
    """

    latent: Variables
    deterministic: Variables
    observed: Variables
    log_likelihood: Variables
    predictive: Variables
    log_weights: LogWeights
    shared: dict[str, jax.Array]


def draw(
    rng_key: jax.Array,
    plate_key: jax.Array,
    params: Params,
    pair: Pair,
    *,
    predictive: bool = False,
    likelihood: bool = False,
) -> Draw:
    """Draw latent values from the guide, with their log-weight and, on demand, more."""
    record = Recorder(pair, rng_key, plate_key)
    drawn = record.guide(params)
    latents = latent_sites(drawn)
    modelled = model_at(record, params, drawn, latents)
    kept = {k: site for k, site in latents.items() if not site["infer"].get("is_auxiliary")}
    data = {k: site for k, site in sample_sites(modelled).items() if _checks.is_data(site)}
    new = record.predictive({**params, **mutable_state(drawn)}, latents) if predictive else {}
    densities = log_probs(modelled)
    # The model's plates: a joint guide may draw all rows at once, outside of any.
    rows = {plate.name for site in data.values() for plate in _plates(site)}
    local = {
        name
        for name, site in latents.items()
        if rows & {plate.name for plate in (*_plates(site), *_plates(modelled.get(name, site)))}
    }
    return Draw(
        latent={name: _variable(modelled[name], site["value"]) for name, site in kept.items()},
        deterministic=_deterministic(modelled),
        observed={name: _variable(site, site["value"]) for name, site in data.items()},
        log_likelihood={
            name: _variable(site, densities[name], 0) for name, site in data.items() if likelihood
        },
        predictive={name: _variable(data[name], new[name]["value"]) for name in data if new},
        log_weights=weights_of(modelled, drawn, densities, log_probs(drawn), {}),
        shared={name: site["value"] for name, site in latents.items() if name not in local},
    )


def predict(
    rng_key: jax.Array,
    plate_key: jax.Array,
    params: Params,
    pair: Pair,
    shared: Mapping[str, jax.Array],
    data: tuple[str, ...],
) -> Variables:
    """Draw the data of a model at other arguments, and what it computes there.

    The guide is run at these arguments with the shared values of an earlier draw; what it does not
    draw, the model does.
    """
    record = Recorder(pair, rng_key, plate_key)
    # What a program keeps in its mutable state must not end up in the caller's.
    params = jax.tree.map(lambda x: x, params)
    given = {
        name: {"type": "sample", "is_observed": False, "value": value, "infer": {}}
        for name, value in shared.items()
    }
    drawn = record.guide(params, given)
    latents = latent_sites(drawn)

    def look(msg: Any) -> None:
        if msg["name"] in latents:
            check_fit(msg["name"], jnp.shape(msg["value"]), msg["fn"].shape())

    new = record.predictive({**params, **mutable_state(drawn)}, latents, look)
    wanted = {
        name: site
        for name, site in sample_sites(new).items()
        if name in data or (site["infer"].get("was_observed") and site["value"].size)
    }
    found = {name: _variable(site, site["value"]) for name, site in wanted.items()}
    return {**found, **_deterministic(new)}


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


def _plates(site: Any) -> Plates:
    return tuple(sorted(site["cond_indep_stack"], key=lambda plate: plate.dim))


def _deterministic(modelled: Sites) -> Variables:
    found = {}
    for name, site in modelled.items():
        if site["type"] != "deterministic":
            continue
        value, plates = jnp.asarray(site["value"]), _plates(site)
        # Nothing says which dimensions are the event's. In the plates' full depth the first ones
        # are the plates'; else all are of the event.
        batch = max((-plate.dim for plate in plates), default=0)
        shape = value.shape[:batch]
        if value.ndim < batch or any(shape[p.dim] not in (1, p.size) for p in plates):
            batch, plates = 0, ()
        sizes = {batch + plate.dim: plate.size for plate in plates}
        shape = tuple(sizes.get(axis, size) for axis, size in enumerate(shape))
        value = jnp.broadcast_to(value, shape + value.shape[batch:])
        found[name] = _rows_first(value, plates, value.ndim - batch)
    return found


def _variable(site: Any, value: Any, event_dim: int | None = None) -> Variable:
    """A site's value, or its log-density with ``event_dim=0``."""
    fn = site["fn"]
    shape, event_dim = (fn.shape(), fn.event_dim) if event_dim is None else (fn.batch_shape, 0)
    return _rows_first(jnp.broadcast_to(value, shape), _plates(site), event_dim)


def _rows_first(value: jax.Array, plates: Plates, event_dim: int) -> Variable:
    """``(*plates, *rest)``, dimensions of size 1 that no plate declares dropped."""
    rows = [plate.dim - event_dim + value.ndim for plate in plates]
    rest = [axis for axis in range(value.ndim) if axis not in rows]
    batch = value.ndim - event_dim
    dropped = [axis for axis in rest if axis < batch and value.shape[axis] == 1]
    value = jnp.transpose(value, (*rows, *dropped, *(a for a in rest if a not in dropped)))
    value = jnp.squeeze(value, tuple(range(len(rows), len(rows) + len(dropped))))
    return Variable(value, tuple(plate.name for plate in plates))
