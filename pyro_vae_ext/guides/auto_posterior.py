"""A joint posterior of any family for all latents of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from pyro_vae_ext.guides._auto import (
    Site,
    latent_sites,
    split,
)
from pyro_vae_ext.guides._base import GuideFamily
from pyro_vae_ext.guides._hierarchy import AUXILIARY, built
from pyro_vae_ext.guides._transport import TransportGuide
from pyro_vae_ext.guides.iaf import IAF


class AutoPosterior(TransportGuide):
    r"""Guide of any family over all continuous latents of a model, as one vector.

    .. math:: z \sim q_\phi, \qquad u = m + s \odot z, \qquad \theta_i = T_i(u_i), \qquad
              \log q(\theta) = \log q_\phi(z) - \sum_j \log s_j
              - \sum_i \log |\det \partial T_i / \partial u_i|,

    with :math:`T_i` the host's bijection onto the support of site :math:`i`. The start :math:`m`
    comes from ``init_loc_fn`` at the first call; it is saved with the parameters and stays as it
    is, as :math:`s` does: what is learned is the family. The guide is global. It is one joint
    density, whose weight in an importance-weighted bound is joint as well, and the number of
    latents must not change from call to call. The supports are those of the first call: a bound
    that depends on another latent is taken as it was then, as the host's AutoGuides take it.

    The family is built at the first call: call the guide once before loading a ``state_dict``.
    The parameters are ``latent.loc`` (without a gradient) and those of ``latent.family``, next to
    the buffer ``latent.scale``.

    Args:
        model: Program of Pyro primitives.
        family: Called as ``family(latent_dim, context_dim)`` with ``context_dim=None``; a class
            such as :class:`IAF`, ``functools.partial(IAF, num_flows=4)``, or a function.
        init_loc_fn: The host's function of a site that gives its start value.
        init_scale: Scale :math:`s` of a standard Normal :math:`z`, a positive number or
            ``latent_dim`` of them.
        create_plates: Function of the model's arguments that returns plates to use instead of
            new ones, as in the host's AutoGuides.

    Raises:
        ValueError: At the first call, if a latent site is discrete, masked, or in a subsampled
            plate, if there is none, or if ``init_scale`` is not positive.
        TypeError: If ``family`` builds no guide family.

    References:
        Kucukelbir, Tran, Ranganath, Gelman and Blei, 2017, *Automatic Differentiation
        Variational Inference*, arXiv:1603.00788, sec. 2.3 and eq. 5 (the unconstrained space).

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
        init_scale: Any = 0.1,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn, create_plates)
        self._family = family
        self._init_scale = init_scale
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
            scale = _scales(self._init_scale, start)
            family = built("family", self._family, len(start), None).to(start)
            latent = _Located(family, start, scale)
            self._adopt("latent", latent)
            self.latent = latent
        except Exception:
            self.prototype_trace = None  # The next call is a first one again.
            raise

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
        latent = self.latent
        vector = latent(self._aux_name("latent"))
        log_scales = split(self._sites, latent.scale.log())
        for (site, value), (_, log_scale) in zip(
            split(self._sites, vector), log_scales, strict=True
        ):
            yield site, value, -sum_rightmost(log_scale, len(site.event))

    def _posterior(self) -> tuple[GuideFamily | None, Any, Any]:
        if "latent" not in self._modules:
            return None, None, None
        return self.latent.family, self.latent.loc.detach(), self.latent.scale


class _Located(nn.Module):
    """A family that starts at a place and scale of its own, neither of them trained."""

    scale: Tensor

    def __init__(self, family: GuideFamily, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.family = family
        # A parameter, not a buffer: Pyro's store saves nothing else.
        self.loc = nn.Parameter(loc)
        self.register_buffer("scale", scale)

    def forward(self, name: str) -> Tensor:
        """Draw ``(*batch, latent_dim)`` unconstrained numbers; the site scores them unscaled."""
        return self.loc.detach() + self.scale * self.family(name, infer=dict(AUXILIARY))


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
