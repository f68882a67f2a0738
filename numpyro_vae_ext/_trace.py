"""The only file that touches NumPyro's traces: a (model, guide) pair in, log-weights out.

:func:`run` executes guide and model once, for one particle, and returns what an objective needs:
the log-weights with the plate bookkeeping done. :func:`draw` also returns what was drawn. Both are
pure functions of keys, parameters and data: callers ``vmap``, loop, differentiate and compile them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.handlers import replay, seed, substitute, trace, uncondition
from numpyro.primitives import Messenger

from numpyro_vae_ext import _checks, _path
from numpyro_vae_ext._checks import Plates

Program = Callable[..., Any]
Params = dict[str, Any]
Sites = dict[str, Any]


class Pair(NamedTuple):
    """A model and a guide, and what they are called with."""

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogWeights:
    """Log-weights of one run.

    Attributes:
        value: Of shape ``(*common_plates)`` and unscaled; the scaled sum of shape ``()`` if joint.
        scale: The one scale of all sites, which multiplies the bound.
        state: New values of the mutable sites.
        plates: The common plates, from left to right; static.
    """

    value: jax.Array
    scale: jax.Array
    state: Params
    plates: Plates = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Draw:
    """Latent values of a guide, the data of the model, and new data drawn from it.

    Attributes:
        latent: By site, ``(*plates, *event)``; without auxiliaries.
        observed: By site, ``(*plates, *event)``; without factors.
        predictive: New values of the observed sites.
        log_weights: Of this draw.
        plates: By site, its plates from left to right; static.
    """

    latent: dict[str, jax.Array]
    observed: dict[str, jax.Array]
    predictive: dict[str, jax.Array]
    log_weights: LogWeights
    plates: tuple[tuple[str, Plates], ...] = field(metadata={"static": True})


class _SharedSubsample(Messenger):
    """Draws a plate's subsample from a key that all particles, guide and model share."""

    def __init__(self, fn: Program, rng_key: jax.Array) -> None:
        super().__init__(fn)
        self.rng_key = rng_key

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            name = zlib.crc32(msg["name"].encode())
            msg["kwargs"]["rng_key"] = random.fold_in(self.rng_key, name)


class _Recorder(NamedTuple):
    """Runs guide and model under the key of one particle."""

    pair: Pair
    rng_key: jax.Array
    plate_key: jax.Array

    def guide(self, params: Params, values: Sites | None = None) -> Sites:
        """Sites and mutable state of the guide, at given values where there are any."""
        return self._record(self.pair.guide, random.split(self.rng_key)[1], params, values)

    def model(self, params: Params, values: Sites) -> Sites:
        """Sites and mutable state of the model at the guide's values."""
        return self._record(self.pair.model, random.split(self.rng_key)[0], params, values)

    def predictive(self, params: Params, values: Sites) -> Sites:
        """The model at the guide's values, its observed sites drawn anew."""
        key = random.fold_in(self.rng_key, 1)
        return self._record(self.pair.model, key, params, values, uncondition)

    def _record(
        self, fn: Program, key: jax.Array, params: Params, values: Sites | None, *outer: Any
    ) -> Sites:
        # The seed is innermost: a replayed value leaves the keys of all other sites alone, and a
        # plate uses up a key as it does in the host's own objectives.
        fn = replay(_SharedSubsample(seed(fn, key), self.plate_key), values or {})
        for handler in outer:
            fn = handler(fn)
        recorded = trace(substitute(fn, data=params))
        return recorded.get_trace(*self.pair.args, **self.pair.kwargs)


def _samples(recorded: Sites) -> Sites:
    return {name: site for name, site in recorded.items() if site["type"] == "sample"}


def _latents(recorded: Sites) -> Sites:
    return {name: site for name, site in _samples(recorded).items() if not site["is_observed"]}


def _state(recorded: Sites) -> Params:
    return {name: site["value"] for name, site in recorded.items() if site["type"] == "mutable"}


def _log_probs(recorded: Sites) -> dict[str, jax.Array]:
    return {
        name: site["fn"].log_prob(site["value"], site["intermediates"])
        if site["intermediates"]
        else site["fn"].log_prob(site["value"])
        for name, site in _samples(recorded).items()
    }


def shared_key(rng_key: jax.Array) -> jax.Array:
    """The key of a call's subsamples, apart from the keys of its particles."""
    return random.fold_in(rng_key, zlib.crc32(b"subsample"))


def run(
    rng_key: jax.Array,
    plate_key: jax.Array,
    params: Params,
    pair: Pair,
    *,
    joint: bool = False,
    gradient: str | None = None,
    path: bool = False,
    weight: jax.Array | None = None,
    plates: Plates = (),
) -> LogWeights:
    """Run guide and model once.

    Args:
        rng_key: Key of the particle.
        plate_key: Key of the subsamples, the same for all particles.
        params: Constrained parameters and mutable state.
        pair: The model and the guide.
        joint: Return the scaled sum of all log-densities, without the checks of a weight.
        gradient: Name of the estimator, which refuses latent sites without a reparameterised
            sampler; None where no derivative is taken.
        path: Leave out the derivative of the guide's log-density in its own parameters.
        weight: Multiply the derivative that reaches a sample from the densities by this, of the
            common plates' shape, once.
        plates: The common plates, which ``weight`` needs.
    """
    record = _Recorder(pair, rng_key, plate_key)
    drawn = record.guide(params)
    latents = _latents(drawn)
    if gradient is not None:
        _checks.check_reparameterised(latents, gradient)
    if weight is not None:
        latents = _path.weighed(record.guide, params, latents, weight, plates)
    modelled = _modelled(record, params, drawn, latents)
    if path:
        log_q = _path.path_log_probs(record.guide, params, _samples(drawn), latents)
    else:
        log_q = _log_probs(drawn)
    state = lax.stop_gradient({**_state(drawn), **_state(modelled)})
    if joint:
        total = _scaled_sum(modelled, _log_probs(modelled)) - _scaled_sum(drawn, log_q)
        return LogWeights(total, jnp.ones((), total.dtype), state, ())
    return _weights(modelled, drawn, log_q, state)


