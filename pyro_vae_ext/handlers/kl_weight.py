"""A weight on the divergence of the latent sites of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae_ext._checks import check_weight, unwrapped
from pyro_vae_ext.handlers._program import Program, wrapped

Weight = float | Tensor | Callable[..., float | Tensor]


def kl_weight(fn: Program, *, weight: Weight) -> Program:
    r"""Weigh the Kullback-Leibler divergence of a model or guide: KL annealing.

    The log-densities of latent sites are multiplied by a weight :math:`w`; observed sites are
    left alone. With both programs wrapped, the evidence lower bound becomes

    .. math::
        \mathbb E_{q(z \mid x)} \big[\log p(x \mid z)\big]
        - w\, \mathrm{KL}\big(q(z \mid x) \,\|\, p(z)\big),

    which is a bound on the evidence for :math:`w \ge 1` and none below. A schedule from 0 to 1
    lets the decoder make use of the latents before the divergence can close them.

    Of a guide, auxiliary sites and reverse models count with the latents: the weight is that of
    the guide's total :math:`\log q - \log r`. A factor of the model counts as observed. A factor
    is a guide's if it was given ``has_rsample``, as those of the families here are.

    The weight enters the host's scale of the site, beside those of plates. Objectives that are an
    expectation of log-densities are right with it: the host's ``Trace_ELBO``,
    ``TraceMeanField_ELBO`` and ``TraceGraph_ELBO``, ours with one particle, and ours for discrete
    latents with any number. Inside of an importance-weighted bound a weight would be an exponent of
    the densities in a weight, and the result no weighted divergence: ours raise, whatever the
    number. The host's ``RenyiELBO`` does not know. Evaluate the plain pair.

    Args:
        fn: The program. Handlers that observe a site belong inside of this one.
        weight: A number of at least 0; or a tensor that broadcasts with the batch of every
            latent site; or a function of the arguments of ``fn`` that returns either, evaluated at
            every call, which makes a schedule of a step among the arguments.

    Raises:
        ValueError: If the weight is negative (tensors: with validation). At a step of our
            objectives, if one of model and guide is weighted and the other is not, or if the
            bound is an importance-weighted one.
        TypeError: If the program is a messenger that runs the model itself, such as
            ``AutoNormalMessenger``.

    References:
        Bowman, Vilnis, Vinyals, Dai, Jozefowicz and Bengio, 2016, *Generating Sentences from a
        Continuous Space*, arXiv:1511.06349, sec. 3.1. Higgins et al., 2017, *beta-VAE*, ICLR,
        eq. 4.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(x, step):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x, step):
        ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.7))
        >>> def weight(x, step):
        ...     return min(1.0, step / 1000)
        >>> pair = kl_weight(model, weight=weight), kl_weight(guide, weight=weight)
        >>> svi = SVI(*pair, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        >>> losses = [svi.step(torch.tensor(1.0), step) for step in range(3)]
    """
    return wrapped(fn, weight, check_weight, _Weigh)


class _Weigh(Messenger):
    """Multiplies the scale of latent sites, and keeps the scale that it was."""

    def __init__(self, weight: float | Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or (msg["is_observed"] and not _of_a_guide(msg["fn"])):
            return
        infer, weight = msg["infer"], self.weight
        if "kl_weight" in infer:
            weight = weight * infer["kl_weight"]
        # A copy: the dict is the user's own. Divisions by the scale must not be by a weight of 0.
        msg["infer"] = {
            **infer,
            "kl_weight": weight,
            "unweighted_scale": infer.get("unweighted_scale", msg["scale"]),
        }
        msg["scale"] = self.weight * msg["scale"]


def _of_a_guide(fn: Any) -> bool:
    """Whether an observed site is a factor of a guide: these alone must say how they came about."""
    base = unwrapped(fn)
    return type(base).__name__ == "Unit" and "has_rsample" in vars(base)
