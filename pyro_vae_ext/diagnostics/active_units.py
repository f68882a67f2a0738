"""Active units: how many latent dimensions carry information on the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae_ext import _draws, _trace
from pyro_vae_ext._checks import positive_int


@dataclass(frozen=True)
class ActiveUnits:
    """Result of :func:`active_units`.

    Attributes:
        count: Number of active units, over all latent sites.
        active: By site, a boolean tensor ``(D,)``.
        variance: By site, the variance over the data of the posterior mean, ``(D,)``.
    """

    count: int
    active: dict[str, Tensor]
    variance: dict[str, Tensor]


def active_units(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 100,
    threshold: float = 0.01,
    **kwargs: Any,
) -> ActiveUnits:
    r"""Count the latent dimensions whose posterior mean varies over the data.

    Dimension :math:`d` is active if :math:`A_d = \mathrm{Var}_x(E_{q(z \mid x)}[z_d])` exceeds
    ``threshold``. The mean is estimated from draws, whose noise would add
    :math:`E_x \mathrm{Var}(z_d \mid x) / S` to the variance; here :math:`A_d` is the covariance
    over the data of the means of two independent halves of the draws, which has no such bias.

    Args:
        model: Program of Pyro primitives.
        guide: Program of Pyro primitives.
        args: Positional arguments of both.
        num_samples: Number :math:`S` of draws per datum, at least 2.
        threshold: Smallest variance of an active unit.
        kwargs: Keyword arguments of both.

    Returns:
        Count, flags and variances. Auxiliary sites are left out; a row is one element of the
        plates of a site, and an event of several dimensions is flattened.

    Raises:
        ValueError: If ``num_samples`` is below 2, or no latent site lies in a plate of at least
            two rows.

    References:
        Burda, Grosse and Salakhutdinov, 2016, arXiv:1509.00519, sec. 5.2.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_vae_ext.guides import MeanField
        >>> posterior = MeanField(latent_dim=2, context_dim=2)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.module("posterior", posterior)
        ...     with pyro.plate("data", len(x)):
        ...         posterior("z", x)
        >>> active_units(model, guide, torch.randn(50, 2)).variance["z"].shape
        torch.Size([2])
    """
    positive_int("num_samples", num_samples, minimum=2)
    particle_dim = -1 - _trace.plate_nesting(model, guide, args, kwargs)
    subsamples: dict[str, Tensor] = {}
    sizes = (num_samples // 2, num_samples - num_samples // 2)
    halves: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for size in sizes:
            draw = _draws.draw(
                model,
                guide,
                args,
                kwargs,
                num_particles=size,
                particle_dim=particle_dim,
                subsamples=subsamples,
            )
            halves.append(
                {
                    name: variable.value.mean(0).flatten(0, len(variable.plates) - 1).flatten(1)
                    for name, variable in draw.latent.items()
                    if variable.plates
                }
            )
    first, second = halves
    if not first or any(len(mean) < 2 for mean in first.values()):
        raise ValueError(
            "Expected latent sites inside a data plate of at least 2 rows; got "
            f"{ {name: len(mean) for name, mean in first.items()} }. Active units compare data."
        )
    variance = {}
    for name, mean in first.items():
        a, b = mean - mean.mean(0), second[name] - second[name].mean(0)
        variance[name] = (a * b).sum(0) / (len(mean) - 1)
    active = {name: value > threshold for name, value in variance.items()}
    return ActiveUnits(sum(int(flags.sum()) for flags in active.values()), active, variance)
