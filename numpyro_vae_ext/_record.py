"""Runs a program once and records its sites: NumPyro's handlers, put together in one order."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from numpyro.handlers import replay, seed, substitute, trace, uncondition
from numpyro.primitives import Messenger

from numpyro_vae_ext import _checks, _relaxation

Program = Callable[..., Any]
Params = dict[str, Any]
Sites = dict[str, Any]
Choose = Callable[[Any], jax.Array]  # a message -> the value of its site


class Pair(NamedTuple):
    """A model and a guide, and what they are called with."""

    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class SharedSubsample(Messenger):
    """Draws a plate's subsample from a key that all particles, guide and model share."""

    def __init__(self, fn: Program, rng_key: jax.Array) -> None:
        super().__init__(fn)
        self.rng_key = rng_key

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            name = zlib.crc32(msg["name"].encode())
            msg["kwargs"]["rng_key"] = random.fold_in(self.rng_key, name)


class Chosen(Messenger):
    """Gives every scored site the value that ``choose`` returns for its message."""

    def __init__(self, fn: Program, choose: Choose) -> None:
        super().__init__(fn)
        self.choose = choose

    def process_message(self, msg: Any) -> None:
        if is_scored(msg) and msg["value"] is None:
            msg["value"] = self.choose(msg)


class Watch(Messenger):
    """Shows every sample statement to a function while a program runs."""

    def __init__(self, fn: Program, look: Callable[[Any], None]) -> None:
        super().__init__(fn)
        self.look = look

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            self.look(msg)


class Recorder(NamedTuple):
    """Runs guide and model under the key of one particle.

    Without a key of their own, plates draw their subsamples as in the host's objectives.
    """

    pair: Pair
    rng_key: jax.Array
    plate_key: jax.Array | None

    def guide(
        self, params: Params, values: Sites | None = None, choose: Choose | None = None
    ) -> Sites:
        """Sites and mutable state of the guide, at given values where there are any."""
        key = random.split(self.rng_key)[1]
        return self._record(self.pair.guide, key, params, values, choose)

    def model(self, params: Params, values: Sites) -> Sites:
        """Sites and mutable state of the model at the guide's values."""
        return self._record(self.pair.model, random.split(self.rng_key)[0], params, values)

    def started(self, start: Callable[[Any], Any], params: Params) -> Sites:
        """The model with its latent sites where a function of their messages puts them."""
        placed = partial(substitute, substitute_fn=start)
        return self._record(self.pair.model, self.rng_key, params, None, None, placed)

    def predictive(
        self, params: Params, values: Sites, look: Callable[[Any], None] | None = None
    ) -> Sites:
        """The model at the guide's values, its observed sites drawn anew; ``look`` sees them."""
        key = random.fold_in(self.rng_key, 1)
        outer = () if look is None else (partial(Watch, look=look),)
        return self._record(self.pair.model, key, params, values, None, uncondition, *outer)

    def _record(
        self,
        fn: Program,
        key: jax.Array,
        params: Params,
        values: Sites | None,
        choose: Choose | None = None,
        *outer: Any,
    ) -> Sites:
        # The seed is innermost: a replayed value leaves the keys of all other sites alone, and a
        # plate uses up a key as it does in the host's own objectives.
        fn = seed(fn, key)
        if self.plate_key is not None:
            fn = SharedSubsample(fn, self.plate_key)
        fn = replay(fn, values or {})
        if choose is not None:
            fn = Chosen(fn, choose)
        for handler in outer:
            fn = handler(fn)
        recorded = trace(substitute(fn, data=params))
        return recorded.get_trace(*self.pair.args, **self.pair.kwargs)


def is_scored(msg: Any) -> bool:
    """Whether a message is that of a latent site without a reparameterised sampler."""
    return msg["type"] == "sample" and not msg["is_observed"] and not msg["fn"].has_rsample


def hard(noise: dict[str, jax.Array], *, whole: bool = False) -> Choose:
    """Draws what can be relaxed from uniform numbers, kept in ``noise``, and the rest as ever.

    Bits are floats as relaxed values are, or ``whole`` numbers as the host's own sampler has them.
    """

    def choose(msg: Any) -> jax.Array:
        kind = _relaxation.kind(msg["fn"])
        if kind is None:
            return lax.stop_gradient(msg["fn"](**msg["kwargs"]))
        logits = site_logits(msg)
        u = _relaxation.uniform(msg["kwargs"]["rng_key"], logits.shape, logits.dtype)
        noise[msg["name"]] = u
        value = _relaxation.harden(kind, _relaxation.noisy(kind, logits, u))
        return as_whole(value) if whole and kind == "bernoulli" else value

    return choose


def as_whole(bits: jax.Array) -> jax.Array:
    """Bits of the host's type, which may index an array."""
    return bits.astype(jnp.result_type(int))


def site_logits(msg: Any) -> jax.Array:
    """The logits of a Bernoulli or one-hot site, of the shape of its value."""
    logits = _relaxation.logits(msg["fn"])
    return jnp.broadcast_to(logits, msg["kwargs"]["sample_shape"] + logits.shape)


def sample_sites(recorded: Sites) -> Sites:
    """The sample sites of a run, observed ones and factors included."""
    return {name: site for name, site in recorded.items() if site["type"] == "sample"}


def latent_sites(recorded: Sites) -> Sites:
    """The latent sites of a run."""
    return {name: site for name, site in sample_sites(recorded).items() if not site["is_observed"]}


def mutable_state(recorded: Sites) -> Params:
    """The mutable state after a run."""
    return {name: site["value"] for name, site in recorded.items() if site["type"] == "mutable"}


def merged_state(state: Params) -> Params:
    """The state after a step, from that of all particles in front: means, or the first one's."""
    return jax.tree.map(
        lambda x: jnp.mean(x, axis=0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0], state
    )


def log_probs(recorded: Sites, *, soft: bool = False) -> dict[str, jax.Array]:
    """The log-densities of all sample sites, unscaled.

    Args:
        recorded: Sites of a run.
        soft: Those of discrete latent sites as functions of a value off the corners.
    """
    return {name: _log_prob(site, soft) for name, site in sample_sites(recorded).items()}


def _log_prob(site: Any, soft: bool) -> jax.Array:
    if soft and not site["is_observed"] and _relaxation.kind(site["fn"]) is not None:
        return _relaxation.soft_log_prob(site["fn"], site["value"])
    if site["intermediates"]:
        return site["fn"].log_prob(site["value"], site["intermediates"])
    return site["fn"].log_prob(site["value"])


def own_log_prob(site: Any) -> jax.Array:
    """The log-density that a scored site was drawn from: without masks, unscaled."""
    bare = _checks.unmasked(site["fn"])
    if _relaxation.kind(bare) is not None:
        return _relaxation.soft_log_prob(bare, site["value"])
    return bare.log_prob(site["value"])


def scaled(recorded: Sites, densities: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Log-densities times the scales of their sites."""
    scales = {name: recorded[name]["scale"] for name in densities}
    return {k: x if scales[k] is None else scales[k] * x for k, x in densities.items()}
