"""What is `PixelCNN`'s own: its window, its two ways for the conditioning, its cached sampler."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from reference import pixelcnn as oracle
from test_pyro.models import shaken
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae_ext.likelihoods import PixelCNN

GREY = {"shape": (9, 9), "channels": 12}
# Of few rectified features all may be dead: eight in each group.
COLOUR = {"shape": (3, 5, 5), "channels": 24}
# What the registry's cases leave out: wide kernels, layers of extent 0, many channels.
CASES = [
    {
        "shape": (5, 6),
        "channels": 5,
        "num_layers": 3,
        "kernel_size": 5,
        "first_kernel_size": 5,
        "context_dim": 2,
    },
    {"shape": (4, 3), "channels": 4, "num_layers": 4, "receptive_field": 5, "context_dim": 2},
    {
        "shape": (3, 3, 4),
        "channels": 6,
        "num_layers": 3,
        "context_dim": 2,
        "covariate_dim": 1,
        "spatial_channels": 3,
        "output": "categorical",
        "num_categories": 4,
    },
    {
        "shape": (2, 4, 3),
        "channels": 6,
        "num_layers": 2,
        "kernel_size": 1,
        "context_dim": 2,
        "spatial_channels": 0,
        "output": "discretized_logistic_mixture",
        "num_components": 2,
    },
    {"shape": (1, 4, 3), "channels": 4, "num_layers": 2, "output": "logistic_mixture"},
]


def random_inputs(module: PixelCNN, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, *module.shape, module.output.num_inputs)


def conditioning(module: PixelCNN, *batch: int) -> list[torch.Tensor]:
    sizes = (module.context_dim, module.covariate_dim)
    return [torch.randn(*batch, size) for size in sizes if size]


def dependence(module: PixelCNN, inputs: torch.Tensor) -> torch.Tensor:
    """Boolean ``(D, D)``: whether an element's numbers (row) move with an element (column)."""
    size = module.num_elements
    inputs = inputs.unsqueeze(1).repeat(1, size, *[1] * (inputs.dim() - 1)).requires_grad_()
    params = module._params(inputs, module().conditioned).reshape(len(inputs), size, size, -1)
    # Row k of the Jacobian comes from copy k of the image.
    weighted = params * torch.randn(params.shape[-1])
    (found,) = torch.autograd.grad(weighted.sum(-1).diagonal(dim1=1, dim2=2).sum(), inputs)
    return (found != 0).any(0).reshape(size, size)


@pytest.mark.parametrize("receptive_field", [3, 5, 7, None])
@pytest.mark.parametrize("case", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_output_depends_exactly_on_its_window(
    exact: None, case: dict, receptive_field: int | None
) -> None:
    module = shaken(PixelCNN(**case, receptive_field=receptive_field))
    found = dependence(module, random_inputs(module, 4))
    expected = oracle.dependency(**case, receptive_field=receptive_field)
    np.testing.assert_array_equal(found.cpu(), expected)
    if receptive_field is None and case is GREY:
        # Far enough for nearly all, and still a window: a corner does not see the opposite one.
        assert module.receptive_field == 15 and not found[-1, 0] and found[-1, 1 * 9 + 1]


@pytest.mark.parametrize(
    ("kwargs", "extents"),
    [
        ({}, (3, 1, 1, 1, 1)),
        ({"receptive_field": 15}, (3, 1, 1, 1, 1)),
        ({"receptive_field": 11}, (3, 1, 1, 0, 0)),
        ({"receptive_field": 3}, (1, 0, 0, 0, 0)),
        ({"kernel_size": 5, "num_layers": 3, "receptive_field": 13}, (3, 2, 1)),
        ({"first_kernel_size": 3, "num_layers": 1}, (1,)),
        ({"kernel_size": 1}, (3, 0, 0, 0, 0)),
    ],
)
def test_receptive_field_is_dealt_out_to_the_layers(kwargs: dict, extents: tuple) -> None:
    module = PixelCNN((4, 4), channels=4, **kwargs)
    assert module.extents == extents
    assert module.receptive_field == kwargs.get("receptive_field", 2 * sum(extents) + 1)
    # Unused taps are no parameters: the kernels are as small as they look.
    assert [layer.horizontal.in_features for layer in module.layers] == [
        (extent + 1) * (4 if index else 1) for index, extent in enumerate(extents)
    ]


@pytest.mark.parametrize("case", CASES)
def test_density_and_parameters_are_the_reference(exact: None, case: dict) -> None:
    module = shaken(PixelCNN(**case))
    given = conditioning(module, 2, 3)
    p = module(*given)
    value = p.sample()[0] if given else p.sample((3,))
    weights = {name: value.detach().cpu().numpy() for name, value in module.named_parameters()}
    rows = torch.cat(given, -1).cpu().numpy() if given else None
    options = {key: size for key, size in case.items() if not key.endswith("_dim")}
    inputs = module.output.encode(value, torch.float64)
    params = module._params(inputs, p.conditioned).flatten(-len(module.shape) - 1, -2)
    expected = oracle.params(value.cpu().numpy(), weights, rows, **options)
    np.testing.assert_allclose(params.detach().cpu(), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        p.log_prob(value).detach().cpu(),
        oracle.log_prob(value.cpu().numpy(), weights, rows, **options),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("case", CASES)
def test_cached_sample_is_the_naive_one(exact: None, case: dict) -> None:
    """One pass of the whole network for every element, with the same noise."""
    module = shaken(PixelCNN(**case))
    p = module(*conditioning(module, 2))
    noise = module.output.noise((3, *p.batch_shape, *module.shape), torch.float64)
    groups, height, width = (1, *module.shape)[-3:]
    value = noise.new_zeros(noise.shape[:-1]).reshape(-1, groups, height, width)
    planes = noise.reshape(*value.shape, -1)
    for i, j, c in np.ndindex(height, width, groups):
        inputs = module.output.encode(value, torch.float64).reshape(*noise.shape[:-1], -1)
        params = module._params(inputs, p.conditioned).reshape(*value.shape, -1)
        drawn = module.output.draw(params[:, c, i, j], planes[:, c, i, j])
        value[:, c, i, j] = drawn.to(value.dtype).detach()
    found = module._draw(noise, p.conditioned)
    assert found.shape == (3, *p.batch_shape, *module.shape)
    assert (found.to(value.dtype) - value.reshape(found.shape)).abs().max() < 1e-12
    if module.output.is_discrete:
        assert len(found.unique()) > 1


@pytest.mark.parametrize("shape", [(5, 5), (3, 3, 4)])
def test_sample_has_the_work_of_one_pass(shape: tuple) -> None:
    module = PixelCNN(shape, 2, channels=6, num_layers=3)
    p = module(torch.randn(7, 2))
    x = p.sample()
    counts = []
    for program in (p.sample, lambda: p.log_prob(x)):
        with FlopCounterMode(display=False) as counter:
            program()
        counts.append(counter.get_total_flops())
    assert 0.5 < counts[0] / counts[1] < 1.0


@pytest.mark.parametrize("path", ["global", "map", "none"])
@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 3)])
def test_context_reaches_every_output_by_either_path(path: str, shape: tuple) -> None:
    """Also where the window is small, and there is nothing above or to the left."""
    module = shaken(PixelCNN(shape, 3, channels=24, num_layers=3, receptive_field=3))
    with torch.no_grad():
        if path != "global":
            module.to_features.weight.zero_()
        if path != "map":
            module.from_map.weight.zero_()
    inputs = random_inputs(module)

    def params(z: torch.Tensor) -> torch.Tensor:
        return module._params(inputs, module(z).conditioned).flatten()

    found = torch.autograd.functional.jacobian(params, torch.randn(3))
    assert found.shape == (prod(shape), 3)
    reached = found.abs() > 1e-9
    assert reached.all() if path != "none" else not reached.any()


