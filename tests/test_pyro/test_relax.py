"""Relaxed programs: a bound on the evidence of the relaxed model, and nothing else changed."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import infer, poutine
from reference import concrete
from scipy import stats
from scipy.special import expit
from test_pyro.models import standard_errors

from pyro_vae_ext.distributions import OneHotCategorical
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.handlers import relax

CASE = CASES["handlers"]["relax"]
X, Y = [0.9, -0.4, 2.5], [1.0, 0.0, 1.0]


def bit(name: str, family: str, logit: torch.Tensor) -> torch.Tensor:
    """A bit, or a one-hot pair whose first entry is the bit."""
    if family == "bernoulli":
        return pyro.sample(name, dist.Bernoulli(logits=logit))
    make = OneHotCategorical if family == "ours" else dist.OneHotCategorical
    return pyro.sample(name, make(logits=torch.stack([logit, 0 * logit], -1)))[..., 0]


def pair(family: str, batch_size: int | None = None):
    """A bit beside a continuous latent, with continuous and discrete data, in a plate."""
    x, y = torch.tensor(X), torch.tensor(Y)
    logits = torch.tensor([0.8, -0.6, 2.0], requires_grad=True)

    def model() -> None:
        with pyro.plate("rows", 3, subsample_size=batch_size) as rows:
            b = bit("b", family, torch.full((len(rows),), 0.4))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 2.0 * b, 1.0), obs=x[rows])
            pyro.sample("y", dist.Bernoulli(logits=1.5 * b), obs=y[rows])

    def guide() -> None:
        with pyro.plate("rows", 3, subsample_size=batch_size) as rows:
            b = bit("b", family, logits[rows])
            pyro.sample("z", dist.Normal(0.5 * (x[rows] - 2.0 * b), 0.8))

    return model, guide, logits


def evidence(temperature: float) -> np.ndarray:
    """Of the relaxed model, by row."""

    def log_likelihood(row: int):
        def at(b: float) -> float:
            p = expit(1.5 * b)
            seen = np.log(p if Y[row] else 1.0 - p)
            return stats.norm.logpdf(X[row], 2.0 * b, np.sqrt(2.0)) + seen

        return at

    return np.array(
        [concrete.binary_evidence(log_likelihood(i), 0.4, temperature) for i in range(3)]
    )


@pytest.mark.parametrize("case", CASE)
@pytest.mark.parametrize("family", ["bernoulli", "ours", "host"])
def test_weights_are_unbiased_and_the_bound_is_one(family: str, case: dict) -> None:
    model, guide, _ = pair(family)
    model, guide = relax(model, **case), relax(guide, **case)
    truth = evidence(case["temperature"])
    with torch.no_grad():
        weights = ImportanceWeightedELBO(40_000).log_weights(model, guide)
    assert weights.shape == (40_000, 3)
    for row in range(3):
        assert abs(standard_errors(weights[:, row].exp(), truth[row])) < 4
    assert weights.mean(0).sum().item() < np.log(truth).sum() - 0.05
    for elbo in (
        infer.Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=1),
        ImportanceWeightedELBO(500),
    ):
        assert -elbo.loss(model, guide) < np.log(truth).sum() + 0.1


@pytest.mark.parametrize("family", ["bernoulli", "ours"])
def test_temperatures_of_model_and_guide_may_differ(family: str) -> None:
    model, guide, _ = pair(family)
    model, guide = relax(model, temperature=0.5), relax(guide, temperature=torch.tensor(0.7))
    with torch.no_grad():
        weights = ImportanceWeightedELBO(40_000).log_weights(model, guide)
    assert abs(standard_errors(weights.exp().prod(-1), evidence(0.5).prod())) < 4


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["bernoulli", "ours"])
def test_a_sure_guide_at_a_low_temperature(family: str, kind: torch.dtype) -> None:
    """The evidence is 1. Scored as soft values, such guides seem to be worth far more."""
    logit = torch.tensor(3.0, dtype=kind, requires_grad=True)
    model = relax(lambda: bit("b", family, torch.tensor(0.0, dtype=kind)), temperature=0.05)
    guide = relax(lambda: bit("b", family, logit), temperature=0.05)
    with torch.no_grad():
        weights = ImportanceWeightedELBO(100_000).log_weights(model, guide)
    assert weights.dtype == kind
    assert abs(standard_errors(weights.double().exp(), 1.0)) < 4
    # The divergence of two logistics, whatever the temperature.
    assert weights.mean().item() == pytest.approx(-1.3128, abs=0.02)
    ImportanceWeightedELBO(100).differentiable_loss(model, guide).backward()
    assert torch.isfinite(logit.grad) and logit.grad != 0


def test_a_low_temperature_is_nearly_the_discrete_model() -> None:
    def log_joint(b: float) -> np.ndarray:
        p = expit(1.5 * b)
        seen = np.where(np.array(Y) == 1.0, np.log(p), np.log(1.0 - p))
        return stats.norm.logpdf(X, 2.0 * b, np.sqrt(2.0)) + seen

    exact = np.log(expit(0.4) * np.exp(log_joint(1.0)) + expit(-0.4) * np.exp(log_joint(0.0)))
    gaps = [np.abs(np.log(evidence(t)) - exact).max() for t in (0.5, 0.1, 0.02)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.01
    model, guide, _ = pair("bernoulli")
    with torch.no_grad():
        discrete = ImportanceWeightedELBO(40_000).log_weights(model, guide)
        soft = ImportanceWeightedELBO(40_000).log_weights(
            relax(model, temperature=0.02), relax(guide, temperature=0.02)
        )
    for row in range(3):
        assert abs(standard_errors(discrete[:, row].exp(), np.exp(exact[row]))) < 4
        assert abs(soft[:, row].exp().mean().log().item() - exact[row]) < 0.05
    # The bound does not get there: it also pays for how the noise is matched behind the bit.
    assert soft.mean().item() < discrete.mean().item() - 0.05


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("family", ["bernoulli", "ours"])
def test_gradients(exact: None, family: str, gradient: str) -> None:
    """Path gradients have the mean of the host's, or of our own plain one."""
    model, guide, logits = pair(family)
    model, guide = relax(model, temperature=0.6), relax(guide, temperature=0.6)

    def draws(elbo) -> torch.Tensor:
        losses = (elbo.differentiable_loss(model, guide) for _ in range(200))
        return torch.stack([torch.autograd.grad(loss, logits)[0] for loss in losses])

    if gradient == "stl":
        plain = infer.Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=1)
        path = ImportanceWeightedELBO(1, gradient=gradient)
    else:
        plain, path = ImportanceWeightedELBO(4), ImportanceWeightedELBO(4, gradient=gradient)
    ours, theirs = draws(path), draws(plain)
    error = (ours.var(0) / 200 + theirs.var(0) / 200).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)) / error).abs().max() < 4.5


