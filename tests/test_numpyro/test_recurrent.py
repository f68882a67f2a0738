"""What `Recurrent` alone has: lengths, a context per step, blocks, the window."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from flax import nnx
from numpyro import handlers
from reference import recurrent as reference

from numpyro_vae_ext.likelihoods import Recurrent

pytestmark = pytest.mark.usefixtures("exact")

KINDS = [
    {"hidden_dim": 5, "window": 1},
    {"hidden_dim": 4, "window": 3, "cell": "lstm", "num_layers": 2},
]


def make(shape: Any, context_dim: int | None = 2, **kwargs: Any) -> Recurrent:
    """A likelihood with weights far from their small start."""
    decoder = Recurrent(shape, context_dim, rngs=nnx.Rngs(0), **kwargs)
    rng = np.random.default_rng(0)
    state = nnx.state(decoder, nnx.Param)
    nnx.update(decoder, jax.tree.map(lambda x: x + 0.6 * rng.standard_normal(x.shape), state))
    return decoder


def like(decoder: Recurrent, shape: Any, context_dim: int | None = 2, **kwargs: Any) -> Recurrent:
    """A likelihood over another shape with the weights of ``decoder``."""
    other = Recurrent(shape, context_dim, rngs=nnx.Rngs(0), **kwargs)
    nnx.update(other, nnx.state(decoder, nnx.Param))
    return other


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def bits(*shape: int) -> np.ndarray:
    return np.random.default_rng(9).integers(2, size=shape).astype(float)


def all_bits(count: int) -> np.ndarray:
    return np.array(list(itertools.product((0.0, 1.0), repeat=count)))


def weights(decoder: Recurrent) -> dict[str, np.ndarray]:
    """The parameters under torch's names."""
    dense = {"head": decoder.head}
    for index, layer in enumerate(decoder.layers):
        dense |= {f"rnn.ih_l{index}": layer.input, f"rnn.hh_l{index}": layer.hidden}
    found = {}
    for name, module in dense.items():
        stem, _, end = name.partition(".")
        found[f"{stem}.weight{'_' + end if end else ''}"] = np.asarray(module.kernel[...]).T
        found[f"{stem}.bias{'_' + end if end else ''}"] = np.asarray(module.bias[...])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_density_is_that_of_the_formulas(kind: dict) -> None:
    decoder = make((5, 3), covariate_dim=1, block_dims=1, context_per_step=True, **kind)
    x, context, covariates = bits(4, 5, 3), normal(1, 4, 5, 2), normal(2, 4, 1)
    mask = normal(3, 4, 5) < 0.5
    rows = np.concatenate((context, np.broadcast_to(covariates[:, None], (4, 5, 1))), -1)
    expected = reference.bernoulli_log_prob(
        x,
        weights(decoder),
        rows,
        mask=mask,
        cell=kind.get("cell", "gru"),
        window=kind["window"],
    )
    found = decoder(context, covariates, mask=mask).log_prob(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_cells_are_those_of_flax() -> None:
    """Flax's GRU has no bias inside of the reset gate; our LSTM has two biases for its one."""
    rng = np.random.default_rng(0)
    x, h, c = rng.standard_normal((3, 7, 4))
    gru = make(6, 3, hidden_dim=4).layers[0]
    gru.hidden.bias[...] = jnp.zeros(12)
    theirs: Any = nnx.GRUCell(4, 4, param_dtype=float, rngs=nnx.Rngs(0))
    theirs.dense_i.kernel[...] = gru.input.kernel[...]
    theirs.dense_i.bias[...] = gru.input.bias[...]
    theirs.dense_h.kernel[...] = gru.hidden.kernel[...]
    (found,) = gru.step((h,), gru.input(x))
    np.testing.assert_allclose(found, theirs(h, x)[1], rtol=0, atol=1e-12)

    lstm = make(6, 3, hidden_dim=4, cell="lstm").layers[0]
    theirs = nnx.OptimizedLSTMCell(4, 4, param_dtype=float, rngs=nnx.Rngs(0))
    theirs.dense_i.kernel[...] = lstm.input.kernel[...]
    theirs.dense_h.kernel[...] = lstm.hidden.kernel[...]
    theirs.dense_h.bias[...] = lstm.hidden.bias[...] + lstm.input.bias[...]
    found = lstm.step((h, c), lstm.input(x))
    memory, output = theirs((c, h), x)[0]
    np.testing.assert_allclose(found, (output, memory), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_mask_leaves_the_shorter_sequence(kind: dict) -> None:
    decoder, context = make((6, 3), block_dims=1, **kind), normal(1, 3, 2)
    lengths = np.array([6, 4, 1])
    x = bits(3, 6, 3)
    mask = np.arange(6) < lengths[:, None]
    found = decoder(context, mask=mask).log_prob(x)
    for row, length in enumerate(lengths.tolist()):
        short = like(decoder, (length, 3), block_dims=1, **kind)
        expected = short(context[row]).log_prob(x[row, :length])
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=1e-12)
    assert (found != decoder(context).log_prob(x))[1:].all()


def test_what_the_padding_holds_does_not_matter() -> None:
    decoder, context = make((6, 3), block_dims=1), normal(1, 3, 2)
    mask = np.arange(6) < np.array([6, 4, 1])[:, None]
    x = bits(3, 6, 3)
    rubbish = np.where(mask[..., None], x, np.nan)
    rubbish[1, 5] = 17.0

    @jax.jit
    @jax.value_and_grad
    def total(decoder: Recurrent, x: Any) -> Any:
        return decoder(context, mask=mask).log_prob(x).sum()

    clean, gradient = total(decoder, x)
    dirty, other = total(decoder, rubbish)
    assert clean == dirty
    # Outside of a transformation the values are looked at: those of the padding are passed over.
    eager = decoder(context, mask=mask).log_prob(rubbish).sum()
    np.testing.assert_allclose(eager, clean, rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, gradient, other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_present_part_is_a_density_and_the_rest_is_zero(kind: dict) -> None:
    # A hole as well: it is seen as zeros, by the density and by the samples.
    mask = np.array([[True, False, True, True, False], [True, True, False, False, False]])
    decoder, context = make(5, **kind), normal(1, 2, 2)
    p = decoder(context, mask=mask)
    for row, present in enumerate(mask):
        values = np.tile(np.where(mask, 0.0, np.nan), (2 ** int(present.sum()), 1, 1))
        values[:, row, present] = all_bits(int(present.sum()))
        total = jnp.exp(p.log_prob(values)[:, row]).sum()
        np.testing.assert_allclose(total, 1.0, rtol=0, atol=1e-12)
    samples = np.asarray(p.sample(jax.random.key(0), (20,)))
    assert (samples[:, ~mask] == 0).all()
    assert (samples[:, mask] == 1).any()


@pytest.mark.parametrize("output", ["bernoulli", "normal", "categorical"])
def test_samples_see_the_mask_as_the_density_does(output: str) -> None:
    decoder = make((5, 2), block_dims=1, window=2, output=output, num_categories=3)
    mask = np.array([True, False, True, True, False])
    conditioned = (jnp.asarray(normal(1, 7, 5, 2)), jnp.asarray(mask))
    noise = decoder.output.noise(jax.random.key(0), (7, 5, 2), float)
    inputs = np.zeros((7, 5, 2, decoder.output.num_inputs))
    expected = np.zeros((7, 5, 2))
    draw = jax.jit(lambda inputs: decoder.output.draw(decoder._params(inputs, conditioned), noise))
    for t in np.flatnonzero(mask):
        drawn = draw(inputs)[:, t]
        expected[:, t] = drawn
        inputs[:, t] = decoder.output.encode(drawn, float)
    np.testing.assert_allclose(decoder._draw(noise, conditioned), expected, rtol=1e-10, atol=1e-12)
    # Under a transformation it is another loop over the same steps.
    traced = jax.jit(decoder._draw)(noise, conditioned)
    np.testing.assert_allclose(traced, expected, rtol=1e-10, atol=1e-12)


def test_context_per_step_enters_its_step_and_the_later_ones() -> None:
    kwargs: dict = {"block_dims": 1, "covariate_dim": 1}
    decoder = make((4, 2), context_per_step=True, **kwargs)
    plain = like(decoder, (4, 2), **kwargs)
    x, context, covariates = bits(3, 4, 2), normal(1, 3, 2), normal(2, 3, 1)
    repeated = np.repeat(context[:, None], 4, 1)
    expected = plain(context, covariates).log_prob(x)
    # The covariates per sequence, or as rows of their own; particles of the context on the left.
    rows = np.repeat(covariates[:, None], 4, 1)
    for given in (covariates, rows, rows[:, :1]):
        p = decoder(repeated, given)
        assert p.batch_shape == (3,)
        np.testing.assert_allclose(p.log_prob(x), expected, rtol=0, atol=1e-12)
        assert decoder(np.broadcast_to(repeated, (7, 3, 4, 2)), given).batch_shape == (7, 3)
    p = decoder(np.broadcast_to(repeated, (7, 3, 4, 2)), rows)
    wide = np.broadcast_to(expected, (7, 3))
    np.testing.assert_allclose(p.log_prob(x), wide, rtol=0, atol=1e-12)

    inputs = decoder.output.encode(x[0], float)
    of_rows = jax.jit(jax.jacobian(lambda rows: decoder._params(inputs, (rows, None))))
    jacobian = of_rows(normal(3, 4, 3))
    depends = np.abs(jacobian).sum((1, 2, 4)) > 0
    assert (depends == np.tri(4, dtype=bool)).all()


def test_covariates_are_per_sequence_where_that_fits() -> None:
    # As many sequences as positions; rows per position have a dimension more than the batch.
    decoder = make((4, 2), context_per_step=True, block_dims=1, covariate_dim=1)
    context, covariates = normal(1, 3, 4, 4, 2), normal(2, 4, 1)
    explicit = np.broadcast_to(covariates[:, None], (1, 4, 4, 1))
    expected, _ = decoder(context, explicit).conditioned
    found, _ = decoder(context, covariates).conditioned
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
    # Wider than the batch of the context, and no row per position.
    wide = decoder(context[:, :1], normal(3, 3, 5, 1))
    assert wide.batch_shape == (3, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, block_dims", [((2, 3), 0), ((2, 2, 3), 1)])
def test_position_sees_exactly_the_past(shape: tuple, block_dims: int, kind: dict) -> None:
    decoder = make(shape, block_dims=block_dims, **kind)
    conditioned = (normal(1, 1, 2), None)
    of_inputs = jax.jit(jax.jacobian(lambda inputs: decoder._params(inputs, conditioned)))
    size = decoder.num_elements
    position = np.arange(size) // decoder.block_size
    depends = np.asarray(of_inputs(normal(2, *shape, 1))).reshape(size, size) != 0
    assert (depends == (position[:, None] > position)).all()


@pytest.mark.parametrize("window", [1, 4])
def test_window_is_what_a_step_sees_without_its_state(window: int) -> None:
    decoder = make(6, cell="lstm", hidden_dim=4, window=window)
    # Neither output nor memory of the step before.
    layer = decoder.layers[0]
    layer.hidden.kernel[...] = jnp.zeros_like(layer.hidden.kernel[...])
    layer.hidden.bias[...] = layer.hidden.bias[...].at[4:8].set(-jnp.inf)
    conditioned = (normal(1, 1, 2), None)
    of_inputs = jax.jit(jax.jacobian(lambda inputs: decoder._params(inputs, conditioned)))
    lag = np.arange(6)[:, None] - np.arange(6)
    depends = np.asarray(of_inputs(normal(2, 6, 1))).reshape(6, 6) != 0
    assert (depends == ((lag >= 1) & (lag <= window))).all()
    # Before the first position there are zeros: a value of zeros has the same numbers everywhere.
    params = decoder._params(jnp.zeros((6, 1)), conditioned)
    np.testing.assert_allclose(params, np.repeat(params[:1], 6, 0), rtol=0, atol=1e-12)


def test_mask_has_its_batch_and_counts_in_a_plate() -> None:
    decoder = make((4, 2), None, block_dims=1)
    mask = np.arange(4) < np.array([4, 2, 3])[:, None]
    assert decoder().batch_shape == ()
    assert decoder(mask=mask[0]).batch_shape == ()
    assert decoder(mask=mask).batch_shape == (3,)
    with handlers.seed(rng_seed=0), handlers.trace() as trace, numpyro.plate("data", 3):
        numpyro.sample("x", decoder(mask=mask), obs=bits(3, 4, 2))
    assert trace["x"]["fn"].log_prob(trace["x"]["value"]).shape == (3,)


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
        Recurrent((4, 3), **{"context_dim": 2, **kwargs}, rngs=nnx.Rngs(0))
    assert str(error.value) == message


def test_errors_of_the_call() -> None:
    decoder = Recurrent(
        (4, 3), 2, covariate_dim=1, block_dims=1, context_per_step=True, rngs=nnx.Rngs(0)
    )
    context, covariates = np.zeros((5, 4, 2)), np.zeros((5, 1))
    for given, expected in (
        ((np.zeros((5, 2)), covariates), r"a context of shape \(..., 4, 2\) at Recurrent; got"),
        ((np.zeros((5, 3, 2)), covariates), r"a context of shape \(..., 4, 2\) at Recurrent; got"),
        ((context, np.zeros((5, 3, 1))), r"covariates of shape \(..., 4, 1\) at Recurrent; got"),
        ((np.zeros((5, 4, 3)), covariates), "a context of width 2 at Recurrent; got"),
        ((context, np.zeros(())), "covariates of width 1 at Recurrent; got"),
        ((context,), "covariates of width 1 at Recurrent; got None"),
        ((None, covariates), "a context of width 2 at Recurrent; got None"),
    ):
        with pytest.raises(ValueError, match=f"Expected {expected}"):
            decoder(*given)
    with pytest.raises(ValueError, match=r"mask of shape \(..., 4\) at Recurrent; got shape \(5,"):
        decoder(context, covariates, mask=np.ones((5, 3), bool))
    with pytest.raises(TypeError, match="boolean mask at Recurrent; got float64. Compare with 0"):
        decoder(context, covariates, mask=np.ones((5, 4)))
