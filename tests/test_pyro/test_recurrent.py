"""What `Recurrent` alone has: lengths, a context per step, blocks, the window."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from reference import recurrent as reference

from pyro_vae_ext.likelihoods import Recurrent

pytestmark = pytest.mark.usefixtures("exact")

KINDS = [
    {"hidden_dim": 5, "window": 1},
    {"hidden_dim": 4, "window": 3, "cell": "lstm", "num_layers": 2},
]


def make(shape: Any, context_dim: int | None = 2, **kwargs: Any) -> Recurrent:
    """A likelihood with weights far from their small start."""
    decoder = Recurrent(shape, context_dim, **kwargs)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.6 * torch.randn_like(parameter))
    return decoder


def like(decoder: Recurrent, shape: Any, context_dim: int | None = 2, **kwargs: Any) -> Recurrent:
    """A likelihood over another shape with the weights of ``decoder``."""
    other = Recurrent(shape, context_dim, **kwargs)
    other.load_state_dict(decoder.state_dict())
    return other


def bits(*shape: int) -> torch.Tensor:
    return torch.bernoulli(torch.full(shape, 0.5))


def all_bits(count: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)))


def weights(decoder: Recurrent) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in decoder.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_density_is_that_of_the_formulas(kind: dict) -> None:
    decoder = make((5, 3), covariate_dim=1, block_dims=1, context_per_step=True, **kind)
    x, context, covariates = bits(4, 5, 3), torch.randn(4, 5, 2), torch.randn(4, 1)
    mask = torch.rand(4, 5) < 0.7
    rows = torch.cat((context, covariates.unsqueeze(-2).expand(4, 5, 1)), -1)
    expected = reference.bernoulli_log_prob(
        x.numpy(),
        weights(decoder),
        rows.numpy(),
        mask=mask.numpy(),
        cell=kind.get("cell", "gru"),
        window=kind["window"],
    )
    found = decoder(context, covariates, mask=mask).log_prob(x)
    np.testing.assert_allclose(found.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_mask_leaves_the_shorter_sequence(kind: dict) -> None:
    decoder, context = make((6, 3), block_dims=1, **kind), torch.randn(3, 2)
    lengths = torch.tensor([6, 4, 1])
    x = bits(3, 6, 3)
    mask = torch.arange(6) < lengths[:, None]
    found = decoder(context, mask=mask).log_prob(x)
    for row, length in enumerate(lengths.tolist()):
        short = like(decoder, (length, 3), block_dims=1, **kind)
        expected = short(context[row]).log_prob(x[row, :length])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-12)
    assert (found != decoder(context).log_prob(x))[1:].all()


def test_what_the_padding_holds_does_not_matter() -> None:
    decoder, context = make((6, 3), block_dims=1), torch.randn(3, 2)
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]
    x = bits(3, 6, 3)
    rubbish = torch.where(mask.unsqueeze(-1), x, torch.nan)
    rubbish[1, 5] = 17.0
    p = decoder(context, mask=mask)
    torch.testing.assert_close(p.log_prob(rubbish), p.log_prob(x), rtol=0, atol=0)
    p.log_prob(rubbish).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in decoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_present_part_is_a_density_and_the_rest_is_zero(kind: dict) -> None:
    # A hole as well: it is seen as zeros, by the density and by the samples.
    mask = torch.tensor([[True, False, True, True, False], [True, True, False, False, False]])
    decoder, context = make(5, **kind), torch.randn(2, 2)
    p = decoder(context, mask=mask)
    for row, present in enumerate(mask):
        values = torch.full((2 ** int(present.sum()), 2, 5), torch.nan)
        values[:, :] = torch.where(mask, 0.0, torch.nan)
        values[:, row, present] = all_bits(int(present.sum()))
        torch.testing.assert_close(p.log_prob(values)[:, row].exp().sum(), torch.tensor(1.0))
    samples = p.sample((20,))
    assert (samples[:, ~mask] == 0).all()
    assert (samples[:, mask] == 1).any()


@pytest.mark.parametrize("output", ["bernoulli", "normal", "categorical"])
def test_samples_see_the_mask_as_the_density_does(output: str) -> None:
    decoder = make((5, 2), block_dims=1, window=2, output=output, num_categories=3)
    mask = torch.tensor([True, False, True, True, False])
    conditioned = (torch.randn(7, 5, 2), mask)
    noise = decoder.output.noise((7, 5, 2), torch.float64)
    inputs = torch.zeros(7, 5, 2, decoder.output.num_inputs)
    expected = torch.zeros(7, 5, 2)
    for t in torch.nonzero(mask).flatten():
        drawn = decoder.output.draw(decoder._params(inputs, conditioned), noise)[:, t]
        expected[:, t] = drawn.to(expected.dtype)
        inputs[:, t] = decoder.output.encode(drawn, torch.float64)
    found = decoder._draw(noise, conditioned).to(expected.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_context_per_step_enters_its_step_and_the_later_ones() -> None:
    kwargs: dict = {"block_dims": 1, "covariate_dim": 1}
    decoder = make((4, 2), context_per_step=True, **kwargs)
    plain = like(decoder, (4, 2), **kwargs)
    x, context, covariates = bits(3, 4, 2), torch.randn(3, 2), torch.randn(3, 1)
    repeated = context.unsqueeze(-2).expand(3, 4, 2)
    expected = plain(context, covariates).log_prob(x)
    # The covariates per sequence, or as rows of their own; particles of the context on the left.
    rows = covariates.unsqueeze(-2).expand(3, 4, 1)
    for given in (covariates, rows, rows[:, :1]):
        p = decoder(repeated, given)
        assert p.batch_shape == (3,)
        torch.testing.assert_close(p.log_prob(x), expected, rtol=0, atol=1e-12)
        p = decoder(repeated.expand(7, 3, 4, 2), given)
        assert p.batch_shape == (7, 3)
        torch.testing.assert_close(p.log_prob(x), expected.expand(7, 3), rtol=0, atol=1e-12)

    inputs = decoder.output.encode(x[0], torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda rows: decoder._params(inputs, (rows, None)), torch.randn(4, 3)
    )
    depends = jacobian.abs().sum((1, 2, 4)) > 0
    assert (depends == torch.ones(4, 4, dtype=torch.bool).tril()).all()


def test_covariates_are_per_sequence_where_that_fits() -> None:
    # As many sequences as positions; rows per position have a dimension more than the batch.
    decoder = make((4, 2), context_per_step=True, block_dims=1, covariate_dim=1)
    x, context, covariates = bits(4, 4, 2), torch.randn(3, 4, 4, 2), torch.randn(4, 1)
    explicit = covariates.unsqueeze(-2).expand(1, 4, 4, 1)
    expected = decoder(context, explicit).log_prob(x)
    torch.testing.assert_close(decoder(context, covariates).log_prob(x), expected)
    # Wider than the batch of the context, and no row per position.
    wide = decoder(context[:, :1], torch.randn(3, 5, 1))
    assert wide.batch_shape == (3, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, block_dims", [((2, 3), 0), ((4, 3), 1), ((2, 2, 3), 1)])
def test_position_sees_exactly_the_past(shape: tuple, block_dims: int, kind: dict) -> None:
    decoder = make(shape, block_dims=block_dims, **kind)
    conditioned = (torch.randn(1, 2), None)
    jacobian = torch.autograd.functional.jacobian(
        lambda inputs: decoder._params(inputs, conditioned), torch.randn(*shape, 1)
    )
    size = decoder.num_elements
    position = torch.arange(size) // decoder.block_size
    depends = jacobian.reshape(size, size) != 0
    assert (depends == (position[:, None] > position)).all()


@pytest.mark.parametrize("window", [1, 2, 4])
def test_window_is_what_a_step_sees_without_its_state(window: int) -> None:
    decoder = make(6, cell="lstm", hidden_dim=4, window=window)
    with torch.no_grad():
        # Neither output nor memory of the step before.
        decoder.rnn.weight_hh_l0.zero_()
        decoder.rnn.bias_hh_l0[4:8] = -torch.inf
    conditioned = (torch.randn(1, 2), None)
    jacobian = torch.autograd.functional.jacobian(
        lambda inputs: decoder._params(inputs, conditioned), torch.randn(6, 1)
    )
    lag = torch.arange(6)[:, None] - torch.arange(6)
    assert ((jacobian.reshape(6, 6) != 0) == ((lag >= 1) & (lag <= window))).all()
    # Before the first position there are zeros: a value of zeros has the same numbers everywhere.
    params = decoder._params(torch.zeros(6, 1), conditioned)
    torch.testing.assert_close(params, params[:1].expand(6, 1))


def test_mask_has_its_batch_and_trains_in_a_plate() -> None:
    decoder = make((4, 2), None, block_dims=1)
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    assert decoder().batch_shape == ()
    assert decoder(mask=mask[0]).batch_shape == ()
    assert decoder(mask=mask).batch_shape == (3,)
    with pyro.poutine.trace() as trace, pyro.plate("data", 3):
        pyro.sample("x", decoder(mask=mask), obs=bits(3, 4, 2))
    trace.trace.compute_log_prob()
    assert trace.trace.nodes["x"]["log_prob"].shape == (3,)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_dims": 2}, "Expected block_dims from 0 to 1; got 2."),
        ({"block_dims": -1}, "Expected block_dims from 0 to 1; got -1."),
        ({"window": 0}, "Expected window >= 1; got 0."),
        ({"num_layers": 0}, "Expected num_layers >= 1; got 0."),
        ({"hidden_dim": 0}, "Expected hidden_dim >= 1; got 0."),
        ({"cell": "rnn"}, "Expected cell to be 'gru' or 'lstm'; got 'rnn'."),
        (
            {"context_dim": None, "context_per_step": True},
            "Expected a context_dim under context_per_step=True; got None.",
        ),
    ],
)
def test_errors_of_the_constructor(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Recurrent((4, 3), **{"context_dim": 2, **kwargs})
    assert str(error.value) == message


def test_errors_of_the_call() -> None:
    decoder = Recurrent((4, 3), 2, covariate_dim=1, block_dims=1, context_per_step=True)
    context, covariates = torch.zeros(5, 4, 2), torch.zeros(5, 1)
    for given, expected in (
        ((torch.zeros(5, 2), covariates), r"a context of shape \(..., 4, 2\) at Recurrent; got"),
        ((torch.zeros(5, 3, 2), covariates), r"a context of shape \(..., 4, 2\) at Recurrent; got"),
        ((context, torch.zeros(5, 3, 1)), r"covariates of shape \(..., 4, 1\) at Recurrent; got"),
        ((torch.zeros(5, 4, 3), covariates), "a context of width 2 at Recurrent; got"),
        ((context, torch.zeros(())), "covariates of width 1 at Recurrent; got"),
        ((context,), "covariates of width 1 at Recurrent; got None"),
        ((None, covariates), "a context of width 2 at Recurrent; got None"),
    ):
        with pytest.raises(ValueError, match=f"Expected {expected}"):
            decoder(*given)
    with pytest.raises(ValueError, match=r"mask of shape \(..., 4\) at Recurrent; got shape \(5,"):
        decoder(context, covariates, mask=torch.ones(5, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="boolean mask at Recurrent; got float64. Compare with 0"):
        decoder(context, covariates, mask=torch.ones(5, 4))
