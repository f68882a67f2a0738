"""Pathfinder: Normals along the paths of an optimiser, the best of them, and weighted draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_ext._checks import positive_int
from pyro_vae_ext._flat import FlatModel, flat_model
from pyro_vae_ext._trace import MOST_NUMBERS
from pyro_vae_ext.training._paths import Search, Target, draw, find_starts

# Points that the density is asked for at once, and the size up to which it is by default asked
# for Hessians.
MOST_ROWS, LARGEST_HESSIAN = 1024, 512


class PathfinderResult(NamedTuple):
    """What :func:`pathfinder` returns. A vector has the sites in the order of ``sites``.

    Attributes:
        loc: Mean of the best Normal ``(D,)``, unconstrained.
        scale_tril: Cholesky factor of its covariance ``(D, D)``.
        elbo: Its bound on the log evidence.
        elbos: Bound of the best Normal of every path ``(num_paths,)``.
        converged: Whether a path came to its end ``(num_paths,)``.
        num_iterations: Steps of every path ``(num_paths,)``.
        reasons: What ended a path: ``"converged"`` at a mode, ``"bound"`` where the bound has
            long been falling and the mode holds no mass, ``"behind"`` where it crawls far below
            another path, ``"max_iterations"``, ``"line_search"``; the first two count as
            converged.
        locs: Means of the best Normals of all paths ``(num_paths, D)``.
        scale_trils: Their Cholesky factors ``(num_paths, D, D)``.
        low_ranks: By path, ``(loc, alpha, beta, gamma)`` of its best Normal with the covariance
            ``diag(alpha) + beta @ gamma @ beta.T``; None if it has none.
        draws: Draws of the best Normal of every path by site ``(num_paths, num_samples, *site)``.
        log_weights: Log-densities of the draws less that of the mixture of all these Normals
            ``(num_paths, num_samples)``.
        khats: Shape of the tail of the weights of every path alone ``(num_paths,)``.
        khat: That of all ``log_weights``.
        log_evidence: The log of the mean of the smoothed weights.
        resampled: By site ``(num_samples, *site)``: draws of all paths, resampled with their
            smoothed weights.
        sites: Unconstrained shape of every site, in the order of the vector.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float
    elbos: np.ndarray
    converged: np.ndarray
    num_iterations: np.ndarray
    reasons: tuple[str, ...]
    locs: Tensor
    scale_trils: Tensor
    low_ranks: tuple[Any, ...]
    draws: dict[str, Tensor]
    log_weights: np.ndarray
    khats: np.ndarray
    khat: float
    log_evidence: float
    resampled: dict[str, Tensor]
    sites: dict[str, tuple[int, ...]]


