"""The references, checked among themselves by quadrature, enumeration and sampling."""

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.optimize import minimize

from . import (
    auxiliary,
    complex_step,
    conjugate,
    iaf,
    importance_weighted,
    masked,
    mean_field,
    ppca,
    signal_to_noise,
    vgp,
)


def test_complex_step_differentiates_exactly():
    gradient = complex_step.gradient(
        lambda p: np.sum(np.exp(p["a"]) * p["b"] ** 2),
        {"a": np.array([0.3, -1.0]), "b": np.array([2.0, 0.5])},
    )
    np.testing.assert_allclose(gradient["a"], np.exp([0.3, -1.0]) * [4.0, 0.25])
    np.testing.assert_allclose(gradient["b"], 2 * np.exp([0.3, -1.0]) * [2.0, 0.5])


def test_mean_field_is_the_normal_density():
    rng = np.random.default_rng(0)
    loc, log_scale = rng.standard_normal((2, 5, 3))
    z = mean_field.sample(rng.standard_normal((5, 3)), loc, log_scale)
    expected = stats.norm(loc, np.exp(log_scale)).logpdf(z).sum(-1)
    np.testing.assert_allclose(mean_field.log_prob(z, loc, log_scale), expected)


def test_mean_field_scores_are_derivatives():
    rng = np.random.default_rng(0)
    values = dict(zip(("z", "loc", "log_scale"), rng.standard_normal((3, 4)), strict=True))
    exact = complex_step.gradient(
        lambda v: mean_field.log_prob(v["z"], v["loc"], v["log_scale"]), values
    )
    args = values["z"], values["loc"], values["log_scale"]
    np.testing.assert_allclose(mean_field.score_value(*args), exact["z"])
    np.testing.assert_allclose(mean_field.score_parameters(*args)[0], exact["loc"])
    np.testing.assert_allclose(mean_field.score_parameters(*args)[1], exact["log_scale"])


@pytest.mark.parametrize("activation", ["elu", "relu", "tanh"])
@pytest.mark.parametrize("features, hidden_dims", [(1, (4,)), (4, (7,)), (5, (8, 3))])
def test_masked_jacobian_is_the_derivative_and_triangular(activation, features, hidden_dims):
    rng = np.random.default_rng(1)
    weights = iaf.random_weights(rng, features, 2, hidden_dims, num_flows=1)
    net = iaf._nets(weights)[0]
    order = rng.permutation(features)
    z, context = rng.standard_normal((6, features)), rng.standard_normal((6, 2))
    options = {"order": order, "activation": activation}
    jacobian = masked.jacobian(z, net, context, **options)
    exact = complex_step.jacobian(lambda moved: masked.forward(moved, net, context, **options), z)
    np.testing.assert_allclose(jacobian, exact, atol=1e-14)
    sorted_jacobian = jacobian[..., order, :][..., order]
    assert np.all(np.triu(sorted_jacobian) == 0.0)


def test_masked_connects_what_it_may():
    rng = np.random.default_rng(2)
    net = iaf._nets(iaf.random_weights(rng, 4, 3, (16, 16), num_flows=1))[0]
    z, context = rng.standard_normal((1, 4)), rng.standard_normal((1, 3))
    jacobian = masked.jacobian(z, net, context)[0]
    assert np.all(jacobian[:, np.tril_indices(4, -1)[0], np.tril_indices(4, -1)[1]])
    through_context = complex_step.jacobian(lambda moved: masked.forward(z, net, moved), context)
    assert np.all(through_context != 0.0)


