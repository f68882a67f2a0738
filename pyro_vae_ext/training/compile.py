"""Training steps as one compiled graph."""

from __future__ import annotations

from typing import Any

from pyro.infer import SVI
from torch import Tensor

from pyro_vae_ext._checks import one_of
from pyro_vae_ext.training._engine import Engine

BACKENDS = ("inductor", "fx")


class CompiledSVI(SVI):
    r"""The host's SVI, whose step is a compiled graph; made by :func:`compile`.

    A drop-in but for what a step returns: the loss stays a tensor on its device, so that no step
    waits for the last one. Everything else, :meth:`evaluate_loss` included, is the host's.

    Args:
        svi: The host's SVI.
        backend: ``"inductor"`` or ``"fx"``.

    Raises:
        TypeError: For something else than the host's SVI.
        ValueError: For an unknown backend. At a step, for an objective with several losses.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_vae_ext.elbos import ImportanceWeightedELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.7))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), ImportanceWeightedELBO(5))
        >>> compiled = compile(svi, backend="fx")
        >>> losses = [compiled.step(torch.tensor(1.0)) for _ in range(3)]
        >>> compiled.num_graphs
        1
    """

    def __init__(self, svi: SVI, *, backend: str = "inductor") -> None:
        if not isinstance(svi, SVI):
            raise TypeError(f"Expected svi to be an SVI; got {type(svi).__name__}.")
        one_of("backend", backend, BACKENDS)
        super().__init__(svi.model, svi.guide, svi.optim, svi.loss, svi.loss_and_grads)
        # `fit` goes on with its graphs.
        self.engine = Engine(self, backend=backend)

    @property
    def num_graphs(self) -> int:
        """Number of graphs so far: one for each kind of arguments."""
        return self.engine.num_graphs

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a gradient step.

        Args:
            args: Positional arguments of model and guide.
            kwargs: Keyword arguments of both.

        Returns:
            The loss, a tensor without dimensions and gradient; reading it waits for the device.
        """
        gradients = self.engine.gradients(args, kwargs)
        self.engine.update(gradients)
        return gradients.loss

    def reset(self) -> None:
        """Forget the graphs, after a change that no argument tells of."""
        self.engine.reset()


def compile(svi: SVI, *, backend: str = "inductor") -> CompiledSVI:
    r"""The SVI with its step compiled into one graph: loss, gradients and random draws.

    The first step with arguments of a kind runs as the host's does, then once more to record it,
    and is compiled, which takes seconds; further ones run the graph, and one merged update of the
    optimiser. A step that makes parameters is the host's alone. A step draws the host's random
    numbers in the host's order: under the same seed losses and parameters are the host's, up to
    rounding. The kind of arguments is their nesting, the shapes, strides, types and devices of
    tensors, and the values of all else: numbers that change belong in tensors. A graph is checked
    against the host's step once, when it is made.

    What is no argument is followed as far as it is a parameter, a tensor that is written in place
    (buffers, data), the mode of an ``nn.Module``, or a number of the objective. Other values that
    a program reads are those of when its graph was made: call ``reset()`` after changing them.
    What a program does besides, such as appending to a list, happens then alone.

    What cannot be one graph warns once, naming the line, and runs eagerly: a value that Python
    takes out of a tensor, as ``.item()`` and branches do, a shape that depends on values, draws of
    Python or NumPy, state that is put in another tensor at each step, ``chunk_size`` of an
    objective, the host's ``TraceEnum_ELBO`` and ``RenyiELBO``. So do steps under a handler, without
    a warning. Without a C++ compiler the graph is replayed operation by operation, as with
    ``backend="fx"``, which warns as well. On a CUDA device a step is one launch.

    Args:
        svi: The host's SVI. Its parts are shared, and it may go on being used.
        backend: ``"inductor"`` compiles the graph; ``"fx"`` replays it, which costs no compile
            time and saves the overhead of the programs alone.

    Returns:
        A drop-in for the SVI.

    Raises:
        TypeError: For something else than the host's SVI.
        ValueError: For an unknown backend. At a step, for an objective with several losses.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_vae_ext.elbos import ImportanceWeightedELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.7))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), ImportanceWeightedELBO(5))
        >>> svi = compile(svi, backend="fx")
        >>> losses = [svi.step(torch.tensor(1.0)) for _ in range(3)]
    """
    return CompiledSVI(svi, backend=backend)
