r"""Path derivatives of log-weights: the guide's own derivative in its parameters left out.

Two sorts of guide sites are told apart. A *scored* site is latent and has a density, whose
derivative in its own parameters at a fixed value has mean zero: that derivative is left out. Any
other site (a ``Delta``, a latent site under ``mask(False)``, an observed site, a factor) has no
such term and counts as part of the model: all its derivatives are kept.

The guide runs again with its parameters held fixed, at the values of the first run, which still
depend on the parameters. The compiler merges the two runs, whose numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import jax
import numpyro.distributions as dist
from jax import lax

from numpyro_vae_ext._checks import Plates, masks, unwrapped

Sites = dict[str, Any]
Run = Callable[..., Sites]  # (params, values) -> sites of the guide


def is_scored(site: Any) -> bool:
    """Whether the site is latent and its density has a score that is left out."""
    hidden = any(mask is False for mask in masks(site["fn"]))
    return not (site["is_observed"] or hidden or _is_delta(site))


def _is_delta(site: Any) -> bool:
    return isinstance(unwrapped(site["fn"]), dist.Delta)


def path_log_probs(
    run: Run, params: dict[str, Any], drawn: Sites, latents: Sites
) -> dict[str, jax.Array]:
    """The guide's log-densities at ``latents``, scored sites without their own parameters."""
    fixed = run(lax.stop_gradient(params), latents)
    live = fixed
    if not all(is_scored(site) for site in drawn.values()):
        live = run(params, latents)
    return {
        name: _fixed_log_prob(fixed[name], site["intermediates"])
        if is_scored(site)
        else _live_log_prob(live[name])
        for name, site in drawn.items()
    }


def _live_log_prob(site: Any) -> jax.Array:
    # A replayed Delta may miss its own point by the last bit, and would have the density 0.
    value = site["fn"].sample(None) if _is_delta(site) else site["value"]
    return site["fn"].log_prob(value)


def _fixed_log_prob(site: Any, intermediates: Any) -> jax.Array:
    # A distribution of ours is scored by what it kept of its draw, a host's by inverting.
    if hasattr(intermediates, "path"):
        return site["fn"].log_prob(site["value"], intermediates.path())
    try:
        return site["fn"].log_prob(site["value"])
    except NotImplementedError as error:
        raise ValueError(
            "Expected a distribution that scores any value under path gradients; got site "
            f"'{site['name']}' with a {type(unwrapped(site['fn'])).__name__} that cannot invert "
            "its transforms. Use gradient='reparam'."
        ) from error


@jax.custom_jvp
def _weigh(value: jax.Array, rest: jax.Array, weight: jax.Array) -> jax.Array:
    return value


@_weigh.defjvp
def _weigh_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    value, _, weight = primals
    return value, weight * tangents[0] + (1 - weight) * tangents[1]


def weighed(
    run: Run, params: dict[str, Any], latents: Sites, weight: jax.Array, plates: Plates
) -> Sites:
    """The same values; what comes back to scored sites' parameters is multiplied by ``weight``.

    That factor is what a second reparameterisation makes of the score (Tucker et al. 2019,
    eq. 5-8). Unscored sites have no score: ``rest`` holds the values once more, alive in the
    parameters of the unscored sites alone, and gives these the missing ``1 - weight`` back.
    """
    rest: Sites = {}
    for scored, group in groupby(latents.items(), lambda item: is_scored(item[1])):
        names = [name for name, _ in group]
        if rest:
            again = run(lax.stop_gradient(params) if scored else params, rest)
        else:
            again = latents
        for name in names:
            value = again[name]["value"]
            dead = scored and again is latents
            rest[name] = {**latents[name], "value": lax.stop_gradient(value) if dead else value}
    shape = [1] * max((-plate.dim for plate in plates), default=0)
    for plate in plates:
        shape[plate.dim] = plate.size
    result = {}
    for name, site in latents.items():
        wide = weight.reshape(*shape, *(1,) * site["fn"].event_dim)
        result[name] = {**site, "value": _weigh(site["value"], rest[name]["value"], wide)}
    return result


@jax.custom_jvp
def with_derivative_of(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """The first number, with the derivative of the second."""
    return value


@with_derivative_of.defjvp
def _with_derivative_of_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    return primals[0], tangents[1]