@pytest.mark.parametrize("context_dim", [None, 3])
@pytest.mark.parametrize("update", ["gated", "affine"])
@pytest.mark.parametrize("latent_dim", [1, 4])
class TestIAF:
    def build(self, context_dim, update, latent_dim):
        rng = np.random.default_rng(3)
        tails = latent_dim == 4
        weights = iaf.random_weights(rng, latent_dim, context_dim, (6,), num_flows=3, tails=tails)
        context = None if context_dim is None else rng.standard_normal((5, context_dim))
        return rng.standard_normal((5, latent_dim)), weights, context

    def test_inverse_returns_the_noise(self, context_dim, update, latent_dim):
        noise, weights, context = self.build(context_dim, update, latent_dim)
        z, log_q = iaf.forward(noise, weights, context, update=update)
        found = iaf.inverse(z, weights, context, update=update)
        np.testing.assert_allclose(found, noise, atol=1e-12)
        np.testing.assert_allclose(
            iaf.log_prob(z, weights, context, update=update), log_q, atol=1e-11
        )

    def test_log_q_is_the_change_of_variables(self, context_dim, update, latent_dim):
        noise, weights, context = self.build(context_dim, update, latent_dim)
        _, log_q = iaf.forward(noise, weights, context, update=update)
        jacobian = complex_step.jacobian(
            lambda moved: iaf.forward(moved, weights, context, update=update)[0], noise
        )
        _, log_det = np.linalg.slogdet(jacobian)
        expected = stats.norm.logpdf(noise).sum(-1) - log_det
        np.testing.assert_allclose(log_q, expected, atol=1e-12)

    def test_score_follows_the_forward_pass(self, context_dim, update, latent_dim):
        noise, weights, context = self.build(context_dim, update, latent_dim)
        z, _ = iaf.forward(noise, weights, context, update=update)
        score = iaf.score(z, weights, context, update=update)
        jacobian, along_noise = (
            complex_step.jacobian(
                lambda moved, part=part: iaf.forward(moved, weights, context, update=update)[part],
                noise,
            )
            for part in (0, 1)
        )
        pulled_back = np.einsum("ni,nij->nj", score, jacobian)
        np.testing.assert_allclose(pulled_back, along_noise, atol=1e-10)


@pytest.mark.parametrize("tails", [True, False])
@pytest.mark.parametrize("update", ["gated", "affine"])
def test_iaf_density_integrates_to_one(update, tails):
    weights = iaf.random_weights(np.random.default_rng(4), 1, None, (6,), num_flows=2, tails=tails)

    def density(z):
        return np.exp(iaf.log_prob(np.array([[z]]), weights, update=update)[0])

    total, _ = integrate.quad(density, -30.0, 30.0, points=[0.0], limit=200)
    assert total == pytest.approx(1.0, abs=1e-6)


def test_conjugate_evidence_and_posterior_by_quadrature():
    x, mu = 1.3, -0.4

    def joint(z):
        return stats.norm.pdf(z, mu) * stats.norm.pdf(x, z)

    evidence, _ = integrate.quad(joint, -20, 20)
    mean, _ = integrate.quad(lambda z: z * joint(z) / evidence, -20, 20)
    second, _ = integrate.quad(lambda z: z**2 * joint(z) / evidence, -20, 20)
    found = conjugate.log_evidence(np.array([x]), np.array([mu]))
    assert found == pytest.approx(np.log(evidence))
    loc, scale = conjugate.posterior(np.array([x]), np.array([mu]))
    assert loc[0] == pytest.approx(mean)
    assert scale == pytest.approx(np.sqrt(second - mean**2))
    z = np.array([0.7])
    assert conjugate.log_joint(z, np.array([x]), np.array([mu])) == pytest.approx(
        np.log(joint(0.7))
    )


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_global_latents_against_the_joint_normal(tau):
    rng = np.random.default_rng(5)
    x, mu = rng.standard_normal((6, 3)), rng.standard_normal(3)
    ones = np.ones((6, 6))

    def joint(covariance):
        return sum(
            stats.multivariate_normal(np.full(6, mu[d]), covariance).logpdf(x[:, d])
            for d in range(3)
        )

    assert conjugate.global_log_evidence(x, mu) == pytest.approx(joint(np.eye(6) + ones))
    assert conjugate.hierarchical_log_evidence(x, mu, tau) == pytest.approx(
        joint(2 * np.eye(6) + tau**2 * ones)
    )
    for covariance, prior, (loc, scale) in (
        (np.eye(6) + ones, 1.0, conjugate.global_posterior(x, mu)),
        (
            2 * np.eye(6) + tau**2 * ones,
            tau**2,
            conjugate.hierarchical_posterior(x, mu, tau),
        ),
    ):
        gain = prior * np.linalg.solve(covariance, np.ones(6))
        np.testing.assert_allclose(loc, mu + gain @ (x - mu))
        assert scale**2 == pytest.approx(prior - prior * gain.sum())


