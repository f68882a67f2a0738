"""Steps of an SVI on the device: many in one call, with a guard around the update.

The update is left out where the loss is not finite, which costs nothing. A gradient that is not
finite under a finite loss costs a few percent to look for in large networks. It stays in the
parameters, so steps run without, and if the parameters are not finite after a call, the call is
repeated with the whole guard. Optimisers that could hide such a gradient have it from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.optim import _NumPyroOptim

from numpyro_vae_ext import _trace
from numpyro_vae_ext.training import _nonfinite
from numpyro_vae_ext.training._data import Batch, num_rows, on_device

RATE = "learning_rate"


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers are."""
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)], bool).all()


class Guard(_NumPyroOptim):
    """An optimiser that stays where it is if the loss is not finite, which is then NaN.

    Args:
        optim: The optimiser.
        whole: Also if a gradient is not finite.
    """

    def __init__(self, optim: _NumPyroOptim, whole: bool) -> None:
        self.optim = optim
        self.whole = whole

    def get_params(self, state: Any) -> Any:
        """Those of the optimiser."""
        return self.optim.get_params(state)

    def eval_and_update(
        self,
        fn: Callable[[Any], tuple],
        state: Any,
        forward_mode_differentiation: bool = False,
    ) -> tuple[tuple[Any, Any], Any]:
        """What the host calls at a step."""
        if evaluates(self.optim):
            (loss, aux), new = self.optim.eval_and_update(fn, state)
            ok = jnp.isfinite(loss) & all_finite(self.get_params(new))
            new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)
            return (jnp.where(ok, loss, jnp.nan), aux), new
        (loss, aux), grads = jax.value_and_grad(fn, has_aux=True)(self.get_params(state))
        ok = jnp.isfinite(loss)
        if self.whole:
            ok = ok & all_finite(grads)
        new = lax.cond(
            ok,
            lambda grads, state: self.optim.update(grads, state, value=loss),
            lambda grads, state: state,
            grads,
            state,
        )
        return (jnp.where(ok, loss, jnp.nan), aux), new


def evaluates(optim: _NumPyroOptim) -> bool:
    """Whether the optimiser calls the loss as it likes, so that there is no one gradient."""
    return type(optim).eval_and_update is not _NumPyroOptim.eval_and_update


