"""Checks of arguments and of recorded sites, and what they say: "Expected X; got Y".

A *term* is one site of a run with its name, its message (``site``), the sign of its log-density in
the weight, and that log-density.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.distributions import biject_to

# Name of the outermost plate over particles, as Pyro's own objectives call it.
PARTICLES = "num_particles_vectorized"


def positive_int(name: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` if it is an int of at least ``minimum``; raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected {name} to be an int; got {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"Expected {name} >= {minimum}; got {value}.")
    return value


def widths(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """Return ``values`` as a tuple of positive ints; raise otherwise."""
    return tuple(positive_int(name, value) for value in values)


def one_of(name: str, value: object, options: Sequence[str]) -> str:
    """Return ``value`` if it is among ``options``; raise a message that lists them otherwise."""
    if not isinstance(value, str) or value not in options:
        quoted = [repr(option) for option in options]
        if len(quoted) == 2:
            raise ValueError(f"Expected {name} to be {quoted[0]} or {quoted[1]}; got {value!r}.")
        raise ValueError(f"Expected {name} to be one of {', '.join(quoted)}; got {value!r}.")
    return value


def check_context(
    context: Tensor | None,
    width: int | None,
    where: str,
    name: str = "a context",
    owner: str = "family",
) -> None:
    """A module's context must have its width, or be absent where the module has none.

    ``name`` is the argument with its article, if it has one: ``"a context"``, ``"covariates"``;
    ``owner`` is what the module is called.
    """
    article, noun = ("a ", name[2:]) if name.startswith("a ") else ("", name)
    option = "context_dim" if noun == "context" else "covariate_dim"
    if width is None:
        if context is not None:
            raise ValueError(
                f"Expected no {noun}{where}; got shape {tuple(context.shape)}. Build the {owner} "
                f"with {option}={context.shape[-1]} to use {'one' if article else 'them'}."
            )
        return
    expected = f"Expected {name} of width {width}{where}; got "
    if context is None:
        given = "the encoder's output" if article else "them"
        raise ValueError(f"{expected}None. Pass {given}, or build the {owner} with {option}=None.")
    if context.shape[-1:] != (width,):
        raise ValueError(f"{expected}shape {tuple(context.shape)}.")
    if not context.is_floating_point():
        raise TypeError(
            f"Expected {article}floating-point {noun}{where}; got "
            f"{str(context.dtype).removeprefix('torch.')}. Cast the data to float"
            f"{' before the encoder' if article else ''}."
        )
    # A look at the values would break the one graph of a traced step: validation only.
    if is_validation_enabled() and bool(torch.isnan(context).any()):
        raise ValueError(
            f"Expected {name} without NaN{where}; got NaN. Check the data"
            f"{' and the encoder' if article else ''}."
        )


def check_weight(value: Any) -> None:
    """Raise for a number that is no weight; tensors are looked into under validation alone."""
    if isinstance(value, Tensor):
        wrong = is_validation_enabled() and not bool(((value >= 0) & (value < math.inf)).all())
    else:
        wrong = not 0 <= value < math.inf
    if wrong:
        raise ValueError(f"Expected weight >= 0; got {value}.")


def rows(scale: Tensor, plates: list[tuple[str, int]]) -> Tensor:
    """A scale given as a tensor, shaped to multiply a bound of shape ``(*common_plates)``."""
    dims = [dim for _, dim in plates]
    for dim in range(-scale.dim(), 0):
        if scale.shape[dim] != 1 and dim not in dims:
            raise ValueError(
                "Expected a scale that varies over the common plates alone when "
                f"num_particles > 1; got shape {tuple(scale.shape)}. Scale the loss instead, or "
                "use num_particles=1."
            )
    return scale.reshape([scale.shape[dim] if scale.dim() >= -dim else 1 for dim in dims])


def _frames(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES]


def common_plates(terms: Sequence[Any]) -> list[tuple[str, int]]:
    """Plates that enclose every site, outermost first; others must not be subsampled."""
    inside = [{f.name: f for f in _frames(term.site)} for term in terms]
    every: dict[str, Any] = {}
    for frames in inside:
        every.update(frames)
    common = []
    for name, frame in every.items():
        outside = [t.name for t, frames in zip(terms, inside, strict=True) if name not in frames]
        if frame.vectorized and not outside:
            common.append((name, frame.dim))
        elif frame.full_size is not None and frame.size < frame.full_size:
            got = (
                f"site '{outside[0]}' outside it"
                if outside
                else "a plate that is iterated over one by one"
            )
            raise ValueError(
                f"Expected every latent and observed site inside the subsampled plate '{name}' "
                f"when num_particles > 1; got {got}. Move the site into the plate, pass the "
                "full data, or use num_particles=1."
            )
    return sorted(common, key=lambda plate: plate[1])


def common_scale(terms: Sequence[Any]) -> float | Tensor:
    """The one scale of all sites."""
    if not terms:
        return 1.0
    first = terms[0]
    for term in terms[1:]:
        a, b = first.site["scale"], term.site["scale"]
        if a is b:
            continue
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            same = torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double())
        else:
            same = math.isclose(a, b, rel_tol=1e-9)
        if not same:
            raise ValueError(
                "Expected one scale for all sites of a weight when num_particles > 1; got "
                f"{_number(a)} at site '{first.name}' and {_number(b)} at site '{term.name}'. "
                "Scale the loss instead, or use num_particles=1."
            )
    return first.site["scale"]


def _number(scale: float | Tensor) -> str:
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return f"a tensor of shape {tuple(scale.shape)}"
    return f"{float(scale):g}"


def check_rows(terms: Sequence[Any], plates: list[tuple[str, int]]) -> None:
    """Every site must have a log-density of its own for every row of the common plates."""
    for term in terms:
        shape = tuple(term.log_prob.shape)
        for frame in _frames(term.site):
            if (frame.name, frame.dim) not in plates or frame.size == 1:
                continue
            if len(shape) < -frame.dim or shape[frame.dim] == 1:
                raise _no_rows(term.name, frame, shape)


def check_shape(name: str, site: Any, shape: Sequence[int]) -> None:
    """A log-density must not have dimensions that no plate declares."""
    dims = {frame.dim for frame in site["cond_indep_stack"]}
    for dim in range(-len(shape), 0):
        if shape[dim] != 1 and dim not in dims:
            raise ValueError(
                f"Expected a log-density over the plates of site '{name}' alone; got shape "
                f"{tuple(shape)}, whose dimension {dim} belongs to no plate. Declare the plate, "
                "or make the dimension part of the event with .to_event(1)."
            )


def _check_events(name: str, asked: Any, given: Any) -> None:
    """A site must have the same event in both programs; a joint draw of all rows has another."""
    if given["fn"].event_shape == asked["fn"].event_shape:
        return
    wide, narrow = given["fn"].event_dim, asked["fn"].event_dim
    if wide > narrow:
        inside = {frame.name for frame in _frames(given)}
        for frame in _frames(asked):
            if frame.name not in inside:
                raise _no_rows(name, frame, given["fn"].batch_shape)
    raise ValueError(
        f"Expected the same shape at site '{name}' in model and guide; got "
        f"{tuple(asked['fn'].shape())} with event_dim={narrow} in the model and "
        f"{tuple(given['fn'].shape())} with event_dim={wide} in the guide. Use .to_event or the "
        "same plates."
    )


def _no_rows(name: str, frame: Any, shape: Sequence[int]) -> ValueError:
    return ValueError(
        f"Expected one log-density per row of plate '{frame.name}' at site '{name}'; got a "
        f"log-density of shape {tuple(shape)} for {frame.size} rows. Draw the site row by row, or "
        "take it out of the plate."
    )


def check_match(model_sites: Mapping[str, Any], guide_sites: Mapping[str, Any]) -> None:
    """Model and guide must have the same latent sites, auxiliaries apart, of the same events."""
    for name, site in guide_sites.items():
        if site["is_observed"] or site["infer"].get("is_auxiliary", False):
            continue
        if name not in model_sites or model_sites[name]["is_observed"]:
            raise ValueError(
                f"Expected every latent site of the guide in the model; got guide site '{name}' "
                "that the model lacks. Mark it infer={'is_auxiliary': True} or add it to the "
                "model."
            )
    for name, site in model_sites.items():
        if site["is_observed"]:
            continue
        if name not in guide_sites or guide_sites[name]["is_observed"]:
            raise ValueError(
                f"Expected every latent site of the model in the guide; got model site '{name}' "
                "that the guide lacks. Add it to the guide or observe it."
            )
        _check_events(name, site, guide_sites[name])


def unwrapped(fn: Any) -> Any:
    """The distribution inside of the host's wrappers."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent",
        "ExpandedDistribution",
        "MaskedDistribution",
    ):
        fn = fn.base_dist
    return fn


