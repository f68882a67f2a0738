"""`Recurrent` of sequences of different lengths: both backends with the same weights and noise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from test_parity.test_likelihoods import close, in_torch, modules

CASES = [
    {"cell": "gru", "block_dims": 1, "context_per_step": True},
    {"cell": "lstm", "num_layers": 2, "window": 3, "output": "categorical", "num_categories": 3},
]


@pytest.mark.parametrize("case", CASES, ids=["gru", "lstm"])
def test_masked_sequences_agree(case: dict) -> None:
    ours, theirs = modules("Recurrent", {"shape": (4, 3), "context_dim": 2, "hidden_dim": 5} | case)
    rng = np.random.default_rng(0)
    rows = (4,) if case.get("context_per_step") else ()
    # Particles of the context, rows of the data; one of the rows has a hole.
    context = rng.standard_normal((2, 3, *rows, 2))
    mask = np.arange(ours.num_positions) < np.array([99, ours.num_positions - 1, 3])[:, None]
    mask[2, 1] = False
    noise = rng.random((2, 3, *ours.shape, ours.output.num_noise))

    tensor = torch.tensor(context, requires_grad=True)
    p = ours(tensor, mask=torch.tensor(mask))
    drawn = ours._draw(torch.tensor(noise), p.conditioned)
    density = p.log_prob(drawn[0])
    density.sum().backward()

    @jax.jit
    def program(module: Any, context: Any, x: Any, mask: Any) -> Any:
        def score(module: Any, context: Any) -> Any:
            density = module(context, mask=mask).log_prob(x)
            return density.sum(), density

        drawn = module._draw(jnp.asarray(noise), module(context, mask=mask).conditioned)
        return drawn, jax.value_and_grad(score, (0, 1), has_aux=True)(module, context)

    theirs_drawn, ((_, theirs_density), slopes) = program(theirs, context, drawn[0].numpy(), mask)
    close(theirs_drawn, drawn, "draws")
    close(theirs_density, density.detach(), "log_prob")
    close(slopes[1], tensor.grad, "context")
    found = in_torch("Recurrent", nnx.to_pure_dict(nnx.state(slopes[0], nnx.Param)))
    for name, parameter in ours.named_parameters():
        close(found[name], parameter.grad, name)
