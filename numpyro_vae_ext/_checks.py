"""Checks of arguments and of recorded sites, and what they say: "Expected X; got Y".

The checks of sites read messages that :mod:`numpyro_vae_ext._trace` recorded; they run nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to
from numpyro.distributions.distribution import Unit
from numpyro.primitives import CondIndepStackFrame

Plates = tuple[CondIndepStackFrame, ...]
Sites = Mapping[str, Any]

WRAPPERS = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)


def positive_int(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an int of at least ``minimum``; raise otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"Expected {name} to be an int; got {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"Expected {name} >= {minimum}; got {value}.")
    return int(value)


def widths(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """Return ``values`` as a tuple of positive ints; raise otherwise."""
    return tuple(positive_int(name, value) for value in values)


def one_of(name: str, value: Any, options: Sequence[str]) -> str:
    """Return ``value`` if it is among ``options``; raise a message that lists them otherwise."""
    if not isinstance(value, str) or value not in options:
        quoted = [repr(option) for option in options]
        if len(quoted) == 2:
            raise ValueError(f"Expected {name} to be {quoted[0]} or {quoted[1]}; got {value!r}.")
        raise ValueError(f"Expected {name} to be one of {', '.join(quoted)}; got {value!r}.")
    return value


def is_traced(value: Any) -> bool:
    """Whether the numbers are unknown: no Python branch may depend on them."""
    return isinstance(value, jax.core.Tracer)


def check_context(
    context: Any,
    width: int | None,
    where: str,
    name: str = "a context",
    owner: str = "family",
) -> jax.Array | None:
    """Return a module's context as an array; raise unless it has the width, or is absent.

    ``name`` is the argument with its article, if it has one: ``"a context"``, ``"covariates"``;
    ``owner`` is what the module is called.
    """
    article, noun = ("a ", name[2:]) if name.startswith("a ") else ("", name)
    option = "context_dim" if noun == "context" else "covariate_dim"
    if width is None:
        if context is not None:
            shape = jnp.shape(context)
            raise ValueError(
                f"Expected no {noun}{where}; got shape {shape}. Build the {owner} with "
                f"{option}={shape[-1] if shape else 1} to use {'one' if article else 'them'}."
            )
        return None
    expected = f"Expected {name} of width {width}{where}; got "
    if context is None:
        given = "the encoder's output" if article else "them"
        raise ValueError(f"{expected}None. Pass {given}, or build the {owner} with {option}=None.")
    context = jnp.asarray(context)
    if context.ndim == 0 or context.shape[-1] != width:
        raise ValueError(f"{expected}shape {context.shape}.")
    if not jnp.issubdtype(context.dtype, jnp.floating):
        raise TypeError(
            f"Expected {article}floating-point {noun}{where}; got "
            f"{context.dtype}. Cast the data to float{' before the encoder' if article else ''}."
        )
    # A traced value cannot be looked at without a data-dependent branch in the step.
    if not is_traced(context) and np.isnan(context).any():
        raise ValueError(
            f"Expected {name} without NaN{where}; got NaN. Check the data"
            f"{' and the encoder' if article else ''}."
        )
    return context


def check_weight(value: Any) -> None:
    """Weights are not negative, where the numbers are known."""
    if is_traced(value):
        return
    if not np.all((np.asarray(value) >= 0) & (np.asarray(value) < math.inf)):
        raise ValueError(f"Expected weight >= 0; got {value}.")


# --- what a site is ---------------------------------------------------------------------------


def unwrapped(fn: Any) -> Any:
    """The distribution inside of the host's wrappers."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def masks(fn: Any) -> list[Any]:
    """The masks of a distribution, booleans or arrays."""
    found = []
    while isinstance(fn, WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            found.append(fn._mask)
        fn = fn.base_dist
    return found


def unmasked(fn: Any) -> Any:
    """The distribution without its masks, which say nothing about its draws."""
    if isinstance(fn, dist.MaskedDistribution):
        return unmasked(fn.base_dist)
    if not masks(fn):
        return fn
    if isinstance(fn, dist.Independent):
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return unmasked(fn.base_dist).expand(fn.batch_shape)


def is_discrete(fn: Any) -> bool:
    """Whether the values are; a point mass is what its value is."""
    support = unwrapped(fn).support
    return support is not None and support.is_discrete


def is_data(site: Any) -> bool:
    """Whether the site is observed and no mere factor."""
    return site["is_observed"] and not isinstance(unwrapped(site["fn"]), Unit)


# --- plates and scales ------------------------------------------------------------------------


def common_plates(sites: Sequence[Any], full_sizes: Mapping[str, int]) -> Plates:
    """Plates that enclose every site, from left to right; others must not be subsampled."""
    stacks = [set(site["cond_indep_stack"]) for site in sites]
    common = set.intersection(*stacks) if stacks else set()
    for plate in dict.fromkeys(plate for site in sites for plate in site["cond_indep_stack"]):
        if plate in common or full_sizes.get(plate.name, plate.size) == plate.size:
            continue
        outside = [site["name"] for site in sites if plate not in site["cond_indep_stack"]]
        raise ValueError(
            f"Expected every latent and observed site inside the subsampled plate '{plate.name}' "
            f"when num_particles > 1; got site '{outside[0]}' outside it. Move the site into the "
            "plate, pass the full data, or use num_particles=1."
        )
    return tuple(sorted(common, key=lambda plate: plate.dim))


def common_scale(sites: Sequence[Any], plates: Plates) -> Any:
    """The one scale of all sites, a number or of the plates' shape."""
    scales = [1.0 if site["scale"] is None else site["scale"] for site in sites] or [1.0]
    for site, scale in zip(sites, scales, strict=False):
        if not _same(scale, scales[0]):
            raise ValueError(
                "Expected one scale for all sites of a weight when num_particles > 1; got "
                f"{_shown(scales[0])} at site '{sites[0]['name']}' and {_shown(scale)} at site "
                f"'{site['name']}'. Scale the loss instead, or use num_particles=1."
            )
    shape = np.shape(scales[0])
    if not shape:
        return scales[0]
    kept = {plate.dim + len(shape): plate.size for plate in plates}
    if any(size != 1 and axis not in kept for axis, size in enumerate(shape)):
        raise ValueError(
            "Expected a scale that varies over the common plates alone when num_particles > 1; "
            f"got shape {shape}. Scale the loss instead, or use num_particles=1."
        )
    return jnp.reshape(scales[0], [shape[p.dim] if len(shape) >= -p.dim else 1 for p in plates])


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    # Whether two traced numbers agree is unknown until the step runs: only the very same passes.
    if is_traced(a) or is_traced(b) or np.shape(a) != np.shape(b):
        return False
    return np.allclose(a, b, rtol=1e-6, atol=0)


def _shown(scale: Any) -> str:
    if is_traced(scale):
        return "a traced number"
    return f"{float(scale):g}" if np.ndim(scale) == 0 else f"an array of shape {np.shape(scale)}"


def per_row(site: Any, log_prob: jax.Array, plates: Plates) -> jax.Array:
    """The log-density of a site summed down to the common plates' shape."""
    shape = jnp.shape(log_prob)
    for plate in plates:
        if len(shape) < -plate.dim or shape[plate.dim] != plate.size:
            raise _no_rows(site["name"], plate, shape)
    dims = {plate.dim for plate in site["cond_indep_stack"]}
    for dim in range(-len(shape), 0):
        # Without any plate a batch is the host's way to declare an event; a scan adds its own.
        if dims and shape[dim] != 1 and dim not in dims and not site.get("_control_flow_done"):
            raise ValueError(
                f"Expected a log-density over the plates of site '{site['name']}' alone; got shape "
                f"{shape}, whose dimension {dim} belongs to no plate. Declare the plate, or make "
                "the dimension part of the event with .to_event(1)."
            )
    kept = {plate.dim + len(shape) for plate in plates}
    return jnp.sum(log_prob, axis=[axis for axis in range(len(shape)) if axis not in kept])


def _no_rows(name: str, plate: CondIndepStackFrame, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"Expected one log-density per row of plate '{plate.name}' at site '{name}'; got a "
        f"log-density of shape {tuple(shape)} for {plate.size} rows. Draw the site row by row, or "
        "take it out of the plate."
    )


# --- model against guide, and data ------------------------------------------------------------


def check_match(asked: Sites, given: Sites) -> None:
    """Latent sites of the model against those of the guide: the same names and shapes."""
    for name, site in given.items():
        if name not in asked and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Expected every latent site of the guide in the model; got guide site '{name}' "
                "that the model lacks. Mark it infer={'is_auxiliary': True} or add it to the "
                "model."
            )
    for name, site in asked.items():
        if name not in given:
            raise ValueError(
                f"Expected every latent site of the model in the guide; got model site '{name}' "
                "that the guide lacks. Add it to the guide or observe it."
            )
        _check_shape(name, site, given[name])


