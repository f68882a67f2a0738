"""Log evidence by importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae_ext.diagnostics._weights import Weigher


def log_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Tensor:
    r"""Estimate of :math:`\log p(x)` per datum, with the guide as proposal.

    .. math:: \log \hat p(x) = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
              \qquad z_k \sim q(z \mid x).

    A lower bound in expectation that tightens with :math:`K`; the published "NLL" of a
    variational autoencoder is the negative of its mean over the test data at :math:`K = 5000`.

    Args:
        model: Program of Pyro primitives.
        guide: Program of Pyro primitives; discrete latent sites are fine here.
        args: Positional arguments of both.
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
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_vae_ext.guides import MeanField
        >>> posterior = MeanField(latent_dim=2, context_dim=2)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.module("posterior", posterior)
        ...     with pyro.plate("data", len(x)):
        ...         posterior("z", x)
        >>> log_evidence(model, guide, torch.zeros(8, 2), num_samples=500).shape
        torch.Size([8])
    """
    weigher = Weigher(model, guide, args, kwargs, num_samples, chunk_size)
    with torch.no_grad():
        parts = [
            torch.logsumexp(weights.stacked(), 0)
            for weights in weigher.chunks("log evidence", progress_bar)
        ]
    return torch.stack(parts).logsumexp(0) - math.log(num_samples)
