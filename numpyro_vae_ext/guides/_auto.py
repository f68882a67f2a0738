"""What the guides made from a model share: the layout of its latents, and the host's interface.

A latent site is unconstrained by ``biject_to``; unconstrained sites are concatenated to vectors,
which a family draws at auxiliary sites. Every site of the model is then a ``Delta`` at its drawn
value, in the plates of the model, whose log-density carries the Jacobian. Under a mask it has the
model's mask, and a factor cancels what the family says of what is masked out.

A guide may first be called under ``jit``, so nothing traced may stay in it. The host's prototype
of the model, which is full of traced values, is made in a copy that is thrown away; names and
sizes are kept.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import random
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import constrain_fn, get_transforms

from numpyro_vae_ext import _masks
from numpyro_vae_ext._checks import Plates, is_traced, unwrapped
from numpyro_vae_ext._record import Pair, Recorder
from numpyro_vae_ext.guides._base import GuideFamily
from numpyro_vae_ext.guides._hierarchy import built, reverse_factor

AUXILIARY = {"is_auxiliary": True}

Model = Callable[..., Any]
Values = dict[str, jax.Array]


class Site(NamedTuple):
    """A continuous latent site of a model; nothing in it is traced.

    Attributes:
        name: Name of the site.
        transform: Bijection from unconstrained values onto the support; None if the support has
            bounds, which may depend on data, parameters or other sites: a call asks the model.
        shape: Shape of an unconstrained value.
        dtype: Type of an unconstrained value.
        batch_dim: Number of plate dimensions of a value, constrained or not.
        event_dim: Number of dimensions of a constrained event.
        plates: The plates around the site, innermost first.
    """

    name: str
    transform: Any
    shape: tuple[int, ...]
    dtype: Any
    batch_dim: int
    event_dim: int
    plates: Plates

    @property
    def size(self) -> int:
        """Unconstrained numbers."""
        return math.prod(self.shape)


class Latents(NamedTuple):
    """What a guide drew.

    Attributes:
        sites: The sites.
        free: Unconstrained values by site.
        log_scales: Logarithms of what these were scaled by, of the sites where they were.
        plates: Plates that the sites are drawn in.
        rows: Rows of the plate that may be subsampled.
        locs: Where unconstrained values that are masked out are put, of the sites not at 0.
    """

    sites: list[Site]
    free: Values
    log_scales: Values
    plates: dict[str, Any]
    rows: Values
    locs: Values = {}


class FamilyGuide(AutoGuide):
    """Base of the guides made from a model; a member draws the vectors of its sites."""

    def __init__(self, model: Model, rngs: nnx.Rngs | None, **options: Any) -> None:
        super().__init__(model, **options)
        # A stream cannot be advanced under jit, where the families may be built.
        self._rng_key = (nnx.Rngs(0) if rngs is None else rngs).params()
        self._names: frozenset[str] = frozenset()  # of the latent sites, once they are known
        self._has_arguments = False
        self._asks_model = False  # for supports that depend on something, or deterministic sites
        self._has_masks = False
        self._first: tuple[Any, Any] | None = None  # arguments of the first call

    def __getstate__(self) -> dict[str, Any]:
        # A copy on a disk holds no data.
        return {**super().__getstate__(), "_first": None}

    @abstractmethod
    def _latents(self, args: Any, kwargs: Any) -> Latents:
        """Draw, inside of the guide."""

    def __call__(self, *args: Any, **kwargs: Any) -> Values:
        """Run the guide on the arguments of the model.

        Returns:
            The drawn value of every latent site, by name.
        """
        drawn = self._latents(args, kwargs)
        if is_static(drawn.sites):
            transforms = {site.name: site.transform for site in drawn.sites}
            values = {name: transforms[name](free) for name, free in drawn.free.items()}
        else:
            values = self._asked(constrain_fn, drawn.rows, drawn.free, args, kwargs)
            transforms = self._asked(get_transforms, drawn.rows, values, args, kwargs)
        hidden: dict[str, _masks.Hidden | None] = {}
        if self._has_masks:
            hidden = self._asked(_hidden, drawn.rows, values, args, kwargs)
        result = {}
        for site in drawn.sites:
            value, free = values[site.name], drawn.free[site.name]
            batch = value.shape[: value.ndim - site.event_dim]
            log_det = transforms[site.name].log_abs_det_jacobian(free, value)
            log_det = log_det.reshape(*batch, -1).sum(-1)
            if site.name in drawn.log_scales:
                log_det = log_det + drawn.log_scales[site.name].reshape(*batch, -1).sum(-1)
            fn = dist.Delta(value, log_density=-log_det, event_dim=site.event_dim)
            with ExitStack() as stack:
                for plate in reversed(site.plates):
                    if plate.name in drawn.plates:
                        stack.enter_context(drawn.plates[plate.name])
                if (masked := hidden.get(site.name)) is not None:
                    rest = masked.missing(free, value, drawn.locs.get(site.name, 0.0))
                    if masked.rows is not None:
                        fn = fn.mask(masked.rows)
                        rest = rest + jnp.where(masked.rows, 0.0, -log_det)
                    reverse_factor(f"_{self.prefix}_{site.name}", -rest)
                result[site.name] = numpyro.sample(site.name, fn)
        return result

    def _asked(self, ask: Model, rows: Values, values: Values, args: Any, kwargs: Any) -> Any:
        """What the host's function says of the model at these values, the outside untouched."""
        model = handlers.substitute(self._known_part(), data=rows)
        with handlers.block(expose_types=["param"]), handlers.seed(rng_seed=0):
            return ask(model, args, kwargs, values)

    def _known_part(self) -> Model:
        """The model; what was observed at the first call may be latent later, and is hidden."""
        if not self._names:
            return self.model
        return handlers.block(self.model, hide_fn=partial(_is_foreign, self._names))

    def _prototyped(self, rng_key: jax.Array, args: Any, kwargs: Any) -> AutoGuide:
        """A copy that the host has set up for the model at these arguments."""
        scratch = copy.copy(self)
        scratch.model = self._known_part()
        init = self.init_loc_fn
        init = init if isinstance(init, partial) else init()
        scratch.init_loc_fn = partial(_initial_value, init=init, guide=type(self).__name__)
        with handlers.block(), handlers.seed(rng_seed=rng_key):
            # Not what AutoContinuous makes of it: it keeps what is traced.
            AutoGuide._setup_prototype(scratch, *args, **kwargs)
        return scratch

    def _layout(self, args: Any, kwargs: Any) -> tuple[list[Site], dict[str, int]]:
        """The latent sites at these arguments and the full sizes of plates; computes nothing."""
        found: list[AutoGuide] = []
        key = random.key(0)
        jax.eval_shape(lambda: found.append(self._prototyped(key, args, kwargs)))
        messages, free = found[0].prototype_trace, found[0]._init_locs
        if not free:
            raise ValueError("Expected at least one continuous latent site in the model; got none.")
        # In the model's order: that of `_init_locs` is another one under jit.
        sites = [_site(message, free[k]) for k, message in messages.items() if k in free]
        self._has_masks = any(_masks.is_masked(messages[site.name]["fn"]) for site in sites)
        if not self._names:
            if self._has_masks:
                _masks.check_unread(self.model, args, kwargs, type(self).__name__)
            self._names = frozenset(free)
            self._remember(messages, sites, args, kwargs)
        return sites, dict(found[0]._prototype_frame_full_sizes)

    def _remember(
        self, messages: dict[str, Any], sites: list[Site], args: Any, kwargs: Any
    ) -> None:
        """What later questions need of the first call; nothing traced."""
        # The host's lists and reparameterisers read it.
        self.prototype_trace = {
            name: {"name": name, "type": msg["type"], "is_observed": msg.get("is_observed")}
            for name, msg in messages.items()
        }
        types = {msg["type"] for msg in messages.values()}
        self._asks_model = "deterministic" in types or not is_static(sites)
        self._has_arguments = bool(args or kwargs)
        traced = any(map(is_traced, jax.tree.leaves((args, kwargs))))
        self._first = None if traced else (args, kwargs)

    def _built(
        self, family: Callable[..., Any], context_dim: int | None, sites: list[Site], size: int
    ) -> GuideFamily:
        """A new member of the family, of numbers even where all else is traced."""
        dtype = jnp.result_type(*(site.dtype for site in sites))
        with jax.ensure_compile_time_eval():
            return built("family", family, size, context_dim, nnx.Rngs(self._rng_key), dtype)


