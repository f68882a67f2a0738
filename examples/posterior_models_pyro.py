"""Nine models of posteriordb in Pyro, written from their Stan programs.

A flat prior is an `ImproperUniform` over the support. Where Stan cuts a density off at a bound
without its normalising constant, the site is flat and the density a factor, so that the
evidence is that of the Stan program up to constants. Every model takes a batch of particles on
the left of its sites.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints


def flat(name, shape=(), support=constraints.real):
    """A site with density 1 on the support."""
    return pyro.sample(name, dist.ImproperUniform(support, (), shape))


def eight_schools(error, effect):
    """The centred hierarchy of Rubin's eight schools."""
    mu = pyro.sample("mu", dist.Normal(error.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(error.new_tensor(5.0)))
    mean = mu[..., None] * torch.ones_like(error)
    theta = pyro.sample("theta", dist.Normal(mean, tau[..., None]).to_event(1))
    pyro.sample("effect", dist.Normal(theta, error).to_event(1), obs=effect)


def ar_k(lags, y):
    """An autoregression of fifth order."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_tensor(0.0), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    mean = alpha[..., None] + beta @ lags.T
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def kidscore_momhsiq(design, outcome):
    """Test scores of children given their mothers' schooling and IQ."""
    beta = flat("beta", (design.shape[1],), constraints.real_vector)
    sigma = pyro.sample("sigma", dist.HalfCauchy(outcome.new_tensor(2.5)))
    mean = beta @ design.T
    pyro.sample("outcome", dist.Normal(mean, sigma[..., None]).to_event(1), obs=outcome)


def flat_regression(design, outcome):
    """A linear regression with flat priors: log earnings, and party identification in 1980."""
    beta = flat("beta", (design.shape[1],), constraints.real_vector)
    sigma = flat("sigma", support=constraints.positive)
    mean = beta @ design.T
    pyro.sample("outcome", dist.Normal(mean, sigma[..., None]).to_event(1), obs=outcome)


def gp_pois_regr(x, count):
    """Counts whose log-rate is a Gaussian process."""
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), x.new_tensor(4.0)))[..., None, None]
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))[..., None, None]
    f_tilde = pyro.sample("f_tilde", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    squared = (x[:, None] - x) ** 2
    covariance = alpha**2 * torch.exp(-0.5 * squared / rho**2) + 1e-10 * torch.eye(len(x)).to(x)
    f = (torch.linalg.cholesky(covariance) @ f_tilde[..., None])[..., 0]
    pyro.sample("count", dist.Poisson(f.exp()).to_event(1), obs=count)


def log_product(matrices):
    """Logarithm of the product of `(..., n, k, k)` matrices given by their logarithms."""
    while (length := matrices.shape[-3]) > 1:
        left, right = matrices[..., : length - 1 : 2, :, :], matrices[..., 1::2, :, :]
        pairs = torch.logsumexp(left[..., :, :, None] + right[..., None, :, :], -2)
        rest = matrices[..., length - length % 2 :, :, :]
        matrices = torch.cat([pairs, rest], -3)
    return matrices[..., 0, :, :]


def hmm_example(y):
    """Two hidden states with unit Normal emissions; the states are summed out."""
    rows = [pyro.sample(name, dist.Dirichlet(y.new_ones(2))) for name in ("theta1", "theta2")]
    mu = flat("mu", (2,), constraints.positive_ordered_vector)
    prior = dist.Normal(y.new_tensor([3.0, 10.0]), 1.0).to_event(1)
    pyro.factor("mu_prior", prior.log_prob(mu))
    emission = dist.Normal(mu[..., None, :], 1.0).log_prob(y[:, None])
    transition = torch.stack(rows, -2).log()[..., None, :, :]
    steps = log_product(transition + emission[..., 1:, None, :])
    pyro.factor("y", torch.logsumexp(emission[..., 0, :, None] + steps, (-2, -1)))


def runge_kutta(slope, start, times):
    """States at `times[1:]` of `y' = slope(t, y)`, one step of fourth order between neighbours."""
    y, path = start, []
    for now, then in zip(times[:-1], times[1:], strict=True):
        h = then - now
        k1 = slope(now, y)
        k2 = slope(now + h / 2, y + h / 2 * k1)
        k3 = slope(now + h / 2, y + h / 2 * k2)
        k4 = slope(then, y + h * k3)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(y)
    return path


def one_comp_mm_elim_abs(dose, volume, times, concentration, num_early=16):
    """Absorption of first order into one compartment with Michaelis-Menten elimination."""
    names, unit = ("k_a", "K_m", "V_m", "sigma"), times.new_tensor(1.0)
    k_a, k_m, v_m, sigma = (pyro.sample(name, dist.HalfCauchy(unit)) for name in names)

    def slope(t, y):
        y = y.clamp(min=0.0)
        return dose * k_a * torch.exp(-k_a * t) - v_m / volume * y / (k_m + y)

    # Elimination saturates within moments of the start: steps that grow as squares.
    times = times.tolist()
    early = [times[0] * (i / num_early) ** 2 for i in range(num_early)]
    path = runge_kutta(slope, torch.zeros_like(k_a), early + times)
    mean = torch.stack(path[num_early - 1 :], -1).clamp(min=1e-6).log()
    fn = dist.LogNormal(mean, sigma[..., None]).to_event(1)
    pyro.sample("concentration", fn, obs=concentration)


def lotka_volterra(y, num_steps=5):
    """Hares and lynx, year by year; the differential equation is solved for their logarithms."""
    theta = flat("theta", (4,), constraints.independent(constraints.positive, 1))
    prior = dist.Normal(y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05]))
    pyro.factor("theta_prior", prior.to_event(1).log_prob(theta))
    sigma = pyro.sample("sigma", dist.LogNormal(-y.new_ones(2), 1.0).to_event(1))
    centre = math.log(10.0) * y.new_ones(2)
    start = pyro.sample("z_init", dist.LogNormal(centre, 1.0).to_event(1))
    growth = theta[..., ::2] * y.new_tensor([1.0, -1.0])
    contact = theta[..., 1::2] * y.new_tensor([-1.0, 1.0])

    def slope(t, z):
        # The bound is far off any data; it keeps hopeless draws finite.
        return growth + contact * z.flip(-1).clamp(max=20.0).exp()

    years = len(y) - 1
    log_z = start.log()
    path = runge_kutta(slope, log_z, [i / num_steps for i in range(years * num_steps + 1)])
    path = torch.stack([log_z, *path[num_steps - 1 :: num_steps]], -2)
    pyro.sample("y", dist.LogNormal(path, sigma[..., None, :]).to_event(2), obs=y)


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
