"""The contract of an autoregressive likelihood, over every registered member."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro.infer import SVI, Predictive, Trace_ELBO
from reference import likelihoods as oracle
from reference import outputs
from scipy import stats
from test_pyro.models import shaken
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pyro_vae_ext import likelihoods
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.likelihoods._outputs import make_output

MEMBERS = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES["likelihoods"].items()
    for i, case in enumerate(cases)
]


def masks(case: dict) -> list[dict]:
    """What a module of several masks is called with for each of them."""
    number = case.get("num_masks", 1)
    return [{"mask_index": index} for index in range(number)] if number > 1 else []


# Every density: a module as it is, and the nets of its masks; and without the mixtures of nets.
CALLS = [
    pytest.param(*member.values, call, id=f"{member.id}{''.join(f'-{v}' for v in call.values())}")
    for member in MEMBERS
    for call in [{}, *masks(member.values[1])]
]
NETS = [member for member in CALLS if member.values[2] or not masks(member.values[1])]
OUTPUTS = ("bernoulli", "categorical", "normal", "logistic_mixture", "discretized_logistic_mixture")
LARGEST = 70_000  # values of an event to go through


def discrete(case: dict) -> bool:
    return case.get("output", "bernoulli") not in ("normal", "logistic_mixture")


def num_values(case: dict) -> int:
    return 2 if case.get("output", "bernoulli") == "bernoulli" else case.get("num_categories", 256)


def of(members: list, accept: Callable[[dict], bool]) -> list:
    return [member for member in members if accept(member.values[1])]


ENUMERABLE = of(
    CALLS, lambda case: discrete(case) and num_values(case) ** np.prod(case["shape"]) <= LARGEST
)
CONDITIONAL = of(MEMBERS, lambda case: case["context_dim"] or case.get("covariate_dim"))


def build(name: str, case: dict, scale: float | None = None) -> torch.nn.Module:
    # Scales of a chain of real values multiply: closer to the start, so that they stay moderate.
    usual = 0.5 if discrete(case) else 0.2
    return shaken(getattr(likelihoods, name)(**case), usual if scale is None else scale)


def conditioning(module: torch.nn.Module, *batch: int) -> dict[str, torch.Tensor]:
    given = {}
    if module.context_dim is not None:
        per_step = getattr(module, "context_per_step", False)
        inner = (module.num_positions,) if per_step else ()
        given["context"] = torch.randn(*batch, *inner, module.context_dim)
    if module.covariate_dim is not None:
        given["covariates"] = torch.randn(*batch, module.covariate_dim)
    return given


def batch_of(module: torch.nn.Module, *batch: int) -> tuple[int, ...]:
    """The batch shape of the distribution: none for a module without conditioning."""
    return batch if module.conditioning_dim else ()


def all_values(module: torch.nn.Module, case: dict) -> torch.Tensor:
    grid = itertools.product(range(num_values(case)), repeat=module.num_elements)
    values = torch.tensor(list(grid)).reshape(-1, *module.shape)
    return values.to(module._like().dtype) if num_values(case) == 2 else values


def some_values(module: torch.nn.Module, *batch: int) -> torch.Tensor:
    """Values in the support, from no likelihood."""
    shape = (*batch, *module.shape)
    if not module.output.is_discrete:
        return torch.randn(shape)
    if isinstance(module.output.support, type(dist.constraints.boolean)):
        return torch.randint(2, shape).to(module._like().dtype)
    return torch.randint(module.output.num_categories, shape)


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().cpu().numpy()


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: array(parameter) for name, parameter in module.named_parameters()}


def side_by_side(module: torch.nn.Module, given: dict[str, torch.Tensor]) -> np.ndarray | None:
    """The conditioning as the reference takes it."""
    parts = [array(part) for part in given.values()]
    if len({part.ndim for part in parts}) > 1:  # a row of the context for each position
        parts[1] = np.broadcast_to(
            parts[1][..., None, :], (*parts[0].shape[:-1], parts[1].shape[-1])
        )
    return np.concatenate(parts, -1) if parts else None


@contextmanager
def no_look_at_values() -> Iterator[None]:
    """Fails where a number of a tensor becomes one of Python's, as a traced step cannot."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            assert "local_scalar" not in name and "nonzero" not in name, name
            return func(*args, **(kwargs or {}))

    with Watch():
        yield


