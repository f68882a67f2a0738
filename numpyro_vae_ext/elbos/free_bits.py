"""The evidence lower bound with free bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from numpyro_vae_ext import _checks, _divergence, _record, _trace
from numpyro_vae_ext.elbos._host import HostELBO


class TraceFreeBits_ELBO(HostELBO):
    r"""Evidence lower bound in which every group of latents has some divergence for free.

    .. math::
        L_\lambda = E\Big[\frac1B \sum_n \log p(x_n \mid z_n)\Big]
        - \sum_j \max\Big(\lambda,\ \frac1B \sum_n \mathrm{KL}_j(x_n)\Big) \le L,

    per datum of a minibatch of :math:`B` rows, times the number of data. A group whose mean
    divergence is below :math:`\lambda` costs :math:`\lambda` and feels no pull towards the prior;
    any other pays in full. The mean over rows and particles is taken *before* the maximum, so
    that a single row may carry nothing.

    The divergence :math:`\mathrm{KL}_j` has no Monte Carlo noise where the host knows it for the
    two distributions and nothing that the guide draws later shapes the prior; elsewhere it is
    :math:`\log q_j - \log p_j` at the sample. The terms of an :class:`~numpyro_vae_ext.guides.IAF`
    are those of its noise and scales, which sum to :math:`\log q`. Rows are those of the plates
    that a site stands in: scales count as numbers of rows, and masked rows do not count. Under
    :func:`~numpyro_vae_ext.handlers.kl_weight` the maximum as a whole is weighted.

    Auxiliary sites and reverse models belong to the latent site whose name begins theirs, as
    ``z_aux`` and ``z_reverse`` to ``z``, or to the only one. There is no importance-weighted form:
    inside of the logarithm no term is a divergence.

    Args:
        num_particles: number of samples per datum.
        free_bits: the threshold :math:`\lambda` of every group, in nats per datum; 0 is the plain
            bound.
        groups: ``"dimension"``, every element of a value for itself; ``"site"``, every latent
            site as a whole; or a mapping that lists the group of each element of a site's value,
            flattened, by numbers that mean something within the site alone.
        vectorize_particles: run the particles side by side, or one at a time.

    Raises:
        ValueError: if an option is unknown or the threshold negative; at the loss, where a
            density does not split over elements though the groups ask for it, for latent sites
            without a reparameterised sampler, for sites that only one of model and guide has, and
            for NaN data.
        TypeError: if groups are no ints; at the loss, for integer data at a continuous site.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improved Variational
        Inference with Inverse Autoregressive Flow, arXiv 1606.04934, appendix C.8.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from flax import nnx
        >>> from numpyro.contrib.module import nnx_module
        >>> from numpyro.infer import SVI
        >>> from numpyro_vae_ext.guides import MeanField
        >>> posterior = MeanField(2, context_dim=2, rngs=nnx.Rngs(0))
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     post = nnx_module("posterior", posterior)
        ...     with numpyro.plate("data", len(x)):
        ...         post("z", x)
        >>> elbo = TraceFreeBits_ELBO(free_bits=0.5)
        >>> svi = SVI(model, guide, optax.adam(1e-3), elbo)
        >>> state = svi.init(jax.random.key(0), jnp.zeros((8, 2)))
        >>> state, loss = jax.jit(svi.update)(state, jnp.zeros((8, 2)))
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        free_bits: float = 0.5,
        groups: str | Mapping[str, Sequence[int]] = "dimension",
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not 0 <= free_bits < math.inf:
            raise ValueError(f"Expected free_bits >= 0; got {free_bits}.")
        self.free_bits = free_bits
        self.groups = _checked(groups)

    def _loss_and_state(
        self, rng_key: jax.Array, params: dict[str, Any], pair: _trace.Pair
    ) -> tuple[jax.Array, dict[str, Any]]:
        plate_key = _trace.shared_key(rng_key)

        def particle(key: jax.Array) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
            drawn, modelled, state = _trace.play(key, plate_key, params, pair)
            if not modelled:
                raise ValueError("Expected a model with at least one sample site; got none.")
            _checks.check_reparameterised(_record.latent_sites(drawn), "reparam")
            return *_divergence.divergences(modelled, drawn, self.groups), state

        # One particle uses the key itself, as the host does.
        one = self.num_particles == 1
        keys = rng_key[None] if one else random.split(rng_key, self.num_particles)
        observed, found, state = self.vectorize_particles_fn(particle, keys)
        loss = -jnp.mean(observed)
        for groups, rows in found.values():
            # Both are sums over rows: the ratio of their means is the mean divergence. A sampled
            # one may be negative, and without free bits that is the plain bound.
            groups, least = jnp.mean(groups, axis=0), self.free_bits * jnp.mean(rows, axis=0)
            loss = loss + jnp.sum(jnp.maximum(least, groups) if self.free_bits > 0 else groups)
        return loss, _record.merged_state(state)


def _checked(groups: Any) -> _divergence.Groups:
    if not isinstance(groups, Mapping):
        return _checks.one_of("groups", groups, ("dimension", "site"))
    return {
        name: tuple(_checks.positive_int("groups", group, minimum=0) for group in ids)
        for name, ids in groups.items()
    }
