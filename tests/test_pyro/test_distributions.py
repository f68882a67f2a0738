"""Densities, samples and shapes of the distributions that the host lacks."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro.infer import TraceEnum_ELBO, config_enumerate
from reference import concrete
from scipy.special import log_softmax

from pyro_vae_ext import distributions
from pyro_vae_ext.distributions import OneHotCategorical, RelaxedOneHotCategorical

LOGITS = ((0.4, -1.0, 2.0, 0.1), (-0.3, 0.0, 0.7, -2.0))


def members(name: str) -> list:
    cases = CASES["distributions"][name]
    return [pytest.param(case, id=f"{name}-{i}") for i, case in enumerate(cases)]


def build(name: str, case: dict, dtype: torch.dtype | None = None):
    dtype = dtype or torch.get_default_dtype()
    tensors = {
        k: torch.tensor(v, dtype=dtype) if isinstance(v, tuple) else v for k, v in case.items()
    }
    return getattr(distributions, name)(**tensors)


def log_p(case: dict) -> np.ndarray:
    given = case["logits"] if "logits" in case else np.log(case["probs"])
    return log_softmax(np.asarray(given), axis=-1)


def one_hots(fn) -> torch.Tensor:
    return fn.enumerate_support()


@pytest.mark.parametrize("case", members("OneHotCategorical"))
def test_corners_are_the_host_s(case: dict) -> None:
    ours = build("OneHotCategorical", case)
    index = torch.arange(ours.event_shape[0]).reshape(-1, *[1] * len(ours.batch_shape))
    expected = dist.Categorical(logits=ours.logits).log_prob(index.expand(-1, *ours.batch_shape))
    torch.testing.assert_close(ours.log_prob(one_hots(ours)), expected)
    np.testing.assert_allclose(ours.logits, log_p(case), rtol=1e-5)
    assert isinstance(ours, dist.OneHotCategorical) and not ours.has_rsample
    assert ours.support.is_discrete and bool(ours.support.check(one_hots(ours)).all())
    other = dist.OneHotCategorical(logits=torch.zeros_like(ours.logits))
    divergence = torch.distributions.kl_divergence(ours, other)
    torch.testing.assert_close(divergence, math.log(len(index)) - ours.entropy())


@pytest.mark.parametrize("case", members("OneHotCategorical"))
def test_linear_between_the_corners(case: dict) -> None:
    ours = build("OneHotCategorical", case)
    soft = dist.Dirichlet(torch.ones(ours.event_shape)).sample(ours.batch_shape)
    soft = soft.requires_grad_()
    corners = ours.log_prob(one_hots(ours))
    expected = (soft * corners.movedim(0, -1)).sum(-1)
    found = ours.log_prob(soft)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), soft)
    torch.testing.assert_close(gradient, ours.logits.expand_as(soft))


def test_categories_that_cannot_occur() -> None:
    logits = torch.tensor([0.0, -math.inf, 1.0], requires_grad=True)
    ours = OneHotCategorical(logits=logits, validate_args=False)
    values = ours.log_prob(torch.eye(3))
    assert values[1] == -math.inf and torch.isfinite(values[[0, 2]]).all()
    (gradient,) = torch.autograd.grad(values[0], logits)
    assert torch.isfinite(gradient).all()


def test_validation_of_one_hots() -> None:
    ours = OneHotCategorical(logits=torch.tensor(LOGITS), validate_args=True)
    ours.log_prob(torch.full((2, 4), 0.25))
    for wrong in (torch.full((2, 4), 0.5), torch.tensor([1.5, -0.5, 0.0, 0.0]).expand(2, 4)):
        with pytest.raises(ValueError, match="Expected values on the simplex .*; got others"):
            ours.log_prob(wrong)
    with pytest.raises(ValueError, match="The size of tensor|right-most size"):
        ours.log_prob(torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match="not both"):
        OneHotCategorical(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="satisfy the constraint"):
        OneHotCategorical(probs=torch.tensor([0.5, -0.5]), validate_args=True)


@pytest.mark.parametrize("name", sorted(CASES["distributions"]))
def test_frequencies(name: str) -> None:
    """Of the largest entries, also at rows of different temperatures."""
    for case in CASES["distributions"][name]:
        fn = build(name, case)
        draws = fn.sample((20_000,))
        assert draws.shape == (20_000, *fn.batch_shape, *fn.event_shape)
        torch.testing.assert_close(draws.sum(-1), torch.ones(draws.shape[:-1]))
        winners = torch.nn.functional.one_hot(draws.argmax(-1), draws.shape[-1])
        error = (fn.probs * (1 - fn.probs) / 20_000).sqrt()
        z = (winners.to(fn.probs).mean(0) - fn.probs) / error
        assert z.abs().max() < 4.5
        assert name != "OneHotCategorical" or torch.equal(draws, winners.to(draws))


@pytest.mark.parametrize("case", members("RelaxedOneHotCategorical"))
def test_concrete_density(exact: None, case: dict) -> None:
    fn = build("RelaxedOneHotCategorical", case)
    x = fn.rsample((5,))
    found, t = fn.log_prob(x), np.asarray(case["temperature"])
    expected = concrete.log_prob(x.numpy(), log_p(case), t)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    if t.ndim == 0:
        host = dist.RelaxedOneHotCategorical(torch.tensor(float(t)), logits=fn.logits)
        torch.testing.assert_close(found, host.log_prob(x))
    # The logarithm's own density: the same but for the change of variables.
    torch.testing.assert_close(fn.base_dist.log_prob(x.log()) - x.log().sum(-1), found)


def test_concrete_sample_is_the_reference_s(exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.rand(5, 2, 4)
    t = torch.tensor([0.4, 1.3], requires_grad=True)
    fn = RelaxedOneHotCategorical(t, logits=torch.tensor(LOGITS))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: noise)
    x = fn.rsample((5,))
    p = log_softmax(np.asarray(LOGITS), axis=-1)
    expected = concrete.soften(noise.numpy(), p, np.array([0.4, 1.3]))
    np.testing.assert_allclose(x.detach(), expected, rtol=1e-9)
    (gradient,) = torch.autograd.grad(fn.log_prob(x).sum(), t)
    assert (gradient != 0).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(CASES["distributions"]))
def test_dtypes_and_low_temperatures(name: str, kind: torch.dtype) -> None:
    logits = torch.tensor(LOGITS, dtype=kind, requires_grad=True)
    given = {} if name == "OneHotCategorical" else {"temperature": 0.02}
    fn = getattr(distributions, name)(logits=logits, **given)
    x = fn.rsample((500,)) if given else fn.sample((500,))
    value = fn.log_prob(x)
    assert x.dtype == value.dtype == kind and torch.isfinite(value).all()
    (gradient,) = torch.autograd.grad(value.sum() + x.square().sum(), logits)
    assert torch.isfinite(gradient).all()
    if given:
        assert (x > 0).all() and (x.max(-1).values > 0.99).double().mean() > 0.9


@pytest.mark.parametrize("name", sorted(CASES["distributions"]))
def test_wrappers(name: str) -> None:
    case = CASES["distributions"][name][1]
    fn = build(name, case)
    wide = fn.expand((3, 2))
    assert type(wide) is type(fn) and wide.batch_shape == (3, 2)
    x = wide.sample()
    assert x.shape == (3, 2, 4)
    rows = wide.log_prob(x)
    torch.testing.assert_close(rows, fn.log_prob(x))
    torch.testing.assert_close(wide.to_event(1).log_prob(x), rows.sum(-1))
    assert wide.to_event(1).event_shape == (2, 4)
    mask = torch.tensor([True, False])
    torch.testing.assert_close(wide.mask(mask).log_prob(x), rows * mask)
    assert wide.mask(mask).has_rsample == fn.has_rsample
    with pyro.plate("outer", 3, dim=-2), pyro.plate("rows", 2):
        assert pyro.sample("x", fn).shape == (3, 2, 4)


def test_temperatures() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^Expected temperature > 0; got "):
            RelaxedOneHotCategorical(wrong, logits=torch.zeros(3))
    with pytest.raises(ValueError, match="temperature"):
        RelaxedOneHotCategorical(torch.tensor([1.0, -1.0]), logits=torch.zeros(3))
    fn = RelaxedOneHotCategorical(torch.ones(3, 1), logits=torch.zeros(2, 4))
    assert fn.batch_shape == (3, 2) and fn.temperature.shape == (3, 2)


def test_enumeration(exact: None) -> None:
    """The host sums our one-hot sites out, in the model or in the guide."""
    p, q = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.6, 0.3, 0.1])
    loc, x = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.3, 1.2])

    def model() -> None:
        with pyro.plate("rows", 2):
            b = pyro.sample("b", OneHotCategorical(probs=p))
            pyro.sample("x", dist.Normal((b * loc).sum(-1), 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("rows", 2):
            pyro.sample("b", OneHotCategorical(probs=q))

    joint = p.log() + dist.Normal(loc, 1.0).log_prob(x[:, None])
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    found = elbo.loss(config_enumerate(model, "parallel"), lambda: None)
    assert found == pytest.approx(-joint.logsumexp(-1).sum().item())
    found = elbo.loss(model, config_enumerate(guide, "parallel"))
    assert found == pytest.approx(-(q * (joint - q.log())).sum().item())