@pytest.mark.parametrize(("name", "case", "call"), ENUMERABLE)
def test_probabilities_sum_to_one_and_samples_follow_them(
    exact: None, name: str, case: dict, call: dict
) -> None:
    module = build(name, case)
    p = module(**conditioning(module, 3), **call)
    rows = math.prod(p.batch_shape)
    values = all_values(module, case)
    with torch.no_grad():
        density = p.log_prob(values.reshape(-1, *[1] * len(p.batch_shape), *module.shape)).exp()
    density = density.reshape(-1, rows)
    np.testing.assert_allclose(density.sum(0).cpu(), 1.0, rtol=0, atol=1e-10)
    assert rows == 1 or not torch.allclose(density[:, 0], density[:, 1], atol=1e-4)

    count = 99_999 // rows
    samples = p.sample((count,))
    assert samples.dtype == values.dtype and samples.shape == (count, *p.batch_shape, *module.shape)
    powers = num_values(case) ** torch.arange(module.num_elements - 1, -1, -1)
    index = (samples.long().reshape(count, rows, -1) * powers).sum(-1)
    statistic, freedom = 0.0, 0
    for row in range(rows):
        expected = count * density[:, row].cpu().numpy()
        found = np.bincount(index[:, row].cpu(), minlength=len(expected))
        kept = expected >= max(5.0, 1e-4 * count)
        pooled = [np.append(v[kept], v[~kept].sum()) for v in (found, expected)]
        # What all values of a small probability have together may still be next to nothing.
        pooled = [v if pooled[1][-1] >= 5.0 else v[:-1] for v in pooled]
        statistic += ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
        freedom += len(pooled[0]) - 1
    assert freedom >= rows
    assert 1e-4 < stats.chi2.sf(statistic, freedom) < 1 - 1e-4


@pytest.mark.parametrize(("name", "case", "call"), of(NETS, lambda case: not discrete(case)))
def test_samples_of_real_values_follow_the_conditionals(
    exact: None, name: str, case: dict, call: dict
) -> None:
    """Each element's conditional distribution function, at samples, is uniform."""
    module = build(name, case)
    p = module(**conditioning(module, 3), **call)
    x = p.sample((3000,))
    with torch.no_grad():
        params = module._params(module.output.encode(x, x.dtype), p.conditioned)
    sizes = {"num_components": case["num_components"]} if "num_components" in case else {}
    uniform = outputs.cdf(case["output"], array(params), array(x), **sizes)
    uniform = uniform.reshape(-1, module.num_elements)
    for element in range(module.num_elements):
        assert stats.kstest(uniform[:, element], "uniform").pvalue > 1e-4
    # The conditionals' are independent as well.
    correlation = np.corrcoef(uniform.T) - np.eye(module.num_elements)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(uniform))


@pytest.mark.parametrize(("name", "case"), of(MEMBERS, lambda case: not discrete(case)))
def test_density_of_real_values_integrates_to_one(exact: None, name: str, case: dict) -> None:
    """Of two elements, by quadrature over the plane, through x = sinh(t)."""
    module = build(name, {**case, "shape": (1, 2)}, 0.1)
    p = module(**conditioning(module, 3))
    t = torch.linspace(-7.0, 7.0, 401)
    x = torch.cartesian_prod(t.sinh(), t.sinh()).reshape(-1, *[1] * len(p.batch_shape), 1, 2)
    jacobian = torch.cartesian_prod(t.cosh(), t.cosh()).prod(-1)
    with torch.no_grad():
        density = p.log_prob(x).exp().reshape(len(x), -1)
    total = (density * jacobian.unsqueeze(-1)).sum(0) * (t[1] - t[0]) ** 2
    np.testing.assert_allclose(array(total), 1.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_starts_near_one_distribution_for_all_elements(name: str, case: dict) -> None:
    module = getattr(likelihoods, name)(**case)
    p = module(**conditioning(module, 100), **(masks(case) or [{}])[0])
    x = some_values(module, 100)
    params = module._params(module.output.encode(x, module._like().dtype), p.conditioned)
    assert params.std() < 0.25 and params.abs().max() < 1.0


@pytest.mark.parametrize(("name", "case", "call"), CALLS)
def test_density_is_the_reference(exact: None, name: str, case: dict, call: dict) -> None:
    module = build(name, case)
    given, x = conditioning(module, 5), some_values(module, 5)
    found = module(**given, **call).log_prob(x)
    expected = oracle.log_prob(
        name, array(x), arrays(module), side_by_side(module, given), case, **call
    )
    np.testing.assert_allclose(array(found), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "case", "call"), NETS)
