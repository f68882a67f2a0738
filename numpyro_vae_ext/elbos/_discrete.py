r"""The contract of an objective for discrete latents, written once.

A subclass of the host's ``ELBO``. A latent site of the guide without a reparameterised sampler is
*scored*: its value is drawn once, from noise and logits, and its gradient is an estimate. All other
latent sites stay reparameterised. Three things are shared by the members:

- the *terms* of the evidence lower bound: scaled and masked log-densities, those of the guide with
  a minus sign;
- the *cost* of a scored site: all terms but those of the guide's latent sites that ran before it,
  summed over the plates that the site does not stand in. What is left out cannot depend on the
  site's value, given what came before (Schulman et al. 2015, arXiv 1506.05254);
- :meth:`DiscreteELBO.tunable`, which hands an objective's own parameters to the guide's sites.

A member estimates the derivative ``g`` of the expected cost in the logits ``a`` of every site, and
the surrogate ``sum(a * g)`` with ``g`` held fixed brings it to whatever the logits are made of.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax, random
from numpyro.contrib.module import nnx_module
from numpyro.primitives import Messenger

from numpyro_vae_ext import _record, _relaxation, _trace
from numpyro_vae_ext._path import with_derivative_of
from numpyro_vae_ext.elbos._host import HostELBO

Declare = Callable[[Any, dict[str, Any]], dict[str, Any]]
Check = Callable[[str, Any], None]


class Scored(NamedTuple):
    """A scored site of one run.

    Attributes:
        site: The host's record of it.
        kind: ``"bernoulli"``, ``"one_hot"`` or None.
        position: Its place among the latent sites of the guide.
        scale: Its scale without a KL weight, a number or of the batch's shape; 1 where there is
            none, or where it is 0.
    """

    site: Any
    kind: str | None
    position: int
    scale: Any

    @property
    def name(self) -> str:
        """The name of the site."""
        return self.site["name"]

    @property
    def event_dim(self) -> int:
        """Number of dimensions of one value."""
        return self.site["fn"].event_dim

    @property
    def logits(self) -> jax.Array:
        """Logits of the shape of the value; of a Bernoulli or one-hot site alone."""
        return _record.site_logits(self.site)

    @property
    def tuning(self) -> dict[str, Any]:
        """What ``tunable`` declared at the site."""
        return self.site["infer"].get("tuning", {})

    def rows(self, x: Any) -> jax.Array:
        """``x`` of the batch's shape, with a dimension of size 1 for each one of a value."""
        return jnp.reshape(x, (*jnp.shape(x), *(1,) * self.event_dim))


class Term(NamedTuple):
    """A term of the bound.

    Attributes:
        value: Scaled and masked, with its sign.
        plates: Names and dims of its plates.
        position: Its place among the latent sites of the guide; None for all other terms.
        scored: Whether it belongs to a scored site of the guide.
    """

    value: jax.Array
    plates: frozenset[tuple[str, int]]
    position: int | None
    scored: bool


class Play(NamedTuple):
    """One run of guide and model: the terms, the scored sites and the mutable state."""

    terms: list[Term]
    sites: list[Scored]
    state: dict[str, Any]

    def total(self) -> jax.Array:
        """The sampled bound; the densities of scored sites, whose score has mean 0, are fixed."""
        parts = [lax.stop_gradient(t.value) if t.scored else t.value for t in self.terms]
        return _sum(jnp.sum(part) for part in parts)

    def costs(self) -> dict[str, jax.Array]:
        """By scored site, its cost, whose shape broadcasts to the site's batch."""
        return {site.name: self._cost(site) for site in self.sites}

    def totals(self) -> dict[str, jax.Array]:
        """By scored site, the sum of its cost's terms, each counted once."""
        return {s.name: _sum(jnp.sum(t.value) for t in self._below(s)) for s in self.sites}

    def _below(self, site: Scored) -> list[Term]:
        return [t for t in self.terms if t.position is None or t.position >= site.position]

    def _cost(self, site: Scored) -> jax.Array:
        plates = _plates(site.site)
        width = jnp.ndim(site.site["value"]) - site.event_dim
        parts = []
        for term in self._below(site):
            kept = {dim for _, dim in plates & term.plates}
            dims = tuple(dim for dim in range(-term.value.ndim, 0) if dim not in kept)
            part = jnp.sum(term.value, axis=dims, keepdims=True)
            parts.append(jnp.reshape(part, part.shape[max(part.ndim - width, 0) :]))
        return _sum(parts)


def _sum(parts: Any) -> jax.Array:
    # Without a start: 0 of the default type would widen the numbers of a narrower one.
    return functools.reduce(jnp.add, parts)


def _plates(site: Any) -> frozenset[tuple[str, int]]:
    return frozenset((frame.name, frame.dim) for frame in site["cond_indep_stack"])


def play(
    rng_key: jax.Array,
    plate_key: jax.Array,
    params: dict[str, Any],
    pair: _trace.Pair,
    choose: _record.Choose,
    check: Check | None = None,
) -> Play:
    """Run guide and model once at the values that ``choose`` returns for the scored sites.

    ``check`` gets the name and the distribution of every scored site, of guide and model.
    """
    drawn, modelled, state = _trace.play(rng_key, plate_key, params, pair, choose)
    names = list(_record.latent_sites(drawn))
    for name in names:
        if check is not None and _record.is_scored(drawn[name]):
            check(name, drawn[name]["fn"])
            check(name, (modelled if name in modelled else drawn)[name]["fn"])
    terms, sites = [], []
    for sign, recorded in ((1, modelled), (-1, drawn)):
        densities = _record.scaled(recorded, _record.log_probs(recorded, soft=True))
        for name, value in densities.items():
            site = recorded[name]
            position = names.index(name) if sign < 0 and name in names else None
            scored = position is not None and _record.is_scored(site)
            terms.append(Term(sign * jnp.asarray(value), _plates(site), position, scored))
            if position is not None and scored:
                kind = _relaxation.kind(site["fn"])
                scale = site.get("unweighted_scale", site["scale"])
                sites.append(Scored(site, kind, position, _nonzero(scale)))
    return Play(terms, sites, state)


