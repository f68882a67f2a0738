"""Pathfinder: closed forms, hard densities, several modes, what it refuses."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import poutine
from torch.distributions import biject_to

from pyro_vae_ext._flat import flat_model
from pyro_vae_ext.guides import AutoPosterior, MeanField
from pyro_vae_ext.training import PathfinderResult, pathfinder


def run(model, *args, **options):
    pyro.set_rng_seed(0)
    return pathfinder(model, *args, progress_bar=False, **options)


def regression(x, y):
    """A scale on the positive line next to a slope."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


def data(rows: int = 20):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 2))
    y = x @ [1.0, -2.0] + 0.3 * rng.normal(size=rows)
    return torch.tensor(x).to(torch.get_default_dtype()), torch.tensor(y).to(
        torch.get_default_dtype()
    )


@pytest.mark.usefixtures("exact")
def test_normal_is_found() -> None:
    """A Normal over four decades: its evidence, its mean and its covariance."""
    scales = np.logspace(-2, 2, 12)
    tril = np.linalg.cholesky(0.9 + 0.1 * np.eye(12)) * scales[:, None]
    root = torch.tensor(tril)

    def model(loc):
        pyro.factor("constant", torch.tensor(2.5))
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root))

    found = run(model, torch.tensor(3 * scales), num_paths=3, num_samples=200)
    assert found.converged.all() and found.reasons == ("converged",) * 3
    np.testing.assert_allclose(found.elbo, 2.5, atol=1e-3)
    np.testing.assert_allclose(found.log_evidence, 2.5, atol=1e-3)
    np.testing.assert_allclose(found.loc.numpy() / scales, 3, atol=1e-5)
    np.testing.assert_allclose(
        found.scale_tril.numpy() / scales[:, None], tril / scales[:, None], atol=1e-5
    )
    assert found.sites == {"z": (12,)}


@pytest.mark.parametrize("case", CASES["training"]["pathfinder"])
def test_result(case: dict) -> None:
    """Shapes, supports and what belongs together; the same from the same seed."""
    x, y = data()
    found = run(regression, x, y, **case)
    paths, draws = case["num_paths"], case.get("num_samples", 1000)
    assert found.sites == {"slope": (2,), "scale": ()}
    assert found.draws["slope"].shape == (paths, draws, 2)
    assert found.draws["scale"].shape == (paths, draws)
    assert found.resampled["slope"].shape == (draws, 2)
    assert (found.resampled["scale"] > 0).all()
    for name in ("elbos", "converged", "num_iterations", "khats", "reasons", "low_ranks"):
        assert len(getattr(found, name)) == paths, name
    best = int(np.argmax(found.elbos))
    assert found.elbo == found.elbos[best]
    np.testing.assert_array_equal(found.loc, found.locs[best])
    np.testing.assert_array_equal(found.scale_tril, found.scale_trils[best])
    assert found.log_weights.shape == (paths, draws)
    # A bound, and close to what it bounds: no other latent is near a Normal's.
    assert found.log_evidence - 0.3 < found.elbo < found.log_evidence + 0.05
    loc, alpha, beta, gamma = found.low_ranks[best]
    assert (loc.shape, alpha.shape) == ((3,), (3,)) and beta.shape[1] == len(gamma)
    # One number of the host's generator is used up.
    after = torch.rand(())
    pyro.set_rng_seed(0)
    torch.randint(2**62, ())
    assert after == torch.rand(())
    again = run(regression, x, y, **case)
    assert again.reasons == found.reasons
    np.testing.assert_array_equal(again.resampled["slope"], found.resampled["slope"])


@pytest.mark.parametrize("case", CASES["training"]["PathfinderResult"])
def test_starts_a_guide(case: dict) -> None:
    """The guide draws from the best Normal before any training."""
    x, y = data()
    found = run(regression, x, y, **case)
    assert isinstance(found, PathfinderResult)
    guide = AutoPosterior(regression, MeanField, start=found)
    draws = guide.sample_posterior(x, y, sample_shape=(4000,))
    free = np.column_stack([draws["slope"], draws["scale"].log()])
    width = found.scale_tril.norm(dim=1).numpy()
    np.testing.assert_allclose((free.mean(0) - found.loc.numpy()) / width, 0, atol=0.1)
    np.testing.assert_allclose(free.std(0) / width, 1, rtol=0.1)