def test_dependence(exact: None, name: str, case: dict, call: dict) -> None:
    """The Jacobian in the inputs is non-zero exactly where the rule of the order says so."""
    # Where a unit is off for all values, nothing would pass through it.
    module = build(name, {**case, "activation": "tanh"} if name == "MADE" else case)
    p = module(**conditioning(module, 32), **call)
    size = module.num_elements
    inputs = torch.randn(32, *module.shape, module.output.num_inputs, requires_grad=True)
    params = module._params(inputs, p.conditioned).reshape(32, size, -1)
    weights = torch.randn(32, params.shape[-1])
    found = np.zeros((size, size), bool)
    for element in range(size):
        total = (weights * params[:, element]).sum()
        (slopes,) = torch.autograd.grad(total, inputs, retain_graph=True)
        found[element] = array((slopes.reshape(32, size, -1) != 0).any(-1).any(0))
    np.testing.assert_array_equal(found, oracle.sees(name, case, **call))


def naive_draw(
    module: torch.nn.Module, noise: torch.Tensor, conditioned: Any, seen: np.ndarray
) -> torch.Tensor:
    """Round after round of elements, each from a whole pass over what was drawn before."""
    rank = len(module.shape)
    flat = noise.flatten(-rank - 1, -2)
    value = torch.zeros(flat.shape[:-1])
    for ready in oracle.rounds(seen):
        inputs = module.output.encode(value.unflatten(-1, module.shape), noise.dtype)
        params = module._params(inputs, conditioned).flatten(-rank - 1, -2)
        drawn = module.output.draw(params, flat).to(value.dtype)
        now = torch.zeros(module.num_elements, dtype=torch.bool)
        now[ready] = True
        value = torch.where(now, drawn, value)
    return value.unflatten(-1, module.shape)


@pytest.mark.parametrize(("name", "case", "call"), NETS)
def test_cached_draw_is_the_naive_one(exact: None, name: str, case: dict, call: dict) -> None:
    """With the same noise, for all outputs; and so is its gradient, where there is one."""
    seen = oracle.sees(name, case, **call)
    for output in OUTPUTS:
        kind = {"num_categories": 5, **case, "output": output}
        module = build(name, kind)
        given = conditioning(module, 3)
        noise = module.output.noise((7, 3, *module.shape), torch.float64)
        with torch.no_grad():
            p = module(**given, **call)
            expected = naive_draw(module, noise, p.conditioned, seen)
            found = module._draw(noise, p.conditioned)
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-9, atol=1e-9)
        assert len(found.unique()) > 1
        if output != "normal":
            continue
        inputs = [*module.parameters(), *(part.requires_grad_() for part in given.values())]
        conditioned = module(**given, **call).conditioned
        slopes = [
            torch.autograd.grad(value.square().sum(), inputs, allow_unused=True)
            for value in (
                naive_draw(module, noise, conditioned, seen),
                module._draw(noise, module(**given, **call).conditioned),
            )
        ]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "case"), of(MEMBERS, lambda case: not masks(case)))
def test_noise_is_the_only_randomness(name: str, case: dict) -> None:
    """A sample is what `_draw` makes of the noise of its shape."""
    module = build(name, case)
    p = module(**conditioning(module, 4))
    torch.manual_seed(3)
    x = p.sample((2,))
    torch.manual_seed(3)
    like = module._like()
    noise = module.output.noise((2, *p.batch_shape, *module.shape), like.dtype, like.device)
    torch.testing.assert_close(x, module._draw(noise, p.conditioned), rtol=0, atol=0)
    assert p.support.check(x).all() and module.output.valid(x).all()
    assert len(torch.unique(x.reshape(-1, module.num_elements), dim=0)) > 1


