"""Latent utilisation: whether a decoder listens to its latents, and by how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from numpyro_vae_ext._checks import positive_int
from numpyro_vae_ext.diagnostics._report import LatentUtilisation
from numpyro_vae_ext.diagnostics._rows import PairRuns
from numpyro_vae_ext.diagnostics._utilisation import estimate


def latent_utilisation(
    rng_key: jax.Array,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: dict[str, Any],
    num_samples: int = 100,
    num_contrasts: int = 100,
    threshold: float = 0.01,
    chunk_size: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> LatentUtilisation:
    r"""Measure what the latents of a trained pair carry of the data.

    A strong decoder can leave its latents unused: the posterior is the prior, and the likelihood
    is the same for the latents of any other row. Reported are the divergence from the prior per
    dimension; the active units; the *swap drop*, by how much
    :math:`\log p(x_i \mid z)` falls when :math:`z` comes from another row; and bounds on the mutual
    information :math:`I_q(x; z)` of rows and draws of the guide. With :math:`K` other rows
    :math:`x_j` and :math:`z \sim q(z \mid x_i)`,

    .. math:: E \log \frac{q(z \mid x_i)}{\frac{1}{K+1} [q(z \mid x_i) + \sum_j q(z \mid x_j)]}
              \;\le\; I_q(x; z) \;\le\;
              E \log \frac{q(z \mid x_i)}{\frac1K \sum_j q(z \mid x_j)}.

    Both hold for the rows as they are, whose information is at most the log of their number, and
    for what the rows are a sample of. The lower bound is at most :math:`\log(K + 1)`; with all
    other rows it is the information of the rows itself.

    A guide with auxiliary sites :math:`a` has no density :math:`q(z \mid x)` in closed form:
    averages of :math:`q(z \mid a, x)` over ``num_samples`` draws take its place, for one
    :math:`z` per row. The :math:`a` that :math:`z` was drawn from is among the draws where a
    bound asks for an estimate that is too large (numerator of the upper bound, denominator of the
    lower one) and left out of the others, so that both remain bounds; the page on diagnostics
    has the proof.

    A row is an element of the plates that enclose all data and the latents that share a plate with
    them. Latents outside of these plates stay as they are when others are moved, and the numbers
    are those given them. Scales are left out: densities are those of a row. Rows that are masked
    out do not count.

    Args:
        rng_key: Random key.
        model: Program of NumPyro primitives.
        guide: Program of NumPyro primitives; discrete latent sites are fine here.
        args: Positional arguments of both.
        params: Constrained parameters, as ``svi.get_params`` gives them; mutable state may be
            among them.
        num_samples: Number of draws per row, at least 4.
        num_contrasts: Number :math:`K` of other rows that each draw is compared with, chosen at
            random for each draw; all of them, if there are not as many.
        threshold: Smallest variance of an active unit.
        chunk_size: Draws to run at a time, which bounds the memory; 100 by default.
        progress_bar: Show a bar over runs on standard error.
        kwargs: Keyword arguments of both.

    Returns:
        A report with all numbers as attributes, NumPy arrays or pairs ``(estimate,
        standard_error)`` with errors over rows, ``.count`` of the active units, ``.table``, a
        ``pandas.DataFrame``, and ``.plot(ax=None)``. An event of several dimensions is flattened.
        The divergence is per dimension where both densities are products over dimensions and the
        guide has no auxiliary sites, in closed form if the host has one; elsewhere
        (``kl_marginal`` in the table) it is that of Normals with the moments of the guide's and
        the model's draws, and ``kl_total`` alone is the divergence.

    Raises:
        ValueError: If a number is too small, no latent site lies in a data plate of at least two
            rows, the guide draws all rows at once, or a mask hides a part of a row.
        ImportError: From ``.table`` without pandas, from ``.plot`` without Matplotlib.

    References:
        Poole, Ozair, van den Oord, Alemi and Tucker, 2019, *On Variational Bounds of Mutual
        Information*, arXiv:1905.06922, sec. 2.5. Burda, Grosse and Salakhutdinov, 2016,
        arXiv:1509.00519, sec. 5.2. Sobolev and Vetrov, 2019, *Importance Weighted Hierarchical
        Variational Inference*, arXiv:1905.03290.

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
        >>> key, x = jax.random.key(0), jax.random.normal(jax.random.key(1), (20, 2))
        >>> found = latent_utilisation(key, model, guide, x, params={}, num_contrasts=5)
        >>> found.kl["z"].estimate.shape, len(found.table)
        ((2,), 10)
    """
    positive_int("num_samples", num_samples, minimum=4)
    positive_int("num_contrasts", num_contrasts)
    size = min(num_samples, 100 if chunk_size is None else positive_int("chunk_size", chunk_size))
    runs = PairRuns(rng_key, model, guide, args, kwargs, params, size)
    return estimate(
        runs,
        runs.seed,
        num_samples=num_samples,
        num_contrasts=num_contrasts,
        threshold=threshold,
        chunk_size=size,
        progress_bar=progress_bar,
    )
