"""Draws of a trained guide as an ArviZ object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from tqdm.auto import tqdm

from numpyro_vae_ext import _draws, _psis, _trace
from numpyro_vae_ext._checks import positive_int
from numpyro_vae_ext.diagnostics._groups import (
    Values,
    check_joint,
    import_arviz,
    new_call,
    resampled,
    to_groups,
    warn_of_tails,
)


def to_arviz(
    rng_key: jax.Array,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: dict[str, Any],
    num_samples: int = 1000,
    num_chains: int = 4,
    num_importance: int = 1,
    posterior_predictive: bool = True,
    log_likelihood: bool = False,
    predictions: tuple | Mapping[str, Any] | None = None,
    chunk_size: int | None = None,
    progress_bar: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    pred_coords: Mapping[str, Sequence[Any]] | None = None,
    pred_dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draw from a trained guide and return an ArviZ object.

    The draws are independent, so that chains differ by their number alone; R-hat and effective
    sample sizes say nothing about them, whereas k-hat of ``log_weight`` does, see
    :func:`importance`.

    Args:
        rng_key: Random key.
        model: Program of NumPyro primitives.
        guide: Program of NumPyro primitives.
        args: Positional arguments of both.
        params: Constrained parameters, as ``svi.get_params`` gives them; mutable state may be
            among them.
        num_samples: Draws per chain.
        num_chains: Number of chains.
        num_importance: Draws of the guide for each draw that is exported. From 2 on, that many
            times as many are made and resampled by their smoothed weights, so that what is
            exported stands for the posterior as far as k-hat is good; some draws appear more than
            once, and there is no ``log_weight``. For guides with one joint weight.
        posterior_predictive: Draw new data at every draw as well.
        log_likelihood: Keep the log-density of every observed site and row at every draw, which
            ``az.loo`` needs.
        predictions: Arguments of a second call: a tuple, ``(x_new,)``, or a dict by name. The guide
            is run on them with the values that each draw has outside of the data's plates, and
            draws the latents of the new rows; the model draws the data, and the latents that the
            guide has not.
        chunk_size: Draws to run at a time, which bounds the memory; 100 by default.
        progress_bar: Show a bar over chunks on standard error.
        coords: Coordinate values by dimension name, as ArviZ takes them.
        dims: Dimension names by variable, as ArviZ takes them; plates and events are named
            after the plate and the site otherwise.
        pred_coords: The same as ``coords`` for the predictions, which do not share them.
        pred_dims: The same as ``dims`` for the predictions.
        kwargs: Keyword arguments of both.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups ``posterior``
        (latent, deterministic and reparameterised sites; auxiliary sites left out),
        ``posterior_predictive``, ``log_likelihood`` of shape ``(num_chains, num_samples,
        *plates)``, ``predictions`` (observed and deterministic sites at the new arguments),
        ``observed_data`` and ``sample_stats``, the last with ``log_weight`` of shape
        ``(num_chains, num_samples, *common_plates)``.

    Warns:
        UserWarning: With ``log_likelihood`` or ``num_importance``, if k-hat of the weights forbids
            to take the draws for the posterior's.

    Raises:
        ImportError: If ArviZ is not installed.
        TypeError: If ``predictions`` is neither a tuple nor a dict.
        ValueError: If a number is below 1, if the pair's weights would not be those of a bound,
            if the guide draws a site of the predictions for other rows, or if there is a weight
            per row under ``num_importance``; the message names the site or plate.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flax import nnx
        >>> from numpyro.contrib.module import nnx_module
        >>> from numpyro_vae_ext.guides import MeanField
        >>> posterior = MeanField(latent_dim=2, context_dim=2, rngs=nnx.Rngs(0))
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     post = nnx_module("posterior", posterior)
        ...     with numpyro.plate("data", len(x)):
        ...         post("z", x)
        >>> key, x = jax.random.key(0), jnp.zeros((8, 2))
        >>> result = to_arviz(key, model, guide, x, params={}, num_samples=50, num_chains=2)
        >>> result["sample_stats"]["log_weight"].shape
        (2, 50, 8)
    """
    import_arviz()
    positive_int("num_samples", num_samples)
    positive_int("num_chains", num_chains)
    total = num_samples * num_chains * positive_int("num_importance", num_importance)
    size = min(total, 100 if chunk_size is None else positive_int("chunk_size", chunk_size))
    pair = _trace.Pair(model, guide, args, kwargs)
    new = None if predictions is None else _trace.Pair(model, guide, *new_call(predictions))
    common = tuple(plate.name for plate in _trace.layout(rng_key, params, pair).plates)
    if num_importance > 1:
        check_joint(common)
    plate_key = _trace.shared_key(rng_key)

    def many(pair: _trace.Pair, params: Any, keys: jax.Array) -> _draws.Draw:
        def one(key: jax.Array) -> _draws.Draw:
            return _draws.draw(
                key,
                plate_key,
                params,
                pair,
                predictive=posterior_predictive,
                likelihood=log_likelihood,
            )

        return jax.vmap(one)(keys)

    def ahead(pair: _trace.Pair, params: Any, keys: jax.Array, values: Any) -> _draws.Variables:
        def one(key: jax.Array, values: Any) -> _draws.Variables:
            return _draws.predict(key, plate_key, params, pair, values, data)

        return jax.vmap(one)(keys, values)

    step = _trace.compiled(many, pair)
    predict = None if new is None else _trace.compiled(ahead, new)
    starts = range(0, total, size)
    # The last chunk is as long as the others, so that there is one program; its rest is cut off.
    keys = random.split(rng_key, len(starts) * size)
    draws: list[_draws.Draw] = []
    predicted: list[_draws.Variables] = []
    for start in tqdm(starts, desc="draws", disable=not progress_bar or len(starts) < 2):
        chunk = keys[start : start + size]
        draw = step(params, chunk)
        if predict is not None:
            data = tuple(draw.observed)
            predicted.append(jax.device_get(predict(params, chunk, draw.shared)))
        # One copy of what is the same at every draw; the shared values have done their work.
        observed = {k: replace(v, value=v.value[:1]) for k, v in draw.observed.items()}
        draws.append(jax.device_get(replace(draw, observed=observed, shared={})))

    weights = np.concatenate([draw.log_weights.value for draw in draws])[:total]
    kept: Any = slice(total)
    if log_likelihood or num_importance > 1:
        smoothed, khat = _psis.psis(weights)
        warn_of_tails(khat, _psis.threshold(total))
        if num_importance > 1:
            seed = int(random.randint(random.fold_in(plate_key, 1), (), 0, 2**31 - 1, jnp.int32))
            kept = resampled(smoothed, num_samples * num_chains, seed)

    def joined(parts: list[_draws.Variables]) -> dict[str, Values]:
        return {
            name: Values(np.concatenate([part[name].value for part in parts])[kept], x.plates)
            for name, x in parts[0].items()
        }

    groups: dict[str, dict[str, Values]] = {
        "posterior": {
            **joined([draw.latent for draw in draws]),
            **joined([draw.deterministic for draw in draws]),
        },
    }
    if num_importance == 1:
        groups["sample_stats"] = {"log_weight": Values(weights, common)}
    if posterior_predictive:
        groups["posterior_predictive"] = joined([draw.predictive for draw in draws])
    if log_likelihood:
        groups["log_likelihood"] = joined([draw.log_likelihood for draw in draws])
    if predicted:
        groups["predictions"] = joined(predicted)
    groups["observed_data"] = {
        name: Values(np.asarray(x.value[0]), x.plates) for name, x in draws[0].observed.items()
    }
    return to_groups(
        groups,
        (num_chains, num_samples),
        coords=coords,
        dims=dims,
        pred_coords=pred_coords,
        pred_dims=pred_dims,
    )