def linear_gaussian(seed=0, num_particles=4, num_data=3, dim=2):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_data, dim))
    parameters = {
        "mu": rng.standard_normal(dim),
        "A": rng.standard_normal((dim, dim)),
        "b": rng.standard_normal(dim),
        "log_scale": 0.3 * rng.standard_normal(dim),
    }
    return rng.standard_normal((num_particles, num_data, dim)), x, parameters


@pytest.mark.parametrize("gradient", importance_weighted.GRADIENTS)
def test_linear_gaussian_gradients_by_complex_step(gradient):
    noise, x, parameters = linear_gaussian()
    phi = {name: parameters[name] for name in ("A", "b", "log_scale")}

    def sample(noise, phi):
        return mean_field.sample(noise, x @ phi["A"].T + phi["b"], phi["log_scale"])

    bound, theta, guide = importance_weighted.gradients(
        lambda z, theta, _: conjugate.log_joint(z, x, theta["mu"]),
        sample,
        lambda z, phi: mean_field.log_prob(z, x @ phi["A"].T + phi["b"], phi["log_scale"]),
        noise,
        {"mu": parameters["mu"]},
        phi,
        gradient,
    )
    closed_bound, closed = importance_weighted.linear_gaussian(noise, x, parameters, gradient)
    assert bound == pytest.approx(closed_bound)
    for name, value in {**theta, **guide}.items():
        np.testing.assert_allclose(value, closed[name], rtol=1e-10, err_msg=name)


def test_reparam_is_the_total_derivative_of_the_bound():
    noise, x, parameters = linear_gaussian()
    _, closed = importance_weighted.linear_gaussian(noise, x, parameters)
    for name, value in parameters.items():
        for index in np.ndindex(value.shape):
            moved = []
            for step in (1e-6, -1e-6):
                shifted = value.copy()
                shifted[index] += step
                moved.append(
                    importance_weighted.linear_gaussian(noise, x, {**parameters, name: shifted})[0]
                )
            difference = (moved[0] - moved[1]) / 2e-6
            assert closed[name][index] == pytest.approx(difference, abs=1e-6)


def test_dreg_and_reparam_agree_on_average():
    draws = {name: [] for name in ("reparam", "dreg")}
    _, x, parameters = linear_gaussian()
    rng = np.random.default_rng(1)
    for _ in range(5_000):
        noise = rng.standard_normal((4, *x.shape))
        for name, values in draws.items():
            _, gradients = importance_weighted.linear_gaussian(noise, x, parameters, name)
            values.append(np.concatenate([gradients["b"], gradients["log_scale"]]))
    difference = np.array(draws["dreg"]) - np.array(draws["reparam"])
    z_score = difference.mean(0) / (difference.std(0) / np.sqrt(len(difference)))
    assert np.all(np.abs(z_score) < 4.0)


def test_path_gradients_vanish_at_the_posterior():
    noise, x, parameters = linear_gaussian()
    parameters["A"] = 0.5 * np.eye(2)
    parameters["b"] = 0.5 * parameters["mu"]
    parameters["log_scale"] = np.full(2, 0.5 * np.log(0.5))
    bound, plain = importance_weighted.linear_gaussian(noise, x, parameters)
    evidence = conjugate.log_evidence(x, parameters["mu"]).sum()
    assert bound == pytest.approx(evidence)
    for gradient in ("stl", "dreg"):
        _, path = importance_weighted.linear_gaussian(noise, x, parameters, gradient)
        for name in ("A", "b", "log_scale"):
            assert np.max(np.abs(path[name])) < 1e-12 * np.max(np.abs(plain[name]))


def test_bound_scales_outside_the_log_mean_exp():
    log_weights = np.random.default_rng(0).standard_normal((5, 3))
    direct = np.sum(np.log(np.mean(np.exp(log_weights), axis=0)))
    assert importance_weighted.bound(log_weights) == pytest.approx(direct)
    assert importance_weighted.bound(log_weights, 7.0) == pytest.approx(7.0 * direct)