@pytest.mark.parametrize("family", ["bernoulli", "ours"])
def test_subsamples(family: str) -> None:
    full, part = pair(family), pair(family, 2)
    bounds = []
    for model, guide, _ in (full, part):
        model, guide = relax(model, temperature=0.5), relax(guide, temperature=0.5)
        elbo = ImportanceWeightedELBO(3)
        with torch.no_grad():
            bounds.append(-torch.tensor([elbo.loss(model, guide) for _ in range(300)]))
        svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
        assert np.isfinite(svi.step())
    error = (bounds[0].var() / 300 + bounds[1].var() / 300).sqrt()
    assert abs(bounds[0].mean() - bounds[1].mean()) < 4 * error


def sites(program) -> dict:
    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    return trace.nodes


def test_wrappers_are_kept() -> None:
    p = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.1, 0.9]])
    mask = torch.tensor([True, False, True])

    def model():
        with pyro.plate("rows", 3):
            a = pyro.sample("a", dist.Bernoulli(p).to_event(1).mask(mask))
            b = pyro.sample("b", OneHotCategorical(logits=torch.randn(2, 4)).to_event(1))
            c = pyro.sample("c", dist.Bernoulli(0.3))
            d = pyro.sample("d", dist.Bernoulli(0.3).expand([3]).mask(False))
            e = pyro.sample("e", dist.OneHotCategorical(p))
        return a, b, c, d, e

    relaxed = relax(model, temperature=torch.tensor(0.2))
    hard, soft = sites(model), sites(relaxed)
    for name in "abcde":
        assert soft[name]["fn"].batch_shape == hard[name]["fn"].batch_shape == (3,)
        assert soft[name]["fn"].event_shape == hard[name]["fn"].event_shape
        assert soft[name]["value"].shape == hard[name]["value"].shape
        assert soft[name]["log_prob"].shape == (3,) and soft[name]["fn"].has_rsample
    assert soft["a"]["log_prob"][1] == 0.0 and (soft["d"]["log_prob"] == 0.0).all()
    # A site is scored in log-odds; the program, and what it returns, has soft values.
    logit = np.log(p.numpy()) - np.log1p(-p.numpy())
    expected = concrete.log_odds_log_prob(soft["a"]["value"].numpy(), logit, 0.2).sum(-1)
    np.testing.assert_allclose(soft["a"]["log_prob"], expected * mask.numpy(), rtol=1e-4)
    values = soft["_RETURN"]["value"]
    torch.testing.assert_close(values[0], soft["a"]["value"].sigmoid(), atol=1e-6, rtol=0)
    torch.testing.assert_close(values[1], soft["b"]["value"].exp(), atol=1e-6, rtol=0)
    assert all(((v > 0) & (v < 1)).all() for v in values)
    # The program itself is discrete still.
    assert all(((v == 0) | (v == 1)).all() for v in model())
    temperature = torch.tensor([5.0, 1e-3])
    wide = relax(lambda: pyro.sample("f", dist.Bernoulli(p).to_event(1)), temperature=temperature)
    rounding = [(v - v.round()).abs().max() for v in wide().unbind(-1)]
    assert rounding[0] > 0.1 and rounding[1] < 1e-3


