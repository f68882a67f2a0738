"""How many threads JAX computes with on a CPU."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# The fewest that have not been seen to wait for one another in a model's derivatives.
FEWEST = 4


def ask_for_enough(environment: MutableMapping[str, str], available: int) -> None:
    """Ask JAX for four threads on two or three cores, if nobody has asked.

    A batch of triangular systems or Cholesky factors is solved by the threads of one pool, and the
    thread that asked waits for them as one of the pool (jaxlib 0.10). On two cores two such solves
    at a time, as in the second derivatives of a Gaussian process, wait for one another for ever;
    one thread never waits.
    JAX reads the variable when it first computes something.
    """
    if 1 < available < FEWEST and not {"PJRT_NPROC", "NPROC"} & set(environment):
        environment["PJRT_NPROC"] = str(FEWEST)


def cores() -> int:
    """The cores that this process may use, which is how JAX counts them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


ask_for_enough(os.environ, cores())