def test_mean_weight_is_the_evidence():
    _, x, parameters = linear_gaussian()
    parameters["A"] = 0.3 * np.eye(2)
    parameters["log_scale"] = np.zeros(2)
    noise = np.random.default_rng(2).standard_normal((200_000, *x.shape))
    loc = x @ parameters["A"].T + parameters["b"]
    z = mean_field.sample(noise, loc, parameters["log_scale"])
    weights = np.exp(
        conjugate.log_joint(z, x, parameters["mu"])
        - mean_field.log_prob(z, loc, parameters["log_scale"])
        - conjugate.log_evidence(x, parameters["mu"])
    )
    error = weights.std(0) / np.sqrt(len(weights))
    assert np.all(np.abs(weights.mean(0) - 1.0) < 4.0 * error)


def test_ppca_is_a_maximum():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((200, 2)) @ rng.standard_normal((2, 5)) + 0.5
    x += 0.3 * rng.standard_normal(x.shape)
    fit = ppca.maximum_likelihood(x, 2)

    def negative(flat):
        weight, log_variance = flat[:10].reshape(5, 2), flat[10]
        return -ppca.log_likelihood(x, fit.loc, weight, np.exp(log_variance))

    start = np.concatenate([rng.standard_normal(10), [0.0]])
    found = minimize(negative, start, options={"maxiter": 2000})
    assert -found.fun == pytest.approx(fit.log_likelihood, abs=1e-3)


def test_ppca_elbo_of_the_diagonal_posterior_is_the_likelihood():
    rng = np.random.default_rng(7)
    x = rng.standard_normal((50, 2)) @ rng.standard_normal((2, 4))
    x += 0.5 * rng.standard_normal(x.shape)
    fit = ppca.maximum_likelihood(x, 2)
    mean, scale = ppca.posterior(x, fit)
    noise = rng.standard_normal(mean.shape)
    z = mean + scale * noise
    log_joint = stats.norm.logpdf(z).sum(-1) + stats.norm.logpdf(
        x, z @ fit.weight.T + fit.loc, np.sqrt(fit.noise_variance)
    ).sum(-1)
    log_q = stats.norm.logpdf(z, mean, scale).sum(-1)
    assert np.sum(log_joint - log_q) == pytest.approx(fit.log_likelihood)


def test_signal_to_noise_gradients_are_the_closed_form_ones():
    data = signal_to_noise.problem(num_data=3, dim=2)
    noise = np.random.default_rng(0).standard_normal((4, 3, 2))
    parameters = {
        "mu": data.mu,
        "A": data.A,
        "b": data.b,
        "log_scale": np.full(2, signal_to_noise.LOG_SCALE),
    }
    for gradient in importance_weighted.GRADIENTS:
        theta, guide = signal_to_noise.per_datum_gradients(noise, data, gradient)
        _, closed = importance_weighted.linear_gaussian(noise, data.x, parameters, gradient)
        np.testing.assert_allclose(theta.sum(0), closed["mu"])
        np.testing.assert_allclose(guide.sum(0), closed["b"])
        np.testing.assert_allclose(guide.T @ data.x, closed["A"])


def test_signal_to_noise_slopes():
    found = signal_to_noise.slopes(signal_to_noise.ratios(num_repetitions=60, num_data=256))
    assert found["theta"][0] == pytest.approx(0.5, abs=0.05)
    assert found["reparam"][0] == pytest.approx(-0.5, abs=0.05)
    assert found["stl"][0] == pytest.approx(0.5, abs=0.05)
    assert found["dreg"][0] == pytest.approx(0.41, abs=0.05)
    assert found["dreg"][1] > 0.45


