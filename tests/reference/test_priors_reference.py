"""The references of the priors, checked among themselves by quadrature and sampling."""

import numpy as np
import pytest
from scipy import stats

from . import iaf, masked_flow, priors, vgp


def net_weights(rng, dim, num_flows, context_dim=None):
    weights = iaf.random_weights(rng, dim, context_dim, (6,), num_flows, scale=0.5)
    if context_dim is not None:
        return weights
    return {name: value for name, value in weights.items() if name.startswith("nets.")}


def test_mixture_is_that_of_scipy_and_its_evidence_the_integral():
    rng = np.random.default_rng(0)
    logits, locs, log_scales = rng.normal(size=3), rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    log_scales *= 0.3
    points, volume = priors.grid(2, 9.0, 181)
    log_p = priors.mixture(points, logits, locs, log_scales)
    weights = np.exp(logits) / np.exp(logits).sum()
    expected = sum(
        w * stats.multivariate_normal(m, np.diag(np.exp(2 * s))).pdf(points)
        for w, m, s in zip(weights, locs, log_scales, strict=True)
    )
    np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-10, atol=1e-300)
    x = rng.normal(size=(4, 2))
    np.testing.assert_allclose(
        priors.evidence(x, log_p, points, volume),
        priors.mixture_evidence(x, logits, locs, log_scales),
        rtol=1e-9,
    )


@pytest.mark.parametrize(("num_flows", "context_dim"), [(1, None), (2, None), (3, None), (2, 3)])
def test_flow_integrates_to_one_and_scores_its_samples(num_flows, context_dim):
    rng = np.random.default_rng(num_flows)
    weights = net_weights(rng, 2, num_flows, context_dim)
    context = None if context_dim is None else rng.normal(size=context_dim)
    points, volume = priors.grid(2, 25.0, 1001)
    log_p = masked_flow.log_prob(points, weights, context)
    assert np.exp(priors.log_sum(log_p)) * volume == pytest.approx(1.0, abs=1e-3)
    # Change of variables: the density of a sample is that of its noise over the determinant.
    noise = rng.normal(size=(5, 2))
    step = 1e-6
    columns = [
        (
            masked_flow.sample(noise + step * e, weights, context)
            - masked_flow.sample(noise - step * e, weights, context)
        )
        / (2 * step)
        for e in np.eye(2)
    ]
    determinant = np.linalg.det(np.stack(columns, -1))
    expected = stats.norm.logpdf(noise).sum(-1) - np.log(np.abs(determinant))
    value = masked_flow.sample(noise, weights, context)
    np.testing.assert_allclose(masked_flow.log_prob(value, weights, context), expected, rtol=1e-7)


def hierarchical_weights(rng, name):
    def linear(prefix, num_out, num_in):
        return {
            f"{prefix}.weight": 0.5 * rng.normal(size=(num_out, num_in)),
            f"{prefix}.bias": 0.5 * rng.normal(size=num_out),
        }

    if name == "VGP":
        return {
            "sources": rng.normal(size=(4, 1)),
            "targets": rng.normal(size=(4, 1)),
            "targets_head.weight": 0.3 * rng.normal(size=(4, 2)),
            "log_lengthscale": np.zeros(1),
            "log_amplitude": np.zeros(()),
            **linear("base.loc", 1, 2),
            **linear("base.log_scale", 1, 2),
        }
    return {
        **linear("aux.loc", 1, 2),
        **linear("aux.log_scale", 1, 2),
        **linear("conditional.loc", 1, 3),
        **linear("conditional.log_scale", 1, 3),
    }


@pytest.mark.parametrize("name", ["Auxiliary", "VGP"])
def test_marginals_integrate_to_one(name):
    rng = np.random.default_rng(3)
    weights, context = hierarchical_weights(rng, name), rng.normal(size=(3, 2))
    points, volume = priors.grid(1, 40.0, 2001)
    log_q = priors.components(name, points, weights, context)
    assert log_q.shape == (2001, 3)
    np.testing.assert_allclose(np.exp(log_q).sum(0) * volume, 1.0, atol=1e-3)
    if name == "VGP":
        value = np.array([[0.3], [-0.7], [1.1]])
        estimate = vgp.log_marginal(value, weights, context, rng, 4000)
        exact = np.diagonal(priors.components(name, value, weights, context))
        np.testing.assert_allclose(estimate, exact, atol=0.1)
