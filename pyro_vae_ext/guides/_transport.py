r"""The map behind a guide of one vector, :math:`u = T(\epsilon)`, as the host's tools take it.

What knows :class:`~pyro.infer.autoguide.AutoContinuous` then knows the guide as well, the host's
``NeuTraReparam`` above all: noise in, unconstrained vector and log-determinant out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution, constraints
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions import transforms

from pyro_vae_ext.guides._auto import Site, split
from pyro_vae_ext.guides._base import DirectFamily, GuideFamily
from pyro_vae_ext.guides._flow import FlowDistribution
from pyro_vae_ext.guides._queries import QueriedGuide


class TransportGuide(QueriedGuide, AutoContinuous):
    """Base of the guides of one vector, with the host's questions to it."""

    _sites: list[Site]

    @abstractmethod
    def _posterior(self) -> tuple[GuideFamily | None, Any, Any]:
        """The family, and the location and scale that its draws are put at.

        A scale is a vector or a lower triangular matrix.
        """

    @property
    def latent_dim(self) -> int:
        """Number of unconstrained numbers, once the guide has been called."""
        return sum(site.size for site in self._sites)

    def get_base_dist(self) -> TorchDistribution:
        """The standard Normal that :meth:`get_transform` maps."""
        loc = torch.zeros_like(self._located()[1])
        return dist.Normal(loc, torch.ones_like(loc)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transport:
        """The bijection of the guide, from standard Normal noise to the unconstrained vector.

        Args:
            args: None is needed; the host may pass those of the model.
            kwargs: As ``args``.

        Returns:
            The host's transform, of vectors ``(*batch, latent_dim)``.

        Raises:
            ValueError: If the guide has not been called, or if its family has no bijection.
        """
        return Transport(*self._located())

    def get_posterior(self, *args: Any, **kwargs: Any) -> TorchDistribution:
        """The distribution of the unconstrained vector, as for :meth:`get_transform`."""
        return Posterior(self.get_base_dist(), [self.get_transform()])

    def _located(self) -> tuple[TorchDistribution, Tensor, Tensor]:
        family, loc, scale = self._posterior()
        if family is None:
            raise ValueError(
                "Expected a guide that has been called for get_transform; got one without a "
                "family. Train it, or call it once with the model's arguments."
            )
        if not isinstance(family, DirectFamily):
            raise ValueError(
                "Expected a family with a density of its own for get_transform; got "
                f"{type(family).__name__}. A hierarchical family has no bijection: use IAF or "
                "MeanField."
            )
        return family.distribution(None), loc, scale

    @torch.no_grad()
    def _exact_median(self, args: tuple, kwargs: dict) -> dict[str, Tensor] | None:
        normal = self._normal(args, kwargs)
        if normal is None:
            return None
        return {site.name: site.transform(x.clone()) for site, x in split(self._sites, normal[0])}

    @torch.no_grad()
    def _exact_quantiles(
        self, quantiles: Any, args: tuple, kwargs: dict
    ) -> tuple[dict[str, Tensor], bool]:
        normal = self._normal(args, kwargs)
        if normal is None:
            return {}, False
        loc, scale = normal
        levels = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device)
        found = {}
        sides = zip(*(split(self._sites, x) for x in (loc, scale)), strict=True)
        for (site, middle), (_, width) in sides:
            if not _is_elementwise(site.transform):
                continue
            step = torch.special.ndtri(levels).reshape(-1, *(1 for _ in middle.shape)) * width
            # Upwards and downwards: the map onto the support may fall.
            rises = site.transform(middle + width) >= site.transform(middle - width)
            value = torch.where(rises, site.transform(middle + step), site.transform(middle - step))
            found[site.name] = value.reshape(*levels.shape, *value.shape[1:])
        return found, len(found) == len(self._sites)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # The host's own name for it.
        normal = self._normal(args, kwargs)
        if normal is None:
            raise NotImplementedError
        return normal

    def _normal(self, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor] | None:
        """Location and scale of the marginals of the vector, where they are Normal."""
        with poutine.block(), self._pyro_context:
            self._ready(args, kwargs)
        family, loc, scale = self._posterior()
        fn: Any = family.distribution(None) if isinstance(family, DirectFamily) else None
        while isinstance(fn, torch.distributions.Independent | dist.ExpandedDistribution):
            fn = fn.base_dist
        if not isinstance(fn, torch.distributions.Normal):
            return None
        if scale.dim() == 1:
            return loc + scale * fn.loc, scale * fn.scale
        return loc + scale @ fn.loc, torch.linalg.vector_norm(scale * fn.scale, dim=-1)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        for site, value in split(self._sites, latent):
            yield self.prototype_trace.nodes[site.name], value


