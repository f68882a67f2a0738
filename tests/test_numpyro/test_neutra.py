"""The bijection of `AutoPosterior`: Jacobians, the host's NeuTra, and NUTS on the funnel."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.distributions.transforms import AffineTransform, ExpTransform, LowerCholeskyAffine
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_value
from numpyro.infer.reparam import NeuTraReparam
from numpyro.infer.util import log_density
from test_numpyro.models import normal, shaken

from numpyro_vae_ext.elbos import ImportanceWeightedELBO
from numpyro_vae_ext.guides import IAF, AutoAmortized, AutoPosterior, Auxiliary, MeanField
from numpyro_vae_ext.guides._base import DirectFamily

KEY = jax.random.key(3)


class Custom(DirectFamily):
    """A user's family: of one of several distributions that the hosts have."""

    def __init__(
        self, latent_dim: int, context_dim: int | None, *, kind: str, rngs: Any, param_dtype: Any
    ) -> None:
        super().__init__(latent_dim, context_dim)
        self.kind = kind
        self.loc = nnx.Param(jnp.zeros(latent_dim, param_dtype))
        self.root = nnx.Param(jnp.eye(latent_dim, dtype=param_dtype))

    def distribution(self, context: Any = None) -> dist.Distribution:
        root = jnp.tril(self.root[...])
        if self.kind == "full":
            return dist.MultivariateNormal(self.loc[...], scale_tril=root)
        if self.kind == "student":
            return dist.StudentT(4.0, self.loc[...]).to_event(1)
        base = dist.Normal(0.0, 0.9).expand(self.loc.shape).to_event(1)
        if self.kind == "narrow":
            return base
        parts = [LowerCholeskyAffine(self.loc[...], root), ExpTransform()]
        return dist.TransformedDistribution(base, parts)


FAMILIES = {
    "IAF": partial(IAF, hidden_dims=(5,)),
    **{kind: partial(Custom, kind=kind) for kind in ("full", "mapped", "narrow")},
}


def rows(x: jax.Array) -> None:
    """A positive site, one with a support that depends on it, and one in a plate."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 3.0))
    part = numpyro.sample("part", dist.Uniform(0.0, rate))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(part, 1.0))
        numpyro.sample("x", dist.Normal(z, rate), obs=x)


def trained(model: Any, guide: Any, *args: Any) -> Any:
    """Parameters of a guide that has been called, far from their start."""
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    return shaken(svi.get_params(svi.init(KEY, *args)))


@pytest.mark.parametrize("name", FAMILIES)
def test_density_through_the_guide(exact: None, name: str) -> None:
    """The host's NeuTra scores noise by the model's density and the whole map's Jacobian."""
    x = normal(2)
    guide = AutoPosterior(rows, FAMILIES[name], init_scale=jnp.array([0.5, 1.0, 2.0, 0.3]))
    params = trained(rows, guide, x)
    neutra, again = NeuTraReparam(guide, params), pickle.loads(pickle.dumps(guide))
    noise = normal(3, 4)

    def values(noise: jax.Array) -> jax.Array:
        found = neutra.transform_sample(noise)
        return jnp.concatenate([found["rate"][None], found["part"][None], found["z"]])

    def pairs(noise: jax.Array) -> Any:
        """What must be equal."""
        site = neutra.transform_sample(noise[0])
        truth = log_density(rows, (x,), {}, site)[0]
        truth += jnp.linalg.slogdet(jax.jacfwd(values)(noise[0]))[1]
        model = neutra.reparam(rows)
        yield truth, log_density(model, (x,), {}, {"auto_shared_latent": noise[0]})[0]
        transform, posterior = guide.get_transform(params), guide.get_posterior(params)
        vectors = transform(noise)
        yield noise, transform.inv(vectors)
        yield vectors, again.get_transform(params)(noise)

        def along(noise: jax.Array) -> jax.Array:
            log_det = transform.log_abs_det_jacobian(noise, None)
            return guide.get_base_dist().log_prob(noise) - log_det

        yield along(noise), posterior.log_prob(vectors)
        slope = jax.grad(posterior.log_prob)(vectors[0])
        yield jax.grad(along)(noise[0]), jax.jacfwd(transform)(noise[0]).T @ slope

    for truth, found in jax.jit(lambda noise: list(pairs(noise)))(noise):
        np.testing.assert_allclose(found, truth, rtol=1e-8, atol=1e-10)
    assert guide.get_posterior(params).event_shape == (guide.latent_dim,) == (4,)
    batch = jax.eval_shape(neutra.transform_sample, noise)
    assert {k: v.shape for k, v in batch.items()} == {"rate": (3,), "part": (3,), "z": (3, 2)}