def pathfinder(
    model: Callable[..., Any],
    *args: Any,
    num_paths: int = 8,
    num_samples: int = 1000,
    num_particles: int = 25,
    max_iterations: int = 1000,
    history_size: int = 10,
    init_radius: float = 2.0,
    hessian: bool | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> PathfinderResult:
    r"""Fit Normals to a posterior, with a few hundred gradients and no step size.

    L-BFGS climbs the joint log-density :math:`\log p(u)` of the data and the unconstrained
    latents from several dispersed starts. The curvature that it meets makes a Normal at every
    iterate; the one with the best bound,

    .. math:: \mathrm{ELBO}(q) = \frac1K \sum_{k=1}^K \log p(u_k) - \log q(u_k), \qquad
              u_k \sim q,

    wins. It is often far before the mode, where there is more mass. Where ``hessian`` holds, the
    exact curvature is tried as well, at some of the iterates.

    Args:
        model: Program of Pyro primitives; its parameters are at their present values.
        args: Positional arguments of the model: the full data.
        num_paths: Number of starts. Their paths run side by side.
        num_samples: Draws of each path's best Normal, and resampled draws.
        num_particles: Draws :math:`K` of the bound at an iterate.
        max_iterations: Steps of a path.
        history_size: Steps that make a curvature of low rank.
        init_radius: The starts are uniform between plus and minus this, unconstrained.
        hessian: Try Normals with the exact Hessian; by default up to 512 unconstrained numbers.
        progress_bar: Show a bar over steps on standard error.
        kwargs: Keyword arguments of the model.

    Returns:
        The best Normal, those of all paths, their draws, and whether the paths have ended.

    Raises:
        ValueError: If an argument is out of range, a latent site is discrete, or masked and
            something reads what the mask hides, there is no latent site, a plate is subsampled, or
            the density is finite at no start; the message names the sites.
        TypeError: If a count is no int.

    References:
        Zhang, Carpenter, Gelman and Vehtari, 2022, *Pathfinder: Parallel Quasi-Newton Variational
        Inference*, JMLR 23, arXiv:2108.03782, algorithms 1-4. Gilbert and Lemarechal, 1989, *Some
        Numerical Experiments with Variable-Storage Quasi-Newton Algorithms*. Veach and Guibas,
        1995, *Optimally Combining Sampling Techniques*, sec. 3 (the weights of several Normals).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     scale = pyro.sample("scale", dist.HalfNormal(10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, scale), obs=x)
        >>> x = torch.linspace(100.0, 104.0, 50)
        >>> result = pathfinder(model, x, num_paths=4, progress_bar=False)
        >>> bool(result.converged.all()), bool(abs(result.resampled["loc"].mean() - 102) < 0.1)
        (True, True)
    """
    _check(num_paths, num_samples, num_particles, max_iterations, history_size, init_radius)
    flat = flat_model(model, args, kwargs)
    # One number of the host's generator is used up, however long the paths are.
    rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
    target = _target(flat)
    starts, good = find_starts(target, rng, num_paths, init_radius)
    if not good.any():
        raise ValueError(_no_start(flat, starts, init_radius))
    starts = starts[np.resize(np.flatnonzero(good), num_paths)]
    search = Search(
        target,
        rng,
        starts,
        num_particles=num_particles,
        max_iterations=max_iterations,
        history_size=history_size,
        hessian=flat.size <= LARGEST_HESSIAN if hessian is None else hessian,
    )
    with tqdm(total=max_iterations, disable=not progress_bar, desc="pathfinder") as bar:

        def show(steps: int, elbo: float) -> None:
            bar.set_postfix({"elbo": f"{elbo:.6g}"}, refresh=False)
            bar.update(steps - bar.n)

        outcomes = search.run(show)
    normals = [outcome.normal for outcome in outcomes]
    found = draw(target, rng, normals, num_samples)
    reasons = tuple(outcome.reason for outcome in outcomes)
    converged = np.array([reason in ("converged", "bound") for reason in reasons])
    if not converged.any():
        warnings.warn(
            f"Expected one path at least to end within {max_iterations} steps; got none. Raise "
            "max_iterations, or give the latent sites scales near 1.",
            UserWarning,
            stacklevel=2,
        )
    best = int(np.argmax(found.elbos))
    locs = np.stack([normal.loc for normal in normals])
    trils = np.stack([normal.scale_tril() for normal in normals])
    return PathfinderResult(
        loc=_tensor(flat, locs[best]),
        scale_tril=_tensor(flat, trils[best]),
        elbo=float(found.elbos[best]),
        elbos=found.elbos,
        converged=converged,
        num_iterations=np.array([outcome.num_iterations for outcome in outcomes]),
        reasons=reasons,
        locs=_tensor(flat, locs),
        scale_trils=_tensor(flat, trils),
        low_ranks=tuple(None if o.low_rank is None else o.low_rank[:4] for o in outcomes),
        draws=_constrained(flat, found.points),
        log_weights=found.log_weights,
        khats=found.khats,
        khat=found.khat,
        log_evidence=found.log_evidence,
        resampled=_constrained(flat, found.chosen),
        sites=flat.shapes,
    )


def _check(
    num_paths: int,
    num_samples: int,
    num_particles: int,
    max_iterations: int,
    history_size: int,
    init_radius: float,
) -> None:
    positive_int("num_paths", num_paths)
    positive_int("num_samples", num_samples)
    positive_int("num_particles", num_particles)
    positive_int("max_iterations", max_iterations)
    positive_int("history_size", history_size)
    if not 0 < init_radius < np.inf:
        raise ValueError(f"Expected init_radius > 0; got {init_radius}.")


def _target(flat: FlatModel) -> Target:
    """The density in NumPy, of so many points at a time as fit into memory."""
    rows = max(1, min(MOST_ROWS, MOST_NUMBERS // max(flat.widest, flat.size)))

    def density(points: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = _in_blocks(flat, flat.gradient, points, rows)
        return values, slopes

    return Target(
        flat.size,
        density,
        lambda points: _in_blocks(flat, lambda u: (flat.log_density(u),), points, rows)[0],
        # These keep what they computed, for the rows of the Hessians.
        lambda u: _in_blocks(flat, lambda u: (flat.hessian(u),), u, max(1, rows // 16))[0],
        float(torch.finfo(flat.dtype).eps),
    )


@torch.no_grad()
def _in_blocks(
    flat: FlatModel, fn: Callable[[Tensor], tuple[Tensor, ...]], points: np.ndarray, rows: int
) -> list[np.ndarray]:
    """What a function of a few points says of any number of points."""
    blocks = [
        # In double precision from here on, whatever the density is computed in.
        [part.double().cpu().numpy() for part in fn(_tensor(flat, points[first : first + rows]))]
        for first in range(0, len(points), rows)
    ]
    return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]


def _tensor(flat: FlatModel, x: np.ndarray) -> Tensor:
    return torch.as_tensor(x, dtype=flat.dtype, device=flat.device)


@torch.no_grad()
def _constrained(flat: FlatModel, points: np.ndarray) -> dict[str, Tensor]:
    """Draws ``(*shape, D)`` as values of the sites ``(*shape, *site)``."""
    shape = points.shape[:-1]
    values = flat.constrain(_tensor(flat, points.reshape(-1, flat.size)))
    return {name: value.reshape(*shape, *value.shape[1:]) for name, value in values.items()}


@torch.no_grad()
def _no_start(flat: FlatModel, starts: np.ndarray, radius: float) -> str:
    """The sites whose log-density is not finite at the starts."""
    found = flat.log_densities(_tensor(flat, starts))
    sites = [name for name, term in found.items() if not bool(term.isfinite().all())]
    names = ", ".join(f"'{name}'" for name in sites)
    return (
        f"Expected a finite log-density and gradient at one start at least; got none within "
        f"{radius} of 0, unconstrained, by {'the gradient' if not names else f'site {names}'}. "
        "Change init_radius, check the data, or bound what overflows in the model."
    )