class Engine:
    """Steps of one SVI.

    Args:
        svi: The host's.
        kwargs: Further keyword arguments of model and guide.
        schedules: Functions of the step, by keyword argument.
    """

    def __init__(
        self,
        svi: SVI,
        kwargs: Mapping[str, Any],
        schedules: Mapping[str, Callable[[Any], Any]],
    ) -> None:
        self.svi = svi
        self.schedules = schedules
        # Arrays are arguments of the programs: as constants they would be copied into each.
        leaves, self._tree = jax.tree.flatten(dict(kwargs))
        self._places = [i for i, x in enumerate(leaves) if np.ndim(x) or isinstance(x, jax.Array)]
        self.extras = [jnp.asarray(leaves[i]) for i in self._places]
        self._leaves = [None if i in self._places else x for i, x in enumerate(leaves)]
        self._programs: dict[Any, Any] = {}
        self._culprit = _nonfinite.Culprit(svi)

    # --- one step ------------------------------------------------------------------------

    def keywords(self, batch: Batch, extras: list[Any], step: Any) -> dict[str, Any]:
        """All keyword arguments of a step."""
        leaves = list(self._leaves)
        for place, value in zip(self._places, extras, strict=True):
            leaves[place] = value
        scheduled = {k: self._scheduled(k, step) for k in self.schedules if k != RATE}
        return {**jax.tree.unflatten(self._tree, leaves), **batch.kwargs, **scheduled}

    def _scheduled(self, name: str, step: Any) -> jax.Array:
        value = jnp.asarray(self.schedules[name](step))
        return lax.convert_element_type(value, jnp.result_type(value))

    def _update(
        self, state: SVIState, batch: Batch, extras: list[Any], step: Any, guarded: bool
    ) -> tuple[SVIState, jax.Array]:
        optim_state = state.optim_state
        if RATE in self.schedules:
            optim_state = _rated(optim_state, self._scheduled(RATE, step))
        svi = copy.copy(self.svi)
        svi.optim = Guard(svi.optim, guarded)
        kwargs = self.keywords(batch, extras, step)
        with numpyro.validation_enabled(False):
            new, loss = svi.update(
                _own(state._replace(optim_state=optim_state)), *batch.args, **kwargs
            )
        if state.mutable_state is not None:
            kept = jax.tree.map(
                lambda a, b: jnp.where(jnp.isnan(loss), b, a),
                new.mutable_state,
                state.mutable_state,
            )
            new = new._replace(mutable_state=kept)
        return new, loss

    def init(self, rng_key: jax.Array, batch: Batch) -> SVIState:
        """The state before the first step; what is wrong is left to :meth:`check`."""
        kwargs = self.keywords(batch, self.extras, jnp.asarray(0))
        with numpyro.validation_enabled(False):
            return self.svi.init(rng_key, *batch.args, **kwargs)

    def check(self, state: SVIState, batch: Batch, step: int) -> None:
        """One run that is not compiled, where hosts and objectives see numbers and can raise."""
        kwargs = self.keywords(batch, self.extras, jnp.asarray(step))
        try:
            self.svi.evaluate(_own(state), *batch.args, **kwargs)
        except Exception as error:
            # A number that is not finite is for the rule on steps; all else is an error.
            if self._is_finite(state, batch, step):
                raise error from None

    def _is_finite(self, state: SVIState, batch: Batch, step: int) -> bool:
        """Whether the compiled loss is; also if there is none."""
        program = self.program("evaluate", lambda: self.evaluation)
        try:
            return bool(jnp.isfinite(program(state, batch, self.extras, step, state.rng_key)))
        except Exception:
            return True

    def scale(self, state: SVIState, batch: Batch) -> tuple[float, str]:
        """The scale of the observed sites, and the name of one."""
        batch = on_device(batch)
        kwargs = {**self.keywords(batch, self.extras, jnp.asarray(0)), **self.svi.static_kwargs}
        pair = _trace.Pair(self.svi.model, self.svi.guide, batch.args, kwargs)
        params = {**self.svi.get_params(state), **(state.mutable_state or {})}
        with numpyro.validation_enabled(False):
            return _trace.data_scale(params, pair, num_rows(batch))

    def blame(self, state: SVIState, batch: Batch, step: int) -> tuple[str | None, str]:
        """The site that a step is not finite for, and what is wrong there."""
        kwargs = self.keywords(batch, self.extras, jnp.asarray(step))
        with numpyro.validation_enabled(False):
            return self._culprit.name(_own(state), batch.args, kwargs)

    # --- programs ------------------------------------------------------------------------

    def program(self, name: Any, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The compiled function of that name."""
        if name not in self._programs:
            self._programs[name] = jax.jit(build())
        return self._programs[name]

    def steps(
        self,
        pick: Callable[[Any], Batch],
        extras: list[Any],
        first: Any,
        origin: Any,
        *,
        guarded: bool,
    ) -> Callable[[Any, Any], Any]:
        """Body of a loop over steps that writes their losses behind ``first``.

        ``pick`` gives the batch of the loop's number; that of the step is as much above it as
        ``origin``.
        """

        def body(i: Any, carry: Any) -> Any:
            state, losses = carry
            step = origin + i
            state, loss = self._update(state, pick(i), extras, step, guarded)
            loss = loss.astype(losses.dtype)
            return state, lax.dynamic_update_index_in_dim(losses, loss, step - first, 0)

        return body

    def result(self, carry: Any) -> tuple[SVIState, jax.Array, jax.Array]:
        """State and losses, and whether all parameters are finite."""
        state, losses = carry
        return state, losses, all_finite(self.svi.optim.get_params(state.optim_state))

    def evaluation(
        self, state: SVIState, batch: Batch, extras: list[Any], step: Any, key: jax.Array
    ) -> jax.Array:
        """The loss of a batch with random numbers of its own."""
        kwargs = self.keywords(batch, extras, step)
        with numpyro.validation_enabled(False):
            return self.svi.evaluate(_own(state._replace(rng_key=key)), *batch.args, **kwargs)

    def hides(self, state: SVIState) -> bool:
        """Whether a gradient that is not finite could leave no trace in the parameters."""
        optim = self.svi.optim
        if evaluates(optim):
            return True

        def stays(optim_state: Any, bad: jax.Array) -> jax.Array:
            params = optim.get_params(optim_state)
            whole = jax.tree.map(lambda x: jnp.full_like(x, bad), params)
            first = jax.tree.map(
                lambda x: jnp.zeros_like(x).ravel().at[:1].set(bad).reshape(x.shape), params
            )
            after = [
                optim.get_params(optim.update(grads, optim_state, value=jnp.zeros(())))
                for grads in (whole, first)
            ]
            kept = [jnp.isfinite(x).all() for x in jax.tree.leaves(after) if x.size]
            return jnp.array(kept, bool).any()

        probe = jax.jit(stays)
        return any(probe(state.optim_state, x) for x in (jnp.nan, jnp.inf, -jnp.inf))


def has_rate(optim_state: Any) -> bool:
    """Whether a step can set the optimiser's learning rate."""
    found = [_is_rated(x) for x in jax.tree.leaves(optim_state, is_leaf=_is_rated)]
    return any(found)


def _is_rated(node: Any) -> bool:
    # A schedule of the optimiser's own would write over ours.
    own = getattr(node, "hyperparams_states", {})
    return RATE in getattr(node, "hyperparams", {}) and RATE not in own


def _rated(optim_state: Any, rate: jax.Array) -> Any:
    def put(node: Any) -> Any:
        if not _is_rated(node):
            return node
        old = node.hyperparams[RATE]
        new = {**node.hyperparams, RATE: rate.astype(jnp.result_type(old))}
        return node._replace(hyperparams=new)

    return jax.tree.map(put, optim_state, is_leaf=_is_rated)


def _own(state: SVIState) -> SVIState:
    """The state in containers of its own: programs write into those of their mutable state."""
    return state._replace(mutable_state=jax.tree.map(lambda x: x, state.mutable_state))
