r"""Hard, relaxed and conditionally relaxed samples, as pure functions of (noise, logits).

With a uniform number :math:`u`, logits :math:`a` and :math:`z = a + \operatorname{logit} u`
(Bernoulli) or :math:`z = \log\operatorname{softmax} a - \log(-\log u)` (one-hot categorical), the
hard sample is :math:`b = H(z)` and the relaxed one :math:`\sigma(z / t)` or
:math:`\operatorname{softmax}(z / t)`. *Conditional* is a draw of :math:`z` given :math:`b`. The
log-densities here are multilinear in the value, so that a relaxed value has one, with a gradient.

References:
    Maddison, Mnih and Teh, 2017, *The Concrete Distribution*, arXiv:1611.00712. Tucker et al.,
    2017, *REBAR*, arXiv:1703.07370, appendix on the conditional samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape, scale_and_mask, sum_rightmost
from torch import Tensor
from torch.nn.functional import one_hot, softplus
from torch.overrides import TorchFunctionMode

from pyro_vae_ext._checks import distribution_name, unwrapped

BERNOULLI, ONE_HOT = "bernoulli", "one_hot"

Density = Callable[[Any, Tensor], Tensor]


def kind(fn: Any) -> str | None:
    """``"bernoulli"``, ``"one_hot"``, or None for a distribution that has no relaxation here."""
    base = unwrapped(fn)
    if base.has_rsample:
        return None
    if isinstance(base, torch.distributions.Bernoulli):
        return BERNOULLI
    if isinstance(base, torch.distributions.OneHotCategorical):
        return ONE_HOT
    return None


def logits(fn: Any) -> Tensor:
    """Logits, or normalised log-probabilities, of the shape of a sample: batch and event."""
    base = unwrapped(fn)
    return base.logits.expand(fn.shape())


def uniform(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uniform numbers strictly inside of (0, 1)."""
    limits = torch.finfo(dtype)
    noise = torch.rand(shape, dtype=dtype, device=device)
    return noise.clamp(limits.tiny, 1.0 - limits.eps)


def _softplus(x: Tensor) -> Tensor:
    # From 20 on, where torch sets the identity by default, that is off by 2e-9.
    return softplus(x, threshold=40)


def _logit(u: Tensor) -> Tensor:
    return torch.log(u) - torch.log1p(-u)


def noisy(kind: str, a: Tensor, u: Tensor) -> Tensor:
    """The number :math:`z` whose sign, or largest entry, is the hard sample."""
    if kind == BERNOULLI:
        return a + _logit(u)
    return torch.log_softmax(a, -1) - torch.log(-torch.log(u))


def harden(kind: str, z: Tensor) -> Tensor:
    """The hard sample, as floats and without a gradient."""
    if kind == BERNOULLI:
        return (z > 0).to(z.dtype)
    return one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)


def soften(kind: str, z: Tensor, temperature: float | Tensor) -> Tensor:
    """The relaxed sample."""
    if kind == BERNOULLI:
        return torch.sigmoid(z / temperature)
    return torch.softmax(z / temperature, -1)


