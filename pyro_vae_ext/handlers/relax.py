"""Concrete relaxation of the discrete sites of a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae_ext._relaxation import (
    BERNOULLI,
    check_relaxable,
    check_temperature,
    kind,
    logits,
    noisy,
    uniform,
)
from pyro_vae_ext.distributions import RelaxedOneHotCategorical
from pyro_vae_ext.handlers._program import Program, wrapped

Temperature = float | Tensor | Callable[..., float | Tensor]


def relax(fn: Program, *, temperature: Temperature) -> Program:
    r"""Turn the discrete latent sites of a model or guide into Concrete ones.

    A Bernoulli site with logits :math:`a` becomes a binary Concrete one and a one-hot categorical
    site a Concrete one. The program gets the soft value,

    .. math::
        \tilde b = \sigma(y), \quad y = \frac{a + \operatorname{logit} u}{t}
        \qquad\text{or}\qquad
        \tilde b = e^y, \quad
        y = \log \operatorname{softmax} \frac{\log p - \log(-\log u)}{t},

    and the site is scored by the *relaxed* density, which is what makes the ELBO of a relaxed
    model and a relaxed guide a bound on the evidence of the relaxed model. Any reparameterised
    objective of the host or of this package trains the pair. ``fn`` itself stays discrete.

    The site's own value, in a trace, is :math:`y`: between two values of :math:`\tilde b` next to
    1 there is room for most of a distribution at a low temperature, while log-odds never run out of
    numbers. The weights are the same, since the change of variables is that of model and guide.
    Soft values are kept away from 0 and 1.

    Events, expanded batches, masks, plates, subsamples, continuous and observed sites stay as they
    are.

    Args:
        fn: The program. Not one whose sites are drawn by another handler, such as an AutoGuide.
        temperature: A positive number; or a tensor that broadcasts with the batch of each
            distribution, before ``to_event``; or a function of the arguments of ``fn`` that
            returns either, evaluated at every call, which makes an annealing schedule of a step
            among the arguments. Model and guide may have different temperatures.

    Raises:
        ValueError: If the temperature is not positive (tensors: with validation); at the call, if
            a latent site is discrete, and neither Bernoulli nor one-hot.

    References:
        Maddison, Mnih and Teh, 2017, *The Concrete Distribution*, arXiv:1611.00712, eq. 7, 10 and
        appendix C.3 (log-odds). Jang, Gu and Poole, 2017, *Categorical Reparameterization with
        Gumbel-Softmax*, arXiv:1611.01144.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("b", dist.Bernoulli(logits=torch.zeros(3)).to_event(1))
        >>> soft = relax(model, temperature=0.5)()
        >>> bool(((soft > 0) & (soft < 1)).all()), model().unique().numel() <= 2
        (True, True)
    """
    return wrapped(fn, temperature, check_temperature, _Relax)


class _Relax(Messenger):
    """Replaces distributions on the way out, and softens values on the way back in."""

    def __init__(self, temperature: float | Tensor) -> None:
        super().__init__()
        self.temperature = temperature
        self.kinds: dict[str, str] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        found = kind(msg["fn"])
        if found is not None:
            msg["fn"] = _relaxed(found, msg["fn"], self.temperature)
            self.kinds[msg["name"]] = found
        elif not msg["fn"].has_rsample and msg["fn"].support.is_discrete:
            check_relaxable("relax", msg["name"], msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        # Handlers outside, a trace among them, have had their look at the site by now.
        found = self.kinds.pop(msg["name"], None)
        if found is not None:
            msg["value"] = _soft(found, msg["value"])


def _relaxed(found: str, fn: Any, temperature: float | Tensor) -> Any:
    """The Concrete distribution in log-odds or log-probabilities, in the wrappers of ``fn``."""
    if isinstance(fn, dist.Independent):
        inner = _relaxed(found, fn.base_dist, temperature)
        return inner.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return _relaxed(found, fn.base_dist, temperature).mask(fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return _relaxed(found, fn.base_dist, temperature).expand(fn.batch_shape)
    if found == BERNOULLI:
        return _Logistic(logits(fn) / temperature, 1.0 / temperature)
    return RelaxedOneHotCategorical(temperature, logits=logits(fn)).base_dist


def _soft(found: str, value: Tensor) -> Tensor:
    limits = torch.finfo(value.dtype)
    soft = torch.sigmoid(value) if found == BERNOULLI else value.exp()
    return soft.clamp(limits.tiny, 1.0 - limits.eps)


class _Logistic(dist.Logistic):
    """The host's distribution, whose own sampler draws an infinite number once in a while."""

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Logistic:
        new = self._get_checked_instance(_Logistic, _instance)
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        u = uniform(shape, self.loc.dtype, self.loc.device)
        return self.loc + self.scale * noisy(BERNOULLI, torch.zeros_like(self.loc), u)
