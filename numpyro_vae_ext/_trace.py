"""What a run is worth: a (model, guide) pair in, log-weights out.

:func:`run` executes guide and model once, for one particle, and returns what an objective needs:
the log-weights with the plate bookkeeping done. :func:`play` returns the sites themselves, at
chosen values of the discrete ones. All are pure functions of keys, parameters and data: callers
``vmap``, loop, differentiate and compile them.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_vae_ext import _checks, _path
from numpyro_vae_ext._checks import Plates
from numpyro_vae_ext._record import (
    Choose,
    Pair,
    Params,
    Recorder,
    Sites,
    hard,
    is_scored,
    latent_sites,
    log_probs,
    mutable_state,
    own_log_prob,
    sample_sites,
    scaled,
)

# Numbers that one site of a chunk of samples may have: 64 MiB in single precision.
MOST_NUMBERS = 2**24
# Those that it has at a time: more of them do not fit into the caches of a CPU.
NUMBERS_AT_A_TIME = {"cpu": 2**19}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogWeights:
    """Log-weights of one run.

    Attributes:
        value: Of shape ``(*common_plates)`` and unscaled; the scaled sum of shape ``()`` if joint.
        scale: The one scale of all sites, which multiplies the bound.
        state: New values of the mutable sites.
        plates: The common plates, from left to right; static.
        score: The guide's log-density of its discrete sites, of the shape of ``value``; under
            ``gradient="vimco"`` alone.
    """

    value: jax.Array
    scale: jax.Array
    state: Params
    plates: Plates = field(metadata={"static": True})
    score: jax.Array | None = None


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
            sampler unless it is ``"vimco"``; None where no derivative is taken.
        path: Leave out the derivative of the guide's log-density in its own parameters.
        weight: Multiply the derivative that reaches a sample from the densities by this, of the
            common plates' shape, once.
        plates: The common plates, which ``weight`` needs.
    """
    record = Recorder(pair, rng_key, plate_key)
    scored = gradient == "vimco"
    drawn = record.guide(params, choose=hard({}) if scored else None)
    latents = latent_sites(drawn)
    if gradient is not None and not scored:
        _checks.check_reparameterised(latents, gradient)
    if weight is not None:
        latents = _path.weighed(record.guide, params, latents, weight, plates)
    modelled = model_at(record, params, drawn, latents)
    if path:
        log_q = _path.path_log_probs(record.guide, params, sample_sites(drawn), latents)
    else:
        log_q = log_probs(drawn, soft=scored)
    state = lax.stop_gradient({**mutable_state(drawn), **mutable_state(modelled)})
    log_p = log_probs(modelled, soft=scored)
    if joint:
        _checks.check_same_weight(sample_sites(modelled), sample_sites(drawn))
        total = _scaled_sum(modelled, log_p) - _scaled_sum(drawn, log_q)
        return LogWeights(total, jnp.ones((), total.dtype), state, ())
    if scored:
        _checks.check_discrete(latent_sites(modelled), latents)
    found = weights_of(modelled, drawn, log_p, log_q, state)
    if not scored:
        return found
    score = [
        _checks.per_row(site, own_log_prob(site), found.plates)
        for site in latents.values()
        if is_scored(site)
    ]
    if not score:
        warnings.warn(
            "Expected discrete latent sites under gradient='vimco'; got none. Use "
            "gradient='reparam'.",
            UserWarning,
            stacklevel=2,
        )
    return replace(found, score=sum(score, start=jnp.zeros_like(found.value)))


def play(
    rng_key: jax.Array,
    plate_key: jax.Array,
    params: Params,
    pair: Pair,
    choose: Choose | None = None,
) -> tuple[Sites, Sites, Params]:
    """Run guide and model once, at chosen values of the guide's discrete sites if there are any.

    Returns:
        The sample sites of the guide and of the model, and the mutable state.
    """
    record = Recorder(pair, rng_key, plate_key)
    # What a program keeps in its mutable state must not end up in the caller's.
    params = jax.tree.map(lambda x: x, params)
    drawn = record.guide(params, choose=choose)
    modelled = model_at(record, params, drawn, latent_sites(drawn))
    _checks.check_discrete(latent_sites(modelled), latent_sites(drawn))
    _checks.check_same_weight(sample_sites(modelled), sample_sites(drawn))
    state = lax.stop_gradient({**mutable_state(drawn), **mutable_state(modelled)})
    return sample_sites(drawn), sample_sites(modelled), state


def pair_sites(
    rng_key: jax.Array, plate_key: jax.Array, params: Params, pair: Pair
) -> tuple[Sites, Sites]:
    """Sample sites of the model and of the guide, with no condition on plates and scales."""
    record = Recorder(pair, rng_key, plate_key)
    params = jax.tree.map(lambda x: x, params)
    drawn = record.guide(params)
    latents = latent_sites(drawn)
    modelled = model_at(record, params, drawn, latents)
    _checks.check_density(latent_sites(modelled), latents)
    return sample_sites(modelled), sample_sites(drawn)


def step_sites(
    rng_key: jax.Array, plate_key: jax.Array | None, params: Params, pair: Pair
) -> tuple[Sites, Sites, Sites]:
    """What one particle of a step runs, with no condition on it.

    Returns:
        The sample sites of the guide and of the model, and the plates of the model.
    """
    record = Recorder(pair, rng_key, plate_key)
    params = jax.tree.map(lambda x: x, params)
    drawn = record.guide(params)
    # All of the guide's sites: a model's plate has the subsample of the guide's.
    modelled = record.model({**params, **mutable_state(drawn)}, drawn)
    plates = {name: site for name, site in modelled.items() if site["type"] == "plate"}
    return sample_sites(drawn), sample_sites(modelled), plates


