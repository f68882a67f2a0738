"""A guide made from a model: local latents from an encoder, global ones by a joint family."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.infer.initialization import init_to_median

from numpyro_vae_ext.guides._auto import AUXILIARY, Latents, Site, Values
from numpyro_vae_ext.guides._base import GuideFamily
from numpyro_vae_ext.guides._located import check_attributes, marginal
from numpyro_vae_ext.guides._queries import QueriedGuide
from numpyro_vae_ext.guides.auto_posterior import AutoPosterior
from numpyro_vae_ext.guides.iaf import IAF


class AutoAmortized(QueriedGuide):
    r"""A guide whose local latents come from an encoder, row by row.

    The continuous latent sites inside ``plate`` are local: :math:`z_n` stands for all of them in
    row :math:`n`, unconstrained by ``biject_to``, flattened and put side by side. All other
    latent sites :math:`\theta` are global and belong to an :class:`AutoPosterior`:

    .. math:: q(\theta, z \mid x) = q(\theta) \prod_n q(z_n \mid c_n), \qquad c = e(x).

    The encoder :math:`e` is called inside the plate with the arguments of the guide. It returns
    one row of context for each row of the plate, which are then indexed with the subsample, or
    for each row of the subsample. The sizes of the plates are found again at every call, so that
    the same guide serves new data with another number of rows. Without global latent sites there
    is one weight per datum; with them one weight for all data, and a subsample needs
    ``num_particles=1``.

    The guide's own sites are ``_{prefix}_local`` (auxiliary) and ``_{prefix}_latent``, that of the
    global guide; every latent site of the model is a ``Delta``. The parameters are those of
    ``{prefix}_encoder`` and ``{prefix}_local_family`` and, with global latents, those of
    :class:`AutoPosterior`.

    Masked latents are those of :class:`AutoPosterior`, local ones with :math:`m = 0`; the mask may
    be another one at every call.

    Args:
        model: Program of NumPyro primitives.
        encoder: Function of the model's arguments that returns a context ``(rows, context_dim)``;
            an :class:`flax.nnx.Module` is registered, any other function is called as it is.
        family: Function ``(latent_dim, context_dim) -> family`` for the local latents, such as a
            class of this package or a ``functools.partial`` of one; called with ``rngs`` and
            ``param_dtype`` as well.
        plate: Name of the plate of the local latents, which must be the outermost around them.
        global_family: The same for the global latents, called with ``context_dim=None``;
            ``family`` by default.
        init_loc_fn: The host's strategy for the start of each global site.
        init_scale: That of :class:`AutoPosterior` for the global latents.
        start: A Normal for the global latents to start from, as in :class:`AutoPosterior`: what
            ``training.pathfinder`` returns for the model, of which the marginal of the global
            sites is taken, or for the global sites alone.
        create_plates: Function of the model's arguments that returns plates of the model to be
            made in the guide instead of copies of the model's.
        prefix: Start of the names of the guide's own sites and parameters.
        rngs: Source of the initial weights, ``nnx.Rngs(0)`` if None.

    Raises:
        ValueError: At a call, if a latent site is discrete, or masked and something reads what the
            mask hides, if no latent site is inside the plate, if one has another plate outside of
            it or a subsampled one inside, if a global site is inside a subsampled plate, if
            ``start`` is of another model or there is no global site for it, or if the rows of the
            context do not match the plate.
        TypeError: If ``family`` or ``global_family`` builds no family.

    References:
        Kingma and Welling (2014), Auto-Encoding Variational Bayes, arXiv 1312.6114, sec. 2.

        Agrawal and Domke (2021), Amortized Variational Inference for Simple Hierarchical Models,
        arXiv 2111.03144, sec. 5.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from flax import nnx
        >>> from numpyro.handlers import seed
        >>> def model(x):
        ...     loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(loc, jnp.ones(2)).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = AutoAmortized(model, nnx.Linear(2, 8, rngs=nnx.Rngs(0)))
        >>> optim, loss = numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO()
        >>> svi = numpyro.infer.SVI(model, guide, optim, loss)
        >>> params = svi.get_params(svi.init(jax.random.key(0), jnp.zeros((10, 2))))
        >>> draws = guide.sample_posterior(
        ...     jax.random.key(1), params, jnp.zeros((3, 2)), sample_shape=(5,)
        ... )
        >>> draws["z"].shape
        (5, 3, 2)
    """

    _reads_arguments = True

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Any],
        *,
        family: Callable[..., Any] = IAF,
        plate: str = "data",
        global_family: Callable[..., Any] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: Any = None,
        start: Any = None,
        create_plates: Callable[..., Any] | None = None,
        prefix: str = "auto",
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = nnx.Rngs(0) if rngs is None else rngs
        super().__init__(
            model, rngs, prefix=prefix, init_loc_fn=init_loc_fn, create_plates=create_plates
        )
        self.encoder = encoder
        self.plate = plate
        self._make = family
        self._family: GuideFamily | None = None
        self._has_global = False
        # Its model is hidden the local sites once these are known.
        self.global_guide = AutoPosterior(
            model,
            family if global_family is None else global_family,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            start=start,
            prefix=prefix,
            rngs=rngs,
        )

    def _latents(self, args: Any, kwargs: Any) -> Latents:
        sites = self._local_sites(args, kwargs)
        wide = self.global_guide._latents(args, kwargs) if self._has_global else None
        plates = self._create_plates(*args, **kwargs)
        plate = plates[self.plate]
        with plate as rows:
            context = self._context(plate.size, rows, args, kwargs)
            size = sum(site.size for site in sites) // len(rows)
            if self._family is None:
                self._family = self._built(self._make, context.shape[-1], sites, size)
            if size != self._family.latent_dim:
                raise ValueError(
                    f"Expected {self._family.latent_dim} unconstrained numbers per row of plate "
                    f"'{self.plate}', as at the first call; got {size}. Only the number of rows "
                    "may change: build a guide for each size of the plates inside."
                )
            family = nnx_module(f"{self.prefix}_local_family", self._family)
            # The vector has a dimension of size 1 for each place to the right of the plate.
            context = jnp.expand_dims(context, tuple(range(1, -plate.dim)))
            vector = family(f"_{self.prefix}_local", context, infer=dict(AUXILIARY))
        free = _split(sites, vector.reshape(len(rows), size), plate.dim)
        here = Latents(sites, free, {}, plates, {self.plate: rows})
        if wide is None:
            return here
        sites, free = wide.sites + here.sites, wide.free | here.free
        return here._replace(sites=sites, free=free, log_scales=wide.log_scales, locs=wide.locs)

    def _local_sites(self, args: Any, kwargs: Any) -> list[Site]:
        """The local sites at these arguments, their plates told to the host."""
        sites, full_sizes = self._layout(args, kwargs)
        local = [site for site in sites if self.plate in {plate.name for plate in site.plates}]
        if not local:
            names = sorted({plate.name for site in sites for plate in site.plates})
            raise ValueError(
                f"Expected a plate '{self.plate}' around latent sites of the model; got latent "
                f"sites in the plates {names or 'none'}. Name the plate of the local latents, or "
                "use AutoPosterior."
            )
        for site in local:
            _check_place(site, self.plate, full_sizes)
        self._prototype_frames = {plate.name: plate for site in local for plate in site.plates}
        self._prototype_frame_full_sizes = full_sizes
        self._has_global = len(local) < len(sites)
        hide = partial(_is_among, frozenset(site.name for site in local))
        self.global_guide.model = handlers.block(self.model, hide_fn=hide)
        self._hand_on_start(frozenset(site.name for site in local))
        return local

    def _hand_on_start(self, local: frozenset[str]) -> None:
        """The global part's share of a start: the marginal of its sites."""
        start = self.global_guide._given_start
        if start is None:
            return
        if not self._has_global:
            raise ValueError(
                "Expected a latent site outside of the plate for start under AutoAmortized; got "
                f"sites in plate '{self.plate}' alone. Leave start out: the encoder's rows have "
                "none."
            )
        check_attributes(start)
        if local & set(start.sites):
            self.global_guide._given_start = marginal(start, local)

    def _context(self, size: int, rows: jax.Array, args: Any, kwargs: Any) -> jax.Array:
        """The encoder's rows that are drawn."""
        encoder = self.encoder
        if isinstance(encoder, nnx.Module):
            encoder = nnx_module(f"{self.prefix}_encoder", encoder)
        context = jnp.asarray(encoder(*args, **kwargs))
        if context.ndim != 2 or len(context) not in (size, len(rows)):
            raise ValueError(
                f"Expected the encoder's rows to match plate '{self.plate}' ({size} rows, "
                f"{len(rows)} of them drawn); got a context of shape {context.shape}. Return one "
                "row of context per row of the plate."
            )
        return context if len(context) == len(rows) else context[rows]