def distribution_name(fn: Any) -> str:
    """Name of the distribution inside of the host's wrappers."""
    return type(unwrapped(fn)).__name__


def check_discrete(model_sites: Mapping[str, Any], guide_sites: Mapping[str, Any]) -> None:
    """A latent site must be discrete in both programs, or in neither."""
    for name, site in guide_sites.items():
        if site["is_observed"] or name not in model_sites:
            continue
        ours, theirs = site["fn"], model_sites[name]["fn"]
        if _is_discrete(ours) != _is_discrete(theirs):
            raise ValueError(
                f"Expected site '{name}' to be discrete in both model and guide; got "
                f"{distribution_name(ours)} in the guide and {distribution_name(theirs)} in the "
                "model. Use the same family of distributions in both."
            )


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (AttributeError, NotImplementedError):
        return not fn.has_rsample


def check_reparameterised(guide_sites: Mapping[str, Any], gradient: str) -> None:
    """Every latent site must have a reparameterised sampler."""
    for name, site in guide_sites.items():
        if not site["is_observed"] and not site["fn"].has_rsample:
            raise ValueError(
                f"Expected reparameterised latent sites under gradient='{gradient}'; got site "
                f"'{name}' with the distribution {distribution_name(site['fn'])}, which has no "
                "reparameterised sampler. Marginalise it with the host's TraceEnum_ELBO, or use "
                "an objective for discrete latents."
            )


