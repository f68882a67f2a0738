"""A guide made from a model: one family over all of its latent sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from flax import nnx
from jax import lax
from numpyro.contrib.module import nnx_module
from numpyro.infer.initialization import init_to_median

from numpyro_vae_ext.guides._auto import AUXILIARY, Latents, Site, Values
from numpyro_vae_ext.guides._base import GuideFamily
from numpyro_vae_ext.guides._transport import TransportGuide, with_params
from numpyro_vae_ext.guides.iaf import IAF


class AutoPosterior(TransportGuide):
    r"""A guide for all continuous latent sites of a model, jointly, with any family.

    The sites are unconstrained by ``biject_to``, flattened and put side by side into one vector

    .. math:: u = \ell + s \odot z, \qquad z \sim q(z),

    where :math:`q` is a family without a context, :math:`\ell` is where ``init_loc_fn`` puts the
    sites and :math:`s` is ``init_scale``. Both are fixed: the family learns the rest.
    :math:`\ell` is saved with the parameters, as ``{prefix}_loc``, and has no gradient. With
    :math:`\theta = T(u)` the guide's log-density is

    .. math:: \log q(\theta) = \log q(z) - \sum_i \log s_i - \log |\det \partial T / \partial u|.

    The sites of the guide are ``_{prefix}_latent`` (auxiliary) and a ``Delta`` for every latent
    site of the model, with its part of the log-determinants. One weight is for all the data: a
    plate over data may be subsampled as long as no latent site is inside, with
    ``num_particles=1``. A support that depends on other sites is taken at their values in each
    draw.

    Args:
        model: Program of NumPyro primitives.
        family: Function ``(latent_dim, context_dim) -> family`` such as a class of this package
            or a ``functools.partial`` of one; called with ``context_dim=None``, ``rngs`` and
            ``param_dtype``.
        init_loc_fn: The host's strategy for the start of each site.
        init_scale: Positive number, or an array ``(latent_dim,)`` in the order of the sites.
        create_plates: Function of the model's arguments that returns plates of the model to be
            made in the guide, for subsampling.
        prefix: Start of the names of the guide's own sites and parameters.
        rngs: Source of the initial weights, ``nnx.Rngs(0)`` if None.

    Raises:
        ValueError: At the first call, if a latent site is discrete, masked, or inside a
            subsampled plate, if there is none, or if ``init_scale`` is not positive or of another
            length.
        TypeError: If ``family`` builds no family.

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), Automatic Differentiation Variational
        Inference, arXiv 1603.00788, sec. 2.3-2.4.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI
        >>> from numpyro_vae_ext.elbos import ImportanceWeightedELBO
        >>> from numpyro_vae_ext.guides import MeanField
        >>> def model(x):
        ...     loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("x", dist.Normal(loc, scale), obs=x)
        >>> x = jnp.array([0.3, -0.2, 0.9])
        >>> guide = AutoPosterior(model, MeanField)
        >>> svi = SVI(model, guide, optax.adam(0.1), ImportanceWeightedELBO(num_particles=5))
        >>> params = svi.run(jax.random.key(0), 20, x, progress_bar=False).params
        >>> draws = guide.sample_posterior(jax.random.key(1), params, x, sample_shape=(100,))
        >>> draws["scale"].shape, bool((draws["scale"] > 0).all())
        ((100,), True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        family: Callable[..., Any] = IAF,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: Any = 0.1,
        create_plates: Callable[..., Any] | None = None,
        prefix: str = "auto",
        rngs: nnx.Rngs | None = None,
    ) -> None:
        super().__init__(
            model, rngs, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates
        )
        self._make = family
        self._init_scale = init_scale
        self._sites: list[Site] = []
        self._scale = np.ones(0)
        self._family: GuideFamily | None = None

    def _latents(self, args: Any, kwargs: Any) -> Latents:
        if self._family is None:
            self._sites, full_sizes = self._layout(args, kwargs)
            _check_whole(self._sites, full_sizes)
            self._scale = _scales(self._init_scale, sum(site.size for site in self._sites))
            self._family = self._built(self._make, None, self._sites, len(self._scale))
        if self.create_plates is not None:
            self._create_plates(*args, **kwargs)
        family = nnx_module(f"{self.prefix}_family", self._family)
        start = numpyro.param(f"{self.prefix}_loc", lambda key: self._start(key, args, kwargs))
        z = family(f"_{self.prefix}_latent", infer=dict(AUXILIARY))
        scale = self._scale.astype(z.dtype)
        vector = lax.stop_gradient(start) + scale * z
        parts, scales = _split(self._sites, vector), _split(self._sites, jnp.log(scale))
        # In no plate, as in the host's joint guides: there is one weight for all rows anyway.
        return Latents(self._sites, dict(parts), dict(scales), {}, {})

    def _posterior(self, params: dict[str, Any]) -> tuple[GuideFamily | None, Any, Any]:
        if self._family is None:
            return None, None, None
        family = with_params(self._family, params.get(f"{self.prefix}_family$params", {}))
        start = params[f"{self.prefix}_loc"]
        return family, start, jnp.asarray(self._scale, start.dtype)

    def _unpack_latent(self, vector: jax.Array) -> Values:
        return dict(_split(self._sites, vector))

    def _start(self, rng_key: jax.Array, args: Any, kwargs: Any) -> jax.Array:
        """Where the host puts the sites, unconstrained; asked for where it is no parameter yet."""
        free = self._prototyped(rng_key, args, kwargs)._init_locs
        return jnp.concatenate([jnp.ravel(free[site.name]) for site in self._sites])


def _split(sites: list[Site], vector: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """Every site's name and part of a vector, in its shape."""
    ends = np.cumsum([site.size for site in sites])
    for site, part in zip(sites, jnp.split(vector, ends[:-1]), strict=True):
        yield site.name, part.reshape(site.shape)


def _scales(init_scale: Any, size: int) -> np.ndarray:
    """``init_scale`` as a vector, checked."""
    scale = np.asarray(init_scale)
    if (
        scale.dtype.kind not in "fiu"
        or scale.shape not in ((), (size,))
        or not (np.isfinite(scale) & (scale > 0)).all()
    ):
        raise ValueError(
            f"Expected init_scale to be a positive number or {size} of them; got {init_scale}."
        )
    return np.broadcast_to(scale, (size,))


def _check_whole(sites: list[Site], full_sizes: dict[str, int]) -> None:
    for site in sites:
        for plate in site.plates:
            if (full := full_sizes[plate.name]) != plate.size:
                raise ValueError(
                    "Expected no latent site inside a subsampled plate under AutoPosterior; got "
                    f"site '{site.name}' in plate '{plate.name}' ({plate.size} of {full} rows). "
                    "Use AutoAmortized, or pass the full data."
                )
