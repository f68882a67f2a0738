"""Bad input: what raises, and what the message says."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from test_pyro.models import amortised, conjugate, family

from pyro_vae_ext.diagnostics import active_units, log_evidence, to_arviz
from pyro_vae_ext.elbos import ImportanceWeightedELBO


def says(error: type[Exception], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def normal(loc: float = 0.0) -> dist.TorchDistribution:
    return dist.Normal(torch.full((1,), loc), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"num_particles": 0}, ValueError, "Expected num_particles >= 1; got 0."),
        ({"num_particles": 2.0}, TypeError, "Expected num_particles to be an int; got float."),
        (
            {"gradient": "foo"},
            ValueError,
            "Expected gradient to be one of 'reparam', 'stl', 'dreg', 'vimco'; got 'foo'.",
        ),
        ({"chunk_size": 0}, ValueError, "Expected chunk_size >= 1 or None; got 0."),
        (
            {"vectorize_particles": "yes"},
            TypeError,
            "Expected vectorize_particles to be a bool; got str.",
        ),
    ],
)
def test_objective_options(kwargs: dict, error: type[Exception], text: str) -> None:
    says(error, text, lambda: ImportanceWeightedELBO(**kwargs))


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        ("MeanField", {"latent_dim": 0}, "Expected latent_dim >= 1; got 0."),
        ("IAF", {"latent_dim": 2, "context_dim": 0}, "Expected context_dim >= 1; got 0."),
        ("IAF", {"latent_dim": 2, "num_flows": 0}, "Expected num_flows >= 1; got 0."),
        ("IAF", {"latent_dim": 2, "hidden_dims": ()}, "Expected at least one hidden layer"),
        ("IAF", {"latent_dim": 2, "hidden_dims": (0,)}, "Expected hidden_dims >= 1; got 0."),
        (
            "IAF",
            {"latent_dim": 2, "update": "x"},
            "Expected update to be 'affine' or 'gated'; got 'x'.",
        ),
        (
            "IAF",
            {"latent_dim": 2, "tails": "x"},
            "Expected tails to be 'normal' or 'exponential'; got 'x'.",
        ),
        (
            "IAF",
            {"latent_dim": 2, "activation": "x"},
            "Expected activation to be one of 'elu', 'relu', 'tanh'; got 'x'.",
        ),
        (
            "MeanField",
            {"latent_dim": 2, "hidden_dims": (64,)},
            "Expected hidden_dims=() without a context; got (64,).",
        ),
    ],
)
def test_family_options(name: str, kwargs: dict, text: str) -> None:
    says(ValueError, text, lambda: family(name, **kwargs))


@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_context(name: str) -> None:
    amortising = family(name, latent_dim=2, context_dim=4)
    free = family(name, latent_dim=2)
    wrong, width = torch.zeros(5, 3), "Expected a context of width 4 at site 'z'; got "
    says(ValueError, width + "shape (5, 3).", lambda: amortising("z", wrong))
    says(ValueError, width + "None. Pass the encoder's output, or", lambda: amortising("z"))
    says(
        ValueError,
        "Expected no context at site 'z'; got shape (5, 3). Build the family with context_dim=3",
        lambda: free("z", wrong),
    )
    says(
        TypeError,
        "Expected a floating-point context at site 'z'; got int64. Cast the data to float",
        lambda: amortising("z", torch.zeros(5, 4, dtype=torch.long)),
    )
    says(
        ValueError,
        "Expected a context without NaN at site 'z'; got NaN. Check the data and the encoder.",
        lambda: amortising("z", torch.full((5, 4), torch.nan)),
    )
    says(
        ValueError,
        "Expected values of width 2 at log_prob; got shape (5, 3).",
        lambda: free.log_prob(wrong),
    )
    says(
        ValueError,
        "Expected a context of width 4 at log_prob; got shape (5, 3).",
        lambda: amortising.log_prob(torch.zeros(5, 2), wrong),
    )


ELBOS = [
    pytest.param(ImportanceWeightedELBO(k, gradient=g, **layout), id=f"{k}-{g}-{len(layout)}")
    for k, g, layout in (
        (1, "reparam", {}),
        (3, "reparam", {}),
        (3, "stl", {"vectorize_particles": False}),
        (3, "dreg", {"chunk_size": 2}),
    )
]


def fails(elbo, error: type[Exception], text: str, model: Callable, guide: Callable) -> None:
    says(error, text, lambda: elbo.differentiable_loss(model, guide))


@pytest.mark.parametrize("elbo", ELBOS)
def test_sites_of_one_program_alone(elbo: ImportanceWeightedELBO) -> None:
    def one(name: str) -> Callable:
        return lambda: pyro.sample(name, normal())

    def both() -> None:
        pyro.sample("z", normal())
        pyro.sample("a", normal())

    fails(elbo, ValueError, "got guide site 'a' that the model lacks. Mark it", one("z"), both)
    fails(elbo, ValueError, "got model site 'a' that the guide lacks. Add it", both, one("z"))


@pytest.mark.parametrize("elbo", ELBOS)
def test_discrete_latent(elbo: ImportanceWeightedELBO) -> None:
    def program() -> None:
        pyro.sample("b", dist.Bernoulli(torch.tensor([0.5])).to_event(1))

    text = (
        f"Expected reparameterised latent sites under gradient='{elbo.gradient}'; got site 'b' "
        "with the distribution Bernoulli, which has no reparameterised sampler. Marginalise it "
        "with the host's TraceEnum_ELBO"
    )
    fails(elbo, ValueError, text, program, program)


@pytest.mark.parametrize("elbo", ELBOS)
def test_data(elbo: ImportanceWeightedELBO) -> None:
    def model(x: torch.Tensor, mask: bool | torch.Tensor = True) -> Callable:
        def program() -> None:
            with pyro.plate("data", len(x)), poutine.mask(mask=mask):
                z = pyro.sample("z", normal())
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return program

    posterior = family("MeanField", latent_dim=1)

    def guide() -> None:
        with pyro.plate("data", 3):
            posterior("z")

    missing = torch.tensor([[0.0], [torch.nan], [1.0]])
    text = "Expected observed data without NaN at site 'x'; got NaN. Drop or mask the rows"
    fails(elbo, ValueError, text, model(missing), guide)
    fails(elbo, ValueError, text, model(missing, torch.tensor([True, True, False])), guide)
    with pyro.validation_enabled(False):
        elbo.differentiable_loss(model(missing, torch.tensor([True, False, True])), guide)
    counts = torch.zeros(3, 1, dtype=torch.long)
    text = "Expected floating-point data at site 'x' (Normal); got int64. Cast the data to float."
    fails(elbo, TypeError, text, model(counts), guide)


def test_integer_data_where_integers_are_due() -> None:
    counts = torch.tensor([1, 0, 2])

    def model() -> None:
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=counts)

    def guide() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.1, 1.0))

    assert ImportanceWeightedELBO(3).log_weights(model, guide).shape == (3, 3)


STRICT = ELBOS[1:]


@pytest.mark.parametrize("elbo", STRICT)
def test_global_latent_beside_a_subsampled_plate(elbo: ImportanceWeightedELBO) -> None:
    x = torch.zeros(10, 1)

    def model() -> None:
        w = pyro.sample("w", normal())
        with pyro.plate("data", 10, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(w, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[rows])

    def guide() -> None:
        pyro.sample("w", normal(0.1))
        with pyro.plate("data", 10, subsample_size=4):
            pyro.sample("z", normal(0.2))

    text = (
        "Expected every latent and observed site inside the subsampled plate 'data' when "
        "num_particles > 1; got site 'w' outside it. Move the site into the plate, pass the full "
        "data, or use num_particles=1."
    )
    fails(elbo, ValueError, text, model, guide)


@pytest.mark.parametrize("elbo", STRICT)
def test_sequential_subsampled_plate(elbo: ImportanceWeightedELBO) -> None:
    def program() -> None:
        for i in pyro.plate("data", 10, subsample_size=2):
            pyro.sample(f"z_{i}", normal())

    text = "subsampled plate 'data' when num_particles > 1; got"
    fails(elbo, ValueError, text, program, program)


@pytest.mark.parametrize("elbo", STRICT)
def test_scale_of_some_sites(elbo: ImportanceWeightedELBO) -> None:
    x, mu = torch.zeros(4, 1), torch.zeros(1)
    model = conjugate(x, mu)
    guide = amortised(family("MeanField", latent_dim=1, context_dim=1), x)
    text = (
        "Expected one scale for all sites of a weight when num_particles > 1; got 0.5 at site "
        "'z' and 1 at site 'z'. Scale the loss instead, or use num_particles=1."
    )
    fails(elbo, ValueError, text, poutine.scale(model, scale=0.5), guide)
    tensor = poutine.scale(model, scale=torch.tensor(0.5))
    fails(elbo, ValueError, "got 0.5 at site 'z' and 1 at site 'z'", tensor, guide)


@pytest.mark.parametrize("elbo", STRICT)
def test_scale_that_varies_over_another_plate(elbo: ImportanceWeightedELBO) -> None:
    def program() -> None:
        with pyro.plate("inner", 3), poutine.scale(scale=torch.tensor([1.0, 2.0, 3.0])):
            pyro.sample("z", normal())

    def both() -> None:
        program()
        with pyro.plate("other", 3), poutine.scale(scale=torch.tensor([1.0, 2.0, 3.0])):
            pyro.sample("y", normal())

    text = "Expected a scale that varies over the common plates alone when num_particles > 1; got"
    fails(elbo, ValueError, text, both, both)


@pytest.mark.parametrize("elbo", STRICT)
def test_joint_guide_over_a_data_plate(elbo: ImportanceWeightedELBO) -> None:
    """One log-density for all rows: an error where it would be broadcast or subsampled."""
    x = torch.zeros(5, 1)
    loc = torch.zeros(5, requires_grad=True)

    def model(batch_size: int | None = None) -> Callable:
        def program() -> None:
            with pyro.plate("data", 5, subsample_size=batch_size) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x[rows])

        return program

    def joint() -> torch.Tensor:
        return pyro.sample("joint", dist.Normal(loc, 1.0).to_event(1), infer={"is_auxiliary": True})

    def outside() -> None:
        values = joint()
        with pyro.plate("data", 5, subsample_size=2) as rows:
            part = values[..., rows]
            pyro.sample("z", dist.Delta(part.squeeze(-2) if part.dim() > 1 else part))

    text = "inside the subsampled plate 'data' when num_particles > 1; got site 'joint' outside it"
    fails(elbo, ValueError, text, model(2), outside)

    class Joint(dist.Normal):
        """Draws its rows at once and has one log-density for all of them."""

        def expand(self, batch_shape, _instance=None):
            return self

        def log_prob(self, value):
            return super().log_prob(value).sum(-1, keepdim=True)

    def broadcast() -> None:
        with pyro.plate("data", 5):
            pyro.sample("z", Joint(loc, torch.ones(5)))

    text = (
        "Expected one log-density per row of plate 'data' at site 'z'; got a log-density of shape"
    )
    fails(elbo, ValueError, text, model(), broadcast)


@pytest.mark.parametrize("elbo", ELBOS)
def test_guide_that_draws_all_rows_at_once(elbo: ImportanceWeightedELBO) -> None:
    """Its one log-density would stand against those of all rows."""

    def model() -> None:
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))

    text = "Expected one log-density per row of plate 'data' at site 'z'; got a log-density of"
    fails(elbo, ValueError, text, model, guide)

    def shorter() -> None:
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(torch.zeros(5, 2), 1.0).to_event(1))

    fails(
        elbo, ValueError, "Expected the same shape at site 'z' in model and guide", model, shorter
    )


@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_undeclared_batch_dimension(num_particles: int) -> None:
    """Also where it is as large as the number of particles, and could pass for theirs."""
    elbo = ImportanceWeightedELBO(num_particles)

    def program() -> None:
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(torch.zeros(3, 4), 1.0))

    text = "Expected a log-density over the plates of site 'z' alone; got shape"
    fails(elbo, ValueError, text, program, program)


@pytest.mark.parametrize("elbo", ELBOS)
def test_site_used_twice(elbo: ImportanceWeightedELBO) -> None:
    def program() -> None:
        pyro.sample("z", normal())
        pyro.sample("z", normal())

    fails(elbo, ValueError, "Expected one site of each name; got 'z' twice.", program, program)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_host_flow_without_an_inverse(gradient: str) -> None:
    """Pyro's planar flow scores its own samples alone: named, with the remedy."""
    planar = dist.transforms.planar(2)

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide() -> None:
        pyro.module("planar", planar)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    elbo = ImportanceWeightedELBO(3, gradient=gradient)
    text = "got site 'z' with a TransformedDistribution that cannot invert its transforms. Use"
    fails(elbo, ValueError, text, model, guide)
    ImportanceWeightedELBO(3).differentiable_loss(model, guide).backward()


def test_diagnostics() -> None:
    x = torch.zeros(4, 1)
    model = conjugate(x, torch.zeros(1))
    guide = amortised(family("MeanField", latent_dim=1, context_dim=1), x)
    text = "Expected num_samples >= 1; got 0."
    says(ValueError, text, lambda: log_evidence(model, guide, num_samples=0))
    says(ValueError, text, lambda: to_arviz(model, guide, num_samples=0))
    text = "Expected num_samples >= 2; got 1."
    says(ValueError, text, lambda: active_units(model, guide, num_samples=1))
    text = "Expected chunk_size >= 1; got 0."
    says(ValueError, text, lambda: log_evidence(model, guide, chunk_size=0))
    says(
        ValueError,
        "Expected latent sites inside a data plate of at least 2 rows; got {}.",
        lambda: active_units(
            lambda: pyro.sample("z", normal()), lambda: pyro.sample("z", normal())
        ),
    )