def test_the_posterior_itself_is_sent_to_a_standard_normal(exact: None) -> None:
    """Then all that is left for the sampler is the noise's own density."""

    def model() -> None:
        numpyro.sample("a", dist.LogNormal(jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0])))

    start = init_to_value(values={"a": jnp.exp(jnp.array([0.3, -1.0]))})
    guide = AutoPosterior(model, MeanField, init_loc_fn=start, init_scale=jnp.array([0.5, 2.0]))
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(KEY))
    through = NeuTraReparam(guide, params).reparam(model)
    for noise in normal(3, 2):
        found = log_density(through, (), {}, {"auto_shared_latent": noise})[0]
        np.testing.assert_allclose(found, dist.Normal().log_prob(noise).sum(), rtol=1e-9)


@pytest.mark.parametrize("family", ["MeanField", "IAF"])
def test_quantiles_of_a_normal_are_exact(family: str) -> None:
    """Upwards and downwards maps, and one of several numbers, against Monte Carlo."""

    def model() -> None:
        numpyro.sample("up", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))
        parts = [ExpTransform(), AffineTransform(3.0, -1.0)]
        numpyro.sample("down", dist.TransformedDistribution(dist.Normal(), parts))
        numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))

    guide = AutoPosterior(model, {**FAMILIES, "MeanField": MeanField}[family], init_scale=0.5)
    params = trained(model, guide)
    levels = jnp.array([[0.05, 0.5], [0.8, 0.95]])
    ask = jax.jit(lambda num: guide.quantiles(params, levels, num_samples=num), static_argnums=0)
    found, again = ask(20_000), ask(10)
    draws = guide.sample_posterior(KEY, params, sample_shape=(20_000,))
    for name, value in draws.items():
        shares = (value < found[name][:, :, None]).mean(2)
        assert (np.abs(shares - levels.reshape(2, 2, *(1 for _ in value.shape[1:]))) < 0.02).all()
        if family != "IAF" and name != "share":
            np.testing.assert_array_equal(found[name], again[name])
        else:
            assert (found[name] != again[name]).any()
    middle = guide.median(params, num_samples=20_000)
    np.testing.assert_allclose(middle["down"], found["down"][0, 1], rtol=2e-3)
    np.testing.assert_allclose(middle["share"].sum(), 1.0, rtol=1e-6)


def test_nuts_on_the_funnel() -> None:
    def funnel() -> None:
        v = numpyro.sample("v", dist.Normal(0.0, 3.0))
        with numpyro.plate("rows", 3):
            numpyro.sample("x", dist.Normal(0.0, jnp.exp(v / 2)))

    guide = AutoPosterior(funnel, partial(IAF, hidden_dims=(16,)), init_scale=1.0)
    elbo = ImportanceWeightedELBO(num_outer=16, gradient="stl")
    svi = SVI(funnel, guide, numpyro.optim.Adam(3e-3), elbo)
    params = svi.run(KEY, 3000, progress_bar=False).params
    neutra = NeuTraReparam(guide, params)
    mcmc = MCMC(NUTS(neutra.reparam(funnel)), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(KEY)
    draws = neutra.transform_sample(mcmc.get_samples()["auto_shared_latent"])
    assert abs(draws["v"].mean()) < 0.8
    assert abs(draws["v"].std() - 3.0) < 0.5
    # The mouth and the neck.
    assert draws["v"].min() < -6 and draws["v"].max() > 6
    np.testing.assert_allclose((draws["x"] / jnp.exp(draws["v"] / 2)[:, None]).std(), 1, atol=0.1)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (Auxiliary, "a density of its own for get_transform; got Auxiliary. A hierarchical"),
        (partial(Custom, kind="student"), "that maps standard Normal noise for get_transform; got"),
    ],
    ids=["Auxiliary", "StudentT"],
)
def test_families_without_a_bijection(family: Any, text: str) -> None:
    guide = AutoPosterior(rows, family)
    with pytest.raises(ValueError, match="^Expected a guide that has been called for get_tra"):
        NeuTraReparam(guide, {})
    params = trained(rows, guide, normal(2))
    with pytest.raises(ValueError, match=f"^Expected a family .*{text}"):
        NeuTraReparam(guide, params).transform(jnp.zeros(4))


def test_amortised_guide_has_no_transform_of_its_own() -> None:
    with pytest.raises(TypeError, match="AutoAmortized"):
        NeuTraReparam(AutoAmortized(rows, lambda x: x[:, None]), {})
