"""RELAX: a learned control variate that starts as REBAR's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from numpyro_vae_ext._checks import widths
from numpyro_vae_ext.elbos._control_variate import ControlVariateELBO
from numpyro_vae_ext.elbos._discrete import declared, dense


class TraceRELAX_ELBO(ControlVariateELBO):
    r"""The evidence lower bound of discrete latents, with RELAX's gradient.

    REBAR's estimate with a learned control variate: with the notation of
    :class:`TraceREBAR_ELBO` and

    .. math:: c(z) = \eta f(\sigma_t(z)) + \rho(z, a), \qquad
        \hat g = \bigl[f(b) - c(\tilde z)\bigr] \partial_a \log q(b)
            + \partial_a c(z) - \partial_a c(\tilde z),

    where :math:`\rho` is a network of the unrelaxed value and the logits (which it sees without a
    derivative), in units of one row: the site's scale multiplies it. The estimate is unbiased for
    any :math:`t`, :math:`\eta` and :math:`\rho`. All three are parameters of the run
    (``"<site>_log_temperature"``, ``"<site>_eta"``, ``"<site>_surrogate$params"``) and follow the
    gradient of the variance alone. The default network is 0 at first: the start is REBAR.

    Args:
        num_particles: number of particles `K`, over which the estimate is averaged.
        temperature: where the temperature of the relaxation starts: a number, or a mapping from
            the name of a site to its number.
        eta: where the factor of the cost starts: a number or a mapping.
        surrogate: ``surrogate(width, rngs=rngs)`` makes an ``nnx.Module`` that maps
            ``(..., width)`` to ``(..., 1)`` or ``(...)``; the width is twice the size of a value.
            None for dense layers with tanh.
        hidden_dims: widths of the hidden layers of the default network.
        vectorize_particles: run the particles side by side, or one at a time.

    Raises:
        ValueError: if an argument is out of range; at a step, if a latent site is in the model or
            the guide alone, or discrete in one of them alone, if a discrete
            site is neither Bernoulli nor one-hot, or if the guide is not that of
            :meth:`tunable`.
        TypeError: if an argument, or the data at a continuous site, has the wrong type.

    References:
        Grathwohl, Choi, Wu, Roeder and Duvenaud (2018), arXiv 1711.00123.

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
        >>> elbo = TraceRELAX_ELBO(hidden_dims=(8,))
        >>> svi = SVI(model, elbo.tunable(guide), optax.adam(1e-2), elbo)
        >>> state = svi.init(jax.random.key(0), jnp.ones((4, 2)))
        >>> state, loss = jax.jit(svi.update)(state, jnp.ones((4, 2)))
        >>> sorted(svi.get_params(state))
        ['b_eta', 'b_log_temperature', 'b_surrogate$params', 'bias', 'weight']
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        temperature: float | Mapping[str, float] = 0.5,
        eta: float | Mapping[str, float] = 1.0,
        surrogate: Callable[..., Any] | None = None,
        hidden_dims: Iterable[int] = (64,),
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            temperature=temperature,
            eta=eta,
            vectorize_particles=vectorize_particles,
        )
        self.surrogate = surrogate
        self.hidden_dims = widths("hidden_dims", hidden_dims)

    @property
    def _is_tuned(self) -> bool:
        return True

    def _declare(self, site: Any, modules: dict[str, Any]) -> dict[str, Any]:
        tuning = super()._declare(site, modules)
        if not tuning:
            return tuning
        width = 2 * math.prod(site["fn"].event_shape)

        def build(rngs: Any) -> Any:
            if self.surrogate is None:
                return dense(width, self.hidden_dims, rngs)
            return self.surrogate(width, rngs=rngs)

        return {**tuning, "surrogate": declared(f"{site['name']}_surrogate", modules, build)}
