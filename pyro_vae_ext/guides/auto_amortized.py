"""An amortised posterior for the latents of one plate, next to a joint one for the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

from pyro import poutine
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from pyro_vae_ext.guides._auto import (
    Site,
    latent_sites,
    split,
)
from pyro_vae_ext.guides._base import GuideFamily
from pyro_vae_ext.guides._hierarchy import AUXILIARY, built
from pyro_vae_ext.guides._located import check_attributes, marginal
from pyro_vae_ext.guides._queries import QueriedGuide
from pyro_vae_ext.guides.auto_posterior import AutoPosterior
from pyro_vae_ext.guides.iaf import IAF

# Structures of arguments to remember: those of ragged batches, of test data, of lengths.
_MEMORY = 64


class AutoAmortized(QueriedGuide):
    r"""Guide with an encoder for the latents of one plate, and a joint family for the others.

    .. math:: q(\theta, z_{1..N}) = q_\psi(\theta) \prod_n q_\phi(z_n \mid \mathrm{encoder}(x)_n).

    The *local* latents of a row, those inside ``plate``, are unconstrained by the host's
    ``biject_to`` and drawn as one vector from ``family(latent_dim, context_dim)`` on the row's
    context, which :math:`T` maps back. All other latents are global: they belong to an
    :class:`AutoPosterior` of ``global_family``, which alone uses ``init_loc_fn`` and
    ``init_scale``. Without global latents an importance-weighted bound has weights per datum.

    Rows may change from call to call: another subsample, a ragged last batch, new data. The model
    is run again, unseen, when the shapes of its arguments or its plain scalars are new. A guide's
    plate draws the subsample and the model replays it, also where the model names the rows
    itself (``subsample=``): return such a plate from ``create_plates``.

    The families are built at the first call: call the guide once before loading a
    ``state_dict``. The parameters are those of ``encoder``, of ``family`` and, with global
    latents, of ``global_guide``.

    Masked latents are those of :class:`AutoPosterior`, local ones with :math:`m = 0`; the mask may
    be another one at every call.

    Args:
        model: Program of Pyro primitives; ``plate`` is its outermost plate around local latents.
        encoder: Called with the arguments of the model inside the plate; returns one row of
            context per row of the plate, ``(N, context_dim)`` for all rows or
            ``(B, context_dim)`` for those of the subsample. A module's parameters are the guide's.
        family: Called as ``family(latent_dim, context_dim)``; a class such as :class:`IAF`,
            ``functools.partial(IAF, num_flows=4)``, or a function.
        plate: Name of the plate of the local latents.
        global_family: The family of the global latents, called with ``context_dim=None``;
            ``family`` by default.
        init_loc_fn: The host's function of a site that gives the start of the global latents.
        init_scale: That of :class:`AutoPosterior` for the global latents.
        start: A Normal for the global latents to start from, as in :class:`AutoPosterior`: what
            ``training.pathfinder`` returns for the model, of which the marginal of the global
            sites is taken, or for the global sites alone.
        create_plates: Function of the model's arguments that returns plates to use instead of
            new ones, as in the host's AutoGuides.

    Raises:
        ValueError: At a call, if a latent site is discrete, or masked and something reads what the
            mask hides, if no latent site is in ``plate``, if one has another plate outside of it or
            in it a subsampled one, if ``start`` is of another model or there is no global site for
            it, or if the encoder's rows are not those of the plate.
        TypeError: If ``family`` builds no guide family.

    References:
        Kingma and Welling, 2014, *Auto-Encoding Variational Bayes*, arXiv:1312.6114, sec. 2
        (local latents) and appendix F (global ones). Agrawal and Domke, 2021, *Amortized
        Variational Inference for Simple Hierarchical Models*, arXiv:2111.03144.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(loc, torch.ones(2)).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> guide = AutoAmortized(model, torch.nn.Linear(2, 8))
        >>> guide(torch.zeros(10, 2))["z"].shape
        torch.Size([10, 2])
        >>> guide.sample_posterior(torch.zeros(3, 2), sample_shape=(5,))["z"].shape
        torch.Size([5, 3, 2])
    """

    _reads_arguments = True

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: Callable[..., Tensor],
        *,
        family: Callable[..., GuideFamily] = IAF,
        plate: str = "data",
        global_family: Callable[..., GuideFamily] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: Any = None,
        start: Any = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn, create_plates)
        self.encoder = encoder
        self.plate = plate
        self._family = family
        self._sites: list[Site] = []
        self._found: dict[Hashable, tuple[Any, Any, list[Site]]] = {}
        self.global_guide = AutoPosterior(
            poutine.block(model, hide_fn=partial(_is_local, plate)),
            family if global_family is None else global_family,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            start=start,
        )

    def _check_prototype(self, part_trace: Any) -> None:
        """The host's check of a part's sites: the global part's model is this one's."""

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        sites = latent_sites(self.prototype_trace)
        self._sites = [_row(site, self.plate) for site in sites if _is_in(site.frames, self.plate)]
        if not self._sites:
            names = sorted({frame.name for site in sites for frame in site.frames})
            raise ValueError(
                f"Expected a plate '{self.plate}' around latent sites of the model; got latent "
                f"sites in the plates {names or 'none'}. Name the plate of the local latents, or "
                "use AutoPosterior."
            )
        self._hand_on_start(len(sites) > len(self._sites))
        if len(sites) > len(self._sites) and self.global_guide.prototype_trace is None:
            self.global_guide._setup_prototype(*args, **kwargs)

    def _hand_on_start(self, has_global: bool) -> None:
        """The global part's share of a start: the marginal of its sites."""
        start = self.global_guide._given_start
        if start is None:
            return
        if not has_global:
            raise ValueError(
                "Expected a latent site outside of the plate for start under AutoAmortized; got "
                f"sites in plate '{self.plate}' alone. Leave start out: the encoder's rows have "
                "none."
            )
        check_attributes(start)
        local = frozenset(site.name for site in self._sites)
        if local & set(start.sites):
            self.global_guide._given_start = marginal(start, local)

    def _prepare(self, args: tuple, kwargs: dict) -> None:
        key = _structure((args, kwargs))
        if key not in self._found:
            self._setup_prototype(*args, **kwargs)
            known = {} if len(self._found) >= _MEMORY else self._found
            found = (self.prototype_trace, self._prototype_frames, self._sites)
            self._found = {**known, key: found}
        self.prototype_trace, self._prototype_frames, self._sites = self._found[key]

    def _latents(
        self, plates: dict[str, Any], args: tuple, kwargs: dict
    ) -> Iterator[tuple[Site, Tensor, Tensor | float]]:
        if self.global_guide.prototype_trace is not None:
            yield from self.global_guide._latents(plates, args, kwargs)
        plate = plates[self.plate]
        with plate:
            first = "family" not in self._modules
            if first and "encoder" in self._modules:
                self._adopt("encoder", self._modules["encoder"])
            context = self._context(plate, args, kwargs)
            size = sum(site.size for site in self._sites)
            if first:
                family = built("family", self._family, size, context.shape[-1]).to(context)
                self._adopt("family", family)
                self.family = family
            family = self.family
            if size != family.latent_dim:
                raise ValueError(
                    f"Expected {family.latent_dim} unconstrained numbers per row of plate "
                    f"'{self.plate}', as at the first call; got {size}. Only the number of rows "
                    "may change: build a guide for each size of the plates inside."
                )
            vector = family(self._aux_name("local"), context, infer=dict(AUXILIARY))
        for site, value in split(self._sites, vector):
            yield site, value, 0.0

    def _locs(self) -> dict[str, Tensor]:
        return self.global_guide._locs() if self.global_guide.prototype_trace is not None else {}

    def _context(self, plate: Any, args: tuple, kwargs: dict) -> Tensor:
        """The encoder's rows that are drawn, at the plate's dimension."""
        context = self.encoder(*args, **kwargs)
        rows, total = plate.subsample_size, plate.size
        if (
            not isinstance(context, Tensor)
            or context.dim() != 2
            or len(context) not in (rows, total)
        ):
            shape = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                f"Expected the encoder's rows to match plate '{self.plate}' ({total} rows, {rows} "
                f"of them drawn); got a context of shape {shape}. Return one row of context per "
                "row of the plate."
            )
        if len(context) != rows:
            context = context[plate.indices.to(context.device)]
        return context.reshape((rows, *(1,) * (-1 - plate.dim), context.shape[-1]))