def _check_shape(name: str, asked: Any, given: Any) -> None:
    if given["fn"].event_dim > asked["fn"].event_dim:
        for plate in asked["cond_indep_stack"]:
            if plate not in given["cond_indep_stack"]:
                raise _no_rows(name, plate, given["fn"].batch_shape)
    wanted, got = (tuple(site["fn"].shape()) for site in (asked, given))
    width = max(len(wanted), len(got))
    same = (1,) * (width - len(wanted)) + wanted == (1,) * (width - len(got)) + got
    if not same or asked["fn"].event_dim != given["fn"].event_dim:
        raise ValueError(
            f"Expected the same shape at site '{name}' in model and guide; got {wanted} with "
            f"event_dim={asked['fn'].event_dim} in the model and {got} with "
            f"event_dim={given['fn'].event_dim} in the guide. Use .to_event or the same plates."
        )


def check_reparameterised(latents: Sites, gradient: str) -> None:
    """No latent site may be discrete, or sampled without a derivative."""
    for name, site in latents.items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"Expected reparameterised latent sites under gradient='{gradient}'; got site "
                f"'{name}' with the distribution {type(unwrapped(site['fn'])).__name__}, which "
                "has no reparameterised sampler. Marginalise it with the host's TraceEnum_ELBO, "
                "or use an objective for discrete latents."
            )


