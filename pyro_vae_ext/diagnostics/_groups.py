"""Draws as groups of an ArviZ object, of whichever version is installed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Coords = Mapping[str, Sequence[Any]]
Dims = Mapping[str, Sequence[str]]


class Values(NamedTuple):
    """Numbers ``(num_chains * num_samples, *plates, *rest)``, or without draws, of one variable."""

    numbers: np.ndarray
    plates: tuple[str, ...]


Group = Mapping[str, Values]


def import_arviz() -> Any:
    """The library, or an error that names the extra."""
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "Expected ArviZ to be installed; got an import error. Install vae-ext[arviz]."
        ) from error
    return arviz


def new_call(predictions: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a second call of model and guide, positional or by name."""
    if isinstance(predictions, tuple):
        return predictions, {}
    if isinstance(predictions, Mapping):
        return (), dict(predictions)
    raise TypeError(
        "Expected predictions to be a tuple of arguments or a dict of arguments by name; got "
        f"{type(predictions).__name__}. Pass (x_new,) for one argument."
    )


def warn_of_tails(khat: np.ndarray, threshold: float) -> None:
    """Say so where ``az.loo`` of the draws would be about the guide and not the posterior."""
    bad = int(np.sum(~(khat < threshold)))
    if bad:
        of_rows = f" in {bad} of {khat.size} rows" if khat.ndim else ""
        warnings.warn(
            f"Expected k-hat below {threshold:.2f} for draws that stand for the posterior; got "
            f"{np.max(khat):.2f}{of_rows}. Leave-one-out estimates of these draws (az.loo) are "
            "those of the guide: see diagnostics.importance, and train a richer family or draw "
            "more.",
            UserWarning,
            stacklevel=3,
        )


def check_joint(plates: Sequence[str]) -> None:
    """Draws can be resampled whole if there is one weight for all rows."""
    if plates:
        raise ValueError(
            "Expected one weight for all rows under num_importance > 1; got one per row of plate "
            f"'{plates[0]}'. Use num_importance=1; diagnostics.importance has the rows' weights."
        )


def resampled(log_weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Places of ``count`` draws, each as often as its weight says, in random order.

    Systematic resampling: a draw of weight w is there ``floor(count w)`` times or once more.
    """
    top = log_weights.max()
    if top == -np.inf:
        raise ValueError(
            "Expected a weight above 0 under num_importance > 1; got none. The guide draws where "
            "the model has no density."
        )
    generator = np.random.default_rng(seed)
    sums = np.cumsum(np.exp(log_weights - top))
    marks = (np.arange(count) + generator.uniform()) / count * sums[-1]
    places = np.minimum(np.searchsorted(sums, marks, side="right"), len(sums) - 1)
    return generator.permutation(places)


def to_groups(
    groups: Mapping[str, Group],
    shape: tuple[int, int],
    *,
    coords: Coords | None,
    dims: Dims | None,
    pred_coords: Coords | None,
    pred_dims: Dims | None,
) -> Any:
    """An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x).

    Args:
        groups: By group and variable; those with "data" in their names have no draws.
        shape: Number of chains and of draws in each.
        coords: Values by dimension; those of predictions are apart.
        dims: Names by variable; plates and events name the others.
        pred_coords: The same for the group ``predictions``.
        pred_dims: The same for the group ``predictions``.
    """
    arviz = import_arviz()
    arrays: dict[str, dict[str, np.ndarray]] = {}
    names: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
    for group, variables in groups.items():
        arrays[group] = {}
        for name, (numbers, plates) in variables.items():
            leading = 0 if "data" in group else 1
            array = numbers.reshape(shape + numbers.shape[1:]) if leading else numbers
            arrays[group][name] = array
            # A log-density has no event: ArviZ leaves the last names out.
            if group != "log_likelihood" or name not in names[False]:
                events = range(numbers.ndim - leading - len(plates))
                labels = [*plates, *(f"{name}_dim_{i}" for i in events)]
                names[group == "predictions"][name] = labels
    for chosen, found in ((dims, names[False]), (pred_dims, names[True])):
        found.update({name: list(value) for name, value in (chosen or {}).items()})
    if int(arviz.__version__.split(".")[0]) >= 1:
        return arviz.from_dict(
            arrays, dims=names[False], coords=coords, pred_dims=names[True], pred_coords=pred_coords
        )
    # This version has one set of coordinates for all groups of a call.
    new = arrays.pop("predictions", None)
    result = arviz.from_dict(**arrays, dims=names[False], coords=coords)
    if new is not None:
        result.extend(arviz.from_dict(predictions=new, pred_dims=names[True], coords=pred_coords))
    return result
