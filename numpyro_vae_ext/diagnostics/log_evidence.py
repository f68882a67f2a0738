"""Log evidence by importance sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from numpyro_vae_ext import _trace
from numpyro_vae_ext.diagnostics._weights import Weigher


def log_evidence(
    rng_key: jax.Array,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: dict[str, Any],
    num_samples: int = 1000,
    chunk_size: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> jax.Array:
    r"""Estimate of :math:`\log p(x)` per datum, with the guide as proposal.

    .. math:: \log \hat p(x) = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
              \qquad z_k \sim q(z \mid x).

    A lower bound in expectation that tightens with :math:`K`; the published "NLL" of a
    variational autoencoder is the negative of its mean over the test data at :math:`K = 5000`.

    Args:
        rng_key: Random key.
        model: Program of NumPyro primitives.
        guide: Program of NumPyro primitives; discrete latent sites are fine here.
        args: Positional arguments of both.
        params: Constrained parameters, as ``svi.get_params`` gives them; mutable state may be
            among them.
        num_samples: Number :math:`K` of samples per datum.
        chunk_size: Samples to run at a time, which bounds the memory; by default as many as hold
            :math:`2^{24}` numbers at the widest site, and 100 at most.
        progress_bar: Show a bar over chunks on standard error.
        kwargs: Keyword arguments of both.

    Returns:
        Estimates in nats of shape ``(*common_plates)``: ``(len(x),)`` for a model whose sites all
        lie in one data plate, a scalar for a joint weight. Of a subsampled plate, the rows of one
        subsample.

    Raises:
        ValueError: If ``num_samples`` or ``chunk_size`` is below 1, or if the pair's weights
            would not be those of a bound; the message names the site.

    References:
        Burda, Grosse and Salakhutdinov, 2016, arXiv:1509.00519, sec. 5 and eq. 8.

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
        >>> x = jnp.zeros((8, 2))
        >>> log_evidence(jax.random.key(0), model, guide, x, params={}, num_samples=500).shape
        (8,)
    """
    pair = _trace.Pair(model, guide, args, kwargs)
    weigher = Weigher(rng_key, params, pair, num_samples, chunk_size)
    shape = weigher.layout.value
    total = jnp.full(shape.shape, -jnp.inf, shape.dtype)
    for weights in weigher.chunks("log evidence", progress_bar):
        total = jnp.logaddexp(total, logsumexp(weights, axis=0))
    return total - jnp.log(num_samples).astype(total.dtype)
