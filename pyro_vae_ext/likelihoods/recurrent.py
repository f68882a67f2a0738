"""The recurrent likelihood: a GRU or an LSTM over the positions of a value."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae_ext._checks import one_of, positive_int
from pyro_vae_ext.likelihoods._base import Autoregressive, Likelihood, steps
from pyro_vae_ext.likelihoods._outputs import make_output

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}


class Recurrent(Likelihood):
    r"""Recurrent autoregressive density, :math:`p(x \mid c) = \prod_t p(x_t \mid x_{<t}, c)`.

    The elements of a value, in raster order, are cut into :math:`T` positions of
    :math:`E = \prod` ``shape[-block_dims:]`` elements each, a single one by default. The elements
    of one position are independent given the past; all of the past is seen, through the state of
    the network:

    .. math:: h_t = \mathrm{cell}\bigl((x_{t-1}, \dots, x_{t-k}, c_t),\, h_{t-1}\bigr), \qquad
              p(x_t \mid x_{<t}, c) = \prod_{e=1}^E p(x_{te};\, (W h_t + b)_e)

    with :math:`k` = ``window``, zeros before the first position and :math:`h_0 = 0`. The
    conditioning :math:`c_t`, context and covariates, enters every step. The log-density is one
    pass of the network over all positions; a sample is one step of it per position.

    Args:
        shape: Shape of a value, or its length.
        context_dim: Width of the context; None for a density without one.
        covariate_dim: Width of the covariates; None for a density without them.
        cell: ``"gru"`` or ``"lstm"``.
        hidden_dim: Width of the state of each layer.
        num_layers: Number of layers.
        window: Number of the preceding positions that enter a step directly.
        block_dims: Number of last dimensions of ``shape`` that make up one position.
        context_per_step: Whether the context has one row per position.
        output: Density of an element: ``"bernoulli"``, ``"categorical"``, ``"normal"``,
            ``"logistic_mixture"`` or ``"discretized_logistic_mixture"``.
        num_categories: Number of values of an element of a categorical or discretized output.
        num_components: Number of components of a mixture.

    Shape:
        Called with a context ``(*batch, context_dim)``, or ``(*batch, T, context_dim)`` under
        ``context_per_step``, covariates ``(*batch, covariate_dim)``, and a boolean ``mask``
        ``(*batch, T)``; the distribution has the batch shape ``batch`` and the event shape
        ``shape``.

    Raises:
        ValueError: If an argument is out of its range; at the call, if the conditioning or the
            mask has another shape than expected.
        TypeError: At the call, if the conditioning is not floating-point or the mask not boolean.

    References:
        Cho et al., 2014, *Learning Phrase Representations using RNN Encoder-Decoder*,
        arXiv:1406.1078 (the GRU, here with torch's reset gate after the recurrent matrix);
        Hochreiter and Schmidhuber, 1997, *Long Short-Term Memory*; Bowman et al., 2016,
        *Generating Sentences from a Continuous Space*, arXiv:1511.06349 (such a decoder's use of
        its latents).

    Example:
        >>> import torch
        >>> decoder = Recurrent((6, 3), context_dim=2, block_dims=1, hidden_dim=8)
        >>> lengths = torch.tensor([6, 4, 1])
        >>> p = decoder(torch.zeros(3, 2), mask=torch.arange(6) < lengths[:, None])
        >>> x = p.sample()
        >>> x.shape, p.log_prob(x).shape
        (torch.Size([3, 6, 3]), torch.Size([3]))
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        context_dim: int | None = None,
        *,
        covariate_dim: int | None = None,
        cell: str = "gru",
        hidden_dim: int = 100,
        num_layers: int = 1,
        window: int = 1,
        block_dims: int = 0,
        context_per_step: bool = False,
        output: str = "bernoulli",
        num_categories: int = 256,
        num_components: int = 5,
    ) -> None:
        super().__init__(
            shape, context_dim, covariate_dim, make_output(output, num_categories, num_components)
        )
        one_of("cell", cell, tuple(CELLS))
        positive_int("hidden_dim", hidden_dim)
        positive_int("num_layers", num_layers)
        self.window = positive_int("window", window)
        if isinstance(block_dims, bool) or not 0 <= block_dims < len(self.shape):
            raise ValueError(
                f"Expected block_dims from 0 to {len(self.shape) - 1}; got {block_dims}."
            )
        if context_per_step and context_dim is None:
            raise ValueError("Expected a context_dim under context_per_step=True; got None.")
        self.context_per_step = context_per_step
        self.position_shape = self.shape[: len(self.shape) - block_dims]
        self.num_positions = math.prod(self.position_shape)
        self.block_size = self.num_elements // self.num_positions

        width = self.window * self.block_size * self.output.num_inputs + self.conditioning_dim
        self.rnn: Any = CELLS[cell](width, hidden_dim, num_layers, batch_first=True)
        self.head = nn.Linear(hidden_dim, self.block_size * self.output.num_params)
        _initialise(self.rnn, self.head)

    def forward(
        self,
        context: Tensor | None = None,
        covariates: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Autoregressive:
        """The density given the conditioning.

        Args:
            context: ``(*batch, context_dim)``, or ``(*batch, T, context_dim)`` under
                ``context_per_step``.
            covariates: ``(*batch, covariate_dim)``, or one row per position as well under
                ``context_per_step``: ``(*batch, T, covariate_dim)``.
            mask: Boolean, ``(*batch, T)``: True where a position is present. What is absent has
                no density, is seen as zeros, and is 0 in a sample. For sequences of different
                lengths: ``torch.arange(T) < length[:, None]``.

        Returns:
            A distribution of batch shape ``batch``, all inputs broadcast, and event ``shape``.

        Raises:
            ValueError: If the conditioning is missing, unexpected, of another shape, or NaN, or
                the mask has another shape.
            TypeError: If the conditioning is not floating-point or the mask not boolean.
        """
        if self.context_per_step:
            context, covariates = self._per_step(context, covariates)
        conditioning = self._conditioning(context, covariates)
        if conditioning is not None and not self.context_per_step:
            conditioning = conditioning.unsqueeze(-2)
        batch_shape = torch.Size() if conditioning is None else conditioning.shape[:-2]
        present = None
        if mask is not None:
            self._check_mask(mask)
            batch_shape = torch.broadcast_shapes(batch_shape, mask.shape[:-1])
            block = [1] * (len(self.shape) - len(self.position_shape))
            present = mask.reshape(*mask.shape[:-1], *self.position_shape, *block)
        return Autoregressive(self, (conditioning, mask), batch_shape, present=present)

    def _per_step(
        self, context: Tensor | None, covariates: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The conditioning with a dimension for the positions, ``(*batch, T or 1, width)``."""
        if context is None:
            return context, covariates
        if context.dim() < 2 or context.shape[-2] != self.num_positions:
            raise ValueError(
                f"Expected a context of shape (..., {self.num_positions}, {self.context_dim}) at "
                f"Recurrent; got shape {tuple(context.shape)}. Give one row per position, or use "
                "context_per_step=False."
            )
        if covariates is None or covariates.shape[-1:] != (self.covariate_dim,):
            return context, covariates  # no covariates, or none that fit
        given, batch = covariates.shape[:-1], context.shape[:-2]
        per_step = given[-1:] in ((1,), (self.num_positions,))
        # A row per sequence wherever that fits as it is: sizes may be equal by chance.
        if len(given) <= len(batch) and (len(given) < 2 or _fits(given, batch)):
            per_step = False
        elif not per_step and not _fits(given, batch, widen=True):
            raise ValueError(
                f"Expected covariates of shape (..., {self.num_positions}, {self.covariate_dim}) "
                f"at Recurrent; got shape {tuple(covariates.shape)}. Give one row per position, or "
                "one per sequence."
            )
        return context, covariates if per_step else covariates.unsqueeze(-2)

    def _check_mask(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise TypeError(
                "Expected a boolean mask at Recurrent; got "
                f"{str(mask.dtype).removeprefix('torch.')}. Compare with 0, or pass "
                "arange(T) < length."
            )
        if mask.shape[-1:] != (self.num_positions,):
            raise ValueError(
                f"Expected a mask of shape (..., {self.num_positions}) at Recurrent; got shape "
                f"{tuple(mask.shape)}."
            )

    def _params(self, inputs: Tensor, conditioned: tuple[Tensor | None, Tensor | None]) -> Tensor:
        conditioning, _ = conditioned
        num_dims = len(self.shape) + 1
        encoded = inputs.flatten(-num_dims).unflatten(-1, (self.num_positions, -1))
        earlier = nn.functional.pad(encoded, (0, 0, self.window, 0))
        ends = range(self.num_positions + self.window - 1, self.num_positions - 1, -1)
        parts = [earlier[..., end - self.num_positions : end, :] for end in ends]
        batch = encoded.shape[:-2]
        if conditioning is not None:
            batch = torch.broadcast_shapes(batch, conditioning.shape[:-2])
            parts.append(conditioning)
        size = (*batch, self.num_positions, -1)
        steps = torch.cat([part.expand(size) for part in parts], -1)
        hidden, _ = self.rnn(steps.flatten(0, -3) if batch else steps)
        params = self.head(hidden)
        return params.reshape(*batch, *self.shape, self.output.num_params)

    def _draw(self, noise: Tensor, conditioned: tuple[Tensor | None, Tensor | None]) -> Tensor:
        conditioning, mask = conditioned
        batch = noise.shape[: -len(self.shape) - 1]
        noise = noise.reshape(-1, self.num_positions, self.block_size, noise.shape[-1])
        if conditioning is not None:
            conditioning = conditioning.expand(*batch, *conditioning.shape[-2:])
            conditioning = conditioning.reshape(len(noise), *conditioning.shape[-2:])
        if mask is not None:
            mask = mask.expand(*batch, self.num_positions).reshape(len(noise), -1, 1)

        width = self.block_size * self.output.num_inputs
        past = deque([noise.new_zeros(len(noise), width)] * self.window, self.window)
        state = None
        values = []
        for t in steps(self.num_positions):
            parts = list(past)
            if conditioning is not None:
                parts.append(conditioning[:, t if conditioning.shape[1] > 1 else 0])
            hidden, state = self.rnn(torch.cat(parts, -1).unsqueeze(1), state)
            params = self.head(hidden).unflatten(-1, (self.block_size, self.output.num_params))
            value = self.output.draw(params.squeeze(1), noise[:, t])
            encoded = self.output.encode(value, noise.dtype).flatten(1)
            if mask is not None:
                value = torch.where(mask[:, t], value, 0)
                encoded = torch.where(mask[:, t], encoded, 0.0)
            values.append(value)
            past.appendleft(encoded)
        return torch.stack(values, 1).reshape(*batch, *self.shape)


def _fits(shape: Sequence[int], batch: Sequence[int], *, widen: bool = False) -> bool:
    """Whether ``shape`` broadcasts with ``batch``, and unless ``widen`` leaves it as it is."""
    ends = zip(reversed(shape), reversed(batch), strict=False)
    return all(size in (1, whole) or (widen and whole == 1) for size, whole in ends)


def _initialise(rnn: nn.RNNBase, head: nn.Linear) -> None:
    """Glorot weights per gate, orthogonal recurrent ones, no biases but the LSTM's forget gate."""
    num_gates = {"GRU": 3, "LSTM": 4}[rnn.mode]
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            for gate, part in enumerate(parameter.chunk(num_gates)):
                if name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(part)
                elif name.startswith("weight_hh"):
                    nn.init.orthogonal_(part)
                else:
                    # Open at the start, so that the gradient reaches far back.
                    nn.init.constant_(part, float((rnn.mode, gate) == ("LSTM", 1)) / 2)
        nn.init.xavier_uniform_(head.weight, 0.1)
        nn.init.zeros_(head.bias)
