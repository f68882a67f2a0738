r"""Where the draws of a family are put: a trained affine step, and a fixed Normal to start from.

The step, :math:`w = l + s \odot z`, is the last one of the family's own law. A handler gives it to
the site that the family is called for, so that any family has it: the host records :math:`w` under
the law with the step, the family goes on with :math:`z`. A reverse model of a family hence reads
the standardised value, and path gradients know the step's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_vae_ext.guides._base import GuideFamily
from pyro_vae_ext.guides._hierarchy import AUXILIARY


class Step(nn.Module):
    r"""The affine step :math:`w = l + s \odot z`; both vectors, ``(latent_dim,)``."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros_like(scale))
        self.log_scale = nn.Parameter(scale.log())

    def forward(self, value: Tensor) -> Tensor:
        """The value after the step."""
        return self.loc + self.log_scale.exp() * value

    def inverse(self, value: Tensor) -> Tensor:
        """The value before the step."""
        return (value - self.loc) * (-self.log_scale).exp()


class SteppedDistribution(TorchDistribution):
    """The law of a step's value, whose samples carry what those before the step do."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, inner: Any, step: Step) -> None:
        self.inner = inner
        self.step = step
        self._sample: tuple[Tensor, Tensor] | None = None
        self._alias: tuple[Tensor, Tensor] | None = None
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether the law before the step has a reparameterised sampler."""
        return self.inner.has_rsample

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> SteppedDistribution:
        """The same law over a wider batch."""
        return SteppedDistribution(self.inner.expand(torch.Size(batch_shape)), self.step)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Samples without a gradient, ``(*sample_shape, *batch_shape, latent_dim)``."""
        with torch.no_grad():
            return self._kept(self.inner.sample(sample_shape))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised samples, ``(*sample_shape, *batch_shape, latent_dim)``."""
        return self._kept(self.inner.rsample(sample_shape))

    def _kept(self, before: Tensor) -> Tensor:
        value = self.step(before)
        self._sample = (value, before)
        return value

    def carry(self, alias: Tensor) -> None:
        """Let ``alias`` stand for the last sample, also in the law before the step."""
        before = self.step.inverse(alias)
        self._alias = (alias, before)
        base = self._base()
        if hasattr(base, "carry"):
            base.carry(before)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of shape ``(*batch,)``."""
        for kept in (self._sample, self._alias):
            if kept is not None and kept[0] is value:
                before = kept[1]
                break
        else:
            before = self.step.inverse(value)
        return self.inner.log_prob(before) - self.step.log_scale.sum()

    def carried_score(self) -> tuple[Tensor, Tensor] | None:
        """Log-density of the last sample and its derivative in the value; constants."""
        base = self._base()
        carried = base.carried_score() if hasattr(base, "carried_score") else None
        if carried is None:
            return None
        log_prob, score = carried
        log_prob = sum_rightmost(log_prob, log_prob.dim() - (score.dim() - 1))
        log_scale = self.step.log_scale.detach()
        return log_prob - log_scale.sum(), score * (-log_scale).exp()

    def _base(self) -> Any:
        base = self.inner
        while hasattr(base, "base_dist"):
            base = base.base_dist
        return base


class Stepped(Messenger):
    """Gives the site called ``name`` a step; what runs inside goes on with the value before it.

    Attributes:
        value: The value of the site, once it has been run.
    """

    def __init__(self, name: str, step: Step) -> None:
        super().__init__()
        self.name = name
        self.step = step
        self.value: Tensor | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            msg["fn"] = SteppedDistribution(msg["fn"], self.step)

    def _pyro_post_sample(self, msg: Any) -> None:
        # Handlers outside come first, and have the value itself.
        if msg["name"] == self.name:
            self.value = msg["value"]
            msg["value"] = self.step.inverse(msg["value"])


class Located(nn.Module):
    r"""A family that starts from a Normal: :math:`u = m + A w`, neither of the two trained.

    Args:
        family: The family of :math:`z`.
        loc: :math:`m`.
        scale_tril: :math:`A`, the identity if None.
        step: The step from :math:`z` to :math:`w`, None for a family that has it itself.
    """

    # Parameters, not buffers: Pyro's store saves nothing else.
    scale_tril: nn.Parameter | None

    def __init__(
        self, family: GuideFamily, loc: Tensor, scale_tril: Tensor | None, step: Step | None
    ) -> None:
        super().__init__()
        self.family = family
        self.step = step
        self.loc = nn.Parameter(loc)
        self.scale_tril = None if scale_tril is None else nn.Parameter(scale_tril)

    def forward(self, name: str) -> Tensor:
        r"""Draw ``(*batch, latent_dim)`` unconstrained numbers; the site is :math:`w`."""
        value = self.drawn(name, dict(AUXILIARY))
        if self.scale_tril is not None:
            value = value @ self.scale_tril.detach().mT
        return self.loc.detach() + value

    def drawn(self, name: str, infer: Any) -> Tensor:
        """Draw :math:`w` at a site with these instructions."""
        step = self.step
        if step is None:
            return self.family(name, infer=infer)
        with Stepped(name, step) as stepped:
            self.family(name, infer=infer)
        if stepped.value is None:
            raise ValueError(
                f"Expected the family to sample the site '{name}' that it is called for; got no "
                "such site. Pass the name on to the sample statement of its latent vector."
            )
        return stepped.value

    def log_scales(self) -> Tensor | None:
        """The log-diagonal of :math:`A`: every number's scale given those before it."""
        return None if self.scale_tril is None else self.scale_tril.detach().diagonal().log()

    def composed(self) -> tuple[Tensor, Tensor]:
        """Location and scale, a vector or lower triangular, of what is before the step."""
        base = self.loc.detach()
        loc, scale = torch.zeros_like(base), torch.ones_like(base)
        if self.step is not None:
            loc, scale = self.step.loc, self.step.log_scale.exp()
        if self.scale_tril is None:
            return base + loc, scale
        root = self.scale_tril.detach()
        return base + root @ loc, root * scale


