"""What the guides made from a model can be asked: draws, medians and quantiles."""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from numpyro import handlers
from numpyro.infer.util import constrain_fn

from numpyro_vae_ext._checks import positive_int
from numpyro_vae_ext.guides._auto import FamilyGuide, Latents, Values
from numpyro_vae_ext.guides._importance import picked, pool


class QueriedGuide(FamilyGuide):
    """Base of the guides made from a model, with what their users ask them."""

    _reads_arguments = False  # a draw depends on the arguments of the model

    def sample_posterior(
        self,
        rng_key: jax.Array,
        params: dict[str, Any],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        num_importance: int | None = None,
        **kwargs: Any,
    ) -> Values:
        """Draw from the guide, or by its importance weights from nearer to the posterior.

        Args:
            rng_key: Random key.
            params: Constrained parameters, as ``svi.get_params`` gives them.
            args: Positional arguments of the model; :class:`AutoPosterior` needs none once it
                has been called: deterministic sites are then those of its first call.
            sample_shape: Leading shape of the draws.
            num_importance: If given, each draw is picked out of that many fresh ones of the
                guide, with a probability in proportion to its importance weight
                ``p(x, z) / q(z)``, Pareto-smoothed over the whole pool: every row for itself
                where rows have weights of their own. Needs the arguments with the data; all of
                the pool is in memory.
            kwargs: Keyword arguments of the model.

        Returns:
            Constrained draws ``(*sample_shape, *site)`` by site, deterministic sites included; of
            a subsampled plate the rows of one subsample.

        Raises:
            ValueError: If there are no arguments where the answer depends on them; under
                ``num_importance``, if it is below 1, if the guide is a part of a list, if a
                weight is NaN or infinite, if the model's weights are not those of a bound, or if
                all of the draws to pick from have weight 0.
        """
        args, kwargs = self._given(args, kwargs)
        if num_importance is not None:
            count = math.prod(sample_shape) * positive_int("num_importance", num_importance)
            pool_key, key = random.split(rng_key)
            drawn = picked(pool(self, pool_key, params, count, args, kwargs), key, num_importance)
            return self._constrained(params, drawn, sample_shape, args, kwargs)
        drawn = self._drawn(rng_key, params, math.prod(sample_shape), args, kwargs)
        return self._constrained(params, drawn, sample_shape, args, kwargs)

    def median(
        self,
        params: dict[str, Any],
        *args: Any,
        rng_key: jax.Array | None = None,
        num_samples: int = 10_000,
        **kwargs: Any,
    ) -> Values:
        """Median of every unconstrained number, mapped to the support.

        Exact where the guide is a Normal in unconstrained space, and by Monte Carlo elsewhere.

        Args:
            params: Constrained parameters, as ``svi.get_params`` gives them.
            args: Positional arguments of the model, as for :meth:`sample_posterior`.
            rng_key: Random key, ``jax.random.key(0)`` by default.
            num_samples: Number of draws.
            kwargs: Keyword arguments of the model.

        Returns:
            Constrained values of the shape of the site, by site: a simplex is one. The
            deterministic sites at these.

        Raises:
            ValueError: If ``num_samples`` is below 1.
        """
        positive_int("num_samples", num_samples)
        args, kwargs = self._given(args, kwargs)
        drawn = self._exact_median(params)
        if drawn is None:
            rng_key = random.key(0) if rng_key is None else rng_key
            drawn = self._drawn(rng_key, params, num_samples, args, kwargs)
            free = {name: jnp.median(x, axis=0)[None] for name, x in drawn.free.items()}
            drawn = drawn._replace(free=free)
        return self._constrained(params, drawn, (), args, kwargs)

    def quantiles(
        self,
        params: dict[str, Any],
        quantiles: Any,
        *args: Any,
        rng_key: jax.Array | None = None,
        num_samples: int = 10_000,
        **kwargs: Any,
    ) -> Values:
        """Quantiles of the marginals of every latent site.

        Exact where the guide is a Normal in unconstrained space and the support is one of
        numbers, each for itself; by Monte Carlo elsewhere.

        Args:
            params: Constrained parameters, as ``svi.get_params`` gives them.
            quantiles: Numbers between 0 and 1.
            args: Positional arguments of the model, as for :meth:`sample_posterior`.
            rng_key: Random key, ``jax.random.key(0)`` by default.
            num_samples: Number of draws, all of them in memory at once.
            kwargs: Keyword arguments of the model.

        Returns:
            Quantiles of the constrained values, ``(*quantiles.shape, *site)``, by site, and of
            the deterministic sites.

        Raises:
            ValueError: If ``num_samples`` is below 1.
        """
        positive_int("num_samples", num_samples)
        args, kwargs = self._given(args, kwargs)
        levels = jnp.asarray(quantiles)
        exact = self._exact_quantiles(params, levels)
        if exact and not self._asks_model and self._names == set(exact):
            return exact
        rng_key = random.key(0) if rng_key is None else rng_key
        drawn = self._drawn(rng_key, params, num_samples, args, kwargs)
        draws = self._constrained(params, drawn, (num_samples,), args, kwargs)
        found = {
            name: jnp.quantile(x, levels.ravel(), axis=0).reshape(*levels.shape, *x.shape[1:])
            for name, x in draws.items()
        }
        return {**found, **exact}

    def _exact_median(self, params: dict[str, Any]) -> Latents | None:
        """The medians of the unconstrained numbers, a dimension in front, if they are known."""
        return None

    def _exact_quantiles(self, params: dict[str, Any], levels: jax.Array) -> Values:
        """Quantiles of the sites of which they are known."""
        return {}

    def _given(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a question; where there are none, those of the first call."""
        if args or kwargs or not self._has_arguments:
            return args, kwargs
        if self._reads_arguments:
            raise ValueError(
                f"Expected the arguments of the model, which the encoder of {type(self).__name__} "
                "reads; got none. Pass the rows to draw for."
            )
        if self._first is not None:
            return self._first
        if self._asks_model or self.create_plates is not None:
            raise ValueError(
                "Expected the arguments of the model, on which deterministic sites, supports or "
                "plates may depend; got none, and those of the first call are not known: it was "
                "under jit, or in another process. Pass them."
            )
        return args, kwargs

    def _drawn(self, rng_key: Any, params: Any, count: int, args: Any, kwargs: Any) -> Latents:
        """Draws at the rows of one subsample."""

        def draw(key: jax.Array, rows: Values) -> Latents:
            with handlers.block(), handlers.substitute(data={**params, **rows}):
                return handlers.seed(self._latents, key)(args, kwargs)

        first_key, key = random.split(rng_key)
        # The parts of a list get one key: one subsample, and draws of their own.
        key = random.fold_in(key, zlib.crc32(self.prefix.encode()))
        first = draw(first_key, {})
        draws = jax.vmap(lambda key: draw(key, first.rows).free)(random.split(key, count))
        return first._replace(free=draws)

    def _constrained(self, params: Any, drawn: Latents, shape: Any, args: Any, kwargs: Any) -> Any:
        """The values, and deterministic sites, of unconstrained ones with a dimension in front."""

        def one(free: Values) -> Values:
            return {site.name: site.transform(free[site.name]) for site in drawn.sites}

        def replayed(free: Values) -> Values:
            ask = partial(constrain_fn, return_deterministic=True)
            with handlers.block(), handlers.substitute(data=params):
                return self._asked(ask, drawn.rows, free, args, kwargs)

        # The compiler leaves out what the model does with the values.
        constrain = jax.jit(jax.vmap(replayed)) if self._asks_model else jax.vmap(one)
        values = constrain(drawn.free)
        return {name: x.reshape(*shape, *x.shape[1:]) for name, x in values.items()}
