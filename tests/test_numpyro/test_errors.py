"""What goes wrong says what was expected, names the site and the remedy."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.handlers import mask, scale, seed
from test_numpyro.models import family, module_params, normal

from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import IAF, MeanField

KEY = jax.random.key(0)
ROWS = 5


def loss(model: Any, guide: Any, particles: int = 3, gradient: str = "reparam", params=None) -> Any:
    return ImportanceWeightedELBO(particles, gradient=gradient).loss(
        KEY, params or {}, model, guide
    )


def program(latent: str = "z", x: Any = None, law: Any = None, size: int = ROWS) -> Any:
    """One latent row by row, and data where there are any."""

    def run() -> None:
        with numpyro.plate("data", size, subsample_size=ROWS):
            z = numpyro.sample(latent, dist.Normal(0.0, 1.0) if law is None else law)
            if x is not None:
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return run


def raises(text: str, kind: type[Exception] = ValueError) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(text)}")  # JAX may add a line


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
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
            {"vectorize_particles": "no"},
            TypeError,
            "Expected vectorize_particles to be a bool; got str.",
        ),
    ],
)
def test_arguments_of_the_objective(arguments: dict, kind: type, text: str) -> None:
    with raises(text, kind):
        ImportanceWeightedELBO(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("MeanField", {"latent_dim": 0}, "Expected latent_dim >= 1; got 0."),
        ("IAF", {"latent_dim": 2, "context_dim": 0}, "Expected context_dim >= 1; got 0."),
        ("IAF", {"latent_dim": 2, "num_flows": 0}, "Expected num_flows >= 1; got 0."),
        ("IAF", {"latent_dim": 2, "hidden_dims": (0,)}, "Expected hidden_dims >= 1; got 0."),
        (
            "IAF",
            {"latent_dim": 2, "hidden_dims": ()},
            "Expected at least one hidden layer; got hidden_dims=().",
        ),
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
            "MeanField",
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
def test_arguments_of_the_families(name: str, arguments: dict, text: str) -> None:
    with raises(text):
        family(name, **arguments)


def test_rngs_are_due_with_a_context() -> None:
    with raises("Expected rngs for a family with a context; got None.", TypeError):
        MeanField(2, context_dim=3)


@pytest.mark.parametrize("family_of", [MeanField, IAF])
@pytest.mark.parametrize(
    ("width", "context", "kind", "text"),
    [
        (
            4,
            np.ones((5, 3)),
            ValueError,
            "Expected a context of width 4 at site 'z'; got shape (5, 3).",
        ),
        (
            4,
            None,
            ValueError,
            "Expected a context of width 4 at site 'z'; got None. Pass the encoder's output, or "
            "build the family with context_dim=None.",
        ),
        (
            None,
            np.ones((5, 3)),
            ValueError,
            "Expected no context at site 'z'; got shape (5, 3). Build the family with "
            "context_dim=3 to use one.",
        ),
        (
            4,
            np.ones((5, 4), np.int32),
            TypeError,
            "Expected a floating-point context at site 'z'; got int32. Cast the data to float "
            "before the encoder.",
        ),
        (
            4,
            np.full((5, 4), np.nan),
            ValueError,
            "Expected a context without NaN at site 'z'; got NaN. Check the data and the encoder.",
        ),
    ],
)
def test_contexts(family_of: type, width: Any, context: Any, kind: type, text: str) -> None:
    posterior = family_of(2, context_dim=width, rngs=nnx.Rngs(0))
    with seed(rng_seed=0), numpyro.plate("data", 5), raises(text, kind):
        nnx_module("posterior", posterior)("z", context)


@pytest.mark.parametrize("name", ["MeanField", "IAF"])
def test_values_of_the_wrong_width(name: str) -> None:
    with raises("Expected values of width 3 at log_prob; got shape (5, 2)."):
        family(name, latent_dim=3).log_prob(jnp.ones((5, 2)))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_sites_that_one_of_the_two_lacks(particles: int, gradient: str) -> None:
    x = normal(ROWS)

    def guide_with_more() -> None:
        program()()
        numpyro.sample("a", dist.Normal(0.0, 1.0))

    text = (
        "Expected every latent site of the guide in the model; got guide site 'a' that the model "
        "lacks. Mark it infer={'is_auxiliary': True} or add it to the model."
    )
    with raises(text):
        loss(program(x=x), guide_with_more, particles, gradient)

    text = (
        "Expected every latent site of the model in the guide; got model site 'z' that the guide "
        "lacks. Add it to the guide or observe it."
    )
    with raises(text):
        loss(program(x=x), lambda: None, particles, gradient)

    # A latent site of the guide that the model observes is none of the model's latent sites.
    with pytest.raises(ValueError, match="got guide site 'x' that the model lacks"):
        loss(program(x=x), lambda: (program()(), program("x")()), particles, gradient)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_discrete_latents(gradient: str, particles: int) -> None:
    text = (
        f"Expected reparameterised latent sites under gradient='{gradient}'; got site 'b' with "
        "the distribution BernoulliProbs, which has no reparameterised sampler. Marginalise it "
        "with the host's TraceEnum_ELBO, or use an objective for discrete latents."
    )
    law = dist.Bernoulli(0.5).expand([ROWS])
    with raises(text):
        loss(program("b", normal(ROWS), law), program("b", law=law), particles, gradient)


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_global_latent_beside_a_subsampled_plate(gradient: str) -> None:
    def both(x: Any) -> Any:
        return lambda: (numpyro.sample("w", dist.Normal(0.0, 1.0)), program(x=x, size=50)())

    text = (
        "Expected every latent and observed site inside the subsampled plate 'data' when "
        "num_particles > 1; got site 'w' outside it. Move the site into the plate, pass the full "
        "data, or use num_particles=1."
    )
    with raises(text):
        loss(both(normal(ROWS)), both(None), 3, gradient)
    assert jnp.isfinite(loss(both(normal(ROWS)), both(None), 1, gradient))


def test_auxiliary_outside_a_subsampled_plate() -> None:
    def guide() -> None:
        numpyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        program(size=50)()

    with pytest.raises(ValueError, match="got site 'aux' outside it"):
        loss(program(x=normal(ROWS), size=50), guide)


def test_scales_that_differ() -> None:
    x = normal(ROWS)
    text = (
        "Expected one scale for all sites of a weight when num_particles > 1; got 1 at site 'z' "
        "and 0.5 at site 'x'. Scale the loss instead, or use num_particles=1."
    )

    def model() -> None:
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            with scale(scale=0.5):
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with raises(text):
        loss(model, program())
    assert jnp.isfinite(loss(model, program(), 1))
    # The guide's plate lacks the subsampling of the model's.
    with pytest.raises(ValueError, match="got 10 at site 'z' and 1 at site 'z'"):
        loss(program(x=x, size=50), program())
    # Traced scales cannot be compared.
    with pytest.raises(ValueError, match="got 1 at site 'z' and a traced number at site 'z'"):
        jax.jit(lambda beta: loss(program(x=x), scale(program(), scale=beta)))(0.5)
    with pytest.raises(ValueError, match=r"a scale that varies over the common plates alone"):
        rows = jnp.arange(1.0, 6.0)

        def wide(f: Any) -> Any:
            def run() -> None:
                with numpyro.plate("out", 2, dim=-2), scale(scale=rows):
                    f()

            return run

        def inner(observed: bool) -> None:
            z = numpyro.sample("z", dist.Normal(jnp.zeros(5), 1.0))
            if observed:
                numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.ones((2, 5)))

        loss(wide(lambda: inner(True)), wide(lambda: inner(False)))


@pytest.mark.parametrize("particles", [1, 3])
def test_joint_guide_over_a_data_plate(particles: int) -> None:
    text = (
        "Expected one log-density per row of plate 'data' at site 'z'; got a log-density of shape "
        "() for 5 rows. Draw the site row by row, or take it out of the plate."
    )

    def guide() -> None:
        numpyro.sample("z", dist.MultivariateNormal(jnp.zeros(ROWS), jnp.eye(ROWS)))

    with raises(text):
        loss(program(x=normal(ROWS)), guide, particles)

    def inside() -> None:
        with numpyro.plate("data", ROWS):
            guide()

    with pytest.raises(ValueError, match="Expected the same shape at site 'z' in model and guide"):
        loss(program(x=normal(ROWS)), inside, particles)


def test_one_log_density_for_all_rows() -> None:
    class Joint(dist.Normal):
        def log_prob(self, value: jax.Array, intermediates: Any = None) -> jax.Array:
            return super().log_prob(value).sum()

    law = Joint(jnp.zeros(ROWS), 1.0)
    with pytest.raises(ValueError, match=r"at site 'z'; got a log-density of shape \(\) for 5"):
        loss(program(x=normal(ROWS)), program(law=law))


def test_a_batch_that_no_plate_declares() -> None:
    def both(x: Any) -> Any:
        def run() -> None:
            with numpyro.plate("data", ROWS):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                if x is not None:
                    numpyro.sample("x", dist.Normal(z, 1.0).expand([ROWS, ROWS]), obs=x)

        return run

    with pytest.raises(ValueError, match="over the plates of site 'x' alone; got shape"):
        loss(both(normal(ROWS, ROWS)), both(None))


@pytest.mark.parametrize("particles", [1, 3])
def test_data(particles: int) -> None:
    x = normal(ROWS)
    text = (
        "Expected observed data without NaN at site 'x'; got NaN. Drop or mask the rows with "
        "missing values."
    )
    spoilt = x.at[0].set(jnp.nan)
    with raises(text):
        loss(program(x=spoilt), program(), particles)
    rows = jnp.arange(ROWS) > 0
    masked = [mask(f, mask=rows) for f in (program(x=spoilt), program())]
    assert jnp.isfinite(loss(*masked, particles))
    text = "Expected floating-point data at site 'x' (Normal); got int32. Cast the data to float."
    with raises(text, TypeError):
        loss(program(x=jnp.ones(ROWS, jnp.int32)), program(), particles)


def test_integers_are_right_at_discrete_sites() -> None:
    def model() -> None:
        with numpyro.plate("data", ROWS):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Poisson(jnp.exp(z)), obs=jnp.arange(ROWS))

    assert jnp.isfinite(loss(model, program()))


def test_context_errors_come_through_the_objective() -> None:
    posterior = family("MeanField", latent_dim=1, context_dim=3)

    def guide() -> None:
        post = nnx_module("posterior", posterior)
        with numpyro.plate("data", ROWS):
            post("z", normal(ROWS, 2))

    with pytest.raises(ValueError, match="Expected a context of width 3 at site 'z'"):
        loss(program(x=normal(ROWS)), guide, params=module_params(posterior=posterior))


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg"])
def test_point_masses(gradient: str) -> None:
    text = (
        "Expected a guide with a density at every latent site when num_particles > 1; got a point "
        "mass (Delta) at site 'z', under which no bound on the evidence holds. Use a guide "
        "family, or num_particles=1 for a MAP estimate."
    )
    law = dist.Delta(jnp.zeros(ROWS))
    with raises(text):
        loss(program(x=normal(ROWS)), program(law=law), 3, gradient)
    assert jnp.isfinite(loss(program(x=normal(ROWS)), program(law=law), 1, gradient))


def test_no_sites() -> None:
    with raises("Expected a model with at least one sample site; got none."):
        loss(lambda: None, lambda: None)