def test_map_tells_pixels_apart_and_the_global_path_does_not() -> None:
    """Of an image without neighbours: the window cannot tell where it is, the map can."""
    module = shaken(PixelCNN((5, 5), 2, channels=6, num_layers=2, receptive_field=3))
    middle = slice(1, -1)

    def spread() -> float:
        inputs = torch.ones(5, 5, 1)
        params = module._params(inputs, module(torch.randn(2)).conditioned)[middle, middle]
        return (params - params.mean()).abs().max().item()

    with torch.no_grad():
        before = module.from_map.weight.clone()
        module.from_map.weight.zero_()
        assert spread() < 1e-5
        module.from_map.weight.copy_(before)
        assert spread() > 1e-2


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"shape": 9}, ValueError, "Expected a shape (H, W) or (C, H, W); got (9,)."),
        (
            {"shape": (1, 2, 3, 4)},
            ValueError,
            "Expected a shape (H, W) or (C, H, W); got (1, 2, 3, 4).",
        ),
        ({"shape": (0, 3)}, ValueError, "Expected shape >= 1; got 0."),
        (
            {"shape": (3, 4, 4), "channels": 8},
            ValueError,
            "Expected channels to be a multiple of the 3 image channels; got 8.",
        ),
        ({"channels": 0}, ValueError, "Expected channels >= 1; got 0."),
        ({"num_layers": 0}, ValueError, "Expected num_layers >= 1; got 0."),
        ({"kernel_size": 4}, ValueError, "Expected an odd kernel_size; got 4."),
        ({"kernel_size": 0}, ValueError, "Expected kernel_size >= 1; got 0."),
        ({"first_kernel_size": 6}, ValueError, "Expected an odd first_kernel_size; got 6."),
        ({"first_kernel_size": 1}, ValueError, "Expected first_kernel_size >= 3; got 1."),
        ({"spatial_channels": -1}, ValueError, "Expected spatial_channels >= 0; got -1."),
        ({"receptive_field": 3.0}, TypeError, "Expected receptive_field to be an int; got float."),
        (
            {"receptive_field": 4},
            ValueError,
            "Expected an odd receptive_field from 3 to 15 for num_layers=5, kernel_size=3, "
            "first_kernel_size=7; got 4. Add layers, or widen the kernels.",
        ),
        ({"receptive_field": 1}, ValueError, "receptive_field from 3 to 15 for num_layers=5"),
        (
            {"receptive_field": 9, "num_layers": 2, "first_kernel_size": 5, "kernel_size": 3},
            ValueError,
            "Expected an odd receptive_field from 3 to 7 for num_layers=2, kernel_size=3, "
            "first_kernel_size=5; got 9. Add layers, or widen the kernels.",
        ),
    ],
)
def test_options(kwargs: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        PixelCNN(**{"shape": (4, 4), **kwargs})
    assert text in str(caught.value)
