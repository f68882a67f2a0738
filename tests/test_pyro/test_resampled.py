"""`sample_posterior(num_importance=...)`: draws picked out of more of them by their weights."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, init_to_value

from pyro_vae_ext.guides import AutoAmortized, AutoPosterior, MeanField


def location(x: torch.Tensor) -> None:
    """The posterior of `a` is Normal: mean sum(x) / (n + 1), variance 1 / (n + 1)."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def rows(x: torch.Tensor, batch_size: int | None = None) -> None:
    """Of every row as well, with n = 1; `scale` has the same posterior as prior."""
    with pyro.plate("data", len(x), batch_size, dim=-1) as index:
        with pyro.plate("inner", 2, dim=-2):
            pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def nested(x: torch.Tensor, batch_size: int | None = None) -> None:
    pyro.sample("t", dist.Normal(0.0, 1.0))
    rows(x, batch_size)


def wrong(init_scale: float = 1.0) -> AutoPosterior:
    start = init_to_value(values={"a": torch.tensor(0.2)})
    return AutoPosterior(location, MeanField, init_loc_fn=start, init_scale=init_scale)


def near(draws: torch.Tensor, mean: torch.Tensor, sd: float) -> None:
    """Both moments, within four standard errors."""
    error = sd / math.sqrt(len(draws))
    assert ((draws.mean(0) - mean).abs() < 4 * error).all()
    assert ((draws.std(0) - sd).abs() < 4 * error).all()


def test_moments_move_to_the_truth() -> None:
    """Of a guide that is wrong in place and width."""
    x = torch.tensor([1.0, 2.0, 0.0])
    guide = wrong()
    draws = guide.sample_posterior(x, sample_shape=(40, 50), num_importance=100)["a"]
    assert draws.shape == (40, 50) and not draws.requires_grad
    near(draws.ravel(), torch.tensor(0.75), 0.5)
    # One out of one is a draw of the guide; all draws are fresh.
    for own in (
        guide.sample_posterior(sample_shape=(2000,))["a"],
        guide.sample_posterior(x, sample_shape=(2000,), num_importance=1)["a"],
    ):
        assert abs(own.mean() - 0.2) < 0.1 and abs(own.std() - 1) < 0.15
        assert len(own.unique()) == 2000


def test_rows_are_picked_each_for_itself() -> None:
    x = torch.tensor([2.0, -1.0, 0.5])

    def encoder(x: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        return torch.zeros(len(x), 1)

    guide = AutoAmortized(rows, encoder, family=MeanField)
    draws = guide.sample_posterior(x, sample_shape=(2000,), num_importance=50)
    assert draws["scale"].shape == (2000, 2, 3)
    near(draws["z"], x / 2, math.sqrt(0.5))
    near(draws["scale"].log(), torch.zeros(2, 3), 0.5)
    # Of a subsample the rows of one: two of the means, in the order of the plate.
    part = guide.sample_posterior(x, 2, sample_shape=(500,), num_importance=50)["z"]
    assert part.shape == (500, 2)
    means = part.mean(0)
    assert ((means[:, None] - x / 2).abs().min(1).values < 0.15).all()
    # With a global latent all rows have one weight, which a subsample has not.
    guide = AutoAmortized(nested, encoder, family=MeanField)
    with pytest.raises(ValueError, match="^Expected every latent and observed site inside the su"):
        guide.sample_posterior(x, 2, num_importance=50)


def test_poor_weights_are_told() -> None:
    x = torch.tensor([1.0, 2.0, 0.0])
    guide = wrong(init_scale=0.05)
    with pytest.warns(UserWarning, match="^Expected k-hat below 0.70 under num_importance; got"):
        guide.sample_posterior(x, sample_shape=(20,), num_importance=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="^Expected a draw with a positive weight among num_"):
            guide.sample_posterior(torch.full((3,), 1e200), num_importance=3)
    with pytest.raises(ValueError, match="^Expected num_importance >= 1; got 0.$"):
        guide.sample_posterior(x, num_importance=0)
    whole = AutoGuideList(nested)
    whole.append(AutoPosterior(poutine.block(nested, hide=["t"]), MeanField))
    whole.append(AutoPosterior(poutine.block(nested, expose=["t"]), MeanField))
    with pytest.raises(ValueError, match="^Expected a guide of the whole model under num_impor"):
        whole[0].sample_posterior(x, num_importance=5)
