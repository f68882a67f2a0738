"""The ELBO of discrete latents with the REBAR gradient."""

from __future__ import annotations

from typing import ClassVar

from pyro_vae_ext.elbos._control_variate import ControlVariateELBO


class TraceREBAR_ELBO(ControlVariateELBO):
    r"""ELBO with the REBAR gradient for Bernoulli and one-hot categorical latent sites.

    With logits :math:`a`, the hard value :math:`b = H(z)`, its relaxation
    :math:`\sigma_t(z) = \sigma(z / t)` (a softmax for categories), a draw :math:`\tilde z` of
    :math:`z` given :math:`b`, and the cost :math:`f` of a site,

    .. math:: g = [f(b) - \eta f(\sigma_t(\tilde z))]\, \partial_a \log q(b)
                  + \eta\, \partial_a f(\sigma_t(z)) - \eta\, \partial_a f(\sigma_t(\tilde z))

    is an unbiased estimate of :math:`\partial_a E f(b)` for every temperature :math:`t` and every
    :math:`\eta`. With several sites each has relaxed values of its own, and sites after it are
    relaxed with it. Continuous sites keep their reparameterised gradient. Costs are summed per
    row of a site's plates.

    With ``learn=True`` every site has a temperature and an :math:`\eta`, tuned by the
    derivative of :math:`g^2`: pass ``tunable(guide)`` to SVI, which declares the parameters
    ``"{site}_log_temperature"`` and ``"{site}_eta"``. Model and guide get none of that
    derivative. Guide and model run once, on hard and relaxed values together; the model must be
    defined, with a derivative, at values between 0 and 1.

    Args:
        num_particles: Number of samples per datum, averaged.
        temperature: Temperature, or its start; one number, or a mapping from sites to numbers.
        eta: Scale of the control variate, or its start; one number or a mapping.
        learn: Tune both.
        vectorize_particles: Run particles, and hard and relaxed values, at once in an outermost
            plate (networks must take any left batch), or one after another.
        max_plate_nesting: Least number of nested plates of model and guide to expect.

    Raises:
        ValueError: At construction for a temperature that is not positive; at a step for a latent
            site without a relaxation, for a site that is discrete in one program alone, for a
            guide without tuning parameters, and for sites that only one of the programs has.

    References:
        Tucker, Mnih, Maddison, Lawson and Sohl-Dickstein, 2017, *REBAR: Low-variance, unbiased
        gradient estimates for discrete latent variable models*, arXiv:1703.07370, eq. 7-9.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> x = torch.ones(8, 3)
        >>> encoder, decoder = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)
        >>> def model(x):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", len(x)):
        ...         b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
        ...         pyro.sample("x", dist.Bernoulli(logits=decoder(b)).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.module("encoder", encoder)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("b", dist.Bernoulli(logits=encoder(x)).to_event(1))
        >>> elbo = TraceREBAR_ELBO()
        >>> svi = SVI(model, elbo.tunable(guide), pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> loss = svi.step(x)
        >>> pyro.param("b_eta").shape
        torch.Size([])
    """

    remedy: ClassVar[str] = ", or use learn=False"
