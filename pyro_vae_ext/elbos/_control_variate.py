r"""What REBAR and RELAX share: a control variate from relaxed values, and its tuning.

Every scored site has two slices. Sites before it keep their hard values, it is itself relaxed,
or conditionally relaxed given its hard value, and sites after it are relaxed at the logits that
they have there. With the site's costs :math:`f` in the hard slice, :math:`c` and
:math:`\tilde c` in the two others, and its hard value :math:`b` with logits :math:`a`,

.. math:: g = (f - \tilde c)\, \partial_a \log q(b) + \partial_a c - \partial_a \tilde c,

where the last two derivatives go along the relaxed values of the site alone. The tuning
parameters get the derivative of :math:`g^2`, whose mean is that of the variance of :math:`g`, and
no other; nothing else gets any of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vae_ext import _relaxation
from pyro_vae_ext._record import Tunable
from pyro_vae_ext._relaxation import Site
from pyro_vae_ext.elbos._discrete import DiscreteELBO, Run

Numbers = float | Mapping[str, float]


class ControlVariateELBO(DiscreteELBO):
    """Base of objectives with a control variate from relaxed values."""

    copies: ClassVar[int] = 2

    def __init__(
        self,
        num_particles: int = 1,
        *,
        temperature: Numbers = 0.5,
        eta: Numbers = 1.0,
        learn: bool = True,
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(
            num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        values = temperature.values() if isinstance(temperature, Mapping) else (temperature,)
        for value in values:
            _relaxation.check_temperature(value)
        if not isinstance(learn, bool):
            raise TypeError(f"Expected learn to be a bool; got {type(learn).__name__}.")
        self.temperature = temperature
        self.eta = eta
        self.learn = learn

    def _has_parameters(self) -> bool:
        return self.learn

    def _declare(self, owner: Tunable, name: str, msg: Any) -> dict[str, Any]:
        self._check_site(name, msg["fn"])
        like = _relaxation.logits(msg["fn"])
        start = math.log(_number("temperature", self.temperature, name))
        eta = _number("eta", self.eta, name)
        return {
            "log_temperature": owner.number(f"{name}_log_temperature", start, like),
            "eta": owner.number(f"{name}_eta", eta, like),
        }

    def _check_site(self, name: str, fn: Any) -> None:
        _relaxation.check_relaxable(type(self).__name__, name, fn)

    def _temperature(self, site: Site) -> float | Tensor:
        if not self.learn:
            return _number("temperature", self.temperature, site.name)
        return self._tuning(site.name, site.infer, "log_temperature")["log_temperature"].exp()

    def _eta(self, site: Site) -> float | Tensor:
        if not self.learn:
            return _number("eta", self.eta, site.name)
        return self._tuning(site.name, site.infer, "eta")["eta"]

    def _tuned(self, site: Site) -> list[Tensor]:
        """All parameters of a site that the variance tunes."""
        return [site.infer["tuning"]["log_temperature"], site.infer["tuning"]["eta"]]

    def _draw(self, site: Site) -> None:
        if not torch.is_grad_enabled():
            return super()._draw(site)
        kind, a = site.kind, site.logits.detach().requires_grad_()
        noise = _relaxation.uniform(a.shape, a.dtype, a.device)
        z = _relaxation.noisy(kind, a, site.noise)
        site.value = _relaxation.harden(kind, z)
        given = _relaxation.conditional(kind, a, site.value, noise)
        temperature = self._temperature(site)
        site.leaf = [a]
        site.own = [_relaxation.soften(kind, x, temperature) for x in (z, given)]
        self._keep(site, z, given)

    def _keep(self, site: Site, z: Tensor, given: Tensor) -> None:
        """Store what the member needs of the numbers behind the relaxed values."""

    def _downstream(self, site: Site, logits: Tensor) -> Tensor:
        z = _relaxation.noisy(site.kind, logits, site.noise)
        return _relaxation.soften(site.kind, z, self._temperature(site))

    def _learned(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        """For every site, numbers to add to its two relaxed costs, ``(num_particles, *plates)``."""
        return []

    def _surrogate(self, run: Run, totals: Tensor) -> Tensor:
        estimates = self._estimates(run, totals)
        surrogate = totals.new_zeros(())
        for site, g in zip(run.sites, estimates, strict=True):
            surrogate = surrogate - (site.logits * g.detach()).sum() / run.num_particles
        if not self.learn:
            return surrogate
        tuned = [parameter for site in run.sites for parameter in self._tuned(site)]
        slopes = torch.autograd.grad(
            self._variance(run, estimates), tuned, retain_graph=True, allow_unused=True
        )
        for parameter, slope in zip(tuned, slopes, strict=True):
            if slope is not None:
                surrogate = surrogate + (parameter * slope).sum()
        return surrogate

    def _estimates(self, run: Run, totals: Tensor) -> list[Tensor]:
        """Estimates of the derivatives of the expected costs in the logits of every site."""
        # A site's relaxed values stand in its own two slices alone, and terms that do not follow
        # from them have no derivative in them: one derivative of all slices serves every site.
        relaxed = self._derivatives(run, (totals[1::2] - totals[2::2]).sum())
        learned = self._learned(run)
        extra = self._derivatives(run, sum((c - given).sum() for c, given in learned))
        estimates = []
        for i, site in enumerate(run.sites):
            costs = run.costs(site)
            eta = self._eta(site)
            signal = costs[0].detach() - eta * costs[2 + 2 * i]
            g = eta * relaxed[i]
            if learned:
                signal = signal - learned[i][1]
                g = g + extra[i]
            a = site.logits.detach()
            estimates.append(g + site.rows(signal) * _relaxation.score(site.kind, a, site.value))
        return estimates

    def _variance(self, run: Run, estimates: list[Tensor]) -> Tensor:
        """Mean squares over particles and rows; its derivatives are those of the variance."""
        squares = [
            (g / site.element_scale).square().mean() * site.fn.event_shape.numel()
            for site, g in zip(run.sites, estimates, strict=True)
        ]
        return torch.stack(squares).sum()

    def _derivatives(self, run: Run, number: Any) -> list[Tensor]:
        """Derivatives of a number in the logits of every site, along its own relaxed values."""
        leaves = [leaf for site in run.sites for leaf in site.leaf]
        if isinstance(number, Tensor) and number.requires_grad:
            slopes = torch.autograd.grad(
                number,
                leaves,
                retain_graph=True,
                create_graph=self.learn,
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            slopes = tuple(torch.zeros_like(leaf) for leaf in leaves)
        found, rest = [], list(slopes)
        for site in run.sites:
            own, rest = rest[: len(site.leaf)], rest[len(site.leaf) :]
            found.append(run.gather(own, site.fn.event_dim))
        return found


def _number(what: str, values: Numbers, name: str) -> float:
    """The number of a site, out of one for all or a mapping."""
    if not isinstance(values, Mapping):
        return values
    if name not in values:
        raise ValueError(
            f"Expected a {what} for every discrete site; got none for site '{name}'. Add it to "
            "the mapping, or pass one number."
        )
    return values[name]
