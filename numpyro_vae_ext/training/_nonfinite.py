"""Names the site that a loss or a gradient is not finite for, by running the step once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_vae_ext import _checks, _record, _trace

PACKAGE = __name__.split(".")[0]


class Culprit:
    """Looks at the sites of a step, with its own random numbers.

    In this order: observed data; sites of the guide as the program has them, first their values and
    then their log-densities; those of the model; at last gradients, in the same order.
    """

    def __init__(self, svi: SVI) -> None:
        self.svi = svi
        classes = [kind.__module__.split(".")[0] for kind in type(svi.loss).__mro__]
        # Ours draw the subsample of a plate from a key of its own.
        self._shares_plates = PACKAGE in classes
        self._faults = jax.jit(self._find)
        self._slopes: dict[tuple[bool, str], Callable[..., Any]] = {}

    def name(
        self, state: SVIState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str | None, str]:
        """The first site, and one of "data", "value", "log_prob" and "gradient".

        None and "loss" if there is no such site.
        """
        found = jax.device_get(self._faults(state, args, kwargs))
        for (_, site, reason, _), bad in sorted(found.items()):
            if reason and bad:
                return site, reason
        for _, site, reason, of_guide in sorted(found):
            if not reason:
                slope = self._slope(of_guide, site)
                if slope(state, args, kwargs):
                    return site, "gradient"
        return None, "loss"

    def _keys(self, state: SVIState) -> jax.Array:
        key = random.split(state.rng_key)[1]
        loss = self.svi.loss
        count = getattr(loss, "num_particles", 1) * getattr(loss, "num_outer", 1)
        return key[None] if count == 1 else random.split(key, count)

    def _params(self, unconstrained: Any, state: SVIState) -> dict[str, Any]:
        return {**self.svi.constrain_fn(unconstrained), **(state.mutable_state or {})}

    def _sites(
        self, key: jax.Array, whole: jax.Array, params: Any, args: Any, kwargs: Any
    ) -> tuple[Any, Any]:
        pair = _trace.Pair(
            self.svi.model, self.svi.guide, args, {**kwargs, **self.svi.static_kwargs}
        )
        plate_key = _trace.shared_key(whole) if self._shares_plates else None
        return _trace.step_sites(key, plate_key, params, pair)[:2]

    def _find(self, state: SVIState, args: Any, kwargs: Any) -> dict[Any, jax.Array]:
        """Whether anything is wrong, by order, site, reason and program.

        Entries without a reason are the sites whose gradient is to be looked at.
        """
        whole = random.split(state.rng_key)[1]
        params = self._params(self.svi.optim.get_params(state.optim_state), state)

        def one(key: jax.Array) -> dict[Any, jax.Array]:
            drawn, modelled = self._sites(key, whole, params, args, kwargs)
            rows: list[tuple[str, str, bool, Any]] = []
            for name, site in modelled.items():
                if _checks.is_data(site):
                    rows.append((name, "data", False, _unmasked(site["fn"], site["value"])))
            for of_guide, sites in ((True, drawn), (False, modelled)):
                densities = _record.log_probs(sites)
                for name, site in sites.items():
                    if not site["is_observed"]:
                        rows.append((name, "value", of_guide, site["value"]))
                    rows.append((name, "log_prob", of_guide, densities[name]))
                    rows.append((name, "", of_guide, jnp.zeros(())))
            return {
                (place, name, reason, of_guide): ~jnp.isfinite(value).all()
                for place, (name, reason, of_guide, value) in enumerate(rows)
            }

        found = lax.map(one, self._keys(state))
        return jax.tree.map(jnp.any, found)

    def _slope(self, of_guide: bool, name: str) -> Callable[..., Any]:
        """Whether the gradient of one site's log-density is not finite."""
        if (of_guide, name) not in self._slopes:

            def slope(state: SVIState, args: Any, kwargs: Any) -> jax.Array:
                whole = random.split(state.rng_key)[1]

                def total(unconstrained: Any, key: jax.Array) -> jax.Array:
                    params = self._params(unconstrained, state)
                    drawn, modelled = self._sites(key, whole, params, args, kwargs)
                    sites = drawn if of_guide else modelled
                    return jnp.sum(_record.log_probs({name: sites[name]})[name])

                def one(key: jax.Array) -> jax.Array:
                    params = self.svi.optim.get_params(state.optim_state)
                    grads = jax.tree.leaves(jax.grad(total)(params, key))
                    return jnp.array([~jnp.isfinite(x).all() for x in grads], bool).any()

                return lax.map(one, self._keys(state)).any()

            self._slopes[of_guide, name] = jax.jit(slope)
        return self._slopes[of_guide, name]


def _unmasked(fn: Any, value: Any) -> jax.Array:
    """The value with zeros where it is masked out, and may be anything."""
    value = jnp.asarray(value)
    while isinstance(fn, (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            mask = jnp.asarray(fn._mask)
            mask = mask.reshape(mask.shape + (1,) * fn.event_dim)
            value = jnp.where(mask, value, jnp.zeros_like(value))
        fn = fn.base_dist
    return value
