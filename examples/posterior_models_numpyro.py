"""Nine models of posteriordb in NumPyro, written from their Stan programs.

A flat prior is an `ImproperUniform` over the support. Where Stan cuts a density off at a bound
without its normalising constant, the site is flat and the density a factor, so that the
evidence is that of the Stan program up to constants.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints


def flat(name, shape=(), support=constraints.real):
    """A site with density 1 on the support."""
    return numpyro.sample(name, dist.ImproperUniform(support, (), shape))


def eight_schools(error, effect):
    """The centred hierarchy of Rubin's eight schools."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    mean = mu[..., None] * jnp.ones(len(error))
    theta = numpyro.sample("theta", dist.Normal(mean, tau[..., None]).to_event(1))
    numpyro.sample("effect", dist.Normal(theta, error).to_event(1), obs=effect)


def ar_k(lags, y):
    """An autoregression of fifth order."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = alpha[..., None] + beta @ lags.T
    numpyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def kidscore_momhsiq(design, outcome):
    """Test scores of children given their mothers' schooling and IQ."""
    beta = flat("beta", (design.shape[1],))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta @ design.T
    numpyro.sample("outcome", dist.Normal(mean, sigma[..., None]).to_event(1), obs=outcome)


def flat_regression(design, outcome):
    """A linear regression with flat priors: log earnings, and party identification in 1980."""
    beta = flat("beta", (design.shape[1],))
    sigma = flat("sigma", support=constraints.positive)
    mean = beta @ design.T
    numpyro.sample("outcome", dist.Normal(mean, sigma[..., None]).to_event(1), obs=outcome)


def gp_pois_regr(x, count):
    """Counts whose log-rate is a Gaussian process."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))[..., None, None]
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))[..., None, None]
    f_tilde = numpyro.sample("f_tilde", dist.Normal(jnp.zeros(len(x)), 1.0).to_event(1))
    squared = (x[:, None] - x) ** 2
    covariance = alpha**2 * jnp.exp(-0.5 * squared / rho**2) + 1e-10 * jnp.eye(len(x))
    f = (jnp.linalg.cholesky(covariance) @ f_tilde[..., None])[..., 0]
    numpyro.sample("count", dist.Poisson(jnp.exp(f)).to_event(1), obs=count)


def log_product(matrices):
    """Logarithm of the product of `(..., n, k, k)` matrices given by their logarithms."""
    while (length := matrices.shape[-3]) > 1:
        left, right = matrices[..., : length - 1 : 2, :, :], matrices[..., 1::2, :, :]
        pairs = logsumexp(left[..., :, :, None] + right[..., None, :, :], axis=-2)
        rest = matrices[..., length - length % 2 :, :, :]
        matrices = jnp.concatenate([pairs, rest], axis=-3)
    return matrices[..., 0, :, :]


def hmm_example(y):
    """Two hidden states with unit Normal emissions; the states are summed out."""
    rows = [numpyro.sample(name, dist.Dirichlet(jnp.ones(2))) for name in ("theta1", "theta2")]
    mu = flat("mu", (2,), constraints.positive_ordered_vector)
    prior = dist.Normal(jnp.array([3.0, 10.0]), 1.0).to_event(1)
    numpyro.factor("mu_prior", prior.log_prob(mu))
    emission = dist.Normal(mu[..., None, :], 1.0).log_prob(y[:, None])
    transition = jnp.log(jnp.stack(rows, axis=-2))[..., None, :, :]
    steps = log_product(transition + emission[..., 1:, None, :])
    numpyro.factor("y", logsumexp(emission[..., 0, :, None] + steps, axis=(-2, -1)))


def runge_kutta(slope, start, times):
    """States at `times[1:]` of `y' = slope(t, y)`, one step of fourth order between neighbours."""

    def step(y, t):
        now, then = t
        h = then - now
        k1 = slope(now, y)
        k2 = slope(now + h / 2, y + h / 2 * k1)
        k3 = slope(now + h / 2, y + h / 2 * k2)
        k4 = slope(then, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y, y

    return jax.lax.scan(step, start, (times[:-1], times[1:]))[1]


def one_comp_mm_elim_abs(dose, volume, times, concentration, num_early=16):
    """Absorption of first order into one compartment with Michaelis-Menten elimination."""
    names = ("k_a", "K_m", "V_m", "sigma")
    k_a, k_m, v_m, sigma = (numpyro.sample(name, dist.HalfCauchy(1.0)) for name in names)

    def slope(t, y):
        y = jnp.maximum(y, 0.0)
        return dose * k_a * jnp.exp(-k_a * t) - v_m / volume * y / (k_m + y)

    # Elimination saturates within moments of the start: steps that grow as squares.
    early = times[0] * (jnp.arange(num_early) / num_early) ** 2
    path = runge_kutta(slope, jnp.zeros_like(k_a), jnp.concatenate([early, times]))
    path = jnp.moveaxis(path[num_early - 1 :], 0, -1)
    mean = jnp.log(jnp.maximum(path, 1e-6))
    fn = dist.LogNormal(mean, sigma[..., None]).to_event(1)
    numpyro.sample("concentration", fn, obs=concentration)


def lotka_volterra(y, num_steps=5):
    """Hares and lynx, year by year; the differential equation is solved for their logarithms."""
    theta = flat("theta", (4,), constraints.positive)
    prior = dist.Normal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]))
    numpyro.factor("theta_prior", prior.to_event(1).log_prob(theta))
    sigma = numpyro.sample("sigma", dist.LogNormal(-jnp.ones(2), 1.0).to_event(1))
    start = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0) * jnp.ones(2), 1.0).to_event(1))
    growth = theta[..., ::2] * jnp.array([1.0, -1.0])
    contact = theta[..., 1::2] * jnp.array([-1.0, 1.0])

    def slope(t, z):
        # The bound is far off any data; it keeps hopeless draws finite.
        return growth + contact * jnp.exp(jnp.minimum(z[..., ::-1], 20.0))

    years = len(y) - 1
    log_z = jnp.log(start)
    path = runge_kutta(slope, log_z, jnp.arange(years * num_steps + 1) / num_steps)
    path = jnp.concatenate([log_z[None], path[num_steps - 1 :: num_steps]])
    path = jnp.moveaxis(path, 0, -2)
    numpyro.sample("y", dist.LogNormal(path, sigma[..., None, :]).to_event(2), obs=y)


MODELS = {
    "eight_schools": eight_schools,
    "arK": ar_k,
    "kidscore_momhsiq": kidscore_momhsiq,
    "logearn_interaction": flat_regression,
    "gp_pois_regr": gp_pois_regr,
    "hmm_example": hmm_example,
    "nes1980": flat_regression,
    "one_comp_mm_elim_abs": one_comp_mm_elim_abs,
    "lotka_volterra": lotka_volterra,
}
