"""Draws of a trained guide as an ArviZ object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import random
from tqdm.auto import tqdm

from numpyro_vae_ext import _trace
from numpyro_vae_ext._checks import positive_int


def to_arviz(
    rng_key: jax.Array,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: dict[str, Any],
    num_samples: int = 1000,
    num_chains: int = 4,
    posterior_predictive: bool = True,
    chunk_size: int | None = None,
    progress_bar: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draw from a trained guide and return an ArviZ object.

    The draws are independent, so that chains differ by their number alone; R-hat and effective
    sample sizes say nothing about them, whereas k-hat of ``log_weight`` does.

    Args:
        rng_key: Random key.
        model: Program of NumPyro primitives.
        guide: Program of NumPyro primitives.
        args: Positional arguments of both.
        params: Constrained parameters, as ``svi.get_params`` gives them; mutable state may be
            among them.
        num_samples: Draws per chain.
        num_chains: Number of chains.
        posterior_predictive: Draw new data at every draw as well.
        chunk_size: Draws to run at a time, which bounds the memory; 100 by default.
        progress_bar: Show a bar over chunks on standard error.
        coords: Coordinate values by dimension name, as ArviZ takes them.
        dims: Dimension names by variable, as ArviZ takes them; plates and events are named
            after the plate and the site otherwise.
        kwargs: Keyword arguments of both.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups ``posterior``
        (auxiliary sites left out), ``posterior_predictive``, ``observed_data`` and
        ``sample_stats``, the last with ``log_weight`` of shape
        ``(num_chains, num_samples, *common_plates)``.

    Raises:
        ImportError: If ArviZ is not installed.
        ValueError: If a number is below 1, or if the pair's weights would not be those of a
            bound; the message names the site.

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
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "Expected ArviZ to be installed; got an import error. Install vae-ext[arviz]."
        ) from error
    positive_int("num_samples", num_samples)
    positive_int("num_chains", num_chains)
    total = num_samples * num_chains
    size = min(total, 100 if chunk_size is None else positive_int("chunk_size", chunk_size))
    pair = _trace.Pair(model, guide, args, kwargs)
    _trace.layout(rng_key, params, pair)
    plate_key = _trace.shared_key(rng_key)

    def many(pair: _trace.Pair, params: Any, keys: jax.Array) -> _trace.Draw:
        def one(key: jax.Array) -> _trace.Draw:
            return _trace.draw(key, plate_key, params, pair, predictive=posterior_predictive)

        return jax.vmap(one)(keys)

    step = _trace.compiled(many, pair)
    starts = range(0, total, size)
    # The last chunk is as long as the others, so that there is one program; its rest is cut off.
    keys = random.split(rng_key, len(starts) * size)
    draws: list[_trace.Draw] = []
    for start in tqdm(starts, desc="draws", disable=not progress_bar or len(starts) < 2):
        draws.append(jax.device_get(step(params, keys[start : start + size])))

    plates = {name: [plate.name for plate in frames] for name, frames in draws[0].plates}
    names: dict[str, list[str]] = {}

    def chains(parts: Sequence[Any]) -> np.ndarray:
        values = np.concatenate(parts)[:total]
        return values.reshape((num_chains, num_samples, *values.shape[1:]))

    def label(name: str, ndim: int) -> None:
        events = (f"{name}_dim_{i}" for i in range(ndim - len(plates[name])))
        names[name] = [*plates[name], *events]

    groups: dict[str, Any] = {"posterior": {}, "sample_stats": {}}
    for name, values in draws[0].latent.items():
        label(name, values.ndim - 1)
        groups["posterior"][name] = chains([draw.latent[name] for draw in draws])
    groups["sample_stats"]["log_weight"] = chains([draw.log_weights.value for draw in draws])
    names["log_weight"] = [plate.name for plate in draws[0].log_weights.plates]
    if posterior_predictive:
        groups["posterior_predictive"] = {
            name: chains([draw.predictive[name] for draw in draws]) for name in draws[0].predictive
        }
    groups["observed_data"] = {}
    for name, values in draws[0].observed.items():
        label(name, values.ndim - 1)
        groups["observed_data"][name] = np.asarray(values[0])
    if dims is not None:
        names.update({name: list(value) for name, value in dims.items()})
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.from_dict(**groups, dims=names, coords=coords)
    return arviz.from_dict(groups, dims=names, coords=coords)
