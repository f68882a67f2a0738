"""A weight on the divergence of the latent sites of a program."""

from __future__ import annotations

from typing import Any

from numpyro.distributions.distribution import Unit
from numpyro.primitives import Messenger

from numpyro_vae_ext._checks import check_weight, unwrapped
from numpyro_vae_ext.handlers._program import Program, wrapped


def kl_weight(fn: Program, *, weight: Any) -> Program:
    r"""Weigh the Kullback-Leibler divergence of a model or guide: KL annealing.

    The log-densities of latent sites are multiplied by a weight :math:`w`; observed sites are
    left alone. With both programs wrapped, the evidence lower bound becomes

    .. math::
        \mathbb E_{q(z \mid x)} \big[\log p(x \mid z)\big]
        - w\, \mathrm{KL}\big(q(z \mid x) \,\|\, p(z)\big),

    which is a bound on the evidence for :math:`w \ge 1` and none below. A schedule from 0 to 1
    lets the decoder make use of the latents before the divergence can close them.

    Of a guide, auxiliary sites and reverse models count with the latents: the weight is that of
    the guide's total :math:`\log q - \log r`. A factor of the model counts as observed. A factor
    is a guide's if its distribution has a reparameterised sampler, as those of the families here
    have.

    The weight enters the host's scale of the site, beside those of plates. Objectives that are an
    expectation of log-densities are right with it: the host's ``Trace_ELBO``,
    ``TraceMeanField_ELBO`` and (for continuous latents) ``TraceGraph_ELBO``, ours with one
    particle, and ours for discrete latents with any number. Inside of an importance-weighted
    bound a weight would be an exponent of the densities in a weight, and the result no weighted
    divergence: ours raise, whatever the number. The host's ``RenyiELBO`` does not know. Evaluate
    the plain pair.

    Args:
        fn: the program. Handlers that observe a site belong inside of this one.
        weight: a number of at least 0; or an array that broadcasts with the batch of every
            latent site; or a function of the arguments of ``fn`` that returns either, evaluated at
            every call, which makes a schedule of a step among the arguments: traced,
            and compiled once.

    Raises:
        ValueError: if the weight is negative (and not traced). At a step of our objectives, if
            one of model and guide is weighted and the other is not, or if the bound is an
            importance-weighted one.

    References:
        Bowman, Vilnis, Vinyals, Dai, Jozefowicz and Bengio (2016), Generating Sentences from a
        Continuous Space, arXiv 1511.06349, sec. 3.1. Higgins et al. (2017), beta-VAE, ICLR,
        eq. 4.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model(x, step):
        ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x, step):
        ...     numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 0.7))
        >>> def weight(x, step):
        ...     return jnp.minimum(1.0, step / 1000)
        >>> pair = kl_weight(model, weight=weight), kl_weight(guide, weight=weight)
        >>> svi = SVI(*pair, optax.adam(1e-3), Trace_ELBO())
        >>> state, update = svi.init(jax.random.key(0), 1.0, 0), jax.jit(svi.update)
        >>> for step in range(3):
        ...     state, loss = update(state, 1.0, step)
        >>> update._cache_size()
        1
    """
    return wrapped(fn, weight, check_weight, _Weigh)


class _Weigh(Messenger):
    """Multiplies the scale of latent sites, and keeps the scale that it was."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or (msg["is_observed"] and not _of_a_guide(msg["fn"])):
            return
        before = 1.0 if msg["scale"] is None else msg["scale"]
        weight = self.weight
        msg["scale"] = weight * before
        # Beside the host's fields: replay gives a model's site the infer of the guide's.
        if "kl_weight" in msg:
            weight = weight * msg["kl_weight"]
        msg["kl_weight"] = weight
        # Divisions by the scale must not be by a weight of 0.
        msg.setdefault("unweighted_scale", before)


def _of_a_guide(fn: Any) -> bool:
    """Whether an observed site is a reverse model, whose number is reparameterised."""
    return isinstance(unwrapped(fn), Unit) and fn.has_rsample
