"""The ELBO of Bernoulli latents with the DisARM gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vae_ext import _checks, _relaxation
from pyro_vae_ext._relaxation import Site
from pyro_vae_ext.elbos._discrete import DiscreteELBO, Run


class TraceDisARM_ELBO(DiscreteELBO):
    r"""ELBO with the DisARM gradient, of antithetic pairs, for Bernoulli latent sites.

    With logits :math:`a`, one uniform number :math:`u`, the pair
    :math:`b = 1[a + \operatorname{logit} u > 0]`, :math:`b' = 1[a - \operatorname{logit} u > 0]`
    and the cost :math:`f` of a site,

    .. math:: g = \tfrac12 \big(f(b) - f(b')\big)\, (b - b')\, \sigma(|a|)

    is an unbiased estimate of :math:`\partial_a E f(b)` without parameters of its own. With
    :math:`L` sites the pair runs at :math:`L + 1` values, each an exact draw of the guide; the
    loss, and the gradients of all else, are means over them. Costs are summed per row of a site's
    plates.

    Args:
        num_particles: Number of samples per datum, averaged.
        vectorize_particles: Run particles and their antithetic values at once in an outermost
            plate (networks must take any left batch), or one after another.
        max_plate_nesting: Least number of nested plates of model and guide to expect.

    Raises:
        ValueError: At a step for a discrete latent site that is no Bernoulli, for a site that is
            discrete in one program alone, and for sites that only one of the programs has.

    References:
        Dong, Mnih and Tucker, 2020, *DisARM: An Antithetic Gradient Estimator for Binary Latent
        Variables*, arXiv:2006.10680, eq. 6.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     b = pyro.sample("b", dist.Bernoulli(0.5))
        ...     pyro.sample("x", dist.Normal(b, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("b", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.0))))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceDisARM_ELBO())
        >>> loss = svi.step(torch.tensor(1.0))
    """

    copies: ClassVar[int] = 1

    def _check_site(self, name: str, fn: Any) -> None:
        if _relaxation.kind(fn) != _relaxation.BERNOULLI:
            raise ValueError(
                f"Expected Bernoulli latent sites under TraceDisARM_ELBO; got site '{name}' with "
                f"the distribution {_checks.distribution_name(fn)}. Use TraceREBAR_ELBO, or "
                "TraceNVIL_ELBO with the leave-one-out baseline."
            )

    def _draw(self, site: Site) -> None:
        super()._draw(site)
        # a - logit u is minus the number that belongs to -a.
        z = -_relaxation.noisy(site.kind, -site.logits.detach(), site.noise)
        site.own = [_relaxation.harden(site.kind, z)]

    def _exact(self, run: Run) -> int:
        return run.num_slices

    def _surrogate(self, run: Run, totals: Tensor) -> Tensor:
        surrogate = totals.new_zeros(())
        for i, site in enumerate(run.sites):
            with torch.no_grad():
                costs = run.costs(site)
                difference = site.rows(costs[0] - costs[1 + i])
                pair = site.value - site.own[0]
                g = 0.5 * difference * pair * torch.sigmoid(site.logits.abs())
            surrogate = surrogate - (site.logits * g).sum()
        return surrogate / run.num_particles
