"""The ELBO of discrete latents with the score-function gradient and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vae_ext import _checks, _relaxation
from pyro_vae_ext._record import Running, Tunable, flat_event, mlp, single
from pyro_vae_ext._relaxation import Site
from pyro_vae_ext.elbos._discrete import DiscreteELBO, Run

BASELINES = ("running", "learned", "leave_one_out")


class TraceNVIL_ELBO(DiscreteELBO):
    r"""ELBO with the score-function gradient and baselines, for any discrete latent site.

    With the cost :math:`f` of a site, per row of its plates and without its scale,

    .. math:: g = r\, \partial \log q(b), \qquad r = \frac{f - C(x) - m}{\max(1, \sqrt v)},

    where :math:`C` is a network (``"learned"``), :math:`m` the running mean of :math:`f - C`
    (``"running"``), and :math:`v` the running mean of :math:`(f - C - m)^2`
    (``normalize_variance``), all from before the step. ``"leave_one_out"`` subtracts the mean of
    the other particles' :math:`r`. The network is fitted to :math:`f - m` by least squares, and
    gets no other gradient. Without normalisation the gradient is unbiased.

    Pass ``tunable(guide)`` to SVI: it declares the module ``"{site}_baseline_network"`` and the
    state ``"{site}_baseline"``, buffers of the returned module. The network's input is
    ``infer={"baseline_input": tensor}`` of the guide's site, of shape ``(*batch, width)``, or the
    site's logits, or, where it has none, a constant.

    Args:
        num_particles: Number of samples per datum, averaged.
        baselines: Any of ``"running"``, ``"learned"`` and ``"leave_one_out"``; ``()`` is
            REINFORCE.
        hidden_dims: Widths of the network's tanh layers; ``()`` is a linear baseline.
        decay: Decay of the running means.
        normalize_variance: Divide by the running standard deviation where it is above one.
        vectorize_particles: Run particles at once in an outermost plate (networks must take any
            left batch), or one after another.
        max_plate_nesting: Least number of nested plates of model and guide to expect.

    Raises:
        TypeError: At construction if ``normalize_variance`` is no bool.
        ValueError: At construction for an unknown baseline, a decay outside of [0, 1), or
            ``"leave_one_out"`` with one particle; at a step for a guide without tuning
            parameters, for a site that is discrete in one program alone, and for sites that only
            one of the programs has.

    References:
        Mnih and Gregor, 2014, *Neural Variational Inference and Learning in Belief Networks*,
        arXiv:1402.0030, section 2.3. Ranganath, Gerrish and Blei, 2014, *Black Box Variational
        Inference*, arXiv:1401.0118.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     n = pyro.sample("n", dist.Poisson(2.0))
        ...     pyro.sample("x", dist.Normal(n, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("n", dist.Poisson(pyro.param("a", torch.tensor(0.0)).exp()))
        >>> elbo = TraceNVIL_ELBO(2, baselines=("running", "leave_one_out"))
        >>> svi = SVI(model, elbo.tunable(guide), pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> loss = svi.step(torch.tensor(1.0))
    """

    remedy: ClassVar[str] = ", or use baselines without state"

    def __init__(
        self,
        num_particles: int = 1,
        *,
        baselines: Sequence[str] = ("running", "learned"),
        hidden_dims: Sequence[int] = (100,),
        decay: float = 0.9,
        normalize_variance: bool = False,
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(
            num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        names = _checked(baselines)
        if "leave_one_out" in names and num_particles < 2:
            raise ValueError(
                f"Expected num_particles >= 2 for a leave-one-out baseline; got {num_particles}."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"Expected decay in [0, 1); got {decay}.")
        if not isinstance(normalize_variance, bool):
            raise TypeError(
                "Expected normalize_variance to be a bool; got "
                f"{type(normalize_variance).__name__}."
            )
        self.baselines = names
        self.hidden_dims = _checks.widths("hidden_dims", hidden_dims)
        self.decay = decay
        self.normalize_variance = normalize_variance
        # What a site needs: the running moments, and the network.
        self._state = "running" in names or normalize_variance
        self._needs = ("state",) * self._state + ("network",) * ("learned" in names)

    def _has_parameters(self) -> bool:
        return bool(self._needs)

    def _declare(self, owner: Tunable, name: str, msg: Any) -> dict[str, Any]:
        features = _features(msg["fn"], msg["infer"])
        tuning: dict[str, Any] = {}
        if self._state:
            tuning["state"] = owner.running(f"{name}_baseline", features)
        if "learned" in self.baselines:
            make = partial(mlp, features.shape[-1], hidden_dims=self.hidden_dims)
            tuning["network"] = owner.network(f"{name}_baseline_network", make, features)
        return tuning

    def _draw(self, site: Site) -> None:
        super()._draw(site)
        if "learned" in self.baselines and torch.is_grad_enabled():
            site.features = [_features(site.fn, site.infer)]

    def _surrogate(self, run: Run, totals: Tensor) -> Tensor:
        surrogate = totals.new_zeros(())
        for site in run.sites:
            tuning = self._tuning(site.name, site.infer, *self._needs)
            signal = run.costs(site)[0].detach() / site.scale
            if "learned" in self.baselines:
                signal = signal - single(tuning["network"], site.features[0])
            spread: float | Tensor = 1.0
            if self._state:
                signal, spread = self._normalised(signal, tuning["state"])
            if "learned" in self.baselines:
                surrogate = surrogate + signal.square().mean()
            signal = signal.detach() / spread
            if "leave_one_out" in self.baselines:
                signal = signal - (signal.sum(0) - signal) / (run.num_particles - 1)
            surrogate = surrogate - _score(site, site.scale * signal) / run.num_particles
        return surrogate

    def _normalised(self, signal: Tensor, state: Running) -> tuple[Tensor, float | Tensor]:
        """The centred signal and what to divide it by; moves the state on by one step."""
        with torch.no_grad():
            # Before the first step there is nothing to correct, nor to divide by.
            fresh = state.count == 0
            weight = torch.where(fresh, torch.ones_like(state.mean), 1 - self.decay**state.count)
            spread = torch.where(fresh, weight, state.variance / weight).sqrt().clamp(min=1.0)
            mean = state.mean / weight
        centred = signal - mean if "running" in self.baselines else signal
        with torch.no_grad():
            state.mean.lerp_(signal.mean(), 1 - self.decay)
            state.variance.lerp_(centred.square().mean(), 1 - self.decay)
            state.count.add_(1)
        return centred, spread if self.normalize_variance else 1.0


def _checked(baselines: Sequence[str]) -> tuple[str, ...]:
    names = (baselines,) if isinstance(baselines, str) else tuple(baselines)
    wrong = [name for name in names if name not in BASELINES]
    if wrong or len(set(names)) < len(names) or isinstance(baselines, str):
        raise ValueError(
            "Expected baselines among 'running', 'learned', 'leave_one_out'; got "
            f"{(wrong[0] if wrong else baselines)!r}."
        )
    return names


def _score(site: Site, signal: Tensor) -> Tensor:
    """A number with the derivative of the site's log-density times the signal, row by row."""
    if site.kind is None:
        return (site.log_prob * signal).sum()
    g = site.rows(signal) * _relaxation.score(site.kind, site.logits.detach(), site.value)
    return (site.logits * g).sum()


def _features(fn: Any, infer: dict[str, Any]) -> Tensor:
    """Input of a site's network, ``(*batch, width)``."""
    if infer.get("baseline_input") is not None:
        return infer["baseline_input"].detach()
    base = _checks.unwrapped(fn)
    if not hasattr(base, "logits"):
        values = [getattr(base, name, None) for name in base.arg_constraints]
        like = next((v for v in values if isinstance(v, Tensor)), torch.zeros(()))
        return torch.ones((*fn.batch_shape, 1), dtype=like.dtype, device=like.device)
    a = base.logits.detach()
    inner = a.shape[len(base.batch_shape) :]
    shape = fn.shape()
    a = a.expand((*shape[: len(shape) - base.event_dim], *inner))
    return flat_event(a, a.dim() - len(fn.batch_shape))
