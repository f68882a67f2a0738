r"""The map behind a guide of one vector, :math:`u = T(\epsilon)`, as the host's tools take it.

What knows :class:`~numpyro.infer.autoguide.AutoContinuous` then knows the guide as well, the
host's ``NeuTraReparam`` above all: noise in, unconstrained vector and log-determinant out.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import ndtri
from numpyro.distributions import constraints
from numpyro.distributions.transforms import IndependentTransform, Transform
from numpyro.infer.autoguide import AutoContinuous

from numpyro_vae_ext.guides._auto import Latents, Site, Values
from numpyro_vae_ext.guides._base import DirectFamily, GuideFamily
from numpyro_vae_ext.guides._flow import FlowDistribution
from numpyro_vae_ext.guides._queries import QueriedGuide


class TransportGuide(QueriedGuide, AutoContinuous):
    """Base of the guides of one vector, with the host's questions to it."""

    _sites: list[Site]

    @abstractmethod
    def _posterior(self, params: dict[str, Any]) -> tuple[GuideFamily | None, Any, Any]:
        """The trained family, and the location and scale that its draws are put at.

        A scale is a vector or a lower triangular matrix.
        """

    @abstractmethod
    def _param_names(self) -> list[str]:
        """The names of the parameters that :meth:`_posterior` reads."""

    @property
    def latent_dim(self) -> int:
        """Number of unconstrained numbers, once the guide has been called."""
        return sum(site.size for site in self._sites)

    def get_base_dist(self) -> dist.Distribution:
        """The standard Normal that :meth:`get_transform` maps."""
        dtype = jnp.result_type(*(site.dtype for site in self._sites))
        return dist.Normal(jnp.zeros(self.latent_dim, dtype), 1.0).to_event(1)

    def get_transform(self, params: dict[str, Any]) -> Transform:
        """The bijection of the guide, from standard Normal noise to the unconstrained vector.

        Args:
            params: Constrained parameters, as ``svi.get_params`` gives them.

        Returns:
            The host's transform, of vectors ``(*batch, latent_dim)``.

        Raises:
            ValueError: If the guide has not been called, or if its family has no bijection.
        """
        return Transport(*self._located(params))

    def get_posterior(self, params: dict[str, Any]) -> dist.Distribution:
        """The distribution of the unconstrained vector, as for :meth:`get_transform`."""
        return Posterior(self.get_base_dist(), [self.get_transform(params)])

    def _exact_median(self, params: dict[str, Any]) -> Latents | None:
        normal = self._normal(params)
        if normal is None:
            return None
        free = {name: x[None] for name, x in self._unpack_latent(normal[0]).items()}
        return Latents(self._sites, free, {}, {}, {})

    def _exact_quantiles(self, params: dict[str, Any], levels: jax.Array) -> Values:
        normal = self._normal(params)
        if normal is None:
            return {}
        loc, scale = normal
        step = scale * ndtri(levels.ravel().astype(loc.dtype))[:, None]
        # Upwards and downwards: the map onto the support may fall.
        up, down, ends = (
            jax.vmap(self._unpack_latent)(x)
            for x in (loc + step, loc - step, jnp.stack([loc - scale, loc + scale]))
        )
        found = {}
        for site in self._sites:
            transform = site.transform
            while isinstance(transform, IndependentTransform):
                transform = transform.base_transform
            if transform is None or transform.domain.event_dim or transform.codomain.event_dim:
                continue
            low, high = transform(ends[site.name])
            value = jnp.where(high >= low, transform(up[site.name]), transform(down[site.name]))
            found[site.name] = value.reshape(*levels.shape, *value.shape[1:])
        return found

    def _normal(self, params: dict[str, Any]) -> tuple[jax.Array, jax.Array] | None:
        """Location and scale of the marginals of the vector, where they are Normal."""
        family, loc, scale = self._posterior(params)
        fn: Any = family.distribution(None) if isinstance(family, DirectFamily) else None
        while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
            fn = fn.base_dist
        if not isinstance(fn, dist.Normal):
            return None
        if scale.ndim == 1:
            return loc + scale * fn.loc, scale * fn.scale
        return loc + scale @ fn.loc, jnp.linalg.norm(scale * fn.scale, axis=-1)

    def _get_posterior(self) -> dist.Distribution:
        # The host's own name for it, under a handler that knows the parameters.
        return self.get_posterior({name: numpyro.param(name) for name in self._param_names()})

    def _located(self, params: dict[str, Any]) -> tuple[dist.Distribution, Any, Any]:
        family, loc, scale = self._posterior(params)
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

    def _unpack_and_constrain(self, latent_sample: jax.Array, params: dict[str, Any]) -> Any:
        shape = latent_sample.shape[:-1]
        vectors = latent_sample.reshape(-1, latent_sample.shape[-1])
        free = jax.vmap(self._unpack_latent)(vectors)
        args, kwargs = self._given((), {})
        drawn = Latents(self._sites, free, {}, {}, {})
        return self._constrained(params, drawn, shape, args, kwargs)


