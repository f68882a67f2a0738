"""Activations together with their derivatives, for forward-mode Jacobians."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# name -> (function, derivative as a function of the pre-activation)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "elu": (torch.nn.functional.elu, lambda a: a.clamp(max=0.0).exp()),
    "relu": (torch.relu, lambda a: (a > 0).to(a.dtype)),
    "tanh": (torch.tanh, lambda a: 1.0 - torch.tanh(a) ** 2),
}