def _is_among(names: frozenset[str], msg: Any) -> bool:
    return msg["type"] == "sample" and msg["name"] in names


def _check_place(site: Site, plate: str, full_sizes: dict[str, int]) -> None:
    """No plate outside of the local one, and the whole of the plates inside."""
    if (outermost := site.plates[-1].name) != plate:
        raise ValueError(
            f"Expected local latent sites inside plate '{plate}' with no other plate outside of "
            f"it; got site '{site.name}' in plate '{outermost}'. Declare '{plate}' outermost, or "
            "write the guide by hand."
        )
    for inner in site.plates[:-1]:
        if (full := full_sizes[inner.name]) != inner.size:
            raise ValueError(
                f"Expected no subsampled plate inside plate '{plate}' around a latent site under "
                f"AutoAmortized; got site '{site.name}' in plate '{inner.name}' ({inner.size} of "
                f"{full} rows). Use all rows of '{inner.name}'."
            )


def _split(sites: list[Site], vectors: jax.Array, dim: int) -> Values:
    """The unconstrained values of the sites from one vector for each row of the plate."""
    free, position = {}, 0
    for site in sites:
        axis = site.batch_dim + dim
        rest = site.shape[:axis] + site.shape[axis + 1 :]
        part = vectors[:, position : (position := position + math.prod(rest))]
        free[site.name] = jnp.moveaxis(part.reshape(len(vectors), *rest), 0, axis)
    return free
