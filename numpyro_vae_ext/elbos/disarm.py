"""DisARM: antithetic pairs of Bernoulli draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_vae_ext import _record, _relaxation, _trace
from numpyro_vae_ext._checks import unwrapped
from numpyro_vae_ext.elbos._discrete import DiscreteELBO, Scored, play


class TraceDisARM_ELBO(DiscreteELBO):
    r"""The evidence lower bound of Bernoulli latents, with DisARM's gradient.

    Two draws from one noise, :math:`b = [a + \operatorname{logit} u > 0]` and its antithetic
    :math:`b' = [a - \operatorname{logit} u > 0]`; for every logit :math:`a`

    .. math:: \hat g = \tfrac12 \bigl(f(b) - f(b')\bigr) (b - b')\, \sigma(|a|),

    unbiased, without parameters or state, and no relaxed value is needed: the model may do with
    the values what it likes. With several discrete sites there is an antithetic run for each, in
    which the sites before it keep their values. The loss is the mean over all these runs, each of
    which is a draw from the guide. Continuous latent sites keep their reparameterised gradient.

    Args:
        num_particles: number of particles `K`, over which the estimate is averaged; each takes
            one run and another for every discrete site.
        vectorize_particles: run the particles side by side, or one at a time.

    Raises:
        ValueError: if an argument is out of range; at a step, if a latent site is in the model or
            the guide alone, or discrete in one of them alone, or if a discrete
            site is not Bernoulli.
        TypeError: if an argument, or the data at a continuous site, has the wrong type.

    References:
        Dong, Mnih and Tucker (2020), arXiv 2006.10680. Yin and Zhou (2019), ARM, arXiv 1807.11143.

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
        >>> elbo = TraceDisARM_ELBO()
        >>> svi = SVI(model, elbo.tunable(guide), optax.adam(1e-2), elbo)
        >>> state = svi.init(jax.random.key(0), jnp.ones((4, 2)))
        >>> state, loss = jax.jit(svi.update)(state, jnp.ones((4, 2)))
        >>> sorted(svi.get_params(state))
        ['bias', 'weight']
    """

    def _particle(
        self,
        rng_key: jax.Array,
        plate_key: jax.Array,
        params: dict[str, Any],
        pair: _trace.Pair,
    ) -> dict[str, Any]:
        noise: dict[str, jax.Array] = {}
        choose_hard = _record.hard(noise, whole=True)
        hard = self._checked(play(rng_key, plate_key, params, pair, choose_hard, _check))
        sites = {site.name: site for site in hard.sites}
        order = {name: i for i, name in enumerate(sites)}
        values = {site.name: (site.site["value"], _mirrored(site, noise)) for site in hard.sites}
        total = hard.total()
        if not sites:
            return {"value": total, "surrogate": total, "state": hard.state}

        def one(index: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            def choose(msg: Any) -> jax.Array:
                i, (value, mirrored) = order[msg["name"]], values[msg["name"]]
                chosen = jnp.where(index == i, mirrored, value)
                if i == 0:
                    return chosen
                z = _relaxation.noisy("bernoulli", _record.site_logits(msg), noise[msg["name"]])
                anew = _record.as_whole(_relaxation.harden("bernoulli", z))
                return jnp.where(index < i, anew, chosen)

            found = play(rng_key, plate_key, params, pair, choose)
            return found.total(), found.costs()

        totals, others = jax.vmap(one)(jnp.arange(len(sites)))
        # Every slice is a draw from guide and model, and counts for the bound and its derivative.
        value = surrogate = (total + jnp.sum(totals)) / (1 + len(sites))
        costs = lax.stop_gradient(hard.costs())
        for name, site in sites.items():
            i, (hard_value, mirrored) = order[name], values[name]
            gap = site.rows(costs[name] - lax.stop_gradient(others[name][i]))
            weight = jax.nn.sigmoid(jnp.abs(site.logits))
            g = 0.5 * gap * (hard_value - mirrored) * weight
            surrogate = surrogate + jnp.sum(site.logits * lax.stop_gradient(g))
        return {"value": value, "surrogate": surrogate, "state": hard.state}


def _check(name: str, fn: Any) -> None:
    if _relaxation.kind(fn) != "bernoulli":
        raise ValueError(
            f"Expected Bernoulli latent sites under TraceDisARM_ELBO; got site '{name}' with the "
            f"distribution {type(unwrapped(fn)).__name__}. Use TraceREBAR_ELBO, or TraceNVIL_ELBO "
            "with the leave-one-out baseline."
        )


def _mirrored(site: Scored, noise: dict[str, jax.Array]) -> jax.Array:
    """The draw from the mirrored noise ``1 - u``."""
    # In this form no digit of a small u is lost.
    z = -_relaxation.noisy("bernoulli", -site.logits, noise[site.name])
    return _record.as_whole(_relaxation.harden("bernoulli", z))
