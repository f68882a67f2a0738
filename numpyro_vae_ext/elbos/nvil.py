"""The score function with baselines: neural variational inference and learning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro.primitives import mutable

from numpyro_vae_ext import _record, _trace
from numpyro_vae_ext._checks import unwrapped, widths
from numpyro_vae_ext.elbos._discrete import DiscreteELBO, Scored, declared, dense, play

_BASELINES = ("running", "learned", "leave_one_out")


class TraceNVIL_ELBO(DiscreteELBO):
    r"""The evidence lower bound of discrete latents, with the score function and baselines.

    For any discrete site, an integer ``Categorical`` or a ``Poisson`` among them, with the cost
    :math:`f` of each of its rows,

    .. math:: \hat g = \bigl(f(b) - C - m\bigr) \nabla \log q(b),

    with any of three baselines:

    - ``"learned"``: :math:`C` is a network of what the site sees, trained on the mean of
      :math:`(f - C - m)^2` with the optimiser of the run. Its input is the array at
      ``infer={"baseline_input": ...}`` of the guide's site, ``(*batch, width)``, or the site's
      logits, or a constant where it has none. It gets no other gradient, nor do others get its.
    - ``"running"``: :math:`m` is a running mean of :math:`f - C`, from before the step;
    - ``"leave_one_out"``: the mean of what is left at the other particles is subtracted as well.

    Both learned and running baselines are in units of one row: the site's scale is taken out. The
    running state is mutable state of the run, ``"<site>_baseline"``. Without baselines this is
    REINFORCE, Rao-Blackwellised over the plates. Continuous latent sites keep their
    reparameterised gradient.

    Args:
        num_particles: number of particles `K`, over which the estimate is averaged.
        baselines: any of ``"running"``, ``"learned"`` and ``"leave_one_out"``.
        hidden_dims: widths of the network's hidden layers (tanh); ``()`` for a linear baseline.
        decay: how much of the running averages a step keeps.
        normalize_variance: divide by the running standard deviation where it is above 1. The
            gradient is then that of a rescaled bound.
        vectorize_particles: run the particles side by side, or one at a time.

    Raises:
        ValueError: if an argument is out of range; at a step, if a latent site is in the model or
            the guide alone, or discrete in one of them alone, or if the guide
            is not that of :meth:`tunable` where a baseline has parameters or state.
        TypeError: if an argument, or the data at a continuous site, has the wrong type.

    References:
        Mnih and Gregor (2014), arXiv 1402.0030, eq. 5-9. Ranganath, Gerrish and Blei (2014), arXiv
        1401.0118. Kool, van Hoof and Welling (2019), Buy 4 REINFORCE Samples (leave-one-out).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI
        >>> def model(x):
        ...     bias = numpyro.param("bias", jnp.zeros(2))
        ...     with numpyro.plate("data", len(x)):
        ...         b = numpyro.sample("b", dist.Bernoulli(logits=0.0).expand([2]).to_event(1))
        ...         numpyro.sample("x", dist.Normal(b + bias, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     weight = numpyro.param("weight", jnp.ones(2))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("b", dist.Bernoulli(logits=weight * x).to_event(1))
        >>> elbo = TraceNVIL_ELBO(hidden_dims=(8,))
        >>> svi = SVI(model, elbo.tunable(guide), optax.adam(1e-2), elbo)
        >>> state = svi.init(jax.random.key(0), jnp.ones((4, 2)))
        >>> state, loss = jax.jit(svi.update)(state, jnp.ones((4, 2)))
        >>> sorted(svi.get_params(state))
        ['b_baseline_network$params', 'bias', 'weight']
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        baselines: Iterable[str] = ("running", "learned"),
        hidden_dims: Iterable[int] = (100,),
        decay: float = 0.9,
        normalize_variance: bool = False,
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.baselines = _checked_baselines(baselines)
        if "leave_one_out" in self.baselines and num_particles < 2:
            raise ValueError("Expected num_particles >= 2 for a leave-one-out baseline; got 1.")
        if not 0 <= decay < 1:
            raise ValueError(f"Expected decay in [0, 1); got {decay}.")
        if not isinstance(normalize_variance, bool):
            raise TypeError(
                "Expected normalize_variance to be a bool; got "
                f"{type(normalize_variance).__name__}."
            )
        self.hidden_dims = widths("hidden_dims", hidden_dims)
        self.decay = decay
        self.normalize_variance = normalize_variance

    @property
    def _has_state(self) -> bool:
        return "running" in self.baselines or self.normalize_variance

    @property
    def _is_tuned(self) -> bool:
        return "learned" in self.baselines or self._has_state

    def _declare(self, site: Any, modules: dict[str, Any]) -> dict[str, Any]:
        tuning = {}
        if "learned" in self.baselines:
            width = _width(site)
            tuning["network"] = declared(
                f"{site['name']}_baseline_network",
                modules,
                lambda rngs: dense(width, self.hidden_dims, rngs),
            )
        if self._has_state:
            start = {name: jnp.zeros(()) for name in ("mean", "variance", "count")}
            tuning["running"] = mutable(f"{site['name']}_baseline", start)
        return tuning

    def _particle(
        self,
        rng_key: jax.Array,
        plate_key: jax.Array,
        params: dict[str, Any],
        pair: _trace.Pair,
    ) -> dict[str, Any]:
        found = self._checked(play(rng_key, plate_key, params, pair, _record.hard({}, whole=True)))
        costs = lax.stop_gradient(found.costs())
        total = found.total()
        sites = {site.name: self._rows(site, costs[site.name]) for site in found.sites}
        return {"value": total, "surrogate": total, "state": found.state, "sites": sites}

    def _rows(self, site: Scored, cost: jax.Array) -> dict[str, Any]:
        """The signal less the network's output, and what is needed to make use of it."""
        log_q = _record.own_log_prob(site.site)
        scale = lax.stop_gradient(jnp.broadcast_to(site.scale, log_q.shape))
        rows = {"log_q": log_q, "scale": scale, "signal": cost / scale}
        if self._is_tuned:
            tuning = self._tuning(site, ", or use baselines without state")
            rows["running"] = tuning.get("running", {})
            if "network" in tuning:
                x = _input(site)
                learned = jnp.reshape(tuning["network"](x), x.shape[:-1])
                rows["signal"] = rows["signal"] - learned.astype(cost.dtype)
        return rows

    def _combined(self, particles: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        loss, state = super()._combined(particles)
        for name, rows in particles["sites"].items():
            signal, weight = rows["signal"], 1.0
            if self._has_state:
                running = {key: x[0] for key, x in rows["running"].items()}
                mean, weight, new = self._tracked(running, lax.stop_gradient(signal))
                state[f"{name}_baseline"] = new
                signal = signal - mean
            if "learned" in self.baselines:
                loss = loss + jnp.mean(signal**2)
            signal = lax.stop_gradient(signal) * weight
            if "leave_one_out" in self.baselines:
                others = jnp.sum(signal, axis=0) - signal
                signal = signal - others / (self.num_particles - 1)
            score = rows["log_q"] * lax.stop_gradient(rows["scale"] * signal)
            loss = loss - jnp.sum(score) / self.num_particles
        return loss, state

    def _tracked(
        self, running: dict[str, jax.Array], signal: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """What to subtract, what to multiply by, both from before this step; the new state."""
        count = running["count"]
        # Averages that start at 0 are too small by this; without a step there is nothing to say.
        known = 1 - self.decay**count
        fill = jnp.where(known > 0, known, 1.0)
        mean = jnp.zeros((), signal.dtype)
        if "running" in self.baselines:
            mean = jnp.where(count > 0, running["mean"] / fill, 0.0).astype(signal.dtype)
        weight: Any = 1.0
        if self.normalize_variance:
            variance = jnp.where(count > 0, running["variance"] / fill, 1.0)
            weight = 1 / jnp.maximum(1.0, jnp.sqrt(variance)).astype(signal.dtype)
        seen = {"mean": jnp.mean(signal), "variance": jnp.mean((signal - mean) ** 2)}
        new = {key: self.decay * running[key] + (1 - self.decay) * x for key, x in seen.items()}
        new["count"] = count + 1
        return mean, weight, {key: x.astype(running[key].dtype) for key, x in new.items()}


def _checked_baselines(baselines: Iterable[str]) -> tuple[str, ...]:
    names = (baselines,) if isinstance(baselines, str) else tuple(baselines)
    wrong = [name for name in names if name not in _BASELINES]
    if wrong or len(set(names)) < len(names) or isinstance(baselines, str):
        raise ValueError(
            "Expected baselines among 'running', 'learned', 'leave_one_out'; got "
            f"{(wrong[0] if wrong else baselines)!r}."
        )
    return names


def _given(site: Any) -> Any:
    return site["infer"].get("baseline_input")


def _width(site: Any) -> int:
    if _given(site) is not None:
        return jnp.shape(_given(site))[-1]
    return jax.eval_shape(lambda: _known(site["fn"])).shape[-1]


def _input(site: Scored) -> jax.Array:
    """What the network sees of every row, without a derivative."""
    given = _given(site.site)
    if given is not None:
        return lax.stop_gradient(jnp.asarray(given))
    return lax.stop_gradient(_known(site.site["fn"]))


def _known(fn: Any) -> jax.Array:
    """The logits of every row, flat; a one where a distribution has none."""
    base = unwrapped(fn)
    if not hasattr(base, "logits"):
        return jnp.ones((*fn.batch_shape, 1))
    # One number of an event, or one of every category.
    logits = jnp.asarray(base.logits)
    inner = logits.shape[len(base.batch_shape) :]
    if inner:
        logits = jax.nn.log_softmax(logits)
    shape = fn.shape()[: len(fn.shape()) - base.event_dim]
    return jnp.reshape(jnp.broadcast_to(logits, (*shape, *inner)), (*fn.batch_shape, -1))
