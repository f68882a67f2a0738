"""Deterministic sites, pointwise log-likelihoods and predictions in ArviZ objects."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from scipy import stats
from torch import Tensor

from pyro_vae_ext.diagnostics import latent_utilisation, to_arviz

export = partial(to_arviz, progress_bar=False)


def data() -> tuple[Tensor, Tensor]:
    return torch.tensor([1.0, 0.5, 2.0, 1.5]), torch.tensor([1.0, -0.5, 2.0, 0.3])


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


@poutine.reparam(config={"theta": LocScaleReparam(0.0)})
def schools(sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.2))
    pyro.deterministic("log_tau", tau.log())
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.deterministic("ratio", theta / sigma)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_guide(sigma: Tensor, y: Tensor | None = None) -> None:
    """The prior, which has weights of light tails here."""
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("tau", dist.LogNormal(0.0, 0.2))
    with pyro.plate("school", 4):
        pyro.sample("theta_decentered", dist.Normal(0.0, 1.0))


def line(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        mean = pyro.deterministic("mean", slope * x)
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)


def line_guide(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("slope", dist.Normal(1.0, 0.3))


def autoencoder(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("x", dist.Normal(z, 0.1), obs=x)


def encoder(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x, 0.1))


def shapes(group: Any) -> dict[str, tuple[str, ...]]:
    return {name: tuple(variable.dims) for name, variable in group.data_vars.items()}


def test_names_are_those_of_the_model() -> None:
    sigma, y = data()
    found = export(schools, schools_guide, sigma, y, num_samples=40, num_chains=2, chunk_size=30)
    posterior, draws = found["posterior"], ("chain", "draw")
    assert shapes(posterior) == {
        **dict.fromkeys(("mu", "tau", "log_tau"), draws),
        **dict.fromkeys(("theta_decentered", "theta", "ratio"), (*draws, "school")),
    }
    moved = posterior["mu"] + posterior["tau"] * posterior["theta_decentered"]
    np.testing.assert_allclose(posterior["theta"], moved, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(posterior["log_tau"], np.log(posterior["tau"]), atol=1e-6)
    np.testing.assert_allclose(posterior["ratio"], posterior["theta"] / numpy(sigma), rtol=1e-5)
    assert shapes(found["observed_data"]) == {"y": ("school",)}
    assert not {"log_likelihood", "predictions"} & set(found.groups())
    new = found["posterior_predictive"]["y"] - posterior["theta"]
    np.testing.assert_allclose(new.std(draws), numpy(sigma), rtol=0.35)


def test_log_likelihood_of_rows_gives_loo() -> None:
    sigma, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = export(
            schools, schools_guide, sigma, y, num_samples=500, num_chains=2, log_likelihood=True
        )
    pointwise, theta = found["log_likelihood"]["y"], found["posterior"]["theta"]
    assert shapes(found["log_likelihood"]) == {"y": ("chain", "draw", "school")}
    expected = stats.norm.logpdf(numpy(y), np.asarray(theta), numpy(sigma))
    np.testing.assert_allclose(pointwise, expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = np.asarray(arviz.loo(found, pointwise=True).loo_i)
    # The harmonic mean of the likelihoods, its largest terms smoothed: less so at wide likelihoods.
    harmonic = -np.log(np.exp(-expected).mean((0, 1)))
    assert rows.shape == (4,)
    np.testing.assert_allclose(rows[2:], harmonic[2:], atol=0.3)


def test_log_likelihood_leaves_events_masks_and_factors_out() -> None:
    keep = torch.tensor([True, False, True])

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("nothing", 0.0 * z)
        with pyro.plate("rows", 3), poutine.mask(mask=keep):
            loc = z.unsqueeze(-1).expand(*z.shape, 2)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=torch.ones(3, 2))
        pyro.sample("total", dist.Poisson(z.exp()), obs=torch.tensor(2.0))
        # The same at every draw.
        pyro.sample("fixed", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    # Six draws say nothing of their tail.
    with pytest.warns(UserWarning, match=r"got inf\. Leave-one-out estimates"):
        found = export(model, guide, num_samples=3, num_chains=2, log_likelihood=True)
    draws = ("chain", "draw")
    dims = {"x": (*draws, "rows"), "total": draws, "fixed": draws}
    assert shapes(found["log_likelihood"]) == dims
    z = np.asarray(found["posterior"]["z"])
    rows = 2 * stats.norm.logpdf(1.0, z, 1.0)[..., None] * numpy(keep)
    np.testing.assert_allclose(found["log_likelihood"]["x"], rows, rtol=1e-5)
    total = stats.poisson.logpmf(2, np.exp(z))
    np.testing.assert_allclose(found["log_likelihood"]["total"], total, rtol=1e-4)


def test_warns_where_the_weights_forbid_it() -> None:
    def narrow(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, torch.tensor([0.1, 0.02, 0.02])))

    x, options = torch.zeros(3), {"num_samples": 500, "num_chains": 1, "log_likelihood": True}
    with pytest.warns(UserWarning, match=r"below 0\.63 .*; got .* in 2 of 3 rows\. .*az\.loo"):
        export(autoencoder, narrow, x, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(autoencoder, encoder, x, **options)
        export(autoencoder, narrow, x, **{**options, "log_likelihood": False})


@pytest.mark.parametrize("chunk_size", [100, 7])
def test_predictions_go_with_the_draws(chunk_size: int) -> None:
    """New rows, another number of them, at the values of each draw; coordinates of their own."""
    x, new = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.5, 4.0])
    options = {
        "num_samples": 30,
        "num_chains": 2,
        "chunk_size": chunk_size,
        "coords": {"rows": ["a", "b"]},
        "pred_coords": {"rows": ["c", "d", "e"]},
    }
    pyro.set_rng_seed(1)
    found = export(line, line_guide, x, 1.1 * x, predictions=(new,), **options)
    predictions, slope = found["predictions"], found["posterior"]["slope"]
    assert shapes(predictions) == dict.fromkeys(("y", "mean"), ("chain", "draw", "rows"))
    assert list(predictions.coords["rows"].values) == ["c", "d", "e"]
    assert list(found["posterior"].coords["rows"].values) == ["a", "b"]
    mean = np.asarray(slope)[..., None] * numpy(new)
    np.testing.assert_allclose(predictions["mean"], mean, rtol=1e-5)
    noise = (np.asarray(predictions["y"]) - mean) / 0.1
    assert abs(noise.mean()) < 4 / np.sqrt(180) and abs(noise.std() - 1) < 0.25
    assert len(np.unique(noise)) == 180
    pyro.set_rng_seed(1)
    by_name = export(line, line_guide, x, 1.1 * x, predictions={"x": new}, **options)
    np.testing.assert_array_equal(by_name["predictions"]["y"], predictions["y"])


def test_predictions_encode_the_new_rows() -> None:
    """As many new rows as old ones: their latents are those of the new."""
    x, new = torch.tensor([0.0, 1.0]), torch.tensor([50.0, -50.0])
    options = {"predictions": (new,), "num_samples": 50, "num_chains": 1}
    found = export(autoencoder, encoder, x, pred_dims={"x": ["image"]}, **options)
    draws = ("chain", "draw")
    np.testing.assert_allclose(found["posterior"]["z"].mean(draws), numpy(x), atol=0.2)
    np.testing.assert_allclose(found["predictions"]["x"].mean(draws), numpy(new), atol=0.2)
    assert shapes(found["predictions"]) == {"x": (*draws, "image")}
    assert shapes(found["observed_data"]) == {"x": ("rows",)}


def test_predictions_of_a_subsample_share_its_rows() -> None:
    """Guide and model, and all chunks, see the same rows of the new data."""

    def program(x: Tensor, observed: bool) -> None:
        with pyro.plate("rows", len(x), subsample_size=3) as rows:
            if observed:
                z = pyro.sample("z", dist.Normal(0.0, 100.0))
                pyro.sample("x", dist.Normal(z, 0.1), obs=x[rows])
            else:
                pyro.sample("z", dist.Normal(x[rows], 0.1))

    x, new = torch.arange(5.0), 10.0 * torch.arange(8.0)
    found = export(
        lambda x: program(x, True),
        lambda x: program(x, False),
        x,
        predictions=(new,),
        num_samples=20,
        num_chains=1,
        chunk_size=6,
    )
    drawn = np.asarray(found["predictions"]["x"])[0]
    rows = np.round(drawn / 10)
    assert (np.abs(drawn - 10 * rows) < 1.0).all()
    assert (rows == rows[0]).all() and len(set(rows[0])) == 3


def test_predictions_of_rows_that_the_guide_has_not() -> None:
    sigma, y = data()
    text = (
        r"Expected site 'theta_decentered' to be drawn for the new arguments; got shape \(4,\) "
        r"from the guide and \(2,\) in the model\. Use a guide that takes the new rows"
    )
    with pytest.raises(ValueError, match=text):
        export(schools, schools_guide, sigma, y, predictions=(sigma[:2],), num_samples=3)


def test_predictions_are_arguments() -> None:
    sigma, y = data()
    with pytest.raises(TypeError, match=r"Expected predictions to be a tuple .* Pass \(x_new,\)"):
        export(line, line_guide, sigma, y, predictions=sigma)


def test_dimensions_of_deterministic_sites() -> None:
    """Plates where the value has them, with and without an event_dim; as many draws as numbers."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.deterministic("first", z[..., 0])
        pyro.deterministic("pair", z[..., :2])
        pyro.deterministic("pair_too", z[..., :2], event_dim=1)
        pyro.deterministic("grid", torch.arange(6.0))
        with pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 2, dim=-2):
            pyro.deterministic("constant", torch.tensor(2.0))
            pyro.deterministic("table", torch.arange(6.0).reshape(2, 3))
            pyro.deterministic("sum", z[..., 0] + torch.arange(6.0).reshape(2, 3))
            pyro.deterministic("vectors", torch.zeros(2, 1, 5), event_dim=1)
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=torch.zeros(2, 3))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    found = export(model, guide, num_samples=6, num_chains=1)["posterior"]
    draws = ("chain", "draw")
    assert shapes(found) == {
        "z": (*draws, "z_dim_0"),
        "first": draws,
        "pair": (*draws, "pair_dim_0"),
        "pair_too": (*draws, "pair_too_dim_0"),
        "grid": (*draws, "grid_dim_0"),
        "constant": draws,
        "table": (*draws, "rows", "columns"),
        "sum": (*draws, "rows", "columns"),
        "vectors": (*draws, "rows", "columns", "vectors_dim_0"),
    }
    assert found["vectors"].shape == (1, 6, 2, 3, 5)
    np.testing.assert_array_equal(found["grid"][0, 3], np.arange(6.0))
    np.testing.assert_array_equal(found["first"], found["z"][..., 0])
    np.testing.assert_array_equal(found["pair"], found["z"][..., :2])
    np.testing.assert_array_equal(found["table"][0, 5], np.arange(6.0).reshape(2, 3))
    whole = np.asarray(found["first"])[..., None, None] + np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(found["sum"], whole, rtol=1e-6)