def draw(
    rng_key: jax.Array, plate_key: jax.Array, params: Params, pair: Pair, *, predictive: bool
) -> Draw:
    """Draw from the guide once and weigh the draw; draw new data from it as well if asked."""
    record = _Recorder(pair, rng_key, plate_key)
    drawn = record.guide(params)
    latents = _latents(drawn)
    modelled = _modelled(record, params, drawn, latents)
    kept = {k: site for k, site in latents.items() if not site["infer"].get("is_auxiliary")}
    data = {k: site for k, site in _samples(modelled).items() if _checks.is_data(site)}
    new = record.predictive({**params, **_state(drawn)}, latents) if predictive else {}
    # The model's plates: a joint guide may draw all rows at once, outside of any.
    plates = {name: _plates(modelled[name]) for name in (*kept, *data)}
    return Draw(
        latent={name: _rows_first(modelled[name], site["value"]) for name, site in kept.items()},
        observed={name: _rows_first(site, site["value"]) for name, site in data.items()},
        predictive={name: _rows_first(data[name], new[name]["value"]) for name in data if new},
        log_weights=_weights(modelled, drawn, _log_probs(drawn), {}),
        plates=tuple(plates.items()),
    )


def compiled(fn: Callable[..., Any], pair: Pair) -> Callable[..., Any]:
    """``fn(pair, *arrays)`` as a compiled function of ``arrays``.

    Arrays among the arguments of the pair become arguments of the program as well: as constants
    they would be copied into it.
    """
    leaves, tree = jax.tree.flatten((pair.args, pair.kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray)) and x.ndim]

    @jax.jit
    def program(data: list[Any], *arrays: Any) -> Any:
        filled = list(leaves)
        for place, value in zip(places, data, strict=True):
            filled[place] = value
        args, kwargs = jax.tree.unflatten(tree, filled)
        return fn(Pair(pair.model, pair.guide, args, kwargs), *arrays)

    return lambda *arrays: program([leaves[place] for place in places], *arrays)


def layout(rng_key: jax.Array, params: Params, pair: Pair) -> LogWeights:
    """Shapes of one run; the data are looked at, as a compiled run cannot do."""
    return jax.eval_shape(lambda: run(rng_key, shared_key(rng_key), params, pair))


def _plates(site: Any) -> Plates:
    return tuple(sorted(site["cond_indep_stack"], key=lambda plate: plate.dim))


def _rows_first(site: Any, value: Any) -> jax.Array:
    """A value as ``(*plates, *rest)``, dimensions of size 1 that no plate declares dropped."""
    value, event_dim = jnp.broadcast_to(value, site["fn"].shape()), site["fn"].event_dim
    rows = [plate.dim - event_dim + value.ndim for plate in _plates(site)]
    rest = [axis for axis in range(value.ndim) if axis not in rows]
    batch = value.ndim - event_dim
    dropped = [axis for axis in rest if axis < batch and value.shape[axis] == 1]
    value = jnp.transpose(value, (*rows, *dropped, *(a for a in rest if a not in dropped)))
    return jnp.squeeze(value, tuple(range(len(rows), len(rows) + len(dropped))))


def _modelled(record: _Recorder, params: Params, drawn: Sites, latents: Sites) -> Sites:
    modelled = record.model({**params, **_state(drawn)}, latents)
    _checks.check_match(_latents(modelled), latents)
    _checks.check_data(_samples(modelled))
    return modelled


def _weights(
    modelled: Sites, drawn: Sites, log_q: dict[str, jax.Array], state: Params
) -> LogWeights:
    given, asked = _samples(drawn), _samples(modelled)
    recorded = (*drawn.values(), *modelled.values())
    full_sizes = {site["name"]: site["args"][0] for site in recorded if site["type"] == "plate"}
    sites = (*asked.values(), *given.values())
    if not sites:
        raise ValueError("Expected a model with at least one sample site; got none.")
    _checks.check_density(_latents(modelled), _latents(drawn))
    plates = _checks.common_plates(sites, full_sizes)
    scale = _checks.common_scale(sites, plates)
    terms = [_checks.per_row(asked[k], x, plates) for k, x in _log_probs(modelled).items()]
    terms += [-_checks.per_row(given[k], x, plates) for k, x in log_q.items()]
    value = sum(terms, start=jnp.zeros([plate.size for plate in plates]))
    return LogWeights(value, jnp.asarray(scale, value.dtype), state, plates)


def _scaled_sum(recorded: Sites, log_probs: dict[str, jax.Array]) -> jax.Array:
    total = jnp.array(0.0)
    for name, log_prob in log_probs.items():
        scale = recorded[name]["scale"]
        total = total + jnp.sum(log_prob if scale is None else scale * log_prob)
    return total