@pytest.mark.parametrize(("name", "case"), CONDITIONAL)
def test_any_left_batch(name: str, case: dict) -> None:
    module = build(name, case)
    for batch in ((), (4,), (2, 1, 4)):
        given = conditioning(module, *batch)
        p = module(**given)
        assert p.batch_shape == batch and p.event_shape == module.shape
        x = p.sample((3,))
        assert x.shape == (3, *batch, *module.shape) and not x.requires_grad
        density = p.log_prob(x)
        assert density.shape == (3, *batch)
        # Row by row, all is the same.
        rows = {
            key: part.flatten(0, len(batch) - 1) if batch else part[None]
            for key, part in given.items()
        }
        flat = x.reshape(3, -1, *module.shape)
        for row in range(flat.shape[1]):
            alone = module(**{key: part[row] for key, part in rows.items()})
            torch.testing.assert_close(alone.log_prob(flat[:, row]), density.reshape(3, -1)[:, row])
    if case.get("context_per_step"):
        return  # its covariates have a rule of their own
    # Context and covariates broadcast, the value broadcasts with both.
    given = conditioning(module, 5, 4)
    given["context" if "context" in given else "covariates"] = conditioning(module, 5, 1)[
        "context" if "context" in given else "covariates"
    ]
    x = some_values(module, 4)
    whole = {key: part.expand(5, 4, *part.shape[2:]) for key, part in given.items()}
    torch.testing.assert_close(
        module(**given).log_prob(x).expand(5, 4), module(**whole).log_prob(x.expand(5, *x.shape))
    )


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_expand(name: str, case: dict) -> None:
    module = build(name, case)
    p = module(**conditioning(module))
    wide = p.expand((3, 2))
    assert wide.batch_shape == (3, 2) and wide.event_shape == module.shape
    for checked in (True, False):
        one = type(p)(module, p.conditioned, p.batch_shape, validate_args=checked)
        assert one.expand((3, 2))._validate_args is checked
    assert wide.support.event_dim == len(module.shape)
    assert wide.support.is_discrete == module.output.is_discrete == discrete(case)
    x = wide.sample()
    assert x.shape == (3, 2, *module.shape)
    torch.testing.assert_close(wide.log_prob(x), p.log_prob(x))
    assert wide.log_prob(x[0, 0]).shape == (3, 2)
    assert not wide.has_enumerate_support


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_in_plates_with_subsampling(name: str, case: dict) -> None:
    """Amortised or not, a site in a plate counts every row, and scales a minibatch."""
    module = build(name, case)
    given, x = conditioning(module, 6), some_values(module, 6)

    def model() -> None:
        pyro.module("decoder", module)
        with pyro.plate("rows", 6, subsample_size=4) as rows:
            p = module(**{key: part[rows] for key, part in given.items()})
            pyro.sample("x", p, obs=x[rows])
            pyro.sample("new", p)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    rows = trace.nodes["rows"]["value"]
    expected = module(**given).expand((6,)).log_prob(x)[rows]
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], 6 / 4 * expected)
    assert trace.nodes["new"]["value"].shape == (4, *module.shape)
    learned = {key.removeprefix("decoder$$$") for key in pyro.get_param_store()}
    assert learned == {key for key, _ in module.named_parameters()}


@pytest.mark.parametrize(("name", "case"), of(MEMBERS, lambda case: case["context_dim"]))
def test_training_with_particles_and_prediction(name: str, case: dict) -> None:
    module = build(name, case)
    x, size = some_values(module, 4), module.context_dim
    per_step = getattr(module, "context_per_step", False)
    inner = (module.num_positions, size) if per_step else (size,)
    known = conditioning(module, 4)
    known.pop("context")
    loc = pyro.nn.PyroModule("loc")
    loc.weight = torch.nn.Parameter(torch.zeros(4, *inner))

    def model(x: torch.Tensor | None) -> None:
        pyro.module("decoder", module)
        with pyro.plate("rows", 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(inner), 1.0).to_event(len(inner)))
            pyro.sample("x", module(z, **known), obs=x)

    def guide(x: torch.Tensor | None) -> None:
        pyro.module("guide", loc)
        with pyro.plate("rows", 4):
            pyro.sample("z", dist.Normal(loc.weight, 0.5).to_event(len(inner)))

    # Three particles at once are three particles one after the other.
    z = torch.randn(3, 4, *inner)
    together = module(z, **known).log_prob(x)
    single = torch.stack([module(particle, **known).log_prob(x) for particle in z])
    torch.testing.assert_close(together, single)
    for objective in (ImportanceWeightedELBO(3, max_plate_nesting=1), Trace_ELBO()):
        before = copy.deepcopy([*module.parameters(), loc.weight])
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), objective)
        losses = [svi.step(x) for _ in range(3)]
        assert all(math.isfinite(loss) for loss in losses)
        # One element or position sees no other: nothing comes in.
        for old, new in zip(before, [*module.parameters(), loc.weight], strict=True):
            assert module.num_elements == 1 or not torch.equal(old, new)
    drawn = Predictive(model, guide=guide, num_samples=3)(None)["x"]
    assert drawn.shape == (3, 4, *module.shape)
    assert module.output.valid(drawn).all()