def test_the_process_is_the_conditional_of_the_joint_normal():
    """By the blocks of the joint precision matrix, in place of Schur's complement."""
    rng = np.random.default_rng(8)
    sources, targets, x = (rng.standard_normal(shape) for shape in ((6, 2), (6, 3), (4, 2)))
    log_lengthscale, log_amplitude, jitter = np.array([0.3, -0.2]), 0.4, 1e-2
    points = np.concatenate([sources, x])
    joint = np.empty((10, 10))
    for i, j in np.ndindex(10, 10):
        square = np.sum(((points[i] - points[j]) / np.exp(log_lengthscale)) ** 2)
        joint[i, j] = np.exp(log_amplitude) ** 2 * (np.exp(-square / 2) + jitter * (i == j))
    precision = np.linalg.inv(joint)
    covariance = np.linalg.inv(precision[6:, 6:])
    given = sources, targets, log_lengthscale, log_amplitude, jitter
    found = vgp.conditional(x, *given, "zero")
    np.testing.assert_allclose(found[0], -covariance @ precision[6:, :6] @ targets, atol=1e-10)
    np.testing.assert_allclose(found[1], covariance, atol=1e-10)
    # With a mean function the same holds of what is left over it.
    left = targets - np.pad(sources, ((0, 0), (0, 1)))
    with_mean = vgp.conditional(x, *given)[0] - np.pad(x, ((0, 0), (0, 1)))
    np.testing.assert_allclose(with_mean, -covariance @ precision[6:, :6] @ left, atol=1e-10)


class Midpoints:
    """In the place of a generator: the quantiles of a standard Normal, one a row."""

    def standard_normal(self, shape):
        levels = (np.arange(shape[0]) + 0.5) / shape[0]
        return np.broadcast_to(stats.norm.ppf(levels).reshape(-1, *[1] * (len(shape) - 1)), shape)


def small_vgp():
    """A process in one dimension with a linear reverse model, and a context of width 2."""
    rng = np.random.default_rng(9)
    weights = {
        "sources": np.linspace(-2.0, 2.0, 5)[:, None],
        "targets": rng.standard_normal((5, 1)),
        "log_lengthscale": np.array([-0.1]),
        "log_amplitude": np.array(0.2),
        "targets_head.weight": 0.3 * rng.standard_normal((5, 2)),
        "base.loc.weight": 0.5 * rng.standard_normal((1, 2)),
        "base.loc.bias": np.array([0.3]),
        "base.log_scale.weight": 0.2 * rng.standard_normal((1, 2)),
        "base.log_scale.bias": np.array([-0.5]),
        "reverse.loc.weight": 0.4 * rng.standard_normal((1, 3)),
        "reverse.loc.bias": np.array([-0.2]),
        "reverse.log_scale.weight": 0.1 * rng.standard_normal((1, 3)),
        "reverse.log_scale.bias": np.array([0.1]),
    }
    return weights, rng.standard_normal(2)


def test_the_reverse_model_of_the_process_output_is_exact():
    """log q - log r does not depend on f: it is log q(xi) q(z | xi) / r(xi | z), by quadrature."""
    weights, context = small_vgp()
    z, xi = np.array([0.7]), np.array([0.4])
    options = {"jitter": 1e-2, "reverse_family": {"name": "MeanField"}}
    mean, log_sd = vgp.process(xi, weights, context, **options)
    loc, log_scale = mean_field.heads(vgp.part(weights, "base."), context)

    def joint(f):
        return stats.norm.pdf(f, mean[0], np.exp(log_sd[0])) * stats.norm.pdf(
            z[0], loc[0] + f, np.exp(log_scale[0])
        )

    marginal, _ = integrate.quad(joint, mean[0] - 10, mean[0] + 10, points=[mean[0]], limit=200)
    seen = np.concatenate([z, context])
    head, log_head = mean_field.heads(vgp.part(weights, "reverse."), seen)
    reverse = stats.norm(head[0], np.exp(log_head[0]))
    expected = stats.norm.logpdf(xi[0]) + np.log(marginal) - reverse.logpdf(xi[0])
    for f in (-2.0, 0.1, 3.0):
        values = {"xi": xi, "f": np.array([f]), "z": z}
        found = vgp.log_density_with_f(values, weights, context, **options)
        assert found == pytest.approx(expected, abs=1e-7)
    assert vgp.log_density(values, weights, context, **options) == pytest.approx(found, abs=1e-12)