class Transport(Transform):
    """Standard Normal noise sent through a family, and then to a location and scale."""

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, distribution: dist.Distribution, loc: Any, scale: Any) -> None:
        self.distribution = distribution
        self.loc = loc
        self.scale = scale

    def __call__(self, x: Any) -> jax.Array:
        """The unconstrained vector of noise ``(*batch, latent_dim)``."""
        value, _ = pushed(self.distribution, x)
        if self.scale.ndim == 1:
            return self.loc + self.scale * value
        return self.loc + jnp.einsum("ij,...j->...i", self.scale, value)

    def _inverse(self, y: Any) -> jax.Array:
        return pulled(self.distribution, self._unscaled(y))

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> jax.Array:
        """Of shape ``(*batch,)``; by the noise alone."""
        return pushed(self.distribution, x)[1] + self._log_scale()

    def log_density(self, y: jax.Array) -> jax.Array:
        """Of any vector, with the family's own derivatives."""
        return self.distribution.log_prob(self._unscaled(y)) - self._log_scale()

    def _unscaled(self, y: Any) -> jax.Array:
        value = y - self.loc
        if self.scale.ndim == 1:
            return value / self.scale
        flat = value.reshape(-1, value.shape[-1]).T
        return solve_triangular(self.scale, flat, lower=True).T.reshape(value.shape)

    def _log_scale(self) -> jax.Array:
        return jnp.log(self.scale if self.scale.ndim == 1 else jnp.diagonal(self.scale)).sum()

    def tree_flatten(self) -> Any:
        """As the host's transforms."""
        names = ("distribution", "loc", "scale")
        return tuple(getattr(self, name) for name in names), (names, {})


class Posterior(dist.TransformedDistribution):
    """Noise under a :class:`Transport`, scored without a derivative of an inverse."""

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Of shape ``(*batch,)``."""
        return self.transforms[0].log_density(value)


def with_params(family: GuideFamily, params: dict[str, Any]) -> GuideFamily:
    """The family with these numbers for parameters, as ``nnx_module`` keeps them."""
    parts: Any = nnx.split(family, nnx.Param, nnx.Not(nnx.Param))
    if params:
        nnx.replace_by_pure_dict(parts[1], params)
    return nnx.merge(*parts, copy=True)


def pushed(distribution: dist.Distribution, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The value ``(*batch, D)`` that noise is sent to, and the log-determinant ``(*batch,)``."""
    if isinstance(distribution, FlowDistribution):
        value, terms = distribution.transform.forward(noise)
        normal = dist.Normal(jnp.zeros((), noise.dtype), 1.0)
        return value, (normal.log_prob(noise) - terms).sum(-1)
    if isinstance(distribution, dist.TransformedDistribution):
        value, log_det = pushed(distribution.base_dist, noise)
        for part in distribution.transforms:
            before, value = value, part(value)
            own = part.log_abs_det_jacobian(before, value)
            log_det = log_det + (own.sum(-1) if own.ndim == noise.ndim else own)
        return value, log_det
    if isinstance(distribution, dist.MultivariateNormal):
        root = distribution.scale_tril
        value = distribution.loc + jnp.einsum("...ij,...j->...i", root, noise)
        log_det = jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
        return value, jnp.broadcast_to(log_det, noise.shape[:-1])
    if isinstance(distribution, dist.Normal):
        scale = jnp.broadcast_to(distribution.scale, noise.shape)
        return distribution.loc + scale * noise, jnp.log(scale).sum(-1)
    return pushed(_inner(distribution), noise)


def pulled(distribution: dist.Distribution, value: jax.Array) -> jax.Array:
    """The noise that is sent to a value."""
    if isinstance(distribution, FlowDistribution):
        return distribution.transform.inverse(value)
    if isinstance(distribution, dist.TransformedDistribution):
        for part in reversed(distribution.transforms):
            value = part.inv(value)
        return pulled(distribution.base_dist, value)
    if isinstance(distribution, dist.MultivariateNormal):
        flat = (value - distribution.loc)[..., None]
        root = jnp.broadcast_to(distribution.scale_tril, (*value.shape, value.shape[-1]))
        return solve_triangular(root, flat, lower=True)[..., 0]
    if isinstance(distribution, dist.Normal):
        return (value - distribution.loc) / distribution.scale
    return pulled(_inner(distribution), value)


def _inner(distribution: dist.Distribution) -> dist.Distribution:
    if isinstance(distribution, dist.Independent | dist.ExpandedDistribution):
        return distribution.base_dist
    raise ValueError(
        "Expected a family that maps standard Normal noise for get_transform; got the distribution "
        f"{type(distribution).__name__}. Return a Normal or a TransformedDistribution of one, or "
        "use IAF."
    )
