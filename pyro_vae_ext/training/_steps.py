"""Steps of a training run: one that is not finite changes nothing, and is blamed on a site."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroLRScheduler
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_vae_ext import _record, _trace
from pyro_vae_ext.training import _data
from pyro_vae_ext.training._data import Batch
from pyro_vae_ext.training._engine import Engine
from pyro_vae_ext.training._graph import RandomState
from pyro_vae_ext.training._nonfinite import culprit
from pyro_vae_ext.training._state import Guard, Place, buffers, modules

RATE = "learning_rate"


@contextmanager
def validation(enabled: bool) -> Iterator[None]:
    """Without the hosts' validation, or with it as the user has set it.

    Without their warnings of NaN, which name no site.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Encountered (NaN|\+inf|-inf)", UserWarning)
        with nullcontext() if enabled else pyro.validation_enabled(False):
            yield


class Outcome(NamedTuple):
    """What a step gave.

    Attributes:
        loss: A scalar tensor.
        data: Number of data that the loss is the sum over.
        skipped: None, or the site to blame, if there is one, and the reason.
    """

    loss: Tensor
    data: float
    skipped: tuple[str | None, str] | None


class Steps:
    """Steps of one SVI on batches.

    Args:
        engine: Of the SVI.
        kwargs: Further keyword arguments of the programs.
        schedules: Functions of the step, by keyword argument.
    """

    def __init__(
        self,
        engine: Engine,
        kwargs: dict[str, Any],
        schedules: dict[str, Callable[[int], Any]],
    ) -> None:
        self.svi: SVI = engine.svi
        self.engine = engine
        self.guard = Guard({})
        self._constants = kwargs
        self._schedules = schedules
        self._scales: dict[int, float] = {}
        self._rate: dict[str, Any] = {}
        self._modules: list[torch.nn.Module] = []
        self._look = True
        # Parameters that the programs have been seen to use.
        self.names: set[str] = set()

    def take(self, batch: Batch, step: int, *, look: bool = False) -> Outcome:
        """One step; ``look`` at all buffers for those that steps write."""
        self._look = self._look or look
        if batch.rows not in self._scales:
            self._add_scale(batch, step)
        if RATE in self._schedules:
            self._set_rate(float(self._schedules[RATE](step)))
        kwargs = self.kwargs(batch, step)
        # Those of NumPy and Python stay as they are: no host draws from them.
        random = torch.get_rng_state()
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        gradients = self.engine.gradients(batch.args, kwargs)
        data = self._scales[batch.rows] * batch.rows
        if gradients.finite:
            self.engine.update(gradients)
            if self._look:
                self.guard.look()
                self._look = False
            self.guard.keep()
            return Outcome(gradients.loss, data, None)
        self.engine.discard(gradients)
        self.guard.undo()
        after = RandomState.now()
        torch.set_rng_state(random)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        leaves = list(gradients.params.values())
        blamed = culprit(self.svi, batch.args, kwargs, leaves)
        self.guard.undo()
        after.restore()
        return Outcome(gradients.loss, data, blamed)

    def evaluate(self, batches: Iterator[Batch], step: int, seed: int) -> float:
        """Loss per datum of all batches, with the random numbers of a seed.

        They stay used up; modules and their buffers are left as they were.
        """
        training = [module for module in self._modules if module.training]
        losses, rows = [], 0
        try:
            for module in training:
                module.training = False
            pyro.set_rng_seed(seed)
            for batch in batches:
                loss, scale, _ = self._watched(batch, step, validate=False)
                losses.append(loss / scale)
                rows += batch.rows
        finally:
            for module in training:
                module.training = True
            self.guard.undo()
        return math.fsum(losses) / rows if rows else math.nan

    def kwargs(self, batch: Batch, step: int) -> dict[str, Any]:
        """All keyword arguments of a step."""
        scheduled: dict[str, Any] = {}
        for name, schedule in self._schedules.items():
            if name != RATE:
                value = schedule(step)
                if not isinstance(value, Tensor):
                    # For a compiled step a number would be a constant.
                    value = torch.tensor(float(value), device=_data.device(batch))
                scheduled[name] = value
        return {**self._constants, **batch.kwargs, **scheduled}

    def end_epoch(self, loss: float) -> None:
        """Let the schedulers of the host step; ``loss`` is for those that wait for a plateau."""
        if isinstance(self.svi.optim, PyroLRScheduler):
            for scheduler in self.svi.optim.optim_objs.values():
                if not isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step()
                elif not math.isnan(loss):
                    scheduler.step(loss)

    # --- parameters ----------------------------------------------------------------------

    def params(self) -> dict[str, Tensor]:
        """Copies of the constrained parameters."""
        store = pyro.get_param_store()
        return {name: store[name].detach().clone() for name in self._leaves()}

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the unconstrained parameters and of the buffers."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def put_back(self, state: dict[str, Tensor]) -> None:
        """Put back a snapshot."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                if name in state:
                    tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"param/{name}": leaf for name, leaf in self._leaves().items()}
        places = self.guard.places.items()
        return found | {f"buffer/{n}": p.tensor for n, p in places if p.tensor is not None}

    def _leaves(self) -> dict[str, Tensor]:
        used = self.svi.optim.optim_objs
        every = pyro.get_param_store().named_parameters()
        return {name: leaf for name, leaf in every if name in self.names or leaf in used}

    # --- before the first step -----------------------------------------------------------

    def probe(self, examples: list[Batch], step: int) -> None:
        """Run the pair once on a batch of each size, the first one with validation.

        What it leaves are parameters that the programs make, and random numbers used up by them.
        """
        store = pyro.get_param_store()
        known, before = set(store), RandomState.now()
        self.guard = called = Guard(buffers(modules(self.svi)))
        seen: dict[int, torch.nn.Module] = {}

        def on_call(module: torch.nn.Module, inputs: Any) -> None:
            # Also one that nobody has registered yet: as it is before its first call.
            called.add({f"called.{len(seen)}.{n}": Place(module, n) for n in module._buffers})
            seen[id(module)] = module

        hook = register_module_forward_pre_hook(on_call)
        try:
            for place, batch in enumerate(examples):
                self._add_scale(batch, step, validate=place == 0)
        finally:
            hook.remove()
        called.look()
        called.undo()
        # By the names that they have in all processes, now that they are registered.
        roots = modules(self.svi)
        self.guard = Guard(buffers(roots))
        self.guard.take_over(called)
        for root in roots.values():
            seen |= {id(module): module for module in root.modules()}
        self._modules = list(seen.values())
        if known.issuperset(store):
            before.restore()

    def _add_scale(self, batch: Batch, step: int, *, validate: bool = False) -> None:
        """Find out how many data a loss on so many rows is the sum over."""
        before = RandomState.now()
        _, scale, name = self._watched(batch, step, validate=validate)
        if not validate:
            before.restore()
            self.guard.undo()
        for rows, other in self._scales.items():
            if scale > 1.0 and math.isclose(scale, other, rel_tol=1e-6):
                raise ValueError(
                    f"Expected the scale of site '{name}' to follow the rows of a batch; got "
                    f"{scale:g} for {rows} rows and for {batch.rows}. Write "
                    'plate("data", N, subsample_size=len(x)), or pass drop_last=True.'
                )
        self._scales[batch.rows] = scale

    def _watched(self, batch: Batch, step: int, *, validate: bool) -> tuple[float, float, str]:
        """The loss, the scale of the observed sites, and the name of one."""
        msgs: list[Any] = []
        kwargs = self.kwargs(batch, step)

        def loss(validate: bool) -> float:
            msgs.clear()
            with validation(validate), _record.Watch(msgs.append):
                value, params = _trace.captured(self.svi.evaluate_loss, *batch.args, **kwargs)
            self.names.update(params)
            return value

        if validate and _data.is_finite(batch):
            before = RandomState.now()
            try:
                value = loss(True)
            except Exception:
                # A number that is not finite is for the rule on steps; all else is an error.
                before.restore()
                try:
                    value = loss(False)
                except Exception:
                    value = 0.0
                if math.isfinite(value):
                    raise
        else:
            value = loss(False)
        return value, *_trace.data_scale(msgs, batch.rows)

    # --- the learning rate ---------------------------------------------------------------

    @contextmanager
    def scheduled_rate(self) -> Iterator[None]:
        """Optimisers that are made meanwhile have the learning rate of the schedule."""
        optim = self.svi.optim
        if RATE not in self._schedules:
            yield
            return
        given, made = optim.pt_optim_args, optim.pt_optim_constructor
        if "lr" not in inspect.signature(made).parameters:
            raise ValueError(
                f"Expected an optimiser with the hyperparameter '{RATE}' to schedule; got "
                f"{getattr(made, '__name__', type(made).__name__)}. Use one with an argument lr."
            )
        if callable(given):
            optim.pt_optim_args = functools.wraps(given)(
                lambda *names: {**given(*names), **self._rate}
            )
        else:
            # The same dictionary at each step, whose number changes.
            optim.pt_optim_args = self._rate = dict(given)
        try:
            yield
        finally:
            optim.pt_optim_args = given

    def _set_rate(self, value: float) -> None:
        self._rate["lr"] = value
        for own in self.svi.optim.optim_objs.values():
            for group in getattr(own, "optimizer", own).param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(value)
                else:
                    group["lr"] = value
