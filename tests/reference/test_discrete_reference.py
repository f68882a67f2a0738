"""The references of discrete latents, checked by enumeration, sampling and complex steps."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from . import belief_net, complex_step, discrete, mixed

SMALL = {
    "one layer": belief_net.Net("bernoulli", ((3,),)),
    "two layers": belief_net.Net("bernoulli", ((3,), (2,))),
    "one-hot": belief_net.Net("one_hot", ((2, 3),)),
    "two one-hot layers": belief_net.Net("one_hot", ((2, 3), (1, 4))),
}
DRAWS = 9_000


class ToyNet:
    """`(b - t)^2` as the cost of one bit, in the same terms as a net."""

    kind = "bernoulli"

    def __init__(self, t):
        self.t = t

    def logits(self, params, x, values, layer):
        return np.broadcast_to(params["logit"], (1, 1))

    def log_joint(self, params, x, values):
        return np.sum((values[0] - self.t) ** 2, axis=-1)

    def log_q(self, params, x, values):
        return [0.0]


def build(name, rows=2, pixels=4):
    net, rng = SMALL[name], np.random.default_rng(0)
    params = net.start(rng, pixels, 0.7)
    x = (rng.random((rows, pixels)) < 0.5) * 1.0
    return net, params, x


def noise(net, rng, draws, rows):
    return [rng.random((draws, rows, *shape)) for shape in net.layers]


def z_scores(found, exact):
    """Of the mean over draws, in every coordinate that is random."""
    scores = []
    for name, value in exact.items():
        error = found[name].std(0, ddof=1) / np.sqrt(len(found[name]))
        scores.append(((found[name].mean(0) - value) / np.where(error > 0, error, 1.0)).ravel())
    return np.concatenate(scores)


def agree(scores):
    assert np.abs(scores).max() < 4.5
    assert np.sqrt(np.mean(scores**2)) < 1.4


@pytest.mark.parametrize("name", SMALL)
def test_enumeration_is_a_distribution_and_has_the_gradient(name):
    """The matrix products of the sums over states, against the general formulas."""
    net, params, x = build(name)
    states = [value[:, None] for value in net.states()]
    log_p, log_q = net.enumerated(params, x)
    np.testing.assert_allclose(log_p, net.log_joint(params, x, states), atol=1e-12)
    np.testing.assert_allclose(log_q, sum(net.log_q(params, x, states)), atol=1e-12)
    np.testing.assert_allclose(np.exp(log_q).sum(0), 1.0)
    everything = np.array(np.meshgrid(*[(0.0, 1.0)] * x.shape[1])).reshape(x.shape[1], -1).T
    np.testing.assert_allclose(np.exp(net.enumerated(params, everything)[0]).sum(), 1.0)

    def elbo(p):
        log_q = sum(net.log_q(p, x, states))
        return np.sum(np.exp(log_q) * (net.log_joint(p, x, states) - log_q))

    bound, gradient = net.bound(params, x)
    gradient = belief_net.by_parameter(gradient)
    exact = complex_step.gradient(elbo, params)
    np.testing.assert_allclose(bound.sum(), elbo(params))
    first = net.bound(params, x[:1])[1]
    for key in ("encoder_bias_0", "decoder_bias_0", "prior"):
        np.testing.assert_allclose(net.bound(params, x)[1][key][:1], first[key], atol=1e-12)
    for key, value in exact.items():
        np.testing.assert_allclose(gradient[key], value, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("num_particles", [2, 3])
def test_multi_sample_bound_and_its_gradient(num_particles):
    net, params, x = build("two layers" if num_particles == 2 else "one layer")
    states = [value[:, None] for value in net.states()]

    def bound(p):
        """The sum over all tuples of states, written out."""
        log_q = sum(net.log_q(p, x, states))
        log_w = net.log_joint(p, x, states) - log_q
        total = 0.0
        for index in np.ndindex(*[len(log_q)] * num_particles):
            chosen = log_w[list(index)]
            top = np.max(np.real(chosen), axis=0)
            value = np.log(np.mean(np.exp(chosen - top), axis=0)) + top
            total = total + np.exp(np.sum(log_q[list(index)], axis=0)) * value
        return np.sum(total)

    value, gradient = net.bound(params, x, num_particles)
    gradient = belief_net.by_parameter(gradient)
    np.testing.assert_allclose(value.sum(), bound(params))
    keys = ["encoder_bias_0", "decoder_bias_0", "prior"]
    exact = complex_step.gradient(lambda p: bound({**params, **p}), {k: params[k] for k in keys})
    for key, expected in exact.items():
        np.testing.assert_allclose(gradient[key], expected, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_noise_gives_hard_relaxed_and_conditional_values(shape):
    """`z` and `z~` have one law, whatever `b`; the derivatives are those of their formulas."""
    kind = "bernoulli" if len(shape) == 1 else "one_hot"
    rng = np.random.default_rng(0)
    logits, (u, v) = rng.standard_normal(shape), rng.random((2, DRAWS, *shape))
    z = discrete.noisy(kind, logits, u)
    b = discrete.harden(kind, z)
    conditional = discrete.conditional(kind, logits, b, v)
    np.testing.assert_array_equal(discrete.harden(kind, conditional), b)
    error = (b.mean(0) - discrete.mean(kind, logits)) / (b.std(0) / np.sqrt(DRAWS))
    assert np.abs(error).max() < 4
    for index in np.ndindex(shape):
        for corner in (0, 1):
            chosen = b[(slice(None), *index)] == corner
            pair = (sample[(chosen, *index)] for sample in (z, conditional))
            assert stats.ks_2samp(*pair).pvalue > 1e-3
    soft = discrete.soften(kind, z, 0.05)
    assert np.abs(soft - b).mean() < 0.06
    if kind == "one_hot":
        np.testing.assert_allclose(soft.sum(-1), 1.0)
    value = rng.random(shape)
    exact = complex_step.gradient(
        lambda p: np.sum(discrete.log_prob(kind, p["logits"], b[0])), {"logits": logits}
    )
    np.testing.assert_allclose(discrete.score(kind, logits, b[0]), exact["logits"], atol=1e-14)
    moved = complex_step.gradient(
        lambda p: np.sum(discrete.log_prob(kind, logits, p["value"])), {"value": value}
    )["value"]
    again = complex_step.gradient(
        lambda p: np.sum(discrete.log_prob(kind, logits, p["value"])), {"value": 0 * value}
    )["value"]
    np.testing.assert_allclose(moved, again)


@pytest.mark.parametrize("p", [0.3, 0.5])
@pytest.mark.parametrize("t", [0.45, 0.49, 0.499])
def test_toy_in_closed_form(t, p):
    toy, net, rng = discrete.Toy(t, p), ToyNet(t), np.random.default_rng(0)
    params, draws = {"logit": np.log(p / (1 - p))}, 500_000
    u = rng.random((2, draws, 1, 1))
    values, logits, costs = discrete.signals(net, params, None, [u.reshape(-1, 1, 1)])
    score = discrete.score("bernoulli", logits[0], values[0])[..., 0]
    reinforce = costs[0] * score
    pairs = discrete.leave_one_out(costs[0].reshape(2, draws)) * score.reshape(2, draws)
    _, (disarm,) = discrete.disarm(net, params, None, [u[0]])
    first = net.log_joint(params, None, [1.0 * (u[0] > 1 - p)])
    second = net.log_joint(params, None, [1.0 * (u[0] < p)])
    arm = (first - second) * (u[0, ..., 0] - 0.5)
    for draw, variance in (
        (reinforce, toy.reinforce),
        (pairs.mean(0), toy.leave_one_out),
        (disarm, toy.disarm),
        (arm, toy.arm),
    ):
        assert draw.var() == pytest.approx(variance, rel=0.03, abs=1e-30)
        error = np.sqrt(variance / draw.size)
        assert draw.mean() == pytest.approx(toy.gradient, abs=4 * error + 1e-15)
    if p == 0.5:
        assert toy.disarm == 0.0 and np.ptp(disarm) < 1e-16


def test_toy_at_the_published_point():
    toy = discrete.Toy(0.499, 0.3)
    found = toy.reinforce, toy.arm, toy.leave_one_out, toy.disarm
    np.testing.assert_allclose(found, [1.317e-2, 1.356e-7, 2.436e-7, 1.176e-7], rtol=5e-4)


def estimates(net, params, x, name, rng, draws):
    """Gradients of every draw, `(draws, ...)`."""
    u, v = (noise(net, rng, draws, len(x)) for _ in range(2))
    ones = np.ones((draws, len(x)))
    if name in ("rebar", "relax"):
        temperature, eta = [0.4, 0.8][: len(u)], [0.9, 0.6][: len(u)]
        surrogate = None
        if name == "relax":
            widths = [2 * width for width in net.widths]
            surrogate = [
                [
                    (rng.standard_normal((width, 5)), rng.standard_normal(5)),
                    (rng.standard_normal((5, 1)), rng.standard_normal(1)),
                ]
                for width in widths
            ]
        values, guide = discrete.rebar(net, params, x, u, v, temperature, eta, surrogate)
        return net.gradients(params, x, values, ones, guide)
    if name == "disarm":
        runs, guide = discrete.disarm(net, params, x, u)
        first = net.gradients(params, x, runs[0], ones, guide)
        nothing = [np.zeros_like(g) for g in guide]
        others = [net.gradients(params, x, run, ones, nothing) for run in runs[1:]]
        return {
            key: value if "encoder" in key else np.mean([value, *(o[key] for o in others)], 0)
            for key, value in first.items()
        }
    values, logits, costs = discrete.signals(net, params, x, u)
    scores = [discrete.score(net.kind, a, b) for a, b in zip(logits, values, strict=True)]

    def times(signal, score):
        return signal.reshape(*signal.shape, *[1] * (score.ndim - 2)) * score

    if name == "vimco":
        # Three draws share a bound; their contributions are added.
        log_w = costs[0].reshape(-1, 3, len(x)).transpose(1, 0, 2).reshape(3, -1)
        _, model, guide = discrete.vimco(log_w)
        model, guide = (
            c.reshape(3, -1, len(x)).transpose(1, 0, 2).reshape(draws, -1) for c in (model, guide)
        )
        found = net.gradients(params, x, values, model, [times(guide, s) for s in scores])
        return {k: g.reshape(-1, 3, *g.shape[1:]).sum(1) for k, g in found.items()}
    if name == "leave-one-out":
        costs = [discrete.leave_one_out(c.reshape(2, -1)).reshape(c.shape) for c in costs]
    found = net.gradients(
        params, x, values, ones, [times(c, s) for c, s in zip(costs, scores, strict=True)]
    )
    if name == "leave-one-out":
        return {k: g.reshape(2, -1, *g.shape[1:]).mean(0) for k, g in found.items()}
    return found


@pytest.mark.parametrize(
    "estimator", ["nvil", "leave-one-out", "rebar", "relax", "disarm", "vimco"]
)
@pytest.mark.parametrize("name", SMALL)
def test_mean_over_draws_is_the_enumerated_gradient(name, estimator):
    net, params, x = build(name)
    if estimator == "disarm" and net.kind != "bernoulli":
        return
    found = estimates(net, params, x, estimator, np.random.default_rng(1), DRAWS // 6 * 6)
    _, exact = net.bound(params, x, 3 if estimator == "vimco" else 1)
    agree(z_scores(found, belief_net.by_parameter(exact)))


def test_the_comparison_sees_a_bias():
    """Relaxed values that are not conditioned on the bits: a wrong REBAR."""
    net, params, x = build("one layer")
    rng = np.random.default_rng(1)
    u = noise(net, rng, DRAWS, len(x))
    values, guide = discrete.rebar(net, params, x, u, u, [0.5], [1.0])
    found = net.gradients(params, x, values, np.ones((DRAWS, len(x))), guide)
    exact = belief_net.by_parameter(net.bound(params, x)[1])
    assert np.abs(z_scores(found, exact)).max() > 8


def test_difference_quotient():
    found = discrete.difference_quotient(
        lambda p: np.sum(np.exp(p["a"]) * p["b"] ** 2), {"a": [0.3, -1.0], "b": 2.0}
    )
    np.testing.assert_allclose(found["a"], np.exp([0.3, -1.0]) * 4.0, rtol=1e-11)
    np.testing.assert_allclose(found["b"], 4.0 * np.exp([0.3, -1.0]).sum(), rtol=1e-11)


def test_trained_nets_have_bits_to_test():
    for name in belief_net.NETS:
        net, params = belief_net.trained(name)
        x = belief_net.undecided(name)
        log_p, log_q = net.enumerated(params, x)
        elbo = net.bound(params, x)[0].mean()
        assert elbo > -27
        assert elbo < net.bound(params, x, 2)[0].mean() < logsumexp(log_p, axis=0).mean() + 1e-12
        for key, mask in net.regular(params, x).items():
            assert mask.mean() > 0.3, key


def test_mixed_elbo_is_the_mean_of_its_draws():
    params, x = mixed.trained()
    rng, draws = np.random.default_rng(0), 100_000
    eps, u = rng.standard_normal((2, draws, mixed.ROWS)), rng.random((draws, mixed.ROWS, 3))
    c_loc = x @ params["c_weight"] + params["c_bias"]
    c = c_loc + np.exp(params["c_log_scale"]) * eps[0]
    logits = x @ params["b_weight"] + params["b_bias"] + c[..., None] * params["b_of_c"]
    b = discrete.harden("bernoulli", discrete.noisy("bernoulli", logits, u))
    s_loc = x @ params["s_weight"] + params["s_bias"] + b @ params["s_of_b"]
    s = s_loc + np.exp(params["s_log_scale"]) * eps[1]
    prior = params["prior"] + c[..., None] * params["prior_of_c"]
    of_c, of_s = (v[..., None] * params[f"x_of_{k}"] for k, v in (("c", c), ("s", s)))
    x_loc = params["x_bias"] + of_c + of_s + b @ params["x_of_b"]
    log_w = (
        stats.norm.logpdf(c)
        + stats.norm.logpdf(s, c * params["mean_of_c"] + b @ params["mean_of_b"])
        + stats.norm.logpdf(x, x_loc).sum(-1)
        + discrete.log_prob("bernoulli", prior, b)
        - discrete.log_prob("bernoulli", logits, b)
        - stats.norm.logpdf(c, c_loc, np.exp(params["c_log_scale"]))
        - stats.norm.logpdf(s, s_loc, np.exp(params["s_log_scale"]))
    )
    pairs = np.logaddexp(log_w[0::2], log_w[1::2]) - np.log(2)
    exact = mixed.elbo(params, x)
    for found, expected in ((log_w, exact), (pairs, mixed.pair_bound(params, x))):
        error = found.std(0) / np.sqrt(len(found))
        assert np.abs((found.mean(0) - expected) / error).max() < 4
    np.testing.assert_allclose(exact, mixed.elbo(params, x, 40), rtol=1e-12)


def test_mixed_gradients_of_two_particles():
    """By the nodes of one particle, and by those of both at once."""
    params, x = mixed.trained()
    found = mixed.pair_gradient(params, x[:1], 6, 6)
    exact = mixed.by_row(lambda p: mixed.pair_bound(p, x[:1], 6, 6), params)
    for key, value in exact.items():
        np.testing.assert_allclose(found[key], value, atol=1e-12, err_msg=key)
