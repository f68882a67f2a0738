"""`sample_posterior(num_importance=...)`: draws picked out of more of them by their weights."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import block
from numpyro.infer import SVI, Trace_ELBO, init_to_value
from test_numpyro.models import normal

from numpyro_vae_ext.guides import AutoAmortized, AutoPosterior, Auxiliary, MeanField

KEY = jax.random.key(3)


def location(x: jax.Array) -> None:
    """The posterior of `a` is Normal: mean sum(x) / (n + 1), variance 1 / (n + 1)."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2 * a)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(a, 1.0), obs=x)


def rows(x: jax.Array, batch_size: int | None = None) -> None:
    """Of every row as well, with n = 1; `scale` has the same posterior as prior."""
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        batch = numpyro.subsample(x, event_dim=0)
        with numpyro.plate("inner", 2):
            numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=batch)


def nested(x: jax.Array, batch_size: int | None = None) -> None:
    numpyro.sample("t", dist.Normal(0.0, 1.0))
    rows(x, batch_size)


def started(model: Any, guide: Any, *args: Any) -> Any:
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    return svi.get_params(svi.init(KEY, *args))


def wrong(family: Any = MeanField, init_scale: float = 1.0) -> Any:
    start = init_to_value(values={"a": 0.2})
    return AutoPosterior(location, family, init_loc_fn=start, init_scale=init_scale)


def near(draws: Any, mean: Any, sd: Any) -> None:
    """Both moments, within four standard errors."""
    error = np.asarray(sd) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, 0) - mean) < 4 * error).all()
    assert (np.abs(np.std(draws, 0) - sd) < 4 * error).all()


@pytest.mark.parametrize("family", [MeanField, Auxiliary], ids=["MeanField", "Auxiliary"])
def test_moments_move_to_the_truth(family: Any) -> None:
    """Of a guide that is wrong in place and width, and of one with variables of its own."""
    x = jnp.array([1.0, 2.0, 0.0])
    guide = wrong(family)
    params = started(location, guide, x)
    draws = guide.sample_posterior(KEY, params, x, sample_shape=(40, 50), num_importance=100)
    assert draws["a"].shape == (40, 50)
    near(draws["a"].ravel(), 0.75, 0.5)
    np.testing.assert_allclose(draws["twice"], 2 * draws["a"], rtol=1e-6)
    own = guide.sample_posterior(KEY, params, x, sample_shape=(2000,))["a"]
    assert abs(own.mean() - 0.2) < 0.1 and abs(own.std() - 1) < 0.15
    # One out of one is a draw of the guide; all draws are fresh.
    own = guide.sample_posterior(KEY, params, sample_shape=(2000,), num_importance=1)["a"]
    assert abs(own.mean() - 0.2) < 0.1 and len(np.unique(own)) == 2000


def test_rows_are_picked_each_for_itself() -> None:
    x = jnp.array([2.0, -1.0, 0.5])

    def encoder(x: jax.Array, batch_size: int | None = None) -> jax.Array:
        return jnp.zeros((len(x), 1))

    guide = AutoAmortized(rows, encoder, family=MeanField)
    params = started(rows, guide, x)
    draws = guide.sample_posterior(KEY, params, x, sample_shape=(2000,), num_importance=50)
    assert draws["scale"].shape == (2000, 2, 3)
    near(draws["z"], x / 2, np.sqrt(0.5))
    near(np.log(draws["scale"]), np.zeros((2, 3)), 0.5)
    # Of a subsample the rows of one: two of the means, in the order of the plate.
    part = guide.sample_posterior(KEY, params, x, 2, sample_shape=(500,), num_importance=50)["z"]
    assert part.shape == (500, 2)
    means = np.asarray(part.mean(0))
    assert (np.abs(means[:, None] - np.asarray(x) / 2).min(1) < 0.15).all()
    # With a global latent all rows have one weight, which a subsample has not.
    guide = AutoAmortized(nested, encoder, family=MeanField)
    params = started(nested, guide, x)
    with pytest.raises(ValueError, match="^Expected every latent and observed site inside the su"):
        guide.sample_posterior(KEY, params, x, 2, num_importance=50)


def test_poor_weights_are_told() -> None:
    x = jnp.array([1.0, 2.0, 0.0])
    guide = wrong(init_scale=0.05)
    params = started(location, guide, x)
    with pytest.warns(UserWarning, match="^Expected k-hat below 0.70 under num_importance; got"):
        guide.sample_posterior(KEY, params, x, sample_shape=(20,), num_importance=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="^Expected a draw with a positive weight among num_"):
            guide.sample_posterior(KEY, params, jnp.full(3, 1e200), num_importance=3)
    with pytest.raises(ValueError, match="^Expected num_importance >= 1; got 0.$"):
        guide.sample_posterior(KEY, params, x, num_importance=0)
    with pytest.raises(ValueError, match="^Expected num_importance outside of jit; got traced"):
        jax.jit(lambda p: guide.sample_posterior(KEY, p, x, num_importance=2))(params)
    part = AutoPosterior(block(nested, hide=["t"]), MeanField)
    params = started(rows, part, normal(3))
    with pytest.raises(ValueError, match="^Expected a guide of the whole model under num_impor"):
        part.sample_posterior(KEY, params, normal(3), num_importance=5)