def is_static(sites: list[Site]) -> bool:
    """Whether no support has bounds, so that the transforms are known without the model."""
    return all(site.transform is not None for site in sites)


def _is_foreign(names: frozenset[str], msg: Any) -> bool:
    return msg["type"] == "sample" and not msg["is_observed"] and msg["name"] not in names


def _initial_value(msg: Any, init: Callable[..., Any], guide: str) -> Any:
    """The start of a site; the host asks for it before it looks at any site itself."""
    if msg["type"] == "sample" and not msg["is_observed"]:
        if msg["fn"].support.is_discrete:
            raise ValueError(
                f"Expected continuous latent sites under {guide}; got site '{msg['name']}' with "
                f"the distribution {type(unwrapped(msg['fn'])).__name__}. Marginalise it with the "
                "host's TraceEnum_ELBO and hide it from this guide, or use an objective for "
                "discrete latents."
            )
    return init(msg)


def _hidden(
    model: Model, args: Any, kwargs: Any, values: Values
) -> dict[str, _masks.Hidden | None]:
    """What masks leave out of the latent sites, at these values."""
    sites = Recorder(Pair(model, model, args, kwargs), random.key(0), None).model(values, {})
    return {name: _masks.hidden(sites[name]["fn"]) for name in values if name in sites}


def _site(msg: Any, free: Any) -> Site:
    fn = msg["fn"]
    return Site(
        msg["name"],
        None if jax.tree.leaves(fn.support) else biject_to(fn.support),
        jnp.shape(free),
        jnp.result_type(free),
        len(fn.batch_shape),
        fn.event_dim,
        tuple(msg["cond_indep_stack"]),
    )