@pytest.mark.parametrize(("name", "case", "call"), CALLS)
def test_a_gradient_reaches_every_parameter(name: str, case: dict, call: dict) -> None:
    module = build(name, case)
    given = {key: part.requires_grad_() for key, part in conditioning(module, 32).items()}
    module(**given, **call).log_prob(some_values(module, 32)).sum().backward()
    for key, tensor in (*module.named_parameters(), *given.items()):
        # A single element sees no other: the weights of its inputs are all masked out.
        if module.num_elements == 1 and key.endswith("layers.0.weight"):
            continue
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, key


@pytest.mark.parametrize(("name", "case", "call"), CALLS)
def test_gradient_through_samples(name: str, case: dict, call: dict) -> None:
    module = build(name, case)
    p = module(**conditioning(module, 3), **call)
    assert p.has_rsample == (case.get("output") == "normal")
    if not p.has_rsample:
        with pytest.raises(NotImplementedError):
            p.rsample()
        return
    torch.manual_seed(3)
    x = p.rsample((5,))
    x.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())
    torch.manual_seed(3)
    torch.testing.assert_close(p.sample((5,)), x.detach())


@pytest.mark.parametrize(("name", "case"), MEMBERS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_dtypes(name: str, case: dict, kind: torch.dtype) -> None:
    module = build(name, case).double()
    given = {key: part.double() for key, part in conditioning(module, 4).items()}
    x = some_values(module, 4)
    expected = module(**given).log_prob(x)
    p = module.to(kind)(**{key: part.to(kind) for key, part in given.items()})
    found = p.log_prob(x)
    assert found.dtype == kind
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    # Categories are integers of the host, all else is of the parameters' type.
    drawn = p.sample()
    is_index = discrete(case) and case.get("output", "bernoulli") != "bernoulli"
    assert drawn.dtype == (torch.int64 if is_index else kind)
    torch.testing.assert_close(p.log_prob(drawn), p.log_prob(drawn.to(kind)))


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_save_and_load(name: str, case: dict, tmp_path) -> None:
    module = build(name, case)
    torch.save(module.state_dict(), tmp_path / "decoder.pt")
    other = getattr(likelihoods, name)(**case)
    other.load_state_dict(torch.load(tmp_path / "decoder.pt"))
    given, x = conditioning(module, 4), some_values(module, 4)
    expected = module(**given).log_prob(x)
    assert not torch.equal(getattr(likelihoods, name)(**case)(**given).log_prob(x), expected)
    for same in (other, copy.deepcopy(module)):
        assert torch.equal(same(**given).log_prob(x), expected)


@pytest.mark.parametrize(("name", "case", "call"), CALLS)
def test_density_looks_at_no_value(name: str, case: dict, call: dict) -> None:
    """Without validation, which would break the one graph of a traced step."""
    module = build(name, case)
    given, x = conditioning(module, 3), some_values(module, 3)
    if call:
        call = {key: torch.tensor(value) for key, value in call.items()}
    with pytest.raises(AssertionError, match="local_scalar"), no_look_at_values():
        module(**given, **call).log_prob(x)
    with pyro.validation_enabled(False), no_look_at_values():
        module(**given, **call).log_prob(x).sum().backward()


@pytest.mark.parametrize("output", OUTPUTS)
def test_output_is_a_distribution(exact: None, output: str) -> None:
    """At parameters of all sizes; the draws by noise on a fine grid have its probabilities."""
    element = make_output(output, 7, 3)
    params = 4.0 * torch.randn(50, 1, element.num_params)
    if element.is_discrete:
        values = torch.arange(2 if output == "bernoulli" else 7)
        mass = element.log_prob(params, values)
        assert torch.isfinite(mass).all()
        np.testing.assert_allclose(array(mass.exp().sum(-1)), 1.0, rtol=0, atol=1e-12)
    else:
        values = torch.linspace(-12.0, 12.0, 40_001).sinh()
        found = element.log_prob(params.clamp(-2.5, 2.5), values).exp()
        total = torch.trapezoid(found, values, dim=-1)
        np.testing.assert_allclose(array(total), 1.0, rtol=0, atol=1e-6)
    params = params[:1].clamp(-1.0, 1.0)
    draws = element.draw(params, element.noise((40_000, 1), torch.float64)).flatten()
    assert element.valid(draws).all()
    if element.is_discrete:
        expected = 40_000 * array(element.log_prob(params, values).exp()).flatten()
        found = np.bincount(array(draws.long()), minlength=len(expected))
        assert stats.chisquare(found, expected).pvalue > 1e-3
    else:
        cdf = outputs.cdf(output, array(params[0, 0]), array(draws), num_components=3)
        assert stats.kstest(cdf, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("output", OUTPUTS)
def test_output_is_the_reference(exact: None, output: str) -> None:
    element = make_output(output, 6, 4)
    params = 4.0 * torch.randn(40, element.num_params)
    noise = element.noise((40,), torch.float64)
    drawn = element.draw(params, noise)
    sizes = {"num_categories": 6, "num_components": 4}
    np.testing.assert_allclose(
        array(drawn), outputs.draw(output, array(params), array(noise), **sizes), atol=1e-12
    )
    np.testing.assert_allclose(
        array(element.log_prob(params, drawn)),
        outputs.log_prob(output, array(params), array(drawn), **sizes),
        rtol=1e-10,
        atol=1e-10,
    )
    np.testing.assert_allclose(
        array(element.encode(drawn, torch.float64)), outputs.encode(output, array(drawn), 6)
    )
    assert element.num_params == outputs.num_params(output, **sizes)


def test_ordinal_categories_enter_as_one_number() -> None:
    element = make_output("categorical", 5, 1, ordinal=True)
    assert element.num_inputs == 1
    found = element.encode(torch.arange(5), torch.float64).squeeze(-1)
    torch.testing.assert_close(found, torch.linspace(-1.0, 1.0, 5, dtype=torch.float64))


def test_far_bins_have_a_finite_density_and_gradient() -> None:
    """A narrow component far from the value, at either end, and in single precision."""
    element = make_output("discretized_logistic_mixture", 256, 1)
    params = torch.tensor([[0.0, -0.9, -9.0], [0.0, 0.9, -9.0], [0.0, 3.0, -6.0], [0.0, 0.0, 9.0]])
    params = params.float().unsqueeze(1).requires_grad_()
    density = element.log_prob(params, torch.tensor([0, 1, 128, 254, 255]))
    density.sum().backward()
    assert torch.isfinite(density).all() and torch.isfinite(params.grad).all()
    assert density.min() < -500.0


def test_category_without_mass_is_never_drawn() -> None:
    """Not even where the noise is at an end of its interval."""
    element = make_output("categorical", 4, 1)
    logits = torch.tensor([-math.inf, 0.3, -math.inf, -math.inf], dtype=torch.float32)
    for level in (0.0, 0.5, 1.0 - 2.0**-24):
        assert element.draw(logits, torch.tensor([level], dtype=torch.float32)) == 1
    # Rounded, the probabilities before it sum to less than one, or to more.
    for number in range(10, 1000, 10):
        logits = torch.zeros(number + 1, dtype=torch.float32)
        logits[-1] = -math.inf
        element = make_output("categorical", number + 1, 1)
        level = torch.tensor([1.0 - 2.0**-24], dtype=torch.float32)
        assert element.draw(logits, level) < number


def test_ends_of_the_noise_give_finite_numbers() -> None:
    element = make_output("logistic_mixture", 2, 1)
    noise = torch.tensor([[0.0, 0.0], [0.5, 1.0]], dtype=torch.float32)
    drawn = element.draw(torch.zeros(2, 3, dtype=torch.float32), noise)
    assert torch.isfinite(drawn).all() and drawn[0] < -80.0 and drawn[1] > 15.0


def test_ensemble_is_the_mean_of_its_nets(exact: None) -> None:
    # So narrow that some masks have no unit of degree 0, and the next layer no lower ones.
    case = {"shape": 5, "context_dim": 2, "hidden_dims": (3, 5), "num_masks": 4}
    module = build("MADE", case)
    given, x = conditioning(module, 3), some_values(module, 3)
    nets = [module(**given, mask_index=index).log_prob(x) for index in range(4)]
    weights, context = arrays(module), side_by_side(module, given)
    for index, net in enumerate(nets):
        expected = oracle.log_prob("MADE", array(x), weights, context, case, mask_index=index)
        np.testing.assert_allclose(array(net), expected, rtol=1e-10, atol=1e-10)
    assert len({round(net[0].item(), 6) for net in nets}) == 4
    mean = torch.stack(nets).exp().mean(0).log()
    torch.testing.assert_close(module(**given).log_prob(x), mean)
    # Masks of another seed are others, but for the first.
    other = likelihoods.MADE(**case, mask_seed=1)
    other.load_state_dict(module.state_dict())
    theirs = [other(**given, mask_index=index).log_prob(x) for index in range(4)]
    same = [torch.equal(a, b) for a, b in zip(nets, theirs, strict=True)]
    assert same == [True, False, False, False]


def test_made_samples_with_the_work_of_one_pass() -> None:
    """Each unit once, and only with what it may see: less than a pass of the masked net."""
    module = likelihoods.MADE(60, 3, hidden_dims=(80, 80), num_categories=4, output="categorical")
    p = module(torch.randn(7, 3))
    x = p.sample()
    counts = []
    for program in (p.sample, lambda: p.log_prob(x)):
        with FlopCounterMode(display=False) as counter:
            program()
        counts.append(counter.get_total_flops())
    assert 0.4 < counts[0] / counts[1] < 0.7


def test_sampling_shows_nothing_where_it_is_quick(capsys: pytest.CaptureFixture) -> None:
    build("MADE", {"shape": 5, "hidden_dims": (9,)})().sample((3,))
    assert capsys.readouterr() == ("", "")


def says(error: type[Exception], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"shape": ()}, ValueError, "Expected a shape of at least one dimension; got ()."),
        ({"shape": (2, 0)}, ValueError, "Expected shape >= 1; got 0."),
        ({"shape": 2.0}, TypeError, "Expected shape to be an int; got float."),
        ({"shape": True}, TypeError, "Expected shape to be an int; got bool."),
        ({"context_dim": 0}, ValueError, "Expected context_dim >= 1; got 0."),
        ({"covariate_dim": 0}, ValueError, "Expected covariate_dim >= 1; got 0."),
        ({"hidden_dims": ()}, ValueError, "Expected at least one hidden layer; got hidden_dims=()"),
        ({"hidden_dims": (3, 0)}, ValueError, "Expected hidden_dims >= 1; got 0."),
        (
            {"hidden_dims": (3, 4), "residual": True},
            ValueError,
            "Expected equal hidden_dims under residual=True; got (3, 4).",
        ),
        (
            {"output": "poisson"},
            ValueError,
            "Expected output to be one of 'bernoulli', 'categorical', 'normal', "
            "'logistic_mixture', 'discretized_logistic_mixture'; got 'poisson'.",
        ),
        ({"num_categories": 1}, ValueError, "Expected num_categories >= 2; got 1."),
        ({"num_components": 0}, ValueError, "Expected num_components >= 1; got 0."),
        (
            {"order": (0, 0, 1)},
            ValueError,
            "Expected order to be a permutation of range(3); got (0, 0, 1).",
        ),
        ({"num_masks": 0}, ValueError, "Expected num_masks >= 1; got 0."),
        ({"mask_seed": -1}, ValueError, "Expected mask_seed >= 0; got -1."),
        (
            {"activation": "x"},
            ValueError,
            "Expected activation to be one of 'elu', 'relu', 'tanh'; got 'x'.",
        ),
    ],
)
def test_options(kwargs: dict, error: type[Exception], text: str) -> None:
    says(error, text, lambda: likelihoods.MADE(**{"shape": 3, **kwargs}))


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_conditioning_that_does_not_fit(name: str, case: dict) -> None:
    module, where = build(name, case), f" at {name}; got "
    given = conditioning(module, 4)
    for key, words in (("context", "a context"), ("covariates", "covariates")):
        others = {k: part for k, part in given.items() if k != key}
        part = given.get(key)
        noun = words.removeprefix("a ")
        if part is None:
            text = f"Expected no {noun}{where}shape (4, 3). Build the likelihood with "
            says(ValueError, text, lambda k=key, o=others: module(**o, **{k: torch.zeros(4, 3)}))
            continue
        width = part.shape[-1]
        text = f"Expected {words} of width {width}{where}"
        says(ValueError, text + "None. ", lambda o=others: module(**o))
        wrong = part.new_zeros(*part.shape[:-1], width + 1)
        says(
            ValueError,
            f"{text}shape (",
            lambda k=key, o=others, w=wrong: module(**o, **{k: w}),
        )
        kind = words.replace(noun, f"floating-point {noun}")
        says(
            TypeError,
            f"Expected {kind}{where}int64. Cast the data to float",
            lambda k=key, o=others, w=part: module(**o, **{k: w.long()}),
        )
        says(
            ValueError,
            f"Expected {words} without NaN{where}NaN. ",
            lambda k=key, o=others, w=part: module(**o, **{k: w * math.nan}),
        )


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_values_outside_of_the_support(name: str, case: dict) -> None:
    module = build(name, case)
    p = module(**conditioning(module, 4))
    good = some_values(module, 4).to(torch.get_default_dtype())
    words = {
        "bernoulli": "{0, 1}",
        "normal": "finite numbers",
        "logistic_mixture": "finite numbers",
    }
    support = words.get(case.get("output", "bernoulli"), f"{{0, ..., {num_values(case) - 1}}}")
    position = (2, *(size - 1 for size in module.shape))
    wrong = [math.nan, math.inf]
    wrong += [0.5, -1.0, float(num_values(case))] if discrete(case) else []
    for number in wrong:
        bad = good.clone()
        bad[position] = number
        text = (
            f"Expected values in {support} at {name}.log_prob; got {number} at position {position}."
        )
        says(ValueError, text, lambda x=bad: p.log_prob(x))
    if discrete(case):
        bad = good.long()
        bad[position] = num_values(case)
        text = f"{name}.log_prob; got {num_values(case)} at position {position}."
        says(ValueError, text, lambda: p.log_prob(bad))
    sizes = ", ".join(map(str, module.shape))
    for shape in ((4, *module.shape[:-1], module.shape[-1] + 1), module.shape[1:]):
        text = f"Expected values of shape (..., {sizes}) at {name}.log_prob; got shape {shape}."
        says(ValueError, text, lambda s=shape: p.log_prob(torch.zeros(s)))


@pytest.mark.parametrize(("name", "case"), MEMBERS)
def test_sample_shape_of_no_samples(name: str, case: dict) -> None:
    p = build(name, case)
    p = p(**conditioning(p, 4))
    for shape in ((0,), (3, 0), (-1,)):
        text = f"Expected a sample shape of positive sizes; got {shape}."
        says(ValueError, text, lambda s=shape: p.sample(s))


def test_mask_that_is_not_there() -> None:
    module = likelihoods.MADE(3, hidden_dims=(4,), num_masks=2)
    for index in (2, -1, torch.tensor(2), torch.tensor(-1), np.int64(7)):
        text = f"Expected mask_index in [0, 1]; got {int(index)}."
        says(ValueError, text, lambda i=index: module(mask_index=i))
    for index in (1.0, True, torch.tensor(1.0), torch.tensor([1]), torch.tensor(True), "1"):
        text = f"Expected mask_index to be an int; got {type(index).__name__}."
        says(TypeError, text, lambda i=index: module(mask_index=i))
    x = torch.ones(3)
    for index in (torch.tensor(1), np.int32(1)):
        assert module(mask_index=index).log_prob(x) == module(mask_index=1).log_prob(x)
        assert module(mask_index=index).sample((2,)).shape == (2, 3)
