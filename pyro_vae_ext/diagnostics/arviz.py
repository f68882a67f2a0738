"""Draws of a trained guide as an ArviZ object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_ext import _trace
from pyro_vae_ext._checks import positive_int


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    num_chains: int = 4,
    posterior_predictive: bool = True,
    chunk_size: int | None = None,
    progress_bar: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draw from a trained guide and return an ArviZ object.

    The draws are independent, so that chains differ by their number alone; R-hat and effective
    sample sizes say nothing about them, whereas k-hat of ``log_weight`` does.

    Args:
        model: Program of Pyro primitives.
        guide: Program of Pyro primitives.
        args: Positional arguments of both.
        num_samples: Draws per chain.
        num_chains: Number of chains.
        posterior_predictive: Draw new data at every draw as well.
        chunk_size: Draws to run at a time, which bounds the memory; 100 by default.
        progress_bar: Show a bar over chunks on standard error.
        coords: Coordinate values by dimension name, as ArviZ takes them.
        dims: Dimension names by variable, as ArviZ takes them; plates and events are named
            after the plate and the site otherwise.
        kwargs: Keyword arguments of both.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups ``posterior``
        (auxiliary sites left out), ``posterior_predictive``, ``observed_data`` and
        ``sample_stats``, the last with ``log_weight`` of shape
        ``(num_chains, num_samples, *common_plates)``.

    Raises:
        ImportError: If ArviZ is not installed.
        ValueError: If a number is below 1, or if the pair's weights would not be those of a
            bound; the message names the site.

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
        >>> result = to_arviz(model, guide, torch.zeros(8, 2), num_samples=50, num_chains=2)
        >>> result["sample_stats"]["log_weight"].shape
        (2, 50, 8)
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "Expected ArviZ to be installed; got an import error. Install vae-ext[arviz]."
        ) from error
    positive_int("num_samples", num_samples)
    positive_int("num_chains", num_chains)
    total = num_samples * num_chains
    size = min(total, 100 if chunk_size is None else positive_int("chunk_size", chunk_size))
    particle_dim = -1 - _trace.plate_nesting(model, guide, args, kwargs)
    subsamples: dict[str, Tensor] = {}
    draws: list[_trace.Draw] = []
    starts = range(0, total, size)
    with torch.no_grad():
        for start in tqdm(starts, desc="draws", disable=not progress_bar or len(starts) < 2):
            draws.append(
                _trace.draw(
                    model,
                    guide,
                    args,
                    kwargs,
                    num_particles=min(size, total - start),
                    particle_dim=particle_dim,
                    subsamples=subsamples,
                    predictive=posterior_predictive,
                )
            )

    names: dict[str, list[str]] = {}

    def chains(parts: list[Tensor]) -> np.ndarray:
        values = np.concatenate([part.cpu().numpy() for part in parts])
        return values.reshape((num_chains, num_samples, *values.shape[1:]))

    def label(name: str, variable: _trace.Variable, leading: int) -> None:
        events = variable.value.dim() - leading - len(variable.plates)
        names[name] = [*variable.plates, *(f"{name}_dim_{i}" for i in range(events))]

    groups: dict[str, Any] = {"posterior": {}, "sample_stats": {}}
    for name, variable in draws[0].latent.items():
        label(name, variable, 1)
        groups["posterior"][name] = chains([draw.latent[name].value for draw in draws])
    groups["sample_stats"]["log_weight"] = chains([draw.log_weights.stacked() for draw in draws])
    names["log_weight"] = [name for name, _ in draws[0].log_weights.plates]
    if posterior_predictive:
        groups["posterior_predictive"] = {
            name: chains([draw.predictive[name].value for draw in draws])
            for name in draws[0].predictive
        }
    groups["observed_data"] = {}
    for name, variable in draws[0].observed.items():
        label(name, variable, 0)
        groups["observed_data"][name] = variable.value.cpu().numpy()
    if dims is not None:
        names.update({name: list(value) for name, value in dims.items()})
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.from_dict(**groups, dims=names, coords=coords)
    return arviz.from_dict(groups, dims=names, coords=coords)