def test_the_density_of_a_vgp_integrates_to_its_marginal():
    """E of q(z | f) under q(xi) q(f | xi), and of q / r under r, are both exp(log_marginal)."""
    weights, context = small_vgp()
    z, options = np.array([0.7]), {"jitter": 1e-2, "reverse_family": {"name": "MeanField"}}
    grid = np.linspace(-8.0, 8.0, 801)[:, None]
    mean, log_sd = vgp.process(grid, weights, context, **options)
    loc, log_scale = mean_field.heads(vgp.part(weights, "base."), context)
    noise = np.linspace(-8.0, 8.0, 401)
    f = mean + np.exp(log_sd) * noise
    given_xi = np.sum(
        stats.norm.pdf(z, loc + f, np.exp(log_scale)) * stats.norm.pdf(noise), axis=-1
    ) * (noise[1] - noise[0])
    step = grid[1, 0] - grid[0, 0]
    direct = np.sum(stats.norm.pdf(grid[:, 0]) * given_xi) * step

    seen = np.concatenate([z, context])
    head, log_head = mean_field.heads(vgp.part(weights, "reverse."), seen)
    reverse = stats.norm(head, np.exp(log_head))
    values = {"xi": grid, "z": np.broadcast_to(z, grid.shape)}
    log_ratio = vgp.log_density(values, weights, context, **options)
    weighed = np.sum(reverse.pdf(grid[:, 0]) * np.exp(log_ratio)) * step
    assert weighed == pytest.approx(direct, rel=1e-8)
    found = vgp.log_marginal(z, weights, context, Midpoints(), 2000, **options)
    assert found == pytest.approx(np.log(direct), abs=1e-4)


@pytest.mark.parametrize("context_dim", [None, 2])
def test_auxiliary_with_an_exact_reverse_model_is_the_marginal_normal(context_dim):
    """Linear Gaussian throughout: log q(a) + log q(z | a) - log q(a | z) at any a."""
    rng = np.random.default_rng(10)
    width = context_dim or 0
    context = None if context_dim is None else rng.standard_normal((5, context_dim))
    log_aux, log_conditional = 0.3 * rng.standard_normal(2), 0.3 * rng.standard_normal(3)
    # Columns that are orthogonal in units of the noise: the posterior of a is a diagonal Normal.
    frame, _ = np.linalg.qr(rng.standard_normal((3, 2)))
    gains = np.array([1.3, 0.6])
    loading = np.exp(log_conditional)[:, None] * frame * gains
    through = rng.standard_normal((3, width))  # of the context on z, given a
    bias = rng.standard_normal(3)
    prior, prior_bias = rng.standard_normal((2, width)), rng.standard_normal(2)
    variance = 1.0 / (np.exp(-2.0 * log_aux) + gains**2)
    pull = variance[:, None] * loading.T * np.exp(-2.0 * log_conditional)
    shrink = variance * np.exp(-2.0 * log_aux)
    weights = {
        "conditional.loc.weight": np.concatenate([loading, through], axis=1),
        "conditional.loc.bias": bias,
        "conditional.log_scale.weight": np.zeros((3, 2 + width)),
        "conditional.log_scale.bias": log_conditional,
        "reverse.loc.weight": np.concatenate(
            [pull, shrink[:, None] * prior - pull @ through], axis=1
        ),
        "reverse.loc.bias": shrink * prior_bias - pull @ bias,
        "reverse.log_scale.weight": np.zeros((2, 3 + width)),
        "reverse.log_scale.bias": 0.5 * np.log(variance),
    }
    if context is None:
        weights |= {"aux.loc": prior_bias, "aux.log_scale": log_aux}
        mean_a, shift = np.broadcast_to(prior_bias, (5, 2)), 0.0
    else:
        weights |= {
            "aux.loc.weight": prior,
            "aux.loc.bias": prior_bias,
            "aux.log_scale.weight": np.zeros((2, width)),
            "aux.log_scale.bias": log_aux,
        }
        mean_a, shift = context @ prior.T + prior_bias, context @ through.T
    mean = mean_a @ loading.T + shift + bias
    covariance = np.diag(np.exp(2.0 * log_conditional))
    covariance = covariance + loading @ np.diag(np.exp(2.0 * log_aux)) @ loading.T
    a, z = 2.0 * rng.standard_normal((5, 2)), 2.0 * rng.standard_normal((5, 3))
    found = auxiliary.log_density({"aux": a, "z": z}, weights, context)
    expected = stats.multivariate_normal(cov=covariance).logpdf(z - mean)
    np.testing.assert_allclose(found, expected, atol=1e-12)