def test_reparameterised_sites_are_no_data() -> None:
    """In the guide's rows for other diagnostics, too."""

    @poutine.reparam(config={"z": LocScaleReparam(0.0)})
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z_decentered", dist.Normal(0.3 * x, 0.5))

    report = latent_utilisation(
        model, guide, torch.randn(12), num_samples=4, num_contrasts=2, progress_bar=False
    )
    assert report.observed == ("x",) and report.latent == ("z_decentered",)


def test_resampled_draws_are_the_posterior() -> None:
    """A guide that is too wide and off the mark; then leave-one-out is that of the posterior."""
    y = torch.tensor([1.5, 0.4, 1.1, -0.3])

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("square", z**2)
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.2, 0.8))

    data = np.asarray(numpy(y))
    truth, spread = data.sum() / 5, 5**-0.5
    errors = []
    for number in (1, 20):
        found = export(
            model,
            guide,
            y,
            num_samples=1_000,
            num_chains=2,
            num_importance=number,
            log_likelihood=True,
            predictions=(y,),
            chunk_size=10_000,
        )
        draws = np.asarray(found["posterior"]["z"])
        errors.append(abs(draws.mean() - truth) / spread + abs(np.log(draws.std() / spread)))
        assert ("sample_stats" in set(found.groups())) == (number == 1)
        np.testing.assert_allclose(found["posterior"]["square"], draws**2, rtol=1e-5)
        likelihood = stats.norm.logpdf(data, draws[..., None], 1.0)
        np.testing.assert_allclose(found["log_likelihood"]["y"], likelihood, rtol=1e-4, atol=1e-5)
        for group in ("predictions", "posterior_predictive"):
            noise = np.asarray(found[group]["y"]) - draws[..., None]
            assert abs(noise.std() - 1) < 0.05
    assert errors[0] > 0.5 and errors[1] < 0.06
    # Both chains are of one law, in no order.
    assert abs(draws[0].mean() - draws[1].mean()) < 4 * spread * np.sqrt(2 / 1_000)
    assert abs(np.corrcoef(draws[0, 1:], draws[0, :-1])[0, 1]) < 0.15
    others = data.sum() - data
    exact = stats.norm.logpdf(data, others / 4, np.sqrt(1 + 1 / 4))
    assert abs(arviz.loo(found).elpd_loo - exact.sum()) < 0.1


def test_rows_are_not_resampled() -> None:
    text = (
        "Expected one weight for all rows under num_importance > 1; got one per row of plate 'rows'"
    )
    with pytest.raises(ValueError, match=text):
        export(autoencoder, encoder, torch.zeros(2), num_importance=2)
    with pytest.raises(ValueError, match="Expected num_importance >= 1; got 0."):
        export(autoencoder, encoder, torch.zeros(2), num_importance=0)
