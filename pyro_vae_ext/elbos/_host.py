"""Pyro's contract of an objective, which every base here shares.

A subclass says what is minimised, :meth:`HostELBO.differentiable_loss`; ``loss`` and
``loss_and_grads`` follow, and with them ``elbo(model, guide)`` as a ``torch.nn.Module``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae_ext import _trace
from pyro_vae_ext._checks import positive_int


class HostELBO(ELBO, ABC):
    """What Pyro's SVI calls, from a loss with a gradient."""

    def __init__(
        self,
        num_particles: int,
        *,
        vectorize_particles: bool,
        max_plate_nesting: float,
    ) -> None:
        positive_int("num_particles", num_particles)
        if not isinstance(vectorize_particles, bool):
            raise TypeError(
                "Expected vectorize_particles to be a bool; got "
                f"{type(vectorize_particles).__name__}."
            )
        super().__init__(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )

    @abstractmethod
    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The negative bound as a scalar tensor whose gradient is the chosen estimator."""

    def loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The negative bound as a number, without a gradient."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The negative bound as a scalar tensor; adds its gradient to every parameter."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach()

    def _get_trace(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: dict,
    ) -> tuple[Any, Any]:
        """Traces of one run, for the parts of Pyro's base class that ask for them."""
        return _trace.host_traces(model, guide, args, kwargs)
