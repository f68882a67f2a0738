r"""The contract of an objective made of log-weights.

A (model, guide) pair gives log-weights :math:`\log w_k = \log p(x, z_k) - \log q(z_k \mid x)` of
shape ``(num_particles, *common_plates)``; a member maps them to a bound per datum. The base turns
that into Pyro's whole ELBO contract: ``loss``, ``differentiable_loss``, ``loss_and_grads``, and
with them ``elbo(model, guide)`` as a ``torch.nn.Module``. ``loss`` is minimised; a bound is
maximised.

Weights are per datum. A plate that encloses every latent and every observed site is *common*: its
subsample is drawn once for all particles, its scale is taken out before particles are averaged and
put back after it. Without a common plate there is one joint weight, whose bound is valid as well.
What would make the number no bound raises. With one particle nothing is averaged, and scales and
plates are as free as in Pyro's own ``Trace_ELBO``.

With ``num_outer`` groups of particles the loss is the mean of their bounds. Particle ``k`` of group
``m`` is number ``m * num_particles + k`` of all, which run as those of one group do.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_vae_ext import _trace
from pyro_vae_ext._checks import one_of, positive_int
from pyro_vae_ext._path import Path
from pyro_vae_ext._record import PlateCollision
from pyro_vae_ext.elbos._host import HostELBO

GRADIENTS = ("reparam", "stl", "dreg", "vimco")


class LogWeightELBO(HostELBO, ABC):
    """Base of objectives that are functions of log-weights; a member defines :meth:`bound`."""

    def __init__(
        self,
        num_particles: int = 1,
        *,
        num_outer: int = 1,
        gradient: str = "reparam",
        vectorize_particles: bool = True,
        chunk_size: int | None = None,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        super().__init__(
            num_particles,
            vectorize_particles=vectorize_particles,
            max_plate_nesting=max_plate_nesting,
        )
        if chunk_size is not None:
            if not isinstance(chunk_size, int) or chunk_size < 1:
                raise ValueError(f"Expected chunk_size >= 1 or None; got {chunk_size}.")
        self.num_outer = positive_int("num_outer", num_outer)
        if vectorize_particles and num_particles == 1 and num_outer > 1:
            # The plate of the particles, which Pyro adds for several in a group alone.
            self.max_plate_nesting += 1
        self.gradient = one_of("gradient", gradient, GRADIENTS)
        if gradient == "vimco" and num_particles < 2:
            raise ValueError(
                f"Expected num_particles >= 2 under gradient='vimco'; got {num_particles}. Use "
                "TraceNVIL_ELBO or TraceREBAR_ELBO."
            )
        self.chunk_size = chunk_size

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """Bound per datum, ``(*common_plates)``, from ``(num_particles, *common_plates)``.

        Several groups are like one more plate, ``(num_particles, num_outer, *common_plates)``.
        """

    @abstractmethod
    def _others(self, log_weights: Tensor) -> Tensor:
        """Bounds with each weight replaced by what the others predict, of the weights' shape."""

    def log_weights(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Log-weights of one draw of all particles, without the plates' scale.

        Args:
            model: Program of Pyro primitives.
            guide: Program of Pyro primitives.
            args: Positional arguments of both.
            kwargs: Keyword arguments of both.

        Returns:
            ``(num_particles, *common_plates)``, or ``(num_outer, num_particles, *common_plates)``
            if there are several groups.

        Raises:
            ValueError: If the weights would not be those of a bound; the message names the site.
        """
        weights, _, _ = self._weights(model, guide, args, kwargs, path=None)
        if self.num_outer == 1:
            return weights
        return weights.reshape(self.num_outer, self.num_particles, *weights.shape[1:])

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The negative bound as a scalar tensor whose gradient is the chosen estimator."""
        joint = self.num_particles == 1  # Nothing is averaged inside of a logarithm.
        path = None
        if self.gradient in ("stl", "dreg") and torch.is_grad_enabled():
            path = partial(Path, weigh=self.gradient == "dreg" and not joint)
        weights, scale, score = self._weights(model, guide, args, kwargs, path=path, joint=joint)
        if joint:
            return -weights.mean()
        weights = self._grouped(weights)
        bound = self.bound(weights)
        if score is not None:
            with torch.no_grad():
                signal = bound - self._others(weights)
            score = self._grouped(score)
            # Zero, with the gradient of the scores.
            bound = bound + (signal * (score - score.detach())).sum(0)
        if self.num_outer > 1:
            bound = bound.mean(0)
        return -(bound if isinstance(scale, float) and scale == 1.0 else scale * bound).sum()

    def _grouped(self, particles: Tensor) -> Tensor:
        """``(num_particles, [num_outer], *common_plates)``: groups are like one more plate."""
        if self.num_outer == 1:
            return particles
        groups = particles.reshape(self.num_outer, self.num_particles, *particles.shape[1:])
        return groups.transpose(0, 1)

    def _weights(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        *,
        path: Callable[[], Path] | None,
        joint: bool = False,
    ) -> tuple[Tensor, float | Tensor, Tensor | None]:
        """Log-weights of the particles of all groups, their scale, and the scores of VIMCO."""
        if self.vectorize_particles and self.num_outer * self.num_particles > 1:
            if self.max_plate_nesting < float("inf"):
                try:
                    return self._run_all(model, guide, args, kwargs, path, joint)
                except PlateCollision:
                    pass  # Another pair than the last one, with more plates.
            self.max_plate_nesting = 1 + _trace.plate_nesting(model, guide, args, kwargs)
        return self._run_all(model, guide, args, kwargs, path, joint)

    def _run_all(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        path: Callable[[], Path] | None,
        joint: bool,
    ) -> tuple[Tensor, float | Tensor, Tensor | None]:
        """Run all particles, vectorised, looped or chunked."""
        count = self.num_outer * self.num_particles
        stack = self.vectorize_particles and count > 1
        size = count if self.chunk_size is None else self.chunk_size
        size = min(size, count) if stack else 1
        recompute = self.chunk_size is not None and count > 1 and torch.is_grad_enabled()

        subsamples: dict[str, Tensor] = {}
        runs: dict[int, _trace.LogWeights] = {}
        paths = {start: path() for start in range(0, count, size) if path is not None}

        def run(start: int) -> tuple[Tensor, Tensor | None]:
            result = _trace.run(
                model,
                guide,
                args,
                kwargs,
                num_particles=min(size, count - start),
                particle_dim=-int(self.max_plate_nesting) if stack else None,
                subsamples=subsamples,
                path=paths.get(start),
                gradient=self.gradient if joint or torch.is_grad_enabled() else None,
                joint=joint,
            )
            # A second run of a chunk, in the backward pass, changes nothing here.
            runs.setdefault(start, result)
            score = None if result.score is None else result.stacked(result.score)
            return result.stacked(), score

        chunks = [
            # A chunk's activations are recomputed in the backward pass, one chunk at a time.
            checkpoint(run, start, use_reentrant=False) if recompute else run(start)
            for start in range(0, count, size)
        ]
        weights, score = chunks[0]
        if len(chunks) > 1:
            weights = torch.cat([chunk[0] for chunk in chunks])
            scores = [score for _, score in chunks if score is not None]
            score = torch.cat(scores) if scores else None
        if self.gradient == "vimco" and torch.is_grad_enabled() and score is None:
            warnings.warn(
                "Expected discrete latent sites under gradient='vimco'; got none. Use "
                "gradient='reparam'.",
                UserWarning,
                stacklevel=2,
            )
        if self.gradient == "dreg" and paths and not joint:
            every = torch.softmax(self._grouped(weights.detach()), 0)
            if self.num_outer > 1:
                every = every.transpose(0, 1).reshape(weights.shape)
            shares = every.split(size)
            for (start, state), share in zip(paths.items(), shares, strict=True):
                state.weights = runs[start].in_layout(share)
        return weights, runs[0].scale, score
