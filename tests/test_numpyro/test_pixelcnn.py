"""What `PixelCNN` alone has: its window, its two paths of the conditioning, its formulas."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from reference import pixelcnn as reference
from test_numpyro.models import named, shaken

from numpyro_vae_ext.likelihoods import PixelCNN

# Beside those of the registry: other kernels, three channels, a single row, a single column.
MORE = [
    {
        "shape": (4, 5),
        "context_dim": 2,
        "channels": 4,
        "num_layers": 3,
        "kernel_size": 5,
        "first_kernel_size": 5,
        "receptive_field": 7,
    },
    {"shape": (3, 2, 3), "covariate_dim": 2, "channels": 6, "num_layers": 3},
    {"shape": (1, 1, 4), "context_dim": 1, "channels": 2, "num_layers": 2, "kernel_size": 1},
    {"shape": (4, 1), "context_dim": 1, "channels": 2, "num_layers": 2},
]


def make(shape: Any, context_dim: int | None = None, **options: Any) -> PixelCNN:
    """A likelihood far from its start, where everything depends on everything it may."""
    return shaken(PixelCNN(shape, context_dim, rngs=nnx.Rngs(0), **options), 0.5)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("options", CASES["likelihoods"]["PixelCNN"] + MORE)
def test_density_and_draws_are_those_of_the_formulas(options: dict) -> None:
    module = make(**options)
    rng = np.random.default_rng(1)
    widths = (module.context_dim, module.covariate_dim)
    given = [None if width is None else rng.normal(size=(2, width)) for width in widths]
    batch = (2,) if module.conditioning_dim else ()
    noise = rng.uniform(size=(3, *batch, *module.shape, module.output.num_noise))
    x = rng.normal(size=noise.shape[:-1])
    if module.output.is_discrete:
        x = rng.integers(options.get("num_categories", 2), size=x.shape).astype(float)

    @jax.jit
    def check(module: PixelCNN, given: Any, x: Any, noise: Any) -> Any:
        distribution = module(*given)
        return distribution.log_prob(x), module._draw(noise, distribution.conditioned)

    found, drawn = check(module, given, x, noise)
    parts = [part for part in given if part is not None]
    weights, joined = named(module), np.concatenate(parts, -1) if parts else None
    expected = reference.log_prob(x, weights, joined, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found.shape == (3, *batch)
    expected = reference.draw(noise, weights, joined, **options)
    np.testing.assert_allclose(drawn, expected, rtol=1e-10)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("field", [3, 5, 7, None])
@pytest.mark.parametrize("shape", [(9, 9), (3, 5, 5)])
def test_a_pixel_sees_its_window_and_all_of_it(shape: tuple, field: int | None) -> None:
    # Features enough that some are alive behind every rectifier.
    options = {"channels": 24, "num_layers": 3, "first_kernel_size": 5, "receptive_field": field}
    module = make(shape, **options)
    assert module.receptive_field == (field or 9)
    inputs = np.random.default_rng(2).normal(size=(4, *shape, 1))

    @jax.jit
    def slopes(module: PixelCNN, inputs: Any) -> jax.Array:
        return jax.vmap(jax.jacfwd(lambda x: module._params(x, None)))(inputs)

    count = module.num_elements
    found = np.asarray(slopes(module, inputs)).reshape(-1, count, count)
    # Zero is zero for all inputs; elsewhere a unit may be switched off at some of them.
    wanted = reference.dependency(shape=shape, **options)
    assert np.array_equal((found != 0).any(0), wanted)
    # What the reference says, in numbers: the middle pixel, away from the borders.
    reach = min(((field or 9) - 1) // 2, shape[-1] // 2)
    middle = count // 2
    image = shape[0] if len(shape) == 3 else 1
    assert wanted[middle].sum() == image * (reach * (2 * reach + 1) + reach) + (image - 1) // 2


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 3)])
def test_the_conditioning_reaches_every_element_by_two_paths(shape: tuple) -> None:
    module = make(shape, 2, covariate_dim=1, channels=24, num_layers=2, spatial_channels=2)
    plain = make(shape, 2, channels=24, num_layers=2, spatial_channels=0)
    x = np.zeros((*shape, 1))

    @jax.jit
    def slopes(module: PixelCNN, plain: PixelCNN, z: Any, y: Any) -> list:
        def reached(module: PixelCNN, *given: Any) -> list:
            return jax.jacfwd(lambda *g: module._params(x, module(*g).conditioned), (0, 1))(*given)

        everywhere = module.to_features.kernel * 0.0
        at_pixels = module.from_map.kernel * 0.0
        switched = [{}, {"to_features": everywhere}, {"from_map": at_pixels}]
        switched += [{"to_features": everywhere, "from_map": at_pixels}]
        found = []
        for kernels in switched:
            other = nnx.clone(module)
            for name, kernel in kernels.items():
                getattr(other, name).kernel = nnx.Param(kernel)
            found.append(reached(other, z, y))
        without = jax.jacfwd(lambda z: plain._params(x, plain(z).conditioned))(z)
        return [*found, (without, without)]

    z, y = np.array([0.3, -0.8]), np.array([0.5])
    *reached, cut, without = slopes(module, plain, z, y)
    for parts in (*reached, without):
        for part in parts:
            part = np.asarray(part).reshape(module.num_elements, -1)
            assert np.all(part != 0)
    assert not any(np.any(part) for part in cut)
    assert plain.to_map is None and plain.from_map is None


@pytest.mark.usefixtures("exact")
def test_a_map_tells_pixels_apart() -> None:
    """Features that are the same everywhere cannot; the borders are no help in the first row."""
    found = []
    for spatial_channels in (0, 2):
        module = make((2, 6), 1, channels=4, num_layers=1, spatial_channels=spatial_channels)
        logits = module._params(jnp.zeros((2, 6, 1)), module(jnp.ones(1)).conditioned)[..., 0]
        found.append(np.ptp(logits[0]))
    assert found[0] < 1e-12 < 1e-2 < found[1]


@pytest.mark.usefixtures("exact")
def test_gradient_flows_through_all_positions_of_a_sample() -> None:
    module = make((2, 2, 2), 2, channels=4, num_layers=2, output="normal")
    z = jnp.array([0.3, -0.7])

    @jax.jit
    def check(module: PixelCNN, z: Any) -> Any:
        noise = module.output.noise(jax.random.key(0), module.shape, float)
        weights = jnp.arange(1.0, 9.0).reshape(2, 2, 2)

        def naive(module: PixelCNN, z: Any) -> jax.Array:
            conditioned = module(z).conditioned

            def redraw(_: Any, value: jax.Array) -> jax.Array:
                return module.output.draw(module._params(value[..., None], conditioned), noise)

            return (weights * jax.lax.fori_loop(0, 8, redraw, jnp.zeros((2, 2, 2)))).sum()

        def cached(module: PixelCNN, z: Any) -> jax.Array:
            return (weights * module(z).rsample(jax.random.key(0))).sum()

        return [jax.value_and_grad(sampler, (0, 1))(module, z) for sampler in (cached, naive)]

    found, expected = check(module, z)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)
    assert np.all(np.asarray(found[1][1]) != 0)


@pytest.mark.parametrize(
    ("options", "extents"),
    [
        ({}, (3, 1, 1, 1, 1)),
        ({"receptive_field": 15}, (3, 1, 1, 1, 1)),
        ({"receptive_field": 11}, (3, 1, 1, 0, 0)),
        ({"receptive_field": 7}, (3, 0, 0, 0, 0)),
        ({"receptive_field": 3}, (1, 0, 0, 0, 0)),
        ({"num_layers": 3, "kernel_size": 5, "receptive_field": 13}, (3, 2, 1)),
        ({"num_layers": 2, "kernel_size": 1, "first_kernel_size": 9}, (4, 0)),
        ({"num_layers": 1, "first_kernel_size": 3}, (1,)),
    ],
)
def test_the_field_is_dealt_out_from_the_first_layer_on(options: dict, extents: tuple) -> None:
    module = PixelCNN((8, 8), channels=2, rngs=nnx.Rngs(0), **options)
    assert module.extents == extents
    assert module.receptive_field == 2 * sum(extents) + 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shape": 9}, "Expected a shape (H, W) or (C, H, W); got (9,)."),
        ({"shape": (1, 1, 3, 3)}, "Expected a shape (H, W) or (C, H, W); got (1, 1, 3, 3)."),
        ({"kernel_size": 4}, "Expected an odd kernel_size; got 4."),
        ({"first_kernel_size": 6}, "Expected an odd first_kernel_size; got 6."),
        ({"first_kernel_size": 1}, "Expected first_kernel_size >= 3; got 1."),
        ({"kernel_size": 0}, "Expected kernel_size >= 1; got 0."),
        ({"num_layers": 0}, "Expected num_layers >= 1; got 0."),
        ({"channels": 0}, "Expected channels >= 1; got 0."),
        ({"spatial_channels": -1}, "Expected spatial_channels >= 0; got -1."),
        (
            {"shape": (3, 4, 4), "channels": 64},
            "Expected channels to be a multiple of the 3 image channels; got 64.",
        ),
        *(
            (
                {"receptive_field": field},
                "Expected an odd receptive_field from 3 to 11 for num_layers=3, kernel_size=3, "
                f"first_kernel_size=7; got {field}. Add layers, or widen the kernels.",
            )
            for field in (1, 6, 13)
        ),
    ],
)
def test_arguments(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        PixelCNN(**({"shape": (4, 4), "num_layers": 3, "rngs": nnx.Rngs(0)} | options))
