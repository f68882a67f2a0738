"""Draws of a trained guide as an ArviZ object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vae_ext import _draws, _psis, _trace
from pyro_vae_ext._checks import positive_int
from pyro_vae_ext.diagnostics._groups import (
    Values,
    check_joint,
    import_arviz,
    new_call,
    resampled,
    to_groups,
    warn_of_tails,
)


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    num_chains: int = 4,
    num_importance: int = 1,
    posterior_predictive: bool = True,
    log_likelihood: bool = False,
    predictions: tuple | Mapping[str, Any] | None = None,
    chunk_size: int | None = None,
    progress_bar: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    pred_coords: Mapping[str, Sequence[Any]] | None = None,
    pred_dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draw from a trained guide and return an ArviZ object.

    The draws are independent, so that chains differ by their number alone; R-hat and effective
    sample sizes say nothing about them, whereas k-hat of ``log_weight`` does, see
    :func:`importance`.

    Args:
        model: Program of Pyro primitives.
        guide: Program of Pyro primitives.
        args: Positional arguments of both.
        num_samples: Draws per chain.
        num_chains: Number of chains.
        num_importance: Draws of the guide for each draw that is exported. From 2 on, that many
            times as many are made and resampled by their smoothed weights, so that what is
            exported stands for the posterior as far as k-hat is good; some draws appear more than
            once, and there is no ``log_weight``. For guides with one joint weight.
        posterior_predictive: Draw new data at every draw as well.
        log_likelihood: Keep the log-density of every observed site and row at every draw, which
            ``az.loo`` needs.
        predictions: Arguments of a second call: a tuple, ``(x_new,)``, or a dict by name. The guide
            is run on them with the values that each draw has outside of the data's plates, and
            draws the latents of the new rows; the model draws the data, and the latents that the
            guide has not.
        chunk_size: Draws to run at a time, which bounds the memory; 100 by default.
        progress_bar: Show a bar over chunks on standard error.
        coords: Coordinate values by dimension name, as ArviZ takes them.
        dims: Dimension names by variable, as ArviZ takes them; plates and events are named
            after the plate and the site otherwise.
        pred_coords: The same as ``coords`` for the predictions, which do not share them.
        pred_dims: The same as ``dims`` for the predictions.
        kwargs: Keyword arguments of both.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups ``posterior``
        (latent, deterministic and reparameterised sites; auxiliary sites left out),
        ``posterior_predictive``, ``log_likelihood`` of shape ``(num_chains, num_samples,
        *plates)``, ``predictions`` (observed and deterministic sites at the new arguments),
        ``observed_data`` and ``sample_stats``, the last with ``log_weight`` of shape
        ``(num_chains, num_samples, *common_plates)``.

    Warns:
        UserWarning: With ``log_likelihood`` or ``num_importance``, if k-hat of the weights forbids
            to take the draws for the posterior's.

    Raises:
        ImportError: If ArviZ is not installed.
        TypeError: If ``predictions`` is neither a tuple nor a dict.
        ValueError: If a number is below 1, if the pair's weights would not be those of a bound,
            if the guide draws a site of the predictions for other rows, or if there is a weight
            per row under ``num_importance``; the message names the site or plate.

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
    import_arviz()
    positive_int("num_samples", num_samples)
    positive_int("num_chains", num_chains)
    total = num_samples * num_chains * positive_int("num_importance", num_importance)
    size = min(total, 100 if chunk_size is None else positive_int("chunk_size", chunk_size))
    new = None if predictions is None else new_call(predictions)
    particle_dim = -1 - _trace.plate_nesting(model, guide, args, kwargs)
    varying = _draws.varying(model, guide, args, kwargs, particle_dim)
    subsamples: dict[str, Tensor] = {}
    new_subsamples: dict[str, Tensor] = {}
    draws: list[_draws.Draw] = []
    predicted: list[_draws.Variables] = []
    starts = range(0, total, size)
    with torch.no_grad():
        for start in tqdm(starts, desc="draws", disable=not progress_bar or len(starts) < 2):
            options: dict[str, Any] = {
                "num_particles": min(size, total - start),
                "particle_dim": particle_dim,
                "varying": varying,
            }
            draw = _draws.draw(
                model,
                guide,
                args,
                kwargs,
                subsamples=subsamples,
                predictive=posterior_predictive,
                likelihood=log_likelihood,
                **options,
            )
            if new is not None:
                predicted.append(
                    _draws.predict(
                        model,
                        guide,
                        *new,
                        draw.shared,
                        draw.observed,
                        subsamples=new_subsamples,
                        **options,
                    )
                )
            draws.append(draw)
            common = tuple(name for name, _ in draw.log_weights.plates)
            if num_importance > 1:
                check_joint(common)

    weights = np.concatenate([draw.log_weights.stacked().cpu().numpy() for draw in draws])
    kept: Any = slice(total)
    if log_likelihood or num_importance > 1:
        smoothed, khat = _psis.psis(weights)
        warn_of_tails(khat, _psis.threshold(total))
        if num_importance > 1:
            seed = int(torch.randint(2**31 - 1, ()))
            kept = resampled(smoothed, num_samples * num_chains, seed)

    def joined(parts: list[_draws.Variables]) -> dict[str, Values]:
        return {
            name: Values(
                np.concatenate([part[name].value.cpu().numpy() for part in parts])[kept], plates
            )
            for name, (_, plates) in parts[0].items()
        }

    groups: dict[str, dict[str, Values]] = {
        "posterior": {
            **joined([draw.latent for draw in draws]),
            **joined([draw.deterministic for draw in draws]),
        },
    }
    if num_importance == 1:
        groups["sample_stats"] = {"log_weight": Values(weights, common)}
    if posterior_predictive:
        groups["posterior_predictive"] = joined([draw.predictive for draw in draws])
    if log_likelihood:
        groups["log_likelihood"] = joined([draw.log_likelihood for draw in draws])
    if predicted:
        groups["predictions"] = joined(predicted)
    groups["observed_data"] = {
        name: Values(x.value.cpu().numpy(), x.plates) for name, x in draws[0].observed.items()
    }
    return to_groups(
        groups,
        (num_chains, num_samples),
        coords=coords,
        dims=dims,
        pred_coords=pred_coords,
        pred_dims=pred_dims,
    )