def check_unweighted(sites: Iterable[tuple[str, Any]]) -> None:
    """No site of an importance weight may have a KL weight, not even one."""
    for name, site in sites:
        if "kl_weight" in site["infer"]:
            raise ValueError(
                "Expected sites without a KL weight in an importance-weighted bound; got "
                f"handlers.kl_weight at site '{name}'. A weight inside the logarithm is no weight "
                "on a KL divergence; use num_particles=1 or the host's Trace_ELBO, and the plain "
                "pair for evaluation."
            )


def check_same_weight(model_sites: Mapping[str, Any], guide_sites: Mapping[str, Any]) -> None:
    """Model and guide must have one KL weight at every latent site, factors of a guide included."""
    weighted = False
    for name, site in guide_sites.items():
        ours = site["infer"].get("kl_weight")
        weighted = weighted or ours is not None
        if site["is_observed"] or name not in model_sites:
            continue
        theirs = model_sites[name]["infer"].get("kl_weight")
        got = None
        if (ours is None) != (theirs is None):
            alone = "model" if ours is None else "guide"
            got = f"site '{name}' weighted in the {alone} alone"
        elif ours is not theirs and _differ(ours, theirs):
            got = f"{_number(theirs)} in the model and {_number(ours)} in the guide at '{name}'"
        if got is not None:
            raise ValueError(
                f"Expected the same KL weight on model and guide; got {got}. Wrap both in "
                "handlers.kl_weight."
            )
    for name, site in guide_sites.items():
        own = not site["is_observed"] or distribution_name(site["fn"]) == "Unit"
        if weighted and own and "kl_weight" not in site["infer"]:
            raise ValueError(
                "Expected the same KL weight on model and guide; got the guide's own site "
                f"'{name}' without it. Wrap the whole guide, and say of a factor whether it "
                "has_rsample."
            )


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
        return is_validation_enabled() and not torch.allclose(a, b)
    return not math.isclose(a, b, rel_tol=1e-9)


def check_density(model_sites: Mapping[str, Any], guide_sites: Mapping[str, Any]) -> None:
    """A guide must not put a point mass on a latent site: its weights would be no bound.

    A ``Delta`` that only carries a drawn auxiliary value over to its site, as Pyro's AutoGuides
    have them, is fine: there are as many drawn numbers as free numbers in such sites.
    """
    masses: list[str] = []
    free = drawn = 0
    for name, site in guide_sites.items():
        if site["is_observed"]:
            continue
        if distribution_name(site["fn"]) != "Delta":
            drawn += site["value"].numel() if name not in model_sites else 0
            continue
        masses.append(name)
        if name in model_sites:
            transform = biject_to(model_sites[name]["fn"].support)
            free += math.prod(transform.inverse_shape(site["value"].shape))
    if free > drawn:
        raise ValueError(
            "Expected a guide with a density at every latent site when num_particles > 1; got a "
            f"point mass (Delta) at site '{masses[0]}', under which no bound on the evidence "
            "holds. Use a guide family, or num_particles=1 for a MAP estimate."
        )


def check_data(model_sites: Mapping[str, Any]) -> None:
    """Observed values must be floats where floats are due, and no NaN where they count."""
    for name, site in model_sites.items():
        value = site["value"]
        if not site["is_observed"] or not isinstance(value, Tensor) or value.numel() == 0:
            continue
        if not value.is_floating_point():
            if not site["fn"].support.is_discrete:
                raise TypeError(
                    f"Expected floating-point data at site '{name}' "
                    f"({distribution_name(site['fn'])}); got "
                    f"{str(value.dtype).removeprefix('torch.')}. Cast the data to float."
                )
        elif is_validation_enabled():
            # A look at the values would break the one graph of a traced step: validation only.
            bad = torch.isnan(value)
            event_dim = site["fn"].event_dim
            bad = bad.flatten(-event_dim).any(-1) if event_dim else bad
            if isinstance(site["mask"], Tensor):
                bad = bad & site["mask"]
            if site["mask"] is not False and bool(bad.any()):
                raise ValueError(
                    f"Expected observed data without NaN at site '{name}'; got NaN. Drop or mask "
                    "the rows with missing values."
                )
