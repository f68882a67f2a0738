"""The evidence lower bound with free bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae_ext import _checks, _divergence, _record
from pyro_vae_ext.elbos._host import HostELBO


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
    :math:`\log q_j - \log p_j` at the sample. The terms of an :class:`~pyro_vae_ext.guides.IAF`
    are those of its noise and scales, which sum to :math:`\log q`. Rows are those of the plates
    that a site stands in: scales count as numbers of rows, and masked rows do not count. Under
    :func:`~pyro_vae_ext.handlers.kl_weight` the maximum as a whole is weighted.

    Auxiliary sites and reverse models belong to the latent site whose name begins theirs, as
    ``z_aux`` and ``z_reverse`` to ``z``, or to the only one. There is no importance-weighted form:
    inside of the logarithm no term is a divergence.

    Args:
        num_particles: Number of samples per datum.
        free_bits: The threshold :math:`\lambda` of every group, in nats per datum; 0 is the plain
            bound.
        groups: ``"dimension"``, every element of a value for itself; ``"site"``, every latent
            site as a whole; or a mapping that lists the group of each element of a site's value,
            flattened, by numbers that mean something within the site alone.
        vectorize_particles: Run all particles at once in an outermost plate (networks must take
            any left batch), or one after another.
        max_plate_nesting: Largest number of nested plates of model and guide; found by running
            the pair once if left out.

    Raises:
        ValueError: At construction for an unknown option or a negative threshold; at a step where
            a density does not split over elements though the groups ask for it, for latent sites
            without a reparameterised sampler, for sites that only one of model and guide has, and
            for NaN data.
        TypeError: At construction for groups that are no ints; at a step for integer data at a
            site with a continuous distribution.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling, 2016, *Improved Variational
        Inference with Inverse Autoregressive Flow*, arXiv:1606.04934, appendix C.8.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_vae_ext.guides import MeanField
        >>> x, posterior = torch.zeros(8, 2), MeanField(latent_dim=2, context_dim=2)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.module("posterior", posterior)
        ...     with pyro.plate("data", len(x)):
        ...         posterior("z", x)
        >>> elbo = TraceFreeBits_ELBO(free_bits=0.5)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> loss = svi.step(x)
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        free_bits: float = 0.5,
        groups: str | Mapping[str, Sequence[int]] = "dimension",
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(
            num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        if not 0 <= free_bits < math.inf:
            raise ValueError(f"Expected free_bits >= 0; got {free_bits}.")
        self.free_bits = free_bits
        self.groups = _checked(groups)

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The negative bound as a scalar tensor."""
        runs = self._runs(model, guide, args, kwargs)
        loss = -torch.stack([others for others, _ in runs]).sum() / self.num_particles
        for name, first in runs[0][1].items():
            groups, rows = first
            for _, found in runs[1:]:
                groups, rows = groups + found[name].groups, rows + found[name].rows
            # Both are sums over rows and particles: their ratio is the mean divergence. A sampled
            # one may be negative, and without free bits that is the plain bound.
            if self.free_bits > 0:
                groups = torch.maximum(self.free_bits * rows, groups)
            loss = loss + groups.sum() / self.num_particles
        return loss

    def _runs(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: dict
    ) -> list[tuple[Tensor, dict[str, _divergence.Divergence]]]:
        """What is observed and the divergences, for all particles at once or one by one."""
        if not self.vectorize_particles or self.num_particles == 1:
            subsamples: dict[str, Tensor] = {}
            return [
                self._run(model, guide, args, kwargs, None, subsamples)
                for _ in range(self.num_particles)
            ]
        if self.max_plate_nesting < float("inf"):
            try:
                return [self._run(model, guide, args, kwargs, -int(self.max_plate_nesting))]
            except _record.PlateCollision:
                pass  # Another pair than the last one, with more plates.
        self.max_plate_nesting = 1 + _record.probe(model, guide, args, kwargs)[0]
        return [self._run(model, guide, args, kwargs, -int(self.max_plate_nesting))]

    def _run(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        particle_dim: int | None,
        subsamples: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, _divergence.Divergence]]:
        particles = _record.particle_frame(self.num_particles, particle_dim)
        model_sites, guide_sites, _ = _record.run_pair(
            model, guide, args, kwargs, particles, subsamples
        )
        if not model_sites:
            raise ValueError("Expected a model with at least one sample site; got none.")
        _checks.check_match(model_sites, guide_sites)
        _checks.check_same_weight(model_sites, guide_sites)
        _checks.check_reparameterised(guide_sites, "reparam")
        _checks.check_data(model_sites)
        for name, site in [*guide_sites.items(), *model_sites.items()]:
            _checks.check_shape(name, site, site["fn"].batch_shape)
        return _divergence.divergences(model_sites, guide_sites, self.groups)


def _checked(groups: Any) -> _divergence.Groups:
    if not isinstance(groups, Mapping):
        return _checks.one_of("groups", groups, ("dimension", "site"))
    return {
        name: tuple(_checks.positive_int("groups", group, minimum=0) for group in ids)
        for name, ids in groups.items()
    }