def data_scale(params: Params, pair: Pair, rows: int) -> tuple[float, str]:
    """The scale of the observed sites, 1 if they differ, and the name of the first of them.

    A plate that draws its subsample from all ``rows`` itself does not count: times ``rows`` the
    scale is the number of data that a loss is the sum over.
    """
    found: dict[str, Any] = {}

    def look(params: Params) -> tuple[()]:
        _, modelled, plates = step_sites(random.key(0), None, params, pair)
        sites = {name: site for name, site in modelled.items() if site["is_observed"]}
        data = {name: site for name, site in sites.items() if _checks.is_data(site)}
        for name, site in (data or sites).items():
            scale = 1.0 if site["scale"] is None else site["scale"]
            for frame in site["cond_indep_stack"]:
                full = plates[frame.name]["args"][0] if frame.name in plates else frame.size
                scale = scale * frame.size / full if full == rows else scale
            found[name] = scale
        return ()

    # Shapes alone as a rule: scales are numbers of the program, or else it runs.
    jax.eval_shape(look, params)
    if any(_checks.is_traced(scale) for scale in found.values()):
        look(params)
    numbers = [np.unique(np.asarray(scale, float)) for scale in found.values()]
    scales = np.concatenate([*numbers, np.empty(0)])
    same = scales.size and np.allclose(scales, scales[0], rtol=1e-6, atol=0)
    return float(scales[0]) if same else 1.0, next(iter(found), "")


def sites_at(
    rng_key: jax.Array,
    plate_key: jax.Array,
    params: Params,
    pair: Pair,
    values: dict[str, jax.Array],
    *,
    guide: bool,
) -> Sites:
    """Sample sites of one program at given values of some of them; the others are drawn."""
    record = Recorder(pair, rng_key, plate_key)
    given = {
        name: {"type": "sample", "is_observed": False, "value": value, "infer": {}}
        for name, value in values.items()
    }
    params = jax.tree.map(lambda x: x, params)
    return sample_sites((record.guide if guide else record.model)(params, given))


def compiled(fn: Callable[..., Any], pair: Pair) -> Callable[..., Any]:
    """``fn(pair, *arrays)`` as a compiled function of ``arrays``.

    Arrays among the arguments of the pair become arguments of the program as well: as constants
    they would be copied into it.
    """
    leaves, tree = jax.tree.flatten((pair.args, pair.kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray)) and x.ndim]

    # On a CPU the last level of LLVM costs a small fit more seconds to compile than it saves.
    quick = {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else None

    @partial(jax.jit, compiler_options=quick)
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


def chunk_sizes(rng_key: jax.Array, params: Params, pair: Pair) -> tuple[int, int]:
    """Samples of one call, and of these the samples side by side.

    Of the first so few that each site's values fit into memory many times, of the second as many
    as keep a device busy.
    """

    def values() -> list[jax.Array]:
        modelled, drawn = pair_sites(rng_key, shared_key(rng_key), params, pair)
        sites = (*modelled.values(), *drawn.values())
        return [jnp.broadcast_to(site["value"], site["fn"].shape()) for site in sites]

    widest = max(1, *(value.size for value in jax.eval_shape(values)))
    at_a_time = NUMBERS_AT_A_TIME.get(jax.default_backend(), MOST_NUMBERS)
    return max(1, min(100, MOST_NUMBERS // widest)), max(1, at_a_time // widest)


def model_at(record: Recorder, params: Params, drawn: Sites, latents: Sites) -> Sites:
    """Run the model at the guide's values, and check that the two match."""
    modelled = record.model({**params, **mutable_state(drawn)}, latents)
    _checks.check_match(latent_sites(modelled), latents)
    _checks.check_data(sample_sites(modelled))
    return modelled


def weights_of(
    modelled: Sites,
    drawn: Sites,
    log_p: dict[str, jax.Array],
    log_q: dict[str, jax.Array],
    state: Params,
) -> LogWeights:
    """Add up the log-densities of a run of the guide and one of the model, row by row."""
    given, asked = sample_sites(drawn), sample_sites(modelled)
    recorded = (*drawn.values(), *modelled.values())
    full_sizes = {site["name"]: site["args"][0] for site in recorded if site["type"] == "plate"}
    sites = (*asked.values(), *given.values())
    if not sites:
        raise ValueError("Expected a model with at least one sample site; got none.")
    _checks.check_unweighted((*given.values(), *asked.values()))
    _checks.check_density(latent_sites(modelled), latent_sites(drawn))
    plates = _checks.common_plates(sites, full_sizes)
    scale = _checks.common_scale(sites, plates)
    terms = [_checks.per_row(asked[k], x, plates) for k, x in log_p.items()]
    terms += [-_checks.per_row(given[k], x, plates) for k, x in log_q.items()]
    value = sum(terms, start=jnp.zeros([plate.size for plate in plates]))
    return LogWeights(value, jnp.asarray(scale, value.dtype), state, plates)


def _scaled_sum(recorded: Sites, densities: dict[str, jax.Array]) -> jax.Array:
    return sum((jnp.sum(x) for x in scaled(recorded, densities).values()), start=jnp.array(0.0))