def test_observed_and_continuous_sites_are_left_alone() -> None:
    def model() -> None:
        pyro.sample("k", dist.Categorical(torch.ones(3)), obs=torch.tensor(1))
        pyro.sample("b", dist.Bernoulli(0.5), obs=torch.tensor(1.0))
        pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.factor("f", torch.tensor(1.0))
        pyro.deterministic("d", torch.tensor(1.0))

    hard, soft = sites(model), sites(relax(model, temperature=0.5))
    for name in "kbzf":
        assert type(soft[name]["fn"]) is type(hard[name]["fn"])
    given = poutine.condition(lambda: pyro.sample("c", dist.Bernoulli(0.5)), {"c": torch.ones(())})
    assert relax(given, temperature=0.5)() == 1.0


def test_errors() -> None:
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"^Expected temperature > 0; got {wrong}\.$"):
            relax(lambda: None, temperature=wrong)
        late = relax(lambda: None, temperature=lambda wrong=wrong: wrong)
        with pytest.raises(ValueError, match=rf"^Expected temperature > 0; got {wrong}\.$"):
            late()
    text = (
        "Expected Bernoulli or one-hot categorical latent sites under relax; got site 'k' with the "
        "distribution {}. {}"
    )
    for fn, name, remedy in (
        (
            dist.Categorical(torch.ones(3)).expand([2]).to_event(1),
            "Categorical",
            "Use OneHotCategorical of the package's distributions module, or TraceNVIL_ELBO.",
        ),
        (
            dist.Poisson(2.0),
            "Poisson",
            "Marginalise it with the host's TraceEnum_ELBO, or use TraceNVIL_ELBO.",
        ),
    ):
        with pytest.raises(ValueError) as error:
            relax(lambda fn=fn: pyro.sample("k", fn), temperature=0.5)()
        assert str(error.value) == text.format(name, remedy)


def test_schedule() -> None:
    """The temperature is a function of the program's arguments, and changes the values."""

    def model(step: torch.Tensor) -> torch.Tensor:
        return pyro.sample("b", dist.Bernoulli(logits=torch.zeros(1000)).to_event(1))

    annealed = relax(model, temperature=lambda step: 0.05 + 2.0 * torch.exp(-step))
    distance = [
        (b - b.round()).abs().mean().item()
        for b in (annealed(torch.tensor(s)) for s in (0.0, 2.0, 20.0))
    ]
    assert distance[0] > distance[1] > distance[2]
    named = relax(model, temperature=lambda *, step: step)
    assert named.__name__ == "model" and named(step=torch.tensor(0.5)).shape == (1000,)

    def guide(step: torch.Tensor) -> None:
        logits = pyro.param("logits", torch.ones(1000))
        pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    relaxed = relax(guide, temperature=lambda step: 0.05 + 2.0 * torch.exp(-step))
    svi = infer.SVI(annealed, relaxed, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO())
    assert all(np.isfinite(svi.step(torch.tensor(float(s)))) for s in range(3))


def test_relaxed_modules_are_modules() -> None:
    """The host's objectives find the parameters of a relaxed guide, under both interfaces."""

    class Guide(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = pyro.nn.PyroModule[torch.nn.Linear](2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return pyro.sample("b", dist.Bernoulli(logits=self.layer(x)).to_event(1))

    def model(x: torch.Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(3)).to_event(1))
        pyro.sample("x", dist.Normal(b.sum(), 1.0), obs=x.sum())

    guide, x = Guide(), torch.ones(2)
    pair = relax(model, temperature=0.5), relax(guide, temperature=0.5)
    host = infer.Trace_ELBO()(*pair)
    host(x).backward()
    named = dict(host.named_parameters())
    assert len(named) == 2 and all(p.grad is not None for p in named.values())
    infer.SVI(*pair, pyro.optim.Adam({"lr": 0.01}), infer.Trace_ELBO()).step(x)
    assert set(pyro.get_param_store()) == {"layer.weight", "layer.bias"}
    assert guide(x).unique().numel() <= 2
