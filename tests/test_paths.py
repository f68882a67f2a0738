"""L-BFGS side by side and the Normals along it: one text in both packages, tested once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from reference import pathfinder as reference

PACKAGE = Path(__file__).resolve().parent.parent / "numpyro_vae_ext" / "training"


def load(name: str) -> ModuleType:
    """The module alone: its package needs a backend."""
    spec = importlib.util.spec_from_file_location(f"alone{name}", PACKAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


lbfgs, normals = load("_lbfgs"), load("_normals")


def pairs(size: int, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Steps on a quadratic and what its gradient loses along them."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    hessian = root @ root.T + np.diag(np.logspace(-1, 1, size))
    s = rng.normal(size=(count, size))
    return s, s @ hessian


def quadratic(scales: np.ndarray, loc: np.ndarray, calls: list[int] | None = None):
    """Log-density of independent Normals, and its gradient."""

    def density(u: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if calls is not None:
            calls.append(len(at))
        w = (u - loc) / scales
        return -0.5 * (w**2).sum(-1), -w / scales

    return density


def ascent(density, starts, **options):
    found = lbfgs.Ascent(density, starts, **{"max_iterations": 500, "history_size": 6, **options})
    found.advance(10**6)
    return found


def test_diagonal_is_that_of_the_update() -> None:
    s, z = pairs(5, 4)
    alpha = expected = np.ones(5)
    for one, other in zip(s, z, strict=True):
        alpha = lbfgs.diagonal(alpha, one, other)
        expected = reference.diagonal(expected, one, other)
        np.testing.assert_allclose(alpha, expected, rtol=1e-12)
    assert (alpha > 0).all()


@pytest.mark.parametrize(("size", "count"), [(7, 3), (7, 0), (3, 5), (1, 1)])
def test_normal_of_low_rank(size: int, count: int) -> None:
    """Covariance, mean, density and draws, against matrices; more pairs than numbers as well."""
    s, z = pairs(size, count)
    alpha = np.linspace(0.5, 2, size)
    rng = np.random.default_rng(1)
    point, gradient, noise = rng.normal(size=(3, size))[:, None]
    covariance = reference.covariance(alpha, list(zip(s, z, strict=True)))
    normal = normals.low_rank(point[0], gradient[0], alpha, s, z)
    np.testing.assert_allclose(
        np.diag(normal.alpha) + normal.beta @ normal.gamma @ normal.beta.T, covariance, atol=1e-9
    )
    np.testing.assert_allclose(normal.loc, point[0] + covariance @ gradient[0], atol=1e-9)
    tril = normal.scale_tril()
    np.testing.assert_allclose(tril @ tril.T, covariance, atol=1e-9)
    assert (np.triu(tril, 1) == 0).all() and (np.diag(tril) > 0).all()
    # The map from noise to draws is a root of the covariance, and `whiten` undoes it.
    root = (normal.draw(np.eye(size)) - normal.loc).T
    np.testing.assert_allclose(root @ root.T, covariance, atol=1e-9)
    np.testing.assert_allclose(normal.whiten(normal.draw(noise)), noise, atol=1e-9)
    centred = normal.draw(noise)[0] - normal.loc
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    expected = -0.5 * (centred @ np.linalg.solve(covariance, centred) + log_det)
    np.testing.assert_allclose(normals.log_prob(normal, noise), expected, atol=1e-9)


def test_normal_of_a_hessian() -> None:
    """Scales from 1e-4 to 1e3: every one to nine digits."""
    scales = np.logspace(-4, 3, 6)
    correlation = 0.9 + 0.1 * np.eye(6)
    precision = np.linalg.inv(correlation) / scales / scales[:, None]
    loc, point = 3 * scales, np.zeros(6)
    around, moved = normals.full(point, precision @ loc, -precision)
    expected = np.linalg.cholesky(correlation)
    for normal in (around, moved):
        np.testing.assert_allclose(normal.tril / scales[:, None], expected, atol=1e-9)
    np.testing.assert_array_equal(around.loc, point)
    np.testing.assert_allclose(moved.loc / scales, 3, rtol=1e-9)
    np.testing.assert_allclose(around.whiten(around.draw(np.ones((1, 6)))), 1, rtol=1e-9)


def test_hessian_that_bends_up() -> None:
    """A saddle has the width of a bend down; what is not finite has no Normal."""
    normal, _ = normals.full(np.zeros(2), np.zeros(2), np.diag([-4.0, 0.25]))
    np.testing.assert_allclose(normal.tril, np.diag([0.5, 2.0]), rtol=1e-12)
    assert normals.full(np.zeros(2), np.zeros(2), np.full((2, 2), np.nan)) == []
    assert normals.full(np.zeros(2), np.zeros(2), np.zeros((2, 2))) == []


def test_paths_end_at_the_mode() -> None:
    scales, loc = np.logspace(-2, 2, 8), np.linspace(-1, 1, 8)
    starts = np.random.default_rng(0).uniform(-2, 2, (4, 8))
    calls: list[int] = []
    found = ascent(quadratic(scales, loc, calls), starts)
    assert found.reasons == ["converged"] * 4
    for p in range(4):
        path = found.path(p)
        np.testing.assert_array_equal(path.points[0], starts[p])
        assert (np.diff(path.values) > 0)[:-3].all()
        # The gain that is left, in nats: the paths know an estimate of it.
        assert path.values[-1] > -1e-3
    # Paths that have ended are not asked again.
    assert calls[0] == 4 and calls[-1] < 4


def test_paths_do_not_know_of_one_another() -> None:
    density = quadratic(np.logspace(-2, 2, 5), np.ones(5))
    starts = np.random.default_rng(1).uniform(-2, 2, (3, 5))
    together = ascent(density, starts)
    for p in range(3):
        alone = ascent(density, starts[p : p + 1]).path(0)
        np.testing.assert_allclose(together.path(p).points, alone.points, rtol=1e-12)


@pytest.mark.parametrize("wall", [np.nan, -np.inf, np.inf])
def test_walls_are_walked_around(wall: float) -> None:
    """A density that is no number in half of the space; the mode is on the other side."""
    smooth = quadratic(np.ones(2), np.array([0.5, 0.0]))

    def density(u: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        f, g = smooth(100 * u, at)
        outside = u[:, 0] > 0.01
        return np.where(outside, wall, f), np.where(outside[:, None], np.nan, 100 * g)

    found = ascent(density, np.array([[-2.0, 1.0], [-0.1, -2.0]]))
    assert found.reasons == ["converged"] * 2
    np.testing.assert_allclose(found.u, [[0.005, 0]] * 2, atol=1e-5)


def test_ends_that_are_none() -> None:
    def wrong(u: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return -(u**2).sum(-1), u  # uphill is downhill

    assert ascent(wrong, np.ones((1, 2))).reasons == ["line_search"]
    few = ascent(quadratic(np.logspace(-2, 2, 8), np.ones(8)), np.zeros((1, 8)), max_iterations=3)
    assert few.reasons == ["max_iterations"] and list(few.steps) == [3]
    still = ascent(quadratic(np.ones(2), np.ones(2)), np.ones((1, 2)))
    assert still.reasons == ["converged"] and list(still.steps) == [0]


def test_tiny_pair_is_no_warning() -> None:
    """Rounding leaves nothing of it: the diagonal is not finite, and nothing is said."""
    s, z = np.array([[-2.65709065e-32, -5.20923574e-44]]), np.array([[0.0, -1.06310933e-43]])
    assert not np.isfinite(lbfgs.diagonal(np.full((1, 2), 0.49), s, z)).all()
