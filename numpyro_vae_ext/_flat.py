"""A model as the density of one vector of unconstrained numbers.

The vector is that of ``AutoPosterior``: every latent site is unconstrained by ``biject_to`` and
raveled, and the sites follow one another as in the model. What is masked out of a latent site is a
standard Normal in unconstrained space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from numpyro.distributions import biject_to
from numpyro.handlers import seed
from numpyro.infer.util import constrain_fn, get_transforms

from numpyro_vae_ext import _checks, _masks, _trace
from numpyro_vae_ext._record import (
    Pair,
    Recorder,
    Sites,
    latent_sites,
    log_probs,
    sample_sites,
    scaled,
)

Values = dict[str, jax.Array]


class Part(NamedTuple):
    """A latent site and its place in the vector.

    Attributes:
        name: Name of the site.
        shape: Shape of an unconstrained value.
        transform: Bijection onto the support; None if the support has bounds, which may depend on
            data or on other sites.
    """

    name: str
    shape: tuple[int, ...]
    transform: Any


@dataclass(frozen=True)
class FlatModel:
    """The joint log-density of a model, with its data, as a function of a vector ``(size,)``.

    All functions are pure, and can be compiled, mapped and differentiated.
    """

    pair: Pair
    rng_key: jax.Array
    parts: tuple[Part, ...]
    widest: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the latent sites, in the order of the vector."""
        return tuple(part.name for part in self.parts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the unconstrained value of every site, in the order of the vector."""
        return {part.name: part.shape for part in self.parts}

    @property
    def size(self) -> int:
        """Unconstrained numbers."""
        return sum(math.prod(part.shape) for part in self.parts)

    @property
    def dtype(self) -> Any:
        """Type of the vector."""
        return jnp.result_type(float)

    def start(self, rng_key: jax.Array, radius: float = 2.0) -> jax.Array:
        """A vector of uniform numbers between ``-radius`` and ``radius``."""
        return random.uniform(rng_key, (self.size,), self.dtype, -radius, radius)

    def unpack(self, u: jax.Array) -> Values:
        """The unconstrained value of every site."""
        sizes = [math.prod(part.shape) for part in self.parts]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        pieces = jnp.split(u, ends)
        return {
            part.name: piece.reshape(part.shape)
            for part, piece in zip(self.parts, pieces, strict=True)
        }

    def constrain(self, u: jax.Array) -> Values:
        """The value of every site, on its support."""
        free = self.unpack(u)
        if all(part.transform is not None for part in self.parts):
            return {part.name: part.transform(free[part.name]) for part in self.parts}
        values = constrain_fn(self._model(), self.pair.args, self.pair.kwargs, free)
        return {name: values[name] for name in self.names}

    def log_densities(self, u: jax.Array) -> Values:
        """What every site adds to the log-density, with the log-determinant of its transform."""
        free, values = self.unpack(u), self.constrain(u)
        transforms = {part.name: part.transform for part in self.parts}
        if any(transform is None for transform in transforms.values()):
            transforms = get_transforms(self._model(), self.pair.args, self.pair.kwargs, values)
        # As parameters: the host substitutes these in the steps of a scan as well.
        sites = Recorder(self.pair, self.rng_key, None).model(values, {})
        terms = {name: jnp.sum(term) for name, term in scaled(sites, log_probs(sites)).items()}
        for name in self.names:
            log_det = transforms[name].log_abs_det_jacobian(free[name], values[name])
            terms[name] = terms[name] + jnp.sum(log_det)
            if (hidden := _masks.hidden(sites[name]["fn"])) is not None:
                # A density for what is masked out, where that of the model is flat.
                terms[name] = terms[name] - jnp.sum(hidden.missing(free[name], values[name]))
        return terms

    def log_density(self, u: jax.Array) -> jax.Array:
        """The joint log-density at a vector, in its own unconstrained coordinates."""
        return sum(self.log_densities(u).values(), start=jnp.zeros((), u.dtype))

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn(flat, *arrays)`` as a compiled function of the arrays.

        The data are arguments of the program as well: as constants they would be copied into it.
        """
        return _trace.compiled(
            lambda pair, *arrays: fn(
                FlatModel(pair, self.rng_key, self.parts, self.widest), *arrays
            ),
            self.pair,
        )

    def _model(self) -> Callable[..., Any]:
        return seed(self.pair.model, self.rng_key)


def flat_model(
    rng_key: jax.Array,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    owner: str = "pathfinder",
) -> FlatModel:
    """The model at these arguments as a density of one vector.

    Args:
        rng_key: Key for what the model draws besides its latent sites, such as initial values of
            its parameters; the same at every evaluation.
        model: Program of NumPyro primitives, without a discrete latent site.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        owner: What an error calls the caller.

    Raises:
        ValueError: If a latent site is discrete or masked and read, if there is none, or if a
            plate is subsampled; the message names the site.
    """
    pair = Pair(model, model, args, kwargs)
    found: list[Sites] = []

    def layout() -> list[jax.Array]:
        sites = Recorder(pair, rng_key, None).started(partial(_start, owner=owner), {})
        found.append(sites)
        return [_free(site) for site in latent_sites(sites).values()]

    shapes = [tuple(free.shape) for free in jax.eval_shape(layout)]
    sites = found[0]
    if not shapes:
        raise ValueError("Expected at least one continuous latent site in the model; got none.")
    _checks.check_data(sample_sites(sites))
    _check_whole(sites, owner)
    if any(_masks.is_masked(site["fn"]) for site in latent_sites(sites).values()):
        _masks.check_unread(model, args, kwargs, owner)
    parts = [
        Part(name, shape, None if jax.tree.leaves(fn.support) else biject_to(fn.support))
        for (name, fn), shape in zip(
            ((name, site["fn"]) for name, site in latent_sites(sites).items()), shapes, strict=True
        )
    ]
    widest = max(math.prod(site["fn"].shape()) for site in sample_sites(sites).values())
    return FlatModel(pair, rng_key, tuple(parts), max(1, widest))


def _free(site: Any) -> jax.Array:
    return biject_to(site["fn"].support).inv(site["value"])


def _start(msg: Any, owner: str) -> Any:
    """A value for what has an unconstrained space; the host's sampler may have none."""
    if msg["type"] != "sample" or msg["is_observed"]:
        return None
    fn = msg["fn"]
    if fn.support.is_discrete:
        raise ValueError(
            f"Expected continuous latent sites under {owner}; got site '{msg['name']}' with the "
            f"distribution {type(_checks.unwrapped(fn)).__name__}. Marginalise it: sum over its "
            "values in the model."
        )
    shape = fn.shape(msg["kwargs"].get("sample_shape", ()))
    transform = biject_to(fn.support)
    return transform(jnp.zeros(transform.inverse_shape(shape)))


def _check_whole(sites: Sites, owner: str) -> None:
    full_sizes = {k: site["args"][0] for k, site in sites.items() if site["type"] == "plate"}
    for name, site in sample_sites(sites).items():
        for plate in site["cond_indep_stack"]:
            if (full := full_sizes.get(plate.name, plate.size)) != plate.size:
                raise ValueError(
                    f"Expected no subsampled plate under {owner}; got site '{name}' in plate "
                    f"'{plate.name}' ({plate.size} of {full} rows). Pass the full data."
                )
