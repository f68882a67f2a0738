"""Epochs of minibatches over the host's SVI, and everything around them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_vae_ext._checks import positive_int
from numpyro_vae_ext.training import _data
from numpyro_vae_ext.training._engine import Engine
from numpyro_vae_ext.training._run import Options, Run
from numpyro_vae_ext.training.compile import CompiledSVI
from numpyro_vae_ext.training.history import History


class FitResult(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
        params: Constrained parameters, as ``svi.get_params`` gives them; with ``patience`` those
            of the best validation loss.
        history: Losses and skipped steps.
        state: The state that the parameters are of, for ``init_state``, ``svi.evaluate`` and
            its mutable state.
    """

    params: dict[str, Any]
    history: History
    state: SVIState


def fit(
    rng_key: jax.Array,
    svi: SVI,
    data: Any,
    *,
    num_epochs: int,
    batch_size: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    schedules: Mapping[str, Callable[[Any], Any]] | None = None,
    validation_data: Any = None,
    validation_every: int = 1,
    patience: int | None = None,
    min_delta: float = 0.0,
    callbacks: Iterable[Callable[[int, dict[str, Any], History], Any]] = (),
    max_skipped: int = 100,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress_bar: bool = True,
    init_state: SVIState | None = None,
    resident: bool = True,
) -> FitResult:
    r"""Train on epochs of minibatches.

    Every step is the host's ``svi.update``. Arrays lie on the device, and about a thousand steps,
    shuffled there, are one call to it; a minibatch is what a plate
    ``numpyro.plate("data", N, subsample_size=len(x))`` scales right, the last one of an epoch
    included, which may have fewer rows. The state starts as ``svi.init(rng_key, first_rows)``.

    A step whose loss or gradient is not finite changes nothing but the random key. It is counted
    and run once more to name the first site to blame.

    Losses are kept per datum: the loss of the host divided by the rows and by the scale of the
    observed sites (1 if they differ), so that those of minibatches and of other data compare.

    Args:
        rng_key: Random key.
        svi: The host's ``SVI``.
        data: An array; a tuple or list of arrays, for the positional arguments of model and guide;
            a dictionary of arrays, for keyword arguments; all with one leading dimension. Or
            something that can be iterated anew each epoch, a list or a ``DataLoader``, and gives
            batches in these forms.
        num_epochs: Number of epochs in all, those of the checkpoint included.
        batch_size: Rows of a step; None for all of them, and for an iterable of batches.
        shuffle: Draw the order of the rows anew each epoch; of arrays alone.
        drop_last: Leave out the rows at the end of an epoch that are less than a batch.
        kwargs: Further keyword arguments of model and guide.
        schedules: By name, a function of the optimiser's step, a traced number from 0 on: its
            value is a keyword argument of model and guide. ``"learning_rate"`` is that of the
            optimiser, which then is one of ``optax.inject_hyperparams``.
        validation_data: Data in the same forms, on which the loss is computed with the same random
            numbers each time.
        validation_every: Epochs between two validations.
        patience: Stop after so many validations without a better loss, and return the parameters of
            the best one.
        min_delta: What a better loss is better by, in nats per datum.
        callbacks: Functions of the epoch, the constrained parameters and the history, called after
            every epoch; a true return ends the training.
        max_skipped: Steps that may be skipped in all.
        checkpoint: Folder of a checkpoint, written at the end, and before.
        checkpoint_every: Steps between two checkpoints; by default they are at ends of epochs, ten
            seconds apart at least.
        resume: Go on from the checkpoint if there is one. The run ends as one that was never
            stopped does, bit for bit.
        progress_bar: Show a bar over the steps on standard error.
        init_state: State to start from.
        resident: Keep arrays on the device; otherwise stacks of batches are sent.

    Returns:
        Parameters, history and state.

    Raises:
        ValueError: If an argument is out of range, the data have no common number of rows, a
            constant scale does not follow the rows of a batch, or the checkpoint is another run's.
        TypeError: If an argument has the wrong type.
        FloatingPointError: If more than ``max_skipped`` steps were skipped.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model(x):
        ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", 100, subsample_size=len(x)):
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 0.1))
        >>> svi = SVI(model, guide, optax.adam(0.05), Trace_ELBO())
        >>> result = fit(jax.random.key(0), svi, jnp.full(100, 2.0), num_epochs=40, batch_size=32,
        ...              progress_bar=False)
        >>> bool(abs(result.params["loc"] - 200 / 101) < 0.1), len(result.history)
        (True, 40)
    """
    _check_counts(num_epochs, batch_size, validation_every, patience, max_skipped, checkpoint_every)
    for name, schedule in (schedules or {}).items():
        if not callable(schedule):
            raise TypeError(
                f"Expected schedules of callables; got {type(schedule).__name__} for '{name}'."
            )
    if patience is not None and validation_data is None:
        raise ValueError("Expected validation_data with patience; got None.")
    source = _data.read(data, batch_size, shuffle=shuffle, drop_last=drop_last)
    validation = None
    if validation_data is not None:
        size = None if _data.is_stream(validation_data) else batch_size
        validation = _data.read(validation_data, size, shuffle=False, drop_last=False)
    svi = svi.svi if isinstance(svi, CompiledSVI) else svi
    options = Options(
        num_epochs=num_epochs,
        validation_every=validation_every,
        patience=patience,
        min_delta=min_delta,
        callbacks=tuple(callbacks),
        max_skipped=max_skipped,
        path=checkpoint,
        every=checkpoint_every,
        resident=resident,
    )
    run = Run(rng_key, Engine(svi, kwargs or {}, schedules or {}), source, validation, options)
    run.start(init_state, resume=resume)
    run.train(progress_bar=progress_bar)
    state = run.state if run.best is None else run.best
    return FitResult(svi.get_params(state), run.history, state)


def _check_counts(
    num_epochs: int,
    batch_size: int | None,
    validation_every: int,
    patience: int | None,
    max_skipped: int,
    checkpoint_every: int | None,
) -> None:
    positive_int("num_epochs", num_epochs)
    if batch_size is not None:
        positive_int("batch_size", batch_size)
    positive_int("validation_every", validation_every)
    positive_int("max_skipped", max_skipped, 0)
    for name, value in (("patience", patience), ("checkpoint_every", checkpoint_every)):
        if value is not None and positive_int(name, value, value) < 1:
            raise ValueError(f"Expected {name} >= 1 or None; got {value}.")
