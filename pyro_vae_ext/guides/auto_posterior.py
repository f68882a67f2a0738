"""A joint posterior of any family for all latents of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from pyro_vae_ext.guides._auto import (
    Site,
    latent_sites,
    split,
)
from pyro_vae_ext.guides._base import GuideFamily
from pyro_vae_ext.guides._hierarchy import built
from pyro_vae_ext.guides._located import Located, Step, checked_start, init_to_start
from pyro_vae_ext.guides._transport import TransportGuide
from pyro_vae_ext.guides.iaf import IAF
from pyro_vae_ext.guides.mean_field import MeanField


class AutoPosterior(TransportGuide):
    r"""Guide of any family over all continuous latents of a model, as one vector.

    .. math:: z \sim q_\phi, \qquad w = l + s \odot z, \qquad u = m + A w, \qquad
              \theta_i = T_i(u_i),

    .. math:: \log q(\theta) = \log q_\phi(z) - \sum_j \log s_j - \sum_j \log A_{jj}
              - \sum_i \log |\det \partial T_i / \partial u_i|,

    with :math:`T_i` the host's bijection onto the support of site :math:`i`. :math:`m` and
    :math:`A` are fixed and saved with the parameters, :math:`l` and :math:`s` are trained. Without
    a ``start``, :math:`m` is what ``init_loc_fn`` gives at the first call and :math:`A = I`; with
    one, they are the mean and the Cholesky factor of a Normal near the posterior, so that every
    direction has a scale near 1, however different those of the sites are. :math:`l` starts at 0
    and :math:`s` at ``init_scale``. The step from :math:`z` to :math:`w` is a part of the family's
    law: path gradients know it, and a reverse model reads :math:`z`. In :class:`MeanField` it is
    the family's own location and log-scale.

    The guide is global. It is one joint density, whose weight in an importance-weighted bound is
    joint as well, and the number of latents must not change from call to call. The supports are
    those of the first call: a bound that depends on another latent is taken as it was then, as the
    host's AutoGuides take it. The site of the guide is :math:`w` (auxiliary); the ``Delta`` of a
    site has its part of the other two log-determinants: its rows of the diagonal of :math:`A` are
    its scales given the sites before it.

    A latent site under a mask (``mask``, ``obs_mask``) is there as well, if nothing reads what the
    mask hides, which is looked at in the first call: that part is drawn from the family, gets the
    law :math:`N(m, 1)` in unconstrained space, and changes neither the evidence nor the posterior
    of the rest.

    The family is built at the first call: call the guide once before loading a ``state_dict``.
    The parameters are ``latent.loc`` and, with a start, ``latent.scale_tril`` (both without a
    gradient), those of ``latent.family`` and, but for :class:`MeanField`, ``latent.step.loc`` and
    ``latent.step.log_scale``.

    Args:
        model: Program of Pyro primitives.
        family: Called as ``family(latent_dim, context_dim)`` with ``context_dim=None``; a class
            such as :class:`IAF`, ``functools.partial(IAF, num_flows=4)``, or a function.
        init_loc_fn: The host's function of a site that gives its start value.
        init_scale: First value of :math:`s`, a positive number or ``latent_dim`` of them in the
            order of the sites; 0.1 by default, 1 with a ``start``.
        start: What ``training.pathfinder`` returns for the same model and arguments, or anything
            with its attributes ``loc``, ``scale_tril`` and ``sites``; instead of ``init_loc_fn``.
        create_plates: Function of the model's arguments that returns plates to use instead of
            new ones, as in the host's AutoGuides.

    Raises:
        ValueError: At the first call, if a latent site is discrete, in a subsampled plate, or
            masked and something reads what the mask hides, if there is none, if ``init_scale`` is
            not positive or of another length, or if ``start`` is of another model.
        TypeError: If ``family`` builds no guide family.

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei, 2017, *Automatic Differentiation
        Variational Inference*, arXiv:1603.00788, sec. 2.3 and eq. 5 (the unconstrained space).
        Zhang, Carpenter, Gelman and Vehtari, 2022, *Pathfinder: Parallel quasi-Newton variational
        inference*, arXiv:2108.03782, sec. 2 (the Normal to start from).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_vae_ext.guides import MeanField
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, scale), obs=x)
        >>> guide = AutoPosterior(model, MeanField)
        >>> x = torch.tensor([0.3, -0.1, 0.8])
        >>> sorted(guide(x))
        ['loc', 'scale']
        >>> guide.sample_posterior(x, sample_shape=(5,))["scale"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        family: Callable[..., GuideFamily] = IAF,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: Any = None,
        start: Any = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if start is not None:
            init_loc_fn = partial(init_to_start, start, init_loc_fn)
        super().__init__(model, init_loc_fn, create_plates)
        self._family = family
        self._init_scale = init_scale
        self._given_start = start
        self._sites: list[Site] = []

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._setup_prototype(*args, **kwargs)
            self._sites = latent_sites(self.prototype_trace)
            for site in self._sites:
                for frame in site.frames:
                    _check_whole(site, frame.name, frame.size, frame.full_size or frame.size)
            start = torch.cat(
                [
                    site.transform.inv(self.prototype_trace.nodes[site.name]["value"]).reshape(-1)
                    for site in self._sites
                ]
            )
            latent = self._located_at(start)
            self._adopt("latent", latent)
            self.latent = latent
        except Exception:
            self.prototype_trace = None  # The next call is a first one again.
            raise

    def _located_at(self, loc: Tensor) -> Located:
        """The family, put at the given start or else at this place."""
        scale_tril, scale = None, self._init_scale
        if self._given_start is not None:
            shapes = {site.name: site.batch + site.event for site in self._sites}
            loc, scale_tril = checked_start(self._given_start, shapes, loc)
            scale = 1.0 if scale is None else scale
        scale = _scales(0.1 if scale is None else scale, loc)
        family = built("family", self._family, len(loc), None).to(loc)
        if not isinstance(family, MeanField):
            return Located(family, loc, scale_tril, Step(scale))
        with torch.no_grad():
            # Its own location and scale are the step.
            family.loc.mul_(scale)
            family.log_scale.add_(scale.log())
        return Located(family, loc, scale_tril, None)

    def _prepare(self, args: tuple, kwargs: dict) -> None:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _latents(
        self, plates: dict[str, Any], args: tuple, kwargs: dict
    ) -> Iterator[tuple[Site, Tensor, Tensor | float]]:
        for site in self._sites:
            for frame in site.frames:
                plate = plates[frame.name]
                _check_whole(site, plate.name, plate.subsample_size, plate.size)
        values = split(self._sites, self.latent(self._aux_name("latent")))
        log_scales = self.latent.log_scales()
        if log_scales is None:
            for site, value in values:
                yield site, value, 0.0
            return
        parts = split(self._sites, log_scales)
        for (site, value), (_, log_scale) in zip(values, parts, strict=True):
            yield site, value, -sum_rightmost(log_scale, len(site.event))

    def _locs(self) -> dict[str, Tensor]:
        return {site.name: loc for site, loc in split(self._sites, self.latent.loc.detach())}

    def _posterior(self) -> tuple[GuideFamily | None, Any, Any]:
        if "latent" not in self._modules:
            return None, None, None
        return self.latent.family, *self.latent.composed()


def _scales(init_scale: Any, like: Tensor) -> Tensor:
    """``init_scale`` as a vector like the start, checked."""
    try:
        scale = torch.as_tensor(init_scale, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        scale = torch.zeros(())
    if scale.shape not in ((), like.shape) or not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(
            f"Expected init_scale to be a positive number or {len(like)} of them; got {init_scale}."
        )
    return scale.detach().expand(like.shape).clone()


def _check_whole(site: Site, plate: str, rows: int, total: int) -> None:
    if rows < total:
        raise ValueError(
            "Expected no latent site inside a subsampled plate under AutoPosterior; got site "
            f"'{site.name}' in plate '{plate}' ({rows} of {total} rows). Use AutoAmortized, or "
            "pass the full data."
        )
