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
from numpyro_vae_ext.guides._located import Place, Step, checked_start, drawn_through
from numpyro_vae_ext.guides._transport import TransportGuide, with_params
from numpyro_vae_ext.guides.iaf import IAF
from numpyro_vae_ext.guides.mean_field import MeanField

_STEP = ("step_loc", "step_log_scale")


class AutoPosterior(TransportGuide):
    r"""A guide for all continuous latent sites of a model, jointly, with any family.

    The sites are unconstrained by ``biject_to``, flattened and put side by side into one vector

    .. math:: u = m + A w, \qquad w = l + s \odot z, \qquad z \sim q(z),

    where :math:`q` is a family without a context. :math:`m` and :math:`A` are fixed, :math:`l`
    and :math:`s` are trained. Without a ``start``, :math:`m` is where ``init_loc_fn`` puts the
    sites and :math:`A = I`; with one, they are the mean and the Cholesky factor of a Normal near
    the posterior, so that every direction has a scale near 1, however different those of the sites
    are. :math:`l` starts at 0 and :math:`s` at ``init_scale``. With :math:`\theta = T(u)` the
    guide's log-density is

    .. math:: \log q(\theta) = \log q(z) - \sum_i \log s_i - \sum_i \log A_{ii}
              - \log |\det \partial T / \partial u|.

    The step from :math:`z` to :math:`w` is a part of the family's law: path gradients know it. In
    :class:`MeanField` it is the family's own location and log-scale; any other family gets the
    parameters ``{prefix}_step_loc`` and ``{prefix}_step_log_scale``, next to its own in
    ``{prefix}_family``. A reverse model reads :math:`z`. :math:`m` and, with a start, :math:`A`
    are saved with the parameters, as ``{prefix}_loc`` and ``{prefix}_scale_tril``, without a
    gradient.

    The sites of the guide are ``_{prefix}_latent``, which is :math:`w` (auxiliary), and a ``Delta``
    for every latent site of the model, with its part of the other two log-determinants: its rows of
    the diagonal of :math:`A` are its scales given the sites before it. One weight is for all the
    data: a plate over data may be subsampled as long as no latent site is inside, with
    ``num_particles=1``. A support that depends on other sites is taken at their values in each
    draw.

    A latent site under a mask (``mask``, ``obs_mask``) is there as well, if nothing reads what the
    mask hides, which is looked at in the first call: that part is drawn from the family, gets the
    law :math:`N(m, 1)` in unconstrained space, and changes neither the evidence nor the posterior
    of the rest.

    Args:
        model: Program of NumPyro primitives.
        family: Function ``(latent_dim, context_dim) -> family`` such as a class of this package
            or a ``functools.partial`` of one; called with ``context_dim=None``, ``rngs`` and
            ``param_dtype``.
        init_loc_fn: The host's strategy for the start of each site.
        init_scale: First value of :math:`s`, a positive number or an array ``(latent_dim,)`` in the
            order of the sites; 0.1 by default, 1 with a ``start``.
        start: What ``training.pathfinder`` returns for the same model and arguments, or anything
            with its attributes ``loc``, ``scale_tril`` and ``sites``; instead of ``init_loc_fn``.
        create_plates: Function of the model's arguments that returns plates of the model to be
            made in the guide, for subsampling.
        prefix: Start of the names of the guide's own sites and parameters.
        rngs: Source of the initial weights, ``nnx.Rngs(0)`` if None.

    Raises:
        ValueError: At the first call, if a latent site is discrete, inside a subsampled plate, or
            masked and something reads what the mask hides, if there is none, if ``init_scale`` is
            not positive or of another length, or if ``start`` is of another model.
        TypeError: If ``family`` builds no family.

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei (2017), Automatic Differentiation Variational
        Inference, arXiv 1603.00788, sec. 2.3-2.4.

        Zhang, Carpenter, Gelman and Vehtari (2022), Pathfinder: Parallel quasi-Newton variational
        inference, arXiv 2108.03782, sec. 2 (the Normal to start from).

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
        init_scale: Any = None,
        start: Any = None,
        create_plates: Callable[..., Any] | None = None,
        prefix: str = "auto",
        rngs: nnx.Rngs | None = None,
    ) -> None:
        super().__init__(
            model, rngs, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates
        )
        self._make = family
        self._init_scale = init_scale
        self._given_start = start
        self._sites: list[Site] = []
        self._start: tuple[np.ndarray, np.ndarray] | None = None  # of `start`, checked
        self._scale = np.ones(0)  # the first scale of the step
        self._family: GuideFamily | None = None

    def _latents(self, args: Any, kwargs: Any) -> Latents:
        self._prepare(args, kwargs)
        if self.create_plates is not None:
            self._create_plates(*args, **kwargs)
        place, value = self._drawn_vector(args, kwargs, dict(AUXILIARY))
        vector = place.vector(value)
        scales: Values = {}
        if place.scale_tril is not None:
            # By site, its scale given the sites before it.
            log_scale = jnp.log(jnp.diagonal(lax.stop_gradient(place.scale_tril)))
            scales = dict(_split(self._sites, log_scale))
        locs = dict(_split(self._sites, lax.stop_gradient(place.loc)))
        # In no plate, as in the host's joint guides: there is one weight for all rows anyway.
        return Latents(self._sites, dict(_split(self._sites, vector)), scales, {}, {}, locs)

    def _prepare(self, args: Any, kwargs: Any) -> None:
        """Find the sites and build the family, at the first call."""
        if self._family is None:
            self._sites, full_sizes = self._layout(args, kwargs)
            _check_whole(self._sites, full_sizes)
            self._set_up()

    def _drawn_vector(
        self, args: Any, kwargs: Any, infer: dict[str, Any]
    ) -> tuple[Place, jax.Array]:
        """Draw :math:`w`; where it is put."""
        family = nnx_module(f"{self.prefix}_family", self._family)
        place, step = self._placed(args, kwargs)
        return place, drawn_through(family, f"_{self.prefix}_latent", step, infer)

    def _set_up(self) -> None:
        """Build the family and read the start, once the sites are known."""
        size = sum(site.size for site in self._sites)
        scale = self._init_scale
        if self._given_start is not None:
            shapes = {site.name: site.shape for site in self._sites}
            self._start = checked_start(self._given_start, shapes)
            scale = 1.0 if scale is None else scale
        self._scale = _scales(0.1 if scale is None else scale, size)
        family = self._built(self._make, None, self._sites, size)
        if isinstance(family, MeanField):
            with jax.ensure_compile_time_eval():
                # Its own location and scale are the step.
                scale = jnp.asarray(self._scale, family.loc.dtype)
                family.loc[...] = family.loc[...] * scale
                family.log_scale[...] = family.log_scale[...] + jnp.log(scale)
        self._family = family

    def _placed(self, args: Any, kwargs: Any) -> tuple[Place, Step | None]:
        """The parameters of the place and of the step, made where they are none yet."""
        dtype = jnp.result_type(*(site.dtype for site in self._sites))

        def parameter(name: str, value: Any) -> jax.Array:
            given = value if callable(value) else jnp.asarray(value, dtype)
            return numpyro.param(f"{self.prefix}_{name}", given)

        if self._start is None:
            place = Place(parameter("loc", lambda key: self._first_loc(key, args, kwargs)), None)
        else:
            loc, scale_tril = self._start
            place = Place(parameter("loc", loc), parameter("scale_tril", scale_tril))
        if isinstance(self._family, MeanField):
            return place, None
        loc, log_scale = np.zeros_like(self._scale, float), np.log(self._scale)
        return place, Step(*map(parameter, _STEP, (loc, log_scale)))

    def _posterior(self, params: dict[str, Any]) -> tuple[GuideFamily | None, Any, Any]:
        if self._family is None:
            return None, None, None
        family = with_params(self._family, params.get(f"{self.prefix}_family$params", {}))
        found = {name: params[f"{self.prefix}_{name}"] for name in self._own_names()}
        step = Step(found["step_loc"], found["step_log_scale"]) if "step_loc" in found else None
        return family, *Place(found["loc"], found.get("scale_tril")).composed(step)

    def _param_names(self) -> list[str]:
        return [f"{self.prefix}_{name}" for name in ("family$params", *self._own_names())]

    def _own_names(self) -> list[str]:
        """The parameters of the place and of the step."""
        names = ["loc"] if self._start is None else ["loc", "scale_tril"]
        return names if isinstance(self._family, MeanField) else [*names, *_STEP]

    def _unpack_latent(self, vector: jax.Array) -> Values:
        return dict(_split(self._sites, vector))

    def _first_loc(self, rng_key: jax.Array, args: Any, kwargs: Any) -> jax.Array:
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
