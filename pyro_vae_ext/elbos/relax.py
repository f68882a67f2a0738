"""The ELBO of discrete latents with the RELAX gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae_ext import _checks, _relaxation
from pyro_vae_ext._record import Tunable, flat_event, mlp, single
from pyro_vae_ext._relaxation import Site
from pyro_vae_ext.elbos._control_variate import ControlVariateELBO, Numbers
from pyro_vae_ext.elbos._discrete import Run


class TraceRELAX_ELBO(ControlVariateELBO):
    r"""ELBO with the RELAX gradient: REBAR's control variate plus a learned function.

    As :class:`TraceREBAR_ELBO`, with a function :math:`r_\psi(z, a)` of a site's numbers
    :math:`z` before relaxation, and of its logits, besides the relaxed cost:

    .. math:: c(z) = \eta f(\sigma_t(z)) + r_\psi(z, a), \qquad
              g = [f(b) - c(\tilde z)]\, \partial_a \log q(b)
                  + \partial_a c(z) - \partial_a c(\tilde z),

    where the derivatives go through :math:`z` alone. :math:`t, \eta` and :math:`\psi` are tuned
    by the derivative of :math:`g^2`; unbiased for all of them. Pass ``tunable(guide)`` to SVI: it
    declares ``"{site}_log_temperature"``, ``"{site}_eta"`` and the module ``"{site}_surrogate"``.

    Args:
        num_particles: Number of samples per datum, averaged.
        temperature: Start of the temperature; one number, or a mapping from sites to numbers.
        eta: Start of the scale of the relaxed cost; one number or a mapping.
        surrogate: Function of a width that makes the module of a site, from ``(..., width)`` to
            ``(..., 1)`` or ``(...)``; ``width`` is twice the number of elements of an event. By
            default a network that starts at zero, so that the start is REBAR.
        hidden_dims: Widths of the default network's tanh layers.
        vectorize_particles: Run particles, and hard and relaxed values, at once in an outermost
            plate (networks must take any left batch), or one after another.
        max_plate_nesting: Least number of nested plates of model and guide to expect.

    Raises:
        ValueError: At construction for a temperature that is not positive; at a step for a latent
            site without a relaxation, for a site that is discrete in one program alone, for a
            guide without tuning parameters, and for sites that only one of the programs has.

    References:
        Grathwohl, Choi, Wu, Roeder and Duvenaud, 2018, *Backpropagation through the Void*,
        arXiv:1711.00123, eq. 8-10.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     b = pyro.sample("b", dist.Bernoulli(0.5))
        ...     pyro.sample("x", dist.Normal(b, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("b", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.0))))
        >>> elbo = TraceRELAX_ELBO(hidden_dims=(8,))
        >>> svi = SVI(model, elbo.tunable(guide), pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> loss = svi.step(torch.tensor(1.0))
        >>> pyro.param("b_surrogate$$$0.weight").shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        temperature: Numbers = 0.5,
        eta: Numbers = 1.0,
        surrogate: Callable[[int], torch.nn.Module] | None = None,
        hidden_dims: Sequence[int] = (64,),
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(
            num_particles,
            temperature=temperature,
            eta=eta,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        self.hidden_dims = _checks.widths("hidden_dims", hidden_dims)
        self.surrogate = surrogate

    def _declare(self, owner: Tunable, name: str, msg: Any) -> dict[str, Any]:
        tuning = super()._declare(owner, name, msg)
        width = 2 * msg["fn"].event_shape.numel()
        make = self.surrogate or partial(mlp, hidden_dims=self.hidden_dims)
        like = _relaxation.logits(msg["fn"])
        tuning["surrogate"] = owner.network(f"{name}_surrogate", lambda: make(width), like)
        return tuning

    def _tuned(self, site: Site) -> list[Tensor]:
        return [*super()._tuned(site), *site.infer["tuning"]["surrogate"].parameters()]

    def _keep(self, site: Site, z: Tensor, given: Tensor) -> None:
        event_dim = site.fn.event_dim
        a = flat_event(site.logits.detach(), event_dim)
        site.features = [torch.cat([flat_event(x, event_dim), a], -1) for x in (z, given)]

    def _learned(self, run: Run) -> list[tuple[Tensor, Tensor]]:
        learned = []
        for site in run.sites:
            network = self._tuning(site.name, site.infer, "surrogate")["surrogate"]
            relaxed, given = (single(network, x) for x in site.features)
            learned.append((site.scale * relaxed, site.scale * given))
        return learned
