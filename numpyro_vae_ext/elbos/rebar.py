"""REBAR: the score function with a relaxed control variate."""

from __future__ import annotations

from collections.abc import Mapping

from numpyro_vae_ext.elbos._control_variate import ControlVariateELBO


class TraceREBAR_ELBO(ControlVariateELBO):
    r"""The evidence lower bound of discrete latents, with REBAR's gradient.

    For a Bernoulli or one-hot site with logits :math:`a`, cost :math:`f`, noise :math:`u` and
    :math:`v`, value :math:`b = H(z)` with :math:`z = g(u, a)`, and
    :math:`\tilde z = \tilde g(v, b, a)` a draw of :math:`z` given :math:`b`,

    .. math::
        \hat g = \bigl[f(b) - \eta f(\sigma_t(\tilde z))\bigr] \partial_a \log q(b)
            + \eta\, \partial_a f(\sigma_t(z)) - \eta\, \partial_a f(\sigma_t(\tilde z)),

    unbiased for any temperature :math:`t` and :math:`\eta`. The cost is all of the log-weight but
    the guide's log-densities of the sites before; between the corners it is multilinear in the
    value as far as the site's own densities go, and what the model makes of a soft value
    otherwise. With several discrete sites, those before a site stay hard, those after it are
    relaxed in turn. Continuous latent sites keep their reparameterised gradient.

    With ``learn=True`` the temperature and :math:`\eta` of every site are parameters of the run,
    ``"<site>_log_temperature"`` and ``"<site>_eta"``, which follow the gradient of the variance:
    the exact derivative of :math:`\sum \hat g^2`, the mean over rows and particles. They get no
    other gradient, and no other parameter gets theirs. The same optimiser moves them.

    A step evaluates guide and model once at hard values and once, side by side, at two relaxed
    values for every site. Model and guide must be differentiable in the values of their discrete
    sites, which arrive as floats.

    Args:
        num_particles: number of particles `K`, over which the estimate is averaged.
        temperature: temperature of the relaxation, or where it starts: a number, or a mapping
            from the name of a site to its number.
        eta: what multiplies the control variate, or where it starts: a number or a mapping.
        learn: learn both; then :meth:`tunable` declares them in the guide.
        vectorize_particles: run the particles side by side, or one at a time.

    Raises:
        ValueError: if an argument is out of range; at a step, if a latent site is in the model or
            the guide alone, or discrete in one of them alone, if a discrete
            site is neither Bernoulli nor one-hot, or if ``learn`` is on and the guide is not that
            of :meth:`tunable`.
        TypeError: if an argument, or the data at a continuous site, has the wrong type.

    References:
        Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein (2017), arXiv 1703.07370, eq. 7-9 and
        appendix (several layers, the conditional noise).

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
        >>> elbo = TraceREBAR_ELBO()
        >>> svi = SVI(model, elbo.tunable(guide), optax.adam(1e-2), elbo)
        >>> state = svi.init(jax.random.key(0), jnp.ones((4, 2)))
        >>> state, loss = jax.jit(svi.update)(state, jnp.ones((4, 2)))
        >>> sorted(svi.get_params(state))
        ['b_eta', 'b_log_temperature', 'bias', 'weight']
    """

    _extra = ", or use learn=False"

    def __init__(
        self,
        num_particles: int = 1,
        *,
        temperature: float | Mapping[str, float] = 0.5,
        eta: float | Mapping[str, float] = 1.0,
        learn: bool = True,
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(
            num_particles,
            temperature=temperature,
            eta=eta,
            vectorize_particles=vectorize_particles,
        )
        if not isinstance(learn, bool):
            raise TypeError(f"Expected learn to be a bool; got {type(learn).__name__}.")
        self.learn = learn

    @property
    def _is_tuned(self) -> bool:
        return self.learn