class Transport(transforms.Transform):
    """Standard Normal noise sent through a family, and then to a location and scale."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, distribution: TorchDistribution, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.distribution = distribution
        self.loc = loc
        self.scale = scale

    def _call(self, x: Tensor) -> Tensor:
        value, _ = pushed(self.distribution, x)
        if self.scale.dim() == 1:
            return self.loc + self.scale * value
        return self.loc + value @ self.scale.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return pulled(self.distribution, self._unscaled(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of shape ``(*batch,)``; by the noise alone."""
        return pushed(self.distribution, x)[1] + self._log_scale()

    def log_density(self, y: Tensor) -> Tensor:
        """Of any vector, with the family's own derivatives."""
        return self.distribution.log_prob(self._unscaled(y)) - self._log_scale()

    def _unscaled(self, y: Tensor) -> Tensor:
        value = y - self.loc
        if self.scale.dim() == 1:
            return value / self.scale
        value = torch.linalg.solve_triangular(self.scale, value.unsqueeze(-1), upper=False)
        return value.squeeze(-1)

    def _log_scale(self) -> Tensor:
        return (self.scale if self.scale.dim() == 1 else self.scale.diagonal()).log().sum()


def _is_elementwise(transform: Any) -> bool:
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    return transform.domain.event_dim == transform.codomain.event_dim == 0


class Posterior(dist.TransformedDistribution):
    """Noise under a :class:`Transport`, scored without a derivative of an inverse."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Of shape ``(*batch,)``."""
        return self.transforms[0].log_density(value)


def pushed(distribution: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The value ``(*batch, D)`` that noise is sent to, and the log-determinant ``(*batch,)``."""
    if isinstance(distribution, FlowDistribution):
        value, terms = distribution.transform.forward(noise)
        normal = dist.Normal(torch.zeros_like(noise), torch.ones_like(noise))
        return value, (normal.log_prob(noise) - terms).sum(-1)
    if isinstance(distribution, torch.distributions.TransformedDistribution):
        value, log_det = pushed(distribution.base_dist, noise)
        for part in distribution.transforms:
            before, value = value, part(value)
            own = part.log_abs_det_jacobian(before, value)
            log_det = log_det + (own.sum(-1) if own.dim() == noise.dim() else own)
        return value, log_det
    if isinstance(distribution, torch.distributions.MultivariateNormal):
        root: Tensor = distribution.scale_tril
        value = distribution.loc + (root @ noise.unsqueeze(-1)).squeeze(-1)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return value, log_det.expand(noise.shape[:-1])
    if isinstance(distribution, torch.distributions.Normal):
        scale = distribution.scale.expand(noise.shape)
        return distribution.loc + scale * noise, scale.log().sum(-1)
    return pushed(_inner(distribution), noise)


def pulled(distribution: Any, value: Tensor) -> Tensor:
    """The noise that is sent to a value."""
    if isinstance(distribution, FlowDistribution):
        return distribution.transform.inverse(value)
    if isinstance(distribution, torch.distributions.TransformedDistribution):
        for part in reversed(distribution.transforms):
            value = part.inv(value)
        return pulled(distribution.base_dist, value)
    if isinstance(distribution, torch.distributions.MultivariateNormal):
        flat = (value - distribution.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(distribution.scale_tril, flat, upper=False).squeeze(-1)
    if isinstance(distribution, torch.distributions.Normal):
        return (value - distribution.loc) / distribution.scale
    return pulled(_inner(distribution), value)


def _inner(distribution: Any) -> Any:
    if isinstance(distribution, torch.distributions.Independent | dist.ExpandedDistribution):
        return distribution.base_dist
    raise ValueError(
        "Expected a family that maps standard Normal noise for get_transform; got the distribution "
        f"{type(distribution).__name__}. Return a Normal or a TransformedDistribution of one, or "
        "use IAF."
    )