def conditional(kind: str, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """The number :math:`z` given the hard sample ``b``, from uniform numbers ``v`` of its own."""
    if kind == BERNOULLI:
        sign = 2.0 * b - 1.0
        return sign * _softplus(_logit(v) + _softplus(sign * a))
    log_e = torch.log(-torch.log(v))
    # The category that won has the least arrival time, which does not depend on who won.
    least = (b * log_e).sum(-1, keepdim=True)
    others = torch.logaddexp(log_e - torch.log_softmax(a, -1), least)
    return -torch.where(b > 0.5, least, others)


def log_prob(kind: str, a: Tensor, value: Tensor) -> Tensor:
    """Multilinear log-density; one number per element, or per categorical."""
    if kind == BERNOULLI:
        return value * a - _softplus(a)
    return (value * torch.log_softmax(a, -1)).sum(-1)


def score(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """Derivative of :func:`log_prob` in the logits."""
    return b - (torch.sigmoid(a) if kind == BERNOULLI else torch.softmax(a, -1))


def soft_log_prob(fn: Any, value: Tensor) -> Tensor:
    """Multilinear log-density through the host's wrappers, of shape ``fn.batch_shape``."""

    def density(base: Any, value: Tensor) -> Tensor:
        return log_prob(BERNOULLI if kind(base) == BERNOULLI else ONE_HOT, base.logits, value)

    return _through_wrappers(fn, value, density, masked=True)


def unmasked_log_prob(site: Any) -> Tensor:
    """The host's log-density of a site at its value, without masks, its distribution's own too."""

    def density(base: Any, value: Tensor) -> Tensor:
        return base.log_prob(value, *site["args"], **site["kwargs"])

    return _through_wrappers(site["fn"], site["value"], density, masked=False)


def _through_wrappers(fn: Any, value: Tensor, density: Density, *, masked: bool) -> Tensor:
    name = type(fn).__name__
    if name == "Independent":
        inner = _through_wrappers(fn.base_dist, value, density, masked=masked)
        return sum_rightmost(inner, fn.reinterpreted_batch_ndims)
    if name == "ExpandedDistribution":
        batch = value.shape[: value.dim() - fn.event_dim]
        inner = _through_wrappers(fn.base_dist, value, density, masked=masked)
        return inner.expand(broadcast_shape(fn.batch_shape, batch))
    if name == "MaskedDistribution":
        inner = _through_wrappers(fn.base_dist, value, density, masked=masked)
        return scale_and_mask(inner, mask=fn._mask) if masked else inner
    return density(fn, value)


def check_relaxable(cls: str, name: str, fn: Any) -> None:
    """Raise for a site whose distribution has no relaxation; ``cls`` is who asks."""
    if kind(fn) is not None:
        return
    remedy = "Marginalise it with the host's TraceEnum_ELBO, or use TraceNVIL_ELBO."
    if isinstance(unwrapped(fn), torch.distributions.Categorical):
        remedy = "Use OneHotCategorical of the package's distributions module, or TraceNVIL_ELBO."
    raise ValueError(
        f"Expected Bernoulli or one-hot categorical latent sites under {cls}; got site '{name}' "
        f"with the distribution {distribution_name(fn)}. {remedy}"
    )


def check_temperature(value: Any) -> None:
    """Raise for a number that is no temperature; tensors are not looked into."""
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"Expected temperature > 0; got {value}.")


@dataclass
class Site:
    """A scored site of the guide; tensors are ``(num_particles, *plates, *event)``.

    Attributes:
        kind: See :func:`kind`.
        logits: Logits of the hard run, with their graph; None for a site without a relaxation.
        value: The hard value, made of the uniform numbers ``noise``.
        own: Values in the slices that belong to this site.
        leaf: What a member takes derivatives in, one tensor a run.
        features: What a member feeds its networks, ``(num_particles, *plates, width)``.
        log_prob: Log-density at the hard value, neither scaled nor masked.
        plates: Names of the plates that the site stands in, by dimension.
        order: Place among the latent sites of the guide.
    """

    name: str
    kind: Any
    fn: Any
    infer: dict[str, Any]
    logits: Any = None
    noise: Any = None
    value: Any = None
    own: list[Tensor] = field(default_factory=list)
    leaf: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    log_prob: Any = None
    scale: float | Tensor = 1.0
    plates: dict[int, str] = field(default_factory=dict)
    order: int = 0

    def rows(self, numbers: Tensor) -> Tensor:
        """Numbers of the site's rows, shaped to multiply its elements."""
        return numbers.reshape(numbers.shape + (1,) * self.fn.event_dim)

    @property
    def element_scale(self) -> float | Tensor:
        """The scale of the site's log-density, shaped to multiply its elements."""
        return self.rows(self.scale) if isinstance(self.scale, Tensor) else self.scale


class _OneNoise(TorchFunctionMode):
    """Random numbers of the first slice, repeated for the others."""

    IN_PLACE = (
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.exponential_,
        torch.Tensor.cauchy_,
        torch.Tensor.log_normal_,
    )
    FRESH = (torch.rand, torch.randn, torch.rand_like, torch.randn_like)

    def __init__(self, num_slices: int, size: int) -> None:
        super().__init__()
        self.num_slices, self.size = num_slices, size

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is torch.normal and len(args) == 2 and all(isinstance(a, Tensor) for a in args):
            mean, std = torch.broadcast_tensors(*args)
            return mean + std * self._repeat(torch.randn_like(mean))
        result = func(*args, **kwargs)
        if func in self.IN_PLACE or func in self.FRESH or func is torch.normal:
            return self._repeat(result)
        return result

    def _repeat(self, noise: Tensor) -> Tensor:
        if noise.dim() and noise.shape[0] == self.size:
            slices = noise.unflatten(0, (self.num_slices, -1))
            slices[1:] = slices[:1]
        return noise


def shared_draw(msg: Any, num_slices: int) -> Tensor:
    """The host's draw of a site whose outermost dimension is that of slices of particles.

    All slices get the same noise. Samplers that draw theirs out of sight, such as a Gamma's, get
    noise of their own in every slice.
    """
    with _OneNoise(num_slices, msg["fn"].batch_shape[0]):
        return msg["fn"](*msg["args"], **msg["kwargs"])


def random_state() -> tuple[Tensor, Tensor | None]:
    """State of the random numbers, of the CPU and of the GPU in use."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), gpu


def set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    """Put the random numbers back to a state."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