def _nonzero(scale: Any) -> Any:
    # A traced scale may be 0, which no division may turn into NaN.
    return 1.0 if scale is None else jnp.where(jnp.asarray(scale) == 0, 1.0, scale)


class Tunable(Messenger):
    """A guide whose scored sites carry what ``declare`` returns for them."""

    def __init__(self, fn: Callable[..., Any], declare: Declare) -> None:
        super().__init__(fn)
        self.declare = declare
        self.modules: dict[str, Any] = {}

    def process_message(self, msg: Any) -> None:
        if _record.is_scored(msg) and "tuning" not in msg["infer"]:
            # A copy: the dict is the user's own.
            msg["infer"] = {**msg["infer"], "tuning": self.declare(msg, self.modules)}


class DiscreteELBO(HostELBO, ABC):
    """Base of the objectives for discrete latent sites.

    Args:
        num_particles: number of particles `K`, over which the estimates are averaged.
        vectorize_particles: run the particles side by side, or one at a time.
    """

    can_infer_discrete = True

    def tunable(self, guide: Callable[..., Any]) -> Callable[..., Any]:
        """The guide, with the objective's own parameters declared at its discrete sites.

        Pass it to ``SVI`` in the guide's place. They are ordinary parameters of the run from then
        on, with a gradient of their own, and the guide's draws are what they were.

        Args:
            guide: Program of NumPyro primitives.
        """
        return Tunable(guide, self._declare) if self._is_tuned else guide

    # --- what a member says -------------------------------------------------------------------

    @property
    def _is_tuned(self) -> bool:
        """Whether the objective has parameters or state of its own."""
        return False

    def _declare(self, site: Any, modules: dict[str, Any]) -> dict[str, Any]:
        """Declare the parameters of a scored site; modules are made once and kept."""
        return {}

    @abstractmethod
    def _particle(
        self,
        rng_key: jax.Array,
        plate_key: jax.Array,
        params: dict[str, Any],
        pair: _trace.Pair,
    ) -> dict[str, Any]:
        """Run one particle.

        Returns:
            The bound (``value``), what has its derivative (``surrogate``), the ``state``, and what
            :meth:`_combined` makes use of; ``objective``, if there, is minimised.
        """

    def _combined(self, particles: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """What is to be minimised for its derivative, and the state, from all particles."""
        loss = -jnp.mean(particles["surrogate"])
        if "objective" in particles:
            loss = loss + jnp.mean(particles["objective"])
        return loss, _record.merged_state(particles["state"])

    # --- shared -------------------------------------------------------------------------------

    def _loss_and_state(
        self, rng_key: jax.Array, params: dict[str, Any], pair: _trace.Pair
    ) -> tuple[jax.Array, dict[str, Any]]:
        plate_key = _trace.shared_key(rng_key)
        # One particle uses the key itself, as the host does.
        one = self.num_particles == 1
        keys = rng_key[None] if one else random.split(rng_key, self.num_particles)
        particles = self.vectorize_particles_fn(
            lambda key: self._particle(key, plate_key, params, pair), keys
        )
        loss, state = self._combined(particles)
        value = -jnp.mean(particles["value"])
        # The objective's own parameters may be of a wider type than the model's.
        return with_derivative_of(value, loss.astype(value.dtype)), state

    def _checked(self, found: Play) -> Play:
        if not found.sites:
            warnings.warn(
                f"Expected discrete latent sites under {type(self).__name__}; got none. Use the "
                "host's Trace_ELBO, or ImportanceWeightedELBO.",
                UserWarning,
                stacklevel=2,
            )
        return found

    def _tuning(self, site: Scored, extra: str) -> dict[str, Any]:
        if not site.tuning:
            cls = type(self).__name__
            raise ValueError(
                f"Expected the guide that {cls}.tunable(guide) returns; got site '{site.name}' "
                f"without its tuning parameters. Pass that guide to SVI{extra}."
            )
        return site.tuning


def declared(name: str, modules: dict[str, Any], build: Callable[[nnx.Rngs], Any]) -> Any:
    """The module ``build`` makes, declared as a parameter of the program; made once."""
    if name not in modules:
        # Numbers, whatever trace the first run of the guide is part of.
        with jax.ensure_compile_time_eval():
            modules[name] = build(nnx.Rngs(zlib.crc32(name.encode())))
    return nnx_module(name, modules[name])


def dense(width: int, hidden_dims: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Module:
    """Dense layers with tanh and one output, which is 0 at first."""
    dtype = jnp.result_type(float)
    layers: list[Any] = []
    for size in hidden_dims:
        layers += [nnx.Linear(width, size, param_dtype=dtype, rngs=rngs), jnp.tanh]
        width = size
    zeros = nnx.initializers.zeros_init()
    head = nnx.Linear(width, 1, kernel_init=zeros, param_dtype=dtype, rngs=rngs)
    return nnx.Sequential(*layers, head)


def setting(name: str, value: float | Mapping[str, float], site: str) -> float:
    """The number of a site, from one number or a mapping of names."""
    if not isinstance(value, Mapping):
        return value
    if site not in value:
        raise ValueError(
            f"Expected a {name} for every discrete site; got none for site '{site}'. Add "
            "it to the mapping, or pass one number."
        )
    return value[site]