def checked_start(
    start: Any, shapes: dict[str, tuple[int, ...]], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Location and Cholesky factor of a start, for these sites with unconstrained shapes."""
    check_attributes(start)
    fault = _fault({name: tuple(shape) for name, shape in start.sites.items()}, shapes)
    if fault:
        raise ValueError(
            f"Expected start to be of this model; got {fault}. Pass what training.pathfinder "
            "returns for the same model and arguments."
        )
    loc, scale = (torch.as_tensor(x).detach().to(like) for x in (start.loc, start.scale_tril))
    size = sum(math.prod(shape) for shape in shapes.values())
    if tuple(loc.shape) != (size,) or not bool(loc.isfinite().all()):
        raise ValueError(
            f"Expected start.loc to be {size} finite numbers; got shape {tuple(loc.shape)}, "
            f"{int((~loc.isfinite()).sum())} of them not finite."
        )
    lower = tuple(scale.shape) == (size, size) and bool(
        scale.isfinite().all() and not scale.triu(1).any()
    )
    if not lower or not bool((scale.diagonal() > 0).all()):
        raise ValueError(
            f"Expected start.scale_tril to be a lower triangular matrix of shape {(size, size)} "
            f"with a positive diagonal; got shape {tuple(scale.shape)} and other numbers. Pass the "
            "Cholesky factor of a covariance."
        )
    return loc.clone(), scale.clone()


def init_to_start(start: Any, init_loc_fn: Callable[..., Any], site: Any) -> Any:
    """The value of a site at a start; the host's function for what the start does not have."""
    end = 0
    for name, shape in getattr(start, "sites", {}).items():
        begin, end = end, end + math.prod(shape)
        transform = biject_to(site["fn"].support)
        if name == site["name"] and tuple(transform.inverse_shape(site["fn"].shape())) == shape:
            part = torch.as_tensor(start.loc).detach()[begin:end]
            if len(part) == end - begin:
                return transform(part.to(_like(site["fn"])).reshape(shape))
    return init_loc_fn(site)


def _like(fn: Any) -> Tensor:
    """A tensor of the type and on the device of a distribution's parameters."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    own = [x for x in vars(fn).values() if isinstance(x, Tensor) and x.is_floating_point()]
    return own[0] if own else torch.zeros(())


def check_attributes(start: Any) -> None:
    """Refuse what is no start."""
    if not all(hasattr(start, name) for name in ("loc", "scale_tril", "sites")):
        raise TypeError(
            "Expected start with the attributes loc, scale_tril and sites; got "
            f"{type(start).__name__}. Pass what training.pathfinder returns."
        )


def _fault(given: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> str:
    """What tells the sites of a start from those of a model; nothing if they are the same."""
    for name, shape in shapes.items():
        if name not in given:
            return f"no site '{name}'"
        if given[name] != shape:
            return f"site '{name}' of unconstrained shape {given[name]} instead of {shape}"
    for name in given:
        if name not in shapes:
            return f"a site '{name}', which the model does not have"
    wrong = [new for new, old in zip(given, shapes, strict=True) if new != old]
    return f"site '{wrong[0]}' in another place of the vector" if wrong else ""


class Start(NamedTuple):
    """A Normal over the unconstrained vector of some sites, as :func:`checked_start` reads it."""

    loc: Tensor
    scale_tril: Tensor
    sites: dict[str, tuple[int, ...]]


def marginal(start: Any, hidden: frozenset[str]) -> Start:
    """The marginal of a start without the sites in ``hidden``."""
    kept = [
        name not in hidden for name, shape in start.sites.items() for _ in range(math.prod(shape))
    ]
    loc, scale = (torch.as_tensor(x).detach() for x in (start.loc, start.scale_tril))
    sites = {name: shape for name, shape in start.sites.items() if name not in hidden}
    if tuple(loc.shape) != (len(kept),) or tuple(scale.shape) != 2 * (len(kept),):
        return Start(loc, scale, sites)
    # The rows' own triangle: L L^T is the block of the covariance.
    rows = scale[torch.tensor(kept, device=scale.device)]
    triangle = torch.linalg.qr(rows.mT, mode="r").R.mT
    return Start(
        loc[torch.tensor(kept, device=loc.device)], triangle * triangle.diagonal().sign(), sites
    )
