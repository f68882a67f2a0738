"""A compiled SVI: the host's own, its steps as one program."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState


def compile(svi: SVI) -> CompiledSVI:
    """Compile the steps of an SVI.

    The result is used as the SVI itself is. What it computes is what the host computes; the memory
    of a state goes to the next one, so that there is one copy of parameters and optimiser.

    Args:
        svi: The host's ``SVI``, initialised or not.

    Returns:
        The compiled SVI.

    Raises:
        TypeError: If ``svi`` is no ``SVI``.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model(x):
        ...     z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     numpyro.sample("z", dist.Normal(numpyro.param("loc", 0.0), 0.3))
        >>> svi = compile(SVI(model, guide, optax.adam(0.1), Trace_ELBO()))
        >>> x = jnp.full(10, 2.0)
        >>> state = svi.init(jax.random.key(0), x)
        >>> for _ in range(200):
        ...     state, loss = svi.update(state, x)
        >>> bool(abs(svi.get_params(state)["loc"] - 20 / 11) < 0.2)
        True
    """
    return CompiledSVI(svi)


class CompiledSVI(SVI):
    """An SVI whose ``update`` and ``evaluate`` are compiled; all else is the given SVI's own.

    Arrays and numbers among the arguments are arguments of the program, so that another number
    does not compile it again; what is neither (a bool, a string, None, a function) is a constant of
    it. A state that :meth:`update` returned is consumed by the next call: it cannot be used again.
    One that comes from elsewhere, such as the first, is copied and stays as it is.

    Args:
        svi: The host's ``SVI``.

    Raises:
        TypeError: If ``svi`` is no ``SVI``.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     numpyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     numpyro.sample("z", dist.Normal(numpyro.param("loc", 1.0), 1.0))
        >>> svi = CompiledSVI(SVI(model, guide, optax.sgd(0.1), Trace_ELBO()))
        >>> first = svi.init(jax.random.key(0))
        >>> second, loss = svi.update(first)
        >>> float(svi.get_params(first)["loc"])
        1.0
    """

    def __init__(self, svi: SVI) -> None:
        if not isinstance(svi, SVI):
            raise TypeError(f"Expected svi to be an SVI; got {type(svi).__name__}.")
        self.svi: SVI = svi.svi if isinstance(svi, CompiledSVI) else svi
        self._update: dict[Hashable, Callable[..., Any]] = {}
        self._evaluate: dict[Hashable, Callable[..., Any]] = {}
        self._last: SVIState | None = None

    def __getattr__(self, name: str) -> Any:
        # Before __init__ has run, as in a copy, there is nothing to ask.
        if name == "svi":
            raise AttributeError(name)
        return getattr(self.svi, name)

    def init(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> SVIState:
        """The initial state, of the host."""
        return self.svi.init(rng_key, *args, **kwargs)

    def update(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> tuple[SVIState, jax.Array]:
        """One compiled step.

        Args:
            svi_state: The state, which is consumed if the last call returned it.
            args: Positional arguments of model and guide.
            kwargs: Keyword arguments of both, and of the host's ``update``.

        Returns:
            The new state and the loss.
        """
        if svi_state is not self._last:
            svi_state = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), svi_state)
        program, arrays = self._program(self._update, self.svi.update, (args, kwargs), donate=True)
        new, loss = program(svi_state, arrays)
        self._last = new
        return new, loss

    def evaluate(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> jax.Array:
        """The compiled loss of a state, which is kept.

        Args:
            svi_state: The state.
            args: Positional arguments of model and guide.
            kwargs: Keyword arguments of both.

        Returns:
            The loss.
        """
        given = (args, kwargs)
        program, arrays = self._program(self._evaluate, self.svi.evaluate, given, donate=False)
        return program(svi_state, arrays)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own loop, which is compiled as it is."""
        return self.svi.run(*args, **kwargs)

    @staticmethod
    def _program(
        programs: dict[Hashable, Callable[..., Any]],
        fn: Callable[..., Any],
        given: tuple[tuple[Any, ...], dict[str, Any]],
        *,
        donate: bool,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The program for the constants among the arguments, and the other arguments."""
        leaves, tree = jax.tree.flatten(given, is_leaf=lambda x: x is None)
        constants = tuple(None if _is_number(x) else (x,) for x in leaves)
        key = (tree, constants)
        if key not in programs:

            def program(state: SVIState, arrays: list[Any]) -> Any:
                rest = iter(arrays)
                filled = [next(rest) if x is None else x[0] for x in constants]
                args, kwargs = jax.tree.unflatten(tree, filled)
                # A program writes into the containers of its mutable state.
                state = jax.tree.map(lambda x: x, state)
                return fn(state, *args, **kwargs)

            programs[key] = jax.jit(program, donate_argnums=0 if donate else ())
        return programs[key], [x for x in leaves if _is_number(x)]


def _is_number(x: Any) -> bool:
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return True
    return isinstance(x, (int, float, complex)) and not isinstance(x, bool)