def _is_in(frames: Any, plate: str) -> bool:
    return any(frame.name == plate for frame in frames)


def _is_local(plate: str, msg: Any) -> bool:
    return msg["type"] == "sample" and _is_in(msg["cond_indep_stack"], plate)


def _row(site: Site, plate: str) -> Site:
    """The site as a part of one row's vector."""
    names = [frame.name for frame in site.frames]
    place = names.index(plate)
    if place > 0:
        raise ValueError(
            f"Expected local latent sites inside plate '{plate}' with no other plate outside of "
            f"it; got site '{site.name}' in plate '{names[0]}'. Declare '{plate}' outermost, or "
            "write the guide by hand."
        )
    for frame in site.frames[1:]:
        if frame.full_size is not None and frame.size < frame.full_size:
            raise ValueError(
                f"Expected no subsampled plate inside plate '{plate}' around a latent site under "
                f"AutoAmortized; got site '{site.name}' in plate '{frame.name}' ({frame.size} of "
                f"{frame.full_size} rows). Use all rows of '{frame.name}'."
            )
    batch = list(site.batch)
    batch[site.frames[0].dim] = 1
    return site._replace(batch=tuple(batch))


def _structure(value: Any) -> Hashable:
    """What the sizes of plates may depend on: equal structures have equal plates."""
    if hasattr(value, "shape"):
        return ("array", *map(int, value.shape))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_structure, value))
    if isinstance(value, dict):
        return ("dict", *((key, _structure(item)) for key, item in value.items()))
    if value is None or isinstance(value, bool | int | float | str):
        return (type(value).__name__, value)
    return object()  # Unequal to everything: the model is run again.