def test_single_precision() -> None:
    """Data far from 0, in float32: the paths end where the density has no more digits."""

    def model(y):
        loc = pyro.sample("loc", dist.Normal(y.new_tensor(0.0), 5000.0))
        scale = pyro.sample("scale", dist.HalfNormal(y.new_tensor(500.0)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    found = run(model, torch.linspace(2400.0, 2600.0, 50, dtype=torch.float32), num_paths=3)
    assert found.converged.all() and found.loc.dtype == torch.float32
    np.testing.assert_allclose(found.resampled["loc"].mean(), 2500, atol=3)


def test_funnel() -> None:
    """Neal's: the mode is far down the neck, and the best Normal is not there."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(3), (v / 2).exp()).to_event(1))

    found = run(model)
    assert found.converged.any() and np.isfinite(found.elbos).all()
    # With v ~ N(m, s^2) and the best x the bound is
    # -log 3 - (m^2 + s^2) / 18 + 1 / 2 + log s - 3 s^2 / 4: best at m = 0, s^2 = 18 / 29.
    best = -math.log(3) - 1 / 29 + 1 / 2 + math.log(18 / 29) / 2 - 27 / 58
    assert found.loc[0] > -8 and best - 0.75 < found.elbo < best + 0.1


def test_density_without_a_mode() -> None:
    """A hierarchy whose density grows without an end as its scale falls: the path is ended."""

    def model(y):
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("groups", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    found = run(model, torch.linspace(-1, 1, 6), num_paths=4)
    assert set(found.reasons) == {"bound"} and (found.num_iterations <= 250).all()
    assert found.converged.all() and found.log_evidence - found.elbo < 3


def test_wall() -> None:
    """A density that is no number in parts of the space."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("wall", torch.where(z[0] > 1.0, math.nan, 0.0))

    found = run(model, num_paths=4)
    assert found.converged.all() and np.isneginf(found.elbo)  # no Normal keeps off the wall
    np.testing.assert_allclose(found.log_evidence, np.log(0.8413), atol=0.1)
    assert (found.resampled["z"][:, 0] <= 1).all()


def test_two_modes() -> None:
    """Each mode counts by its mass, however many paths end there."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), (2,)))
        left = dist.Normal(-5.0, 1.0).log_prob(z).sum() + math.log(0.8)
        right = dist.Normal(5.0, 0.5).log_prob(z).sum() + math.log(0.2)
        pyro.factor("mixture", torch.logaddexp(left, right))

    found = run(model, num_samples=2000, init_radius=6.0)
    assert {bool(loc[0] > 0) for loc in found.locs} == {True, False}
    np.testing.assert_allclose((found.resampled["z"][:, 0] > 0).double().mean(), 0.2, atol=0.04)
    np.testing.assert_allclose(found.log_evidence, 0, atol=0.02)
    # Each path alone knows one of them.
    np.testing.assert_allclose(np.exp(found.elbos.min()), 0.2, atol=0.01)


def test_unfinished_path() -> None:
    x, y = data()
    text = "Expected one path at least to end within 2 steps; got none. Raise max_iterations"
    with pytest.warns(UserWarning, match=re.escape(text)):
        found = run(regression, x, y, num_paths=2, max_iterations=2)
    assert found.reasons == ("max_iterations",) * 2 and not found.converged.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(regression, x, y, num_paths=2).converged.all()


def hidden(**options) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0), **options)


def discrete() -> None:
    hidden()
    pyro.sample("k", dist.Bernoulli(0.5))


def masked() -> None:
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(torch.tensor([True, False])))
        pyro.sample("x", dist.Normal(z, 1.0), obs=0 * z)


def subsampled() -> None:
    hidden()
    with pyro.plate("data", 100, subsample_size=10):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(10))


def infinite() -> None:
    hidden()
    pyro.factor("nowhere", torch.tensor(math.nan))


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (
            lambda: hidden(obs=torch.tensor(0.0)),
            {},
            "Expected at least one continuous latent site in the model;",
        ),
        (discrete, {}, "Expected continuous latent sites under pathfinder; got site 'k' with the"),
        (masked, {}, "Expected latent sites without a mask under pathfinder; got site 'z' with"),
        (
            subsampled,
            {},
            "Expected no subsampled plate under pathfinder; got site 'x' in plate 'data' (10 of "
            "100 rows). Pass the full data.",
        ),
        (
            infinite,
            {},
            "Expected a finite log-density and gradient at one start at least; got none within "
            "2.0 of 0, unconstrained, by site 'nowhere'. Change init_radius",
        ),
        (hidden, {"num_paths": 0}, "Expected num_paths >= 1; got 0."),
        (hidden, {"init_radius": -1.0}, "Expected init_radius > 0; got -1.0."),
    ],
)
def test_errors(model, options, text) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        run(model, **options)


def hierarchy(y) -> None:
    """Supports that depend on another site, a simplex, a scaled plate."""
    top = pyro.sample("top", dist.HalfNormal(2.0))
    bound = pyro.sample("bound", dist.Uniform(0.0, top))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with poutine.scale(scale=2.0), pyro.plate("data", len(y)):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(bound + shift, weights[0]), obs=y)


def looking(y) -> None:
    """A model that looks at its numbers."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z if z > 0 else 2 * z, 1.0).expand([4]).to_event(1), obs=y)


class Unconstrained(poutine.messenger.Messenger):
    """Gives each latent site the value of its unconstrained one, on the support of that run."""

    def __init__(self, free) -> None:
        super().__init__()
        self.free, self.log_det = free, 0.0

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.free:
            transform, u = biject_to(msg["fn"].support), self.free[msg["name"]]
            msg["value"] = transform(u)
            self.log_det = self.log_det + transform.log_abs_det_jacobian(u, msg["value"]).sum()


def by_hand(model, args, free):
    """The joint log-density at unconstrained values, one statement after the other."""
    with poutine.trace() as recorded, Unconstrained(free) as given:
        model(*args)
    return recorded.trace.log_prob_sum() + given.log_det


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("model", [hierarchy, looking])
def test_flat_density_is_the_models(model) -> None:
    """Rows at once where the model allows it, and one by one where it does not."""
    args = (torch.ones(4),)
    flat = flat_model(model, args, {})
    assert flat.batched == (model is hierarchy)
    u = flat.start(3)
    expected = torch.stack([by_hand(model, args, flat.unpack(row)) for row in u])
    torch.testing.assert_close(flat.log_density(u), expected, rtol=1e-12, atol=0)
    terms = flat.log_densities(u)
    torch.testing.assert_close(sum(terms.values()), expected, rtol=1e-12, atol=0)
    values, slopes = flat.gradient(u)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
    step = 1e-5 * torch.eye(flat.size)[0]
    moved = (flat.log_density(u + step) - flat.log_density(u - step)) / 2e-5
    torch.testing.assert_close(slopes[:, 0], moved, rtol=1e-6, atol=1e-6)
    bent = (flat.gradient(u + step)[1] - flat.gradient(u - step)[1]) / 2e-5
    torch.testing.assert_close(flat.hessian(u)[:, 0], bent, rtol=1e-5, atol=1e-5)
    constrained = flat.constrain(u)
    assert tuple(constrained) == flat.names == tuple(flat.shapes)
    assert all(len(value) == 3 for value in constrained.values())


def test_matrix_without_a_factor() -> None:
    """One row of a batch whose matrix has no Cholesky factor has no density; the others have."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        root = torch.linalg.cholesky(torch.eye(2) + z * (1 - torch.eye(2)))
        pyro.factor("det", root.diagonal().log().sum())

    flat = flat_model(model, (), {})
    found = flat.log_density(torch.tensor([[0.5], [2.0], [-0.3]]))
    assert found.isfinite().tolist() == [True, False, True]
    assert run(model, num_paths=3).converged.all()