def check_discrete(asked: Sites, given: Sites) -> None:
    """A latent site is discrete in model and guide, or in neither."""
    for name, site in given.items():
        fns = [s["fn"] for s in (site, asked.get(name, site))]
        if any(isinstance(unwrapped(fn), dist.Delta) for fn in fns):
            continue
        if is_discrete(fns[0]) != is_discrete(fns[1]):
            shown = [type(unwrapped(fn)).__name__ for fn in fns]
            raise ValueError(
                f"Expected site '{name}' to be discrete in both model and guide; got {shown[0]} "
                f"in the guide and {shown[1]} in the model. Use the same family of distributions "
                "in both."
            )


def check_unweighted(sites: Iterable[Any]) -> None:
    """No site of an importance weight may have a KL weight, not even one."""
    for site in sites:
        if "kl_weight" in site:
            raise ValueError(
                "Expected sites without a KL weight in an importance-weighted bound; got "
                f"handlers.kl_weight at site '{site['name']}'. A weight inside the logarithm is no "
                "weight on a KL divergence; use num_particles=1 or the host's Trace_ELBO, and the "
                "plain pair for evaluation."
            )


def check_same_weight(asked: Sites, given: Sites) -> None:
    """Model and guide must have one KL weight at every latent site, factors of a guide included."""
    weighted = False
    for name, site in given.items():
        ours = site.get("kl_weight")
        weighted = weighted or ours is not None
        if site["is_observed"] or name not in asked:
            continue
        theirs = asked[name].get("kl_weight")
        got = None
        if (ours is None) != (theirs is None):
            alone = "model" if ours is None else "guide"
            got = f"site '{name}' weighted in the {alone} alone"
        elif ours is not theirs and _differ(ours, theirs):
            got = f"{_shown(theirs)} in the model and {_shown(ours)} in the guide at '{name}'"
        if got is not None:
            raise ValueError(
                f"Expected the same KL weight on model and guide; got {got}. Wrap both in "
                "handlers.kl_weight."
            )
    for name, site in given.items():
        own = not site["is_observed"] or isinstance(unwrapped(site["fn"]), Unit)
        if weighted and own and "kl_weight" not in site:
            raise ValueError(
                "Expected the same KL weight on model and guide; got the guide's own site "
                f"'{name}' without it. Wrap the whole guide, and make a factor of a Unit that "
                "has_rsample."
            )


def _differ(a: Any, b: Any) -> bool:
    # Whether two traced numbers agree is unknown until the step runs.
    return not (is_traced(a) or is_traced(b)) and not _same(a, b)


def check_density(asked: Sites, given: Sites) -> None:
    """A guide must not put a point mass on a latent site: its weights would be no bound.

    A ``Delta`` that only carries a drawn auxiliary value over to its site, as NumPyro's AutoGuides
    have them, is fine: there are as many drawn numbers as free numbers in such sites. So is one on
    a discrete site, where a point has a probability.
    """
    masses: list[str] = []
    free = drawn = 0
    for name, site in given.items():
        size = math.prod(site["fn"].shape())
        if not isinstance(unwrapped(site["fn"]), dist.Delta):
            drawn += size if name not in asked else 0
            continue
        masses.append(name)
        if name in asked and not asked[name]["fn"].support.is_discrete:
            transform = biject_to(asked[name]["fn"].support)
            free += math.prod(transform.inverse_shape(site["fn"].shape()))
    if free > drawn:
        raise ValueError(
            "Expected a guide with a density at every latent site when num_particles > 1; got a "
            f"point mass (Delta) at site '{masses[0]}', under which no bound on the evidence "
            "holds. Use a guide family, or num_particles=1 for a MAP estimate."
        )


def check_data(sites: Sites) -> None:
    """Data of continuous sites are floating-point, and hold no NaN where they count."""
    for name, site in sites.items():
        value, fn = site["value"], site["fn"]
        if not is_data(site) or not hasattr(value, "dtype") or fn.support is None:
            continue
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            if not fn.support.is_discrete:
                raise TypeError(
                    f"Expected floating-point data at site '{name}' "
                    f"({type(unwrapped(fn)).__name__}); got {value.dtype}. Cast the data to float."
                )
            continue
        if any(is_traced(x) for x in (value, *masks(fn))):
            continue
        missing = np.isnan(value)
        missing = missing.any(axis=tuple(range(missing.ndim - fn.event_dim, missing.ndim)))
        for mask in masks(fn):
            missing = missing & np.asarray(mask)
        if missing.any():
            raise ValueError(
                f"Expected observed data without NaN at site '{name}'; got NaN. Drop or mask the "
                "rows with missing values."
            )
