"""Training over epochs of minibatches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyro.infer import SVI
from torch import Tensor

from pyro_vae_ext._checks import positive_int
from pyro_vae_ext.training import _data
from pyro_vae_ext.training._engine import Engine
from pyro_vae_ext.training._run import Options, Run
from pyro_vae_ext.training._steps import Steps
from pyro_vae_ext.training.compile import CompiledSVI
from pyro_vae_ext.training.history import History

Callback = Callable[[int, dict[str, Tensor], History], Any]
Schedule = Callable[[int], Any]


class FitResult(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
        params: Constrained parameters by name, as copies; under ``patience`` those of the best
            epoch.
        history: Losses by epoch and by step, skipped steps, and why the training stopped.
    """

    params: dict[str, Tensor]
    history: History


def fit(
    svi: SVI,
    data: Any,
    *,
    num_epochs: int,
    batch_size: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    kwargs: dict[str, Any] | None = None,
    schedules: dict[str, Schedule] | None = None,
    validation_data: Any = None,
    validation_every: int = 1,
    patience: int | None = None,
    min_delta: float = 0.0,
    callbacks: Sequence[Callback] = (),
    max_skipped: int = 100,
    compile: bool = True,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress_bar: bool = True,
) -> FitResult:
    r"""Train a pair over epochs of minibatches.

    Each step is that of the host's SVI on one batch: ``svi.step(*batch, **kwargs)``. With
    ``plate("data", N, subsample_size=len(x))`` in model and guide the loss of a batch estimates
    that of all :math:`N` data, a smaller last batch included. Losses are reported in nats per
    datum: divided by the rows of the batch and by the scale of the observed sites.

    A step whose loss or gradient is not finite changes nothing but the random numbers: parameters,
    the optimiser's state and buffers stay as they were. It is counted, and run once more to name
    the first site that is to blame. The hosts' validation is off during the steps, so that they
    can get that far, and as it is set for one run before them.

    The parameters are Pyro's, in its store and in the modules: training goes on from where they
    are. Validation uses the same random numbers each time and the modules' evaluation mode, and
    leaves those of the training alone.

    Args:
        svi: The host's ``SVI``, or one from ``compile``.
        data: An array (of torch or NumPy), a tuple or list of arrays, nested as the programs like
            it, which are their positional arguments, or a dictionary of arrays, which are keyword
            arguments; all with one leading dimension of rows. Or batches of this kind, from
            something that can be iterated again each epoch, such as a ``DataLoader`` or a list of
            tuples: then ``batch_size`` is None, and order and rest are its own affair. NumPy's
            float64 becomes the default of torch.
        num_epochs: Number of epochs.
        batch_size: Rows of a batch; None for all of them.
        shuffle: Draw a new order of the rows each epoch.
        drop_last: Leave out the last batch of an epoch if it is smaller.
        kwargs: Further keyword arguments of model and guide.
        schedules: Functions of the number of the step, from 0, by name of the keyword argument of
            model and guide that gets the value, as a tensor without dimensions. The name
            ``"learning_rate"`` sets that of the optimiser. Validation has the values of the last
            step.
        validation_data: Like ``data``.
        validation_every: Epochs from one validation to the next.
        patience: Number of validations without an improvement after which the training stops. The
            parameters of the best one are put back then, as at any other end.
        min_delta: By how much the validation loss must fall to count as an improvement.
        callbacks: Called after every epoch with its number, the constrained parameters and the
            history; the training stops if one returns something true.
        max_skipped: Number of skipped steps in all that are put up with.
        compile: Compile the step into one graph; see ``compile``. An SVI that is compiled goes on
            with its graphs.
        checkpoint: A file that the run is saved to and, if it exists, continued from; see
            ``save_checkpoint``. A run that was killed ends as if it had not been.
        checkpoint_every: Steps from one checkpoint to the next; None for the ends of epochs, at
            most one in 10 seconds, and the end of the training.
        resume: Continue from an existing checkpoint, with as many epochs as are asked for now.
        progress_bar: Show a bar over steps on standard error.

    Returns:
        Parameters and history, as :class:`FitResult`.

    Raises:
        ValueError: If an argument is out of its range, if data have no leading dimension in common
            or cannot be iterated twice, if a last batch would be scaled like a full one, or if the
            checkpoint is that of another run.
        TypeError: If an argument is of a wrong type.
        FloatingPointError: After more than ``max_skipped`` skipped steps.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> x = torch.randn(100) + 3.0
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(()))
        ...     with pyro.plate("data", 100, subsample_size=len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        >>> result = fit(svi, x, num_epochs=30, batch_size=32, compile=False, progress_bar=False)
        >>> bool(abs(result.params["loc"] - x.mean()) < 0.1), len(result.history)
        (True, 30)
    """
    positive_int("num_epochs", num_epochs)
    positive_int("validation_every", validation_every)
    positive_int("max_skipped", max_skipped, minimum=0)
    for name, value in (("patience", patience), ("checkpoint_every", checkpoint_every)):
        if value is not None and positive_int(name, value, minimum=value) < 1:
            raise ValueError(f"Expected {name} >= 1 or None; got {value}.")
    if patience is not None and validation_data is None:
        raise ValueError("Expected validation_data with patience; got None.")
    for name, schedule in (schedules or {}).items():
        if not callable(schedule):
            raise TypeError(
                f"Expected schedules of callables; got {type(schedule).__name__} for '{name}'."
            )
    source = _data.source(data, batch_size, shuffle=shuffle, drop_last=drop_last)
    validation = None
    if validation_data is not None:
        size = None if _data.is_stream(validation_data) else batch_size
        validation = _data.source(validation_data, size, shuffle=False, drop_last=False)
    if compile and isinstance(svi, CompiledSVI):
        engine = svi.engine
    else:
        engine = Engine(svi, backend="inductor" if compile else None)
    steps = Steps(engine, dict(kwargs or {}), dict(schedules or {}))
    options = Options(
        num_epochs=num_epochs,
        validation_every=validation_every,
        patience=patience,
        min_delta=min_delta,
        callbacks=tuple(callbacks),
        max_skipped=max_skipped,
        path=checkpoint,
        every=checkpoint_every,
    )
    run = Run(steps, source, validation, options)
    with steps.scheduled_rate():
        run.start(resume=resume)
        run.train(progress_bar=progress_bar)
    return FitResult(steps.params(), run.history)
