"""Active units: how many latent dimensions carry information on the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_vae_ext import _draws, _trace
from numpyro_vae_ext._checks import positive_int


@dataclass(frozen=True)
class ActiveUnits:
    """Result of :func:`active_units`.

    Attributes:
        count: Number of active units, over all latent sites.
        active: By site, a boolean array ``(D,)``.
        variance: By site, the variance over the data of the posterior mean, ``(D,)``.
    """

    count: int
    active: dict[str, jax.Array]
    variance: dict[str, jax.Array]


def active_units(
    rng_key: jax.Array,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: dict[str, Any],
    num_samples: int = 100,
    threshold: float = 0.01,
    **kwargs: Any,
) -> ActiveUnits:
    r"""Count the latent dimensions whose posterior mean varies over the data.

    Dimension :math:`d` is active if :math:`A_d = \mathrm{Var}_x(E_{q(z \mid x)}[z_d])` exceeds
    ``threshold``. The mean is estimated from draws, whose noise would add
    :math:`E_x \mathrm{Var}(z_d \mid x) / S` to the variance; here :math:`A_d` is the covariance
    over the data of the means of two independent halves of the draws, which has no such bias.

    Args:
        rng_key: Random key.
        model: Program of NumPyro primitives.
        guide: Program of NumPyro primitives.
        args: Positional arguments of both.
        params: Constrained parameters, as ``svi.get_params`` gives them; mutable state may be
            among them.
        num_samples: Number :math:`S` of draws per datum, at least 2.
        threshold: Smallest variance of an active unit.
        kwargs: Keyword arguments of both.

    Returns:
        Count, flags and variances. Auxiliary sites are left out; a row is one element of the
        plates of a site, and an event of several dimensions is flattened.

    Raises:
        ValueError: If ``num_samples`` is below 2, or no latent site lies in a plate of at least
            two rows.

    References:
        Burda, Grosse and Salakhutdinov, 2016, arXiv:1509.00519, sec. 5.2.

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
        >>> x = jax.random.normal(jax.random.key(0), (50, 2))
        >>> active_units(jax.random.key(1), model, guide, x, params={}).variance["z"].shape
        (2,)
    """
    positive_int("num_samples", num_samples, minimum=2)
    pair = _trace.Pair(model, guide, args, kwargs)
    _trace.layout(rng_key, params, pair)
    plate_key = _trace.shared_key(rng_key)

    def mean(pair: _trace.Pair, params: Any, keys: jax.Array) -> _draws.Draw:
        def one(key: jax.Array) -> _draws.Draw:
            return _draws.draw(key, plate_key, params, pair)

        def add(total: Any, key: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(key).latent), None

        first = one(keys[0])
        total, _ = lax.scan(add, first.latent, keys[1:])
        return replace(first, latent=jax.tree.map(lambda x: x / len(keys), total))

    half = _trace.compiled(mean, pair)
    keys = random.split(rng_key, num_samples)
    draws = half(params, keys[: num_samples // 2]), half(params, keys[num_samples // 2 :])
    first, second = (
        {
            name: x.value.reshape(int(np.prod(x.value.shape[: len(x.plates)])), -1)
            for name, x in draw.latent.items()
            if x.plates
        }
        for draw in draws
    )
    if not first or any(len(rows) < 2 for rows in first.values()):
        raise ValueError(
            "Expected latent sites inside a data plate of at least 2 rows; got "
            f"{ {name: len(rows) for name, rows in first.items()} }. Active units compare data."
        )
    variance = {}
    for name, rows in first.items():
        a, b = rows - rows.mean(0), second[name] - second[name].mean(0)
        variance[name] = (a * b).sum(0) / (len(rows) - 1)
    active = {name: value > threshold for name, value in variance.items()}
    return ActiveUnits(sum(int(flags.sum()) for flags in active.values()), active, variance)
