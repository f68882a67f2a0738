"""Compiled steps against the host's own, step by step under the same seed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import infer, optim
from pyro.distributions import constraints
from test_pyro.models import family
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae_ext import elbos, handlers
from pyro_vae_ext.elbos import ImportanceWeightedELBO
from pyro_vae_ext.training import _engine, _graph, _products
from pyro_vae_ext.training.compile import CompiledSVI, compile

WIDTH, LATENT, ROWS = 5, 3, 7
Pair = tuple[Callable[..., Any], Callable[..., Any], nn.Module]

pytestmark = pytest.mark.usefixtures("exact")


def batches(*rows: int) -> list[tuple]:
    generator = torch.Generator().manual_seed(1)
    device = torch.get_default_device()
    draws = [torch.rand(n, WIDTH, generator=generator, device="cpu") for n in rows]
    return [((draw < 0.4).to(device, torch.get_default_dtype()),) for draw in draws]


def networks(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 6), *layers, nn.Tanh())


def vae(name: str = "MeanField", layers: Callable[[], list] = list, **options: Any) -> Pair:
    """A small VAE; ``layers`` makes what stands within its encoder."""
    torch.manual_seed(5)
    encoder = networks(*layers())
    posterior = family(name, latent_dim=LATENT, context_dim=6, **options)
    decoder = nn.Linear(LATENT, WIDTH)
    # Its own validation reads values.
    prior = dist.Normal(torch.zeros(LATENT), torch.ones(LATENT), validate_args=True).to_event(1)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", 21, subsample_size=len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("posterior", posterior)
        with pyro.plate("data", 21, subsample_size=len(x)):
            posterior("z", encoder(x))

    return model, guide, nn.ModuleList([encoder, posterior, decoder])


def binary(elbo: Any) -> Pair:
    """A belief net with discrete latents."""
    torch.manual_seed(5)
    encoder, decoder = nn.Linear(WIDTH, LATENT), nn.Linear(LATENT, WIDTH)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(logits=torch.zeros(LATENT)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(b)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=encoder(x)).to_event(1))

    guide = elbo.tunable(guide) if hasattr(elbo, "tunable") else guide
    return model, guide, nn.ModuleList([encoder, decoder])


def run(
    make: Callable[[], tuple[infer.SVI, nn.Module]],
    steps: list[tuple],
    backend: str | None,
    between: Callable[[int, infer.SVI, nn.Module], None] = lambda i, svi, modules: None,
) -> dict[str, Any]:
    """Losses, parameters, buffers, optimiser and random state after some steps."""
    pyro.clear_param_store()
    svi, modules = make()
    if backend is not None:
        svi = compile(svi, backend=backend)
    pyro.set_rng_seed(2)
    losses = []
    for i, arguments in enumerate(steps):
        between(i, svi, modules)
        *args, kwargs = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
        losses.append(float(svi.step(*args, **kwargs)))
    store = pyro.get_param_store()
    return {
        "losses": losses,
        "params": {name: leaf.detach().clone() for name, leaf in store.named_parameters()},
        "buffers": {name: b.clone() for name, b in modules.named_buffers()},
        "state": svi.optim.get_state(),
        "random": torch.get_rng_state(),
        "svi": svi,
    }


def same(ours: dict[str, Any], host: dict[str, Any]) -> None:
    assert ours["losses"] == pytest.approx(host["losses"], rel=1e-10)
    assert ours["params"].keys() == host["params"].keys()
    for part in ("params", "buffers"):
        for name, value in host[part].items():
            torch.testing.assert_close(ours[part][name], value, rtol=1e-9, atol=1e-9)
    assert torch.equal(ours["random"], host["random"])
    assert ours["state"].keys() == host["state"].keys()
    for name, value in host["state"].items():
        close(ours["state"][name], value)


def close(ours: Any, host: Any) -> None:
    """State dicts that agree."""
    if isinstance(host, dict):
        assert ours.keys() == host.keys()
        for key in host:
            close(ours[key], host[key])
    elif isinstance(host, list | tuple):
        for one, other in zip(ours, host, strict=True):
            close(one, other)
    elif isinstance(host, Tensor | float):
        torch.testing.assert_close(ours, host, rtol=1e-9, atol=1e-9)
    else:
        assert ours == host


def both(
    make: Callable[[], tuple[infer.SVI, nn.Module]],
    steps: list[tuple],
    between: Callable[[int, infer.SVI, nn.Module], None] = lambda i, svi, modules: None,
    backend: str = "fx",
    graphs: int | None = 1,
) -> CompiledSVI:
    ours = run(make, steps, backend, between)
    same(ours, run(make, steps, None, between))
    assert graphs is None or ours["svi"].num_graphs == graphs
    return ours["svi"]


def adam(**options: Any) -> optim.PyroOptim:
    return optim.Adam({"lr": 0.05, **options})


def svi_of(pair: Pair, elbo: Any = None, optimiser: Any = None) -> tuple[infer.SVI, nn.Module]:
    elbo = ImportanceWeightedELBO(2) if elbo is None else elbo
    return infer.SVI(pair[0], pair[1], optimiser or adam(), elbo), pair[2]


DISCRETE = ("TraceDisARM_ELBO", "TraceNVIL_ELBO", "TraceREBAR_ELBO", "TraceRELAX_ELBO")
OBJECTIVES = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, cases in CASES["elbos"].items()
    for i, case in enumerate(cases)
    if "chunk_size" not in case  # Recomputed particles are below.
]


@pytest.mark.parametrize(("name", "case"), OBJECTIVES)
def test_every_objective(name: str, case: dict[str, Any]) -> None:
    def make() -> tuple[infer.SVI, nn.Module]:
        elbo = getattr(elbos, name)(**case)
        return svi_of(binary(elbo) if name in DISCRETE else vae(), elbo)

    both(make, batches(ROWS) * 4)


@pytest.mark.parametrize("name", ["IAF", "Auxiliary", "VGP"])
@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
def test_every_family(name: str, gradient: str) -> None:
    options = {"VGP": {"num_inducing": 4}, "Auxiliary": {"aux_dim": 2}}.get(name, {})

    def make() -> tuple[infer.SVI, nn.Module]:
        return svi_of(vae(name, **options), ImportanceWeightedELBO(3, gradient=gradient))

    both(make, batches(ROWS) * 4)


HOSTS = {
    "Trace_ELBO": lambda: infer.Trace_ELBO(),
    "Trace_ELBO looped": lambda: infer.Trace_ELBO(num_particles=2),
    "TraceMeanField_ELBO": lambda: infer.TraceMeanField_ELBO(),
    "TraceGraph_ELBO": lambda: infer.TraceGraph_ELBO(),
    "TraceEnum_ELBO": lambda: infer.TraceEnum_ELBO(
        max_plate_nesting=1, strict_enumeration_warning=False
    ),
    "RenyiELBO": lambda: infer.RenyiELBO(alpha=0.5, num_particles=2),
}
UNTRACEABLE = {"TraceEnum_ELBO": "util.py, line", "RenyiELBO": "renyi_elbo.py, line"}


@pytest.mark.parametrize("name", HOSTS)
def test_host_objectives(name: str) -> None:
    """Those that branch on values run eagerly, and say so once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi = both(lambda: svi_of(vae(), HOSTS[name]()), batches(ROWS) * 4, graphs=None)
    said = [str(w.message) for w in caught if "Expected a step" in str(w.message)]
    assert svi.num_graphs == (0 if name in UNTRACEABLE else 1)
    assert len(said) == (name in UNTRACEABLE)
    assert not said or UNTRACEABLE[name] in said[0]


@pytest.mark.parametrize("num_particles", [1, 5])
def test_inductor(num_particles: int) -> None:
    """The C++ of inductor draws the host's numbers; buffers and dropout included."""

    def make() -> tuple[infer.SVI, nn.Module]:
        layers = [nn.BatchNorm1d(6), nn.Dropout(0.3)] if num_particles == 1 else []
        pair, elbo = vae(layers=lambda: layers), ImportanceWeightedELBO(num_particles)
        # Adam would make much of the rounding of gradients that are zero before a BatchNorm.
        return svi_of(pair, elbo, optim.SGD({"lr": 0.01}) if layers else adam())

    svi = both(make, batches(ROWS) * 5, backend="inductor")
    assert svi.engine.backend == "inductor"


def test_draws_in_order_under_inductor() -> None:
    """Draws of several kinds, some of them used by nothing, come in the host's order."""
    loc = nn.Parameter(torch.zeros(4))

    def model() -> None:
        torch.rand(3)
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("b", dist.Bernoulli(logits=z).to_event(1), obs=torch.ones(4))

    def guide() -> None:
        a = pyro.param("a", loc)
        dist.Bernoulli(a.sigmoid()).sample()
        scale = 1 + torch.rand(4) + torch.empty(4).exponential_() + torch.randperm(4)
        pyro.sample("z", dist.Normal(a, scale).to_event(1))
        torch.randn(5)

    def make() -> tuple[infer.SVI, nn.Module]:
        with torch.no_grad():
            loc.zero_()
        return infer.SVI(model, guide, adam(), ImportanceWeightedELBO(1)), nn.Module()

    svi = both(make, [({},)] * 4, backend="inductor")
    assert svi.engine.backend == "inductor"


def test_ragged_batch_is_a_graph_of_its_own() -> None:
    both(lambda: svi_of(vae()), batches(ROWS, ROWS, 4, ROWS, ROWS, 4, ROWS), graphs=2)


def test_buffers_dropout_and_modes() -> None:
    """Running statistics move on at every step; train() and eval() are other graphs."""

    def between(i: int, svi: infer.SVI, modules: nn.Module) -> None:
        modules.train(i not in (3, 4))

    layers = [nn.BatchNorm1d, lambda width: nn.Dropout(0.3)]
    both(
        lambda: svi_of(vae(layers=lambda: [layer(6) for layer in layers])),
        batches(*[ROWS] * 7),
        between,
        graphs=2,
    )


def test_keywords_containers_and_tensor_weights() -> None:
    """A weight that changes is a tensor: one graph; so are nested arguments."""

    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()

        def weight(data: dict[str, Any], *, beta: Tensor, name: str) -> Tensor:
            return beta

        def unpacked(program: Callable[..., Any]) -> Callable[..., Any]:
            return lambda data, *, beta, name: program(data["x"][0])

        pair = [handlers.kl_weight(unpacked(fn), weight=weight) for fn in (model, guide)]
        return svi_of((pair[0], pair[1], modules), ImportanceWeightedELBO(1))

    steps = [
        ({"x": [x]}, {"beta": torch.tensor(0.2 * i), "name": "a"})
        for i, (x,) in enumerate(batches(*[ROWS] * 5))
    ]
    both(make, steps)


def test_parameters_of_the_programs() -> None:
    """Lazy parameters with random starts, constrained ones, and one that is used by nothing."""

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.rand(WIDTH), constraint=constraints.positive)
        pyro.param("idle", torch.ones(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(WIDTH), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.randn(WIDTH))
        scale = pyro.param("s", torch.full((WIDTH,), 0.5), constraint=constraints.interval(0, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    both(lambda: svi_of((model, guide, nn.Module())), batches(ROWS) * 5)


def test_a_parameter_with_two_names() -> None:
    """It is updated once."""

    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()

        def named(x: Tensor) -> None:
            pyro.module("again", modules[2])
            model(x)

        return svi_of((named, guide, modules))

    both(make, batches(*[ROWS] * 4))


def test_untraceable_step_warns_once() -> None:
    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()

        def branching(x: Tensor) -> None:
            model(x if x.sum() > 1 else 1 - x)

        return svi_of((branching, guide, modules))

    with pytest.warns(
        UserWarning, match="one graph; got a tensor's value.*test_compile.py"
    ) as seen:
        svi = both(make, batches(*[ROWS] * 5), graphs=0)
    assert len(seen) == 1
    assert "Steps run eagerly." in str(seen[0].message)
    svi.reset()
    with pytest.warns(UserWarning, match="Expected a step that traces into one graph"):
        svi.step(*batches(ROWS)[0])


READS = {
    "buffer": lambda x, outside: outside.item(),
    "mask": lambda x, outside: x[x > 0.5].sum(),
    "numpy": lambda x, outside: float(x.numpy().sum()),
    "list": lambda x, outside: x.tolist()[0][0],
    "python": lambda x, outside: random.random(),
    "numpy draw": lambda x, outside: np.random.rand(),
    "nonzero": lambda x, outside: x.nonzero().sum(),
}


@pytest.mark.parametrize("name", READS)
def test_what_would_be_frozen_is_refused(name: str) -> None:
    """Values that Python takes out of tensors, or draws itself, never go stale silently."""
    outside = torch.tensor(2.0)

    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()

        def reading(x: Tensor) -> None:
            with pyro.poutine.scale(scale=1.0 + abs(READS[name](x, outside))):
                model(x)

        return svi_of((reading, guide, modules), infer.Trace_ELBO())

    random.seed(1)
    with pytest.warns(UserWarning, match="Expected a step that traces into one graph"):
        ours = run(make, batches(*[ROWS] * 4), "fx")
    pyro.set_rng_seed(2)
    random.seed(1)
    same(ours, run(make, batches(*[ROWS] * 4), None))


class _Carry(nn.Module):
    """State that is another tensor after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, h: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h - self.mean


def test_state_that_is_replaced_is_refused() -> None:
    """A graph would read the same tensor forever."""

    def make() -> tuple[infer.SVI, nn.Module]:
        return svi_of(vae(layers=lambda: [_Carry()]), infer.Trace_ELBO())

    with pytest.warns(UserWarning, match="put another in the place of; write it in place") as seen:
        both(make, batches(*[ROWS] * 6), graphs=0)
    assert len(seen) == 1


def test_state_outside_of_modules_is_refused_as_well() -> None:
    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()
        state = {"mean": torch.zeros(WIDTH)}

        def carrying(x: Tensor) -> None:
            state["mean"] = 0.5 * state["mean"] + 0.1 * x.mean(0)
            guide(x - state["mean"])

        return svi_of((model, carrying, modules), infer.Trace_ELBO())

    with pytest.warns(UserWarning, match="put another in the place of; write it in place"):
        assert run(make, batches(*[ROWS] * 6), "fx")["svi"].num_graphs == 0


def test_tensors_made_at_first_use() -> None:
    """They are waited for."""

    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()
        cache: list[Tensor] = []

        def caching(x: Tensor) -> None:
            if "decoder$$$bias" in pyro.get_param_store() and not cache:
                cache.append(torch.arange(WIDTH) < 3.0)
            guide(x * cache[0] if cache else x)

        return svi_of((model, caching, modules), infer.Trace_ELBO())

    both(make, batches(*[ROWS] * 6))


def test_parameters_that_are_replaced_are_refused() -> None:
    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()

        def replacing(x: Tensor) -> None:
            scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
            pyro.get_param_store()["scale"] = 0.9 * scale.detach()
            with pyro.poutine.scale(scale=scale):
                model(x)

        return svi_of((replacing, guide, modules), infer.Trace_ELBO())

    with pytest.warns(UserWarning, match="got a parameter that the programs replace"):
        both(make, batches(*[ROWS] * 5), graphs=0)


def test_recomputed_draws_are_refused() -> None:
    elbo = ImportanceWeightedELBO
    with pytest.warns(UserWarning, match="random numbers that are set back within the step"):
        both(lambda: svi_of(vae(), elbo(4, chunk_size=2)), batches(ROWS) * 4, graphs=0)


def test_outside_tensors_are_inputs() -> None:
    """Data that the programs close over is not frozen; an argument may be the same tensor."""
    (data,) = batches(ROWS)[0]

    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()
        data.copy_(batches(ROWS)[0][0])
        return svi_of((lambda x: model(0.5 * (x + data)), guide, modules), infer.Trace_ELBO())

    def between(i: int, svi: infer.SVI, modules: nn.Module) -> None:
        if i == 4:
            data.mul_(0.5)

    steps = [(data,), (data,), (1 - data,), (1 - data,), (data,)]
    with pyro.validation_enabled(False):
        both(make, steps, between)


def test_numbers_that_change() -> None:
    """Each number is a graph; from the fourth on new ones run eagerly, with one warning."""

    def make() -> tuple[infer.SVI, nn.Module]:
        model, guide, modules = vae()

        def weighted(x: Tensor, step: int, flag: bool = True) -> None:
            with pyro.poutine.scale(scale=1.0 + step):
                model(x)

        return svi_of((weighted, lambda x, step, flag=True: guide(x), modules), infer.Trace_ELBO())

    steps = [(x, i) for i, (x,) in enumerate(batches(*[ROWS] * 7))]
    with pytest.warns(UserWarning, match=r"got 4 values of 'step'.*as tensors") as seen:
        both(make, [*steps, *steps], graphs=3)
    assert len(seen) == 1


def test_numbers_of_the_objective() -> None:
    def make() -> tuple[infer.SVI, nn.Module]:
        elbo = elbos.TraceREBAR_ELBO(learn=False)
        svi, modules = svi_of(binary(elbo), elbo)
        modules.elbo = (elbo,)
        return svi, modules

    def between(i: int, svi: infer.SVI, modules: nn.Module) -> None:
        modules.elbo[0].temperature = 0.5 if i < 4 else 0.3

    both(make, batches(*[ROWS] * 6), between, graphs=2)


def test_no_more_than_so_many_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "MAX_GRAPHS", 3)
    with pytest.warns(UserWarning, match="got more than 3 kinds of arguments") as seen:
        both(lambda: svi_of(vae()), batches(*range(1, 7), 2), graphs=3)
    assert len(seen) == 1


def test_cleared_and_replaced_parameters() -> None:
    """A store that was cleared, or a parameter that was frozen, is seen at once."""

    def between(i: int, svi: infer.SVI, modules: nn.Module) -> None:
        if i == 3:
            pyro.clear_param_store()
        if i == 6:
            modules[2].bias.requires_grad_(False)

    model, guide, modules = vae()
    modules.eval()

    def make() -> tuple[infer.SVI, nn.Module]:
        modules.load_state_dict(state)
        modules[2].bias.requires_grad_()
        return svi_of((model, guide, modules))

    state = {name: value.clone() for name, value in modules.state_dict().items()}
    both(make, batches(*[ROWS] * 9), between, graphs=1)


def test_loaded_parameters() -> None:
    """Values that are loaded are those of the next step."""

    def between(i: int, svi: infer.SVI, modules: nn.Module) -> None:
        if i == 3:
            modules.load_state_dict({n: 0.5 * v for n, v in modules.state_dict().items()})

    both(lambda: svi_of(vae()), batches(*[ROWS] * 6), between)


OPTIMISERS: dict[str, Callable[[], optim.PyroOptim]] = {
    "Adam": adam,
    "amsgrad": lambda: adam(amsgrad=True, weight_decay=0.1),
    "foreach": lambda: adam(foreach=True),
    "AdamW": lambda: optim.AdamW({"lr": 0.05}),
    "Adagrad": lambda: optim.Adagrad({"lr": 0.05}),
    "SGD": lambda: optim.SGD({"lr": 0.01}),
    "momentum": lambda: optim.SGD({"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "RMSprop": lambda: optim.RMSprop({"lr": 0.01}),
    "ClippedAdam": lambda: optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 0.5}),
    "per parameter": lambda: optim.Adam(lambda name: {"lr": 0.05 if "weight" in name else 0.01}),
    "clip norm": lambda: optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
    "clip value": lambda: optim.Adam({"lr": 0.05}, {"clip_value": 0.1}),
    "schedule": lambda: optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.8}
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(name: str) -> None:
    """The merged update, with host's steps before, amid and after compiled ones."""

    def between(i: int, svi: infer.SVI, modules: nn.Module) -> None:
        if i and name == "schedule":
            svi.optim.step()
        if i == 3:
            for leaf, own in svi.optim.optim_objs.items():
                own = getattr(own, "optimizer", own)
                own.param_groups[0]["lr"] *= 0.5 if leaf.dim() > 1 else 0.3
        if i == 4:
            x = batches(ROWS)[0]
            infer.SVI.step(svi, *x)

    svi = both(lambda: svi_of(vae(), optimiser=OPTIMISERS[name]()), batches(*[ROWS] * 6), between)
    (update,) = svi.engine._updates.values()
    assert bool(update._alone) == (name == "ClippedAdam")


def test_saved_and_loaded_optimiser(tmp_path: Any) -> None:
    """State that the host loads is that of the next compiled step."""

    def between(i: int, svi: infer.SVI, modules: nn.Module) -> None:
        if i == 3:
            svi.optim.save(str(tmp_path / "state"))
        if i == 5:
            state = torch.load(tmp_path / "state", weights_only=False)
            for leaf, own in svi.optim.optim_objs.items():
                own.load_state_dict(state[pyro.get_param_store().param_name(leaf)])
        if i == 7:
            svi.optim.optim_objs.clear()
            svi.optim.load(str(tmp_path / "state"))

    both(lambda: svi_of(vae()), batches(*[ROWS] * 9), between)


def test_handlers_around_a_step() -> None:
    """Under a handler, or without gradients, a step is the host's."""
    svi = compile(svi_of(vae())[0], backend="fx")
    (x,) = batches(ROWS)[0]
    for _ in range(3):
        svi.step(x)
    with pyro.poutine.mask(mask=False):
        assert svi.step(x) == 0.0
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    with torch.no_grad():
        assert svi.step(x) > 0.0
    for name, leaf in pyro.get_param_store().named_parameters():
        assert torch.equal(leaf, before[name])
    assert svi.num_graphs == 1


def test_a_drop_in() -> None:
    svi, _ = svi_of(vae())
    compiled = compile(svi, backend="fx")
    assert isinstance(compiled, infer.SVI)
    assert (compiled.model, compiled.guide, compiled.optim) == (svi.model, svi.guide, svi.optim)
    (x,) = batches(ROWS)[0]
    losses = [compiled.step(x) for _ in range(3)]
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)
    assert all(leaf.grad is None for _, leaf in pyro.get_param_store().named_parameters())
    state = pyro.util.get_rng_state()
    ours = compiled.evaluate_loss(x)
    pyro.util.set_rng_state(state)
    assert isinstance(ours, float) and ours == svi.evaluate_loss(x)
    compiled.reset()
    assert compiled.num_graphs == 0


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is replayed, and the warning names the cause."""

    def lower(*args: Any) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(_engine, "lower", lower)
    with pytest.warns(UserWarning, match="got RuntimeError: no C.. compiler found") as seen:
        both(lambda: svi_of(vae()), batches(ROWS, ROWS, ROWS, 4, 4), backend="inductor", graphs=2)
    assert len(seen) == 1


class _Device:
    """What a CUDA graph does, on the CPU: outputs of the recorded call stay where they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))
        monkeypatch.setattr(_engine, "can_capture", lambda graph, tensors: True)
        monkeypatch.setattr(_engine, "trace", self.trace)
        self.recording, self.recorded = False, 0

    def trace(self, *args: Any) -> Any:
        graph = _graph.trace(*args)
        run = graph.run

        def spied(*inputs: Tensor) -> list[Tensor]:
            outputs = run(*inputs)
            if self.recording:
                self.inputs, self.outputs, self.run = inputs, outputs, run
            return outputs

        graph.run = spied
        return graph

    @contextmanager
    def record(self, graph: Any) -> Iterator[None]:
        self.recording = True
        self.recorded += 1
        yield
        self.recording = False

    def replay(self) -> None:
        for own, new in zip(self.outputs, self.run(*self.inputs), strict=True):
            own.copy_(new)


def test_capture_as_a_device_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments are copied in, parameters read where they are, and warming up is undone."""
    device = _Device(monkeypatch)

    def between(i: int, svi: infer.SVI, modules: nn.Module) -> None:
        if i == 5:
            modules[2].weight.data = modules[2].weight.data.clone()

    layers = [nn.BatchNorm1d, lambda width: nn.Dropout(0.3)]
    both(
        lambda: svi_of(
            vae(layers=lambda: [layer(6) for layer in layers]), optimiser=optim.SGD({"lr": 0.01})
        ),
        batches(*[ROWS] * 7),
        between,
    )
    assert device.recorded == 2


def test_a_wrong_graph_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler's result is checked against the host's step before it is used."""

    def lower(graph: Any, tensors: list[Tensor]) -> Callable[..., Any]:
        return lambda *inputs: [2 * output for output in graph_run(*inputs)]

    def trace(*args: Any) -> Any:
        nonlocal graph_run
        graph = _graph.trace(*args)
        graph_run = graph.run
        return graph

    graph_run: Any = None
    monkeypatch.setattr(_engine, "lower", lower)
    monkeypatch.setattr(_engine, "trace", trace)
    with pytest.warns(UserWarning, match="got another loss or gradient than the host's"):
        both(lambda: svi_of(vae()), batches(ROWS) * 4, backend="inductor")


def test_step_in_two_halves() -> None:
    """What is not finite is seen before anything is updated, and can be undone."""
    svi, modules = svi_of(vae(layers=lambda: [nn.BatchNorm1d(6)]), infer.Trace_ELBO())
    engine = _engine.Engine(svi, backend="fx")
    (x,) = batches(ROWS)[0]
    with pyro.validation_enabled(False):
        for _ in range(3):
            gradients = engine.gradients((x,), {})
            assert gradients.finite and gradients.loss.shape == ()
            engine.update(gradients)
        before = {name: value.clone() for name, value in modules.state_dict().items()}
        gradients = engine.gradients((x * torch.nan,), {})
        assert not gradients.finite
        engine.discard(gradients)
    for name, value in modules.state_dict().items():
        assert torch.equal(value, before[name])
    assert engine.num_graphs == 1


def test_a_loss_that_is_not_finite_is_seen_without_its_gradient() -> None:
    model, guide, modules = vae()

    def divided(x: Tensor) -> None:
        model(x)
        pyro.factor("f", 1 / x.sum())

    engine = _engine.Engine(svi_of((divided, guide, modules), infer.Trace_ELBO())[0], backend="fx")
    (x,) = batches(ROWS)[0]
    found = [bool(engine.gradients((y,), {}).finite) for y in (x, x, x, 0 * x, x)]
    assert found == [True, True, True, False, True]
    assert engine.num_graphs == 1


def test_errors() -> None:
    svi, _ = svi_of(vae())
    with pytest.raises(TypeError, match="Expected svi to be an SVI; got function."):
        compile(vae)
    with pytest.raises(ValueError, match="Expected backend to be 'inductor' or 'fx'; got 'x'."):
        compile(svi, backend="x")
    wake = infer.ReweightedWakeSleep(num_particles=2, vectorize_particles=False)
    with pytest.raises(ValueError, match="Expected an objective with one loss; got 2."):
        compile(svi_of(binary(wake), wake)[0]).step(*batches(ROWS)[0])
    with pytest.warns(UserWarning, match="got an argument of type ndarray"):
        _refused(np.zeros(2))
    with pytest.warns(UserWarning, match="got an argument that requires a gradient"):
        _refused(torch.zeros(2, requires_grad=True))


def _refused(extra: Any) -> None:
    model, guide, modules = vae()
    pair = (lambda x, extra: model(x)), (lambda x, extra: guide(x)), modules
    svi = compile(svi_of(pair)[0], backend="fx")
    (x,) = batches(ROWS)[0]
    for _ in range(3):
        svi.step(x, extra)
    assert svi.num_graphs == 0


def products(dtype: torch.dtype, rows: int) -> tuple[Any, list[Tensor]]:
    x, w = torch.randn(rows, 200, dtype=dtype), torch.randn(100, 200, dtype=dtype)
    b, c = torch.randn(100, dtype=dtype), torch.randn(rows, 100, dtype=dtype)

    def fn(x: Tensor, w: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        # A bias, a matrix that is added, none.
        return [torch.addmm(b, x, w.t()), torch.addmm(c, x, w.t()), (x @ w.t()).t() @ x]

    return fn, [x, w, b, c]


@pytest.mark.skipif(not _products.available(), reason="torch was built without oneDNN")
def test_large_products_are_those_of_the_graph() -> None:
    """In float32, from a size on; not where a matrix is added."""
    for dtype, rows, expected in (
        (torch.float32, 400, 3),
        (torch.float32, 20, 0),
        (torch.float64, 400, 0),
    ):
        fn, inputs = products(dtype, rows)
        gm = make_fx(fn)(*inputs)
        assert _products.reroute(gm) == expected
        for ours, theirs in zip(gm(*inputs), fn(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch, of itself
@pytest.mark.skipif(not _products.available(), reason="torch was built without oneDNN")
def test_compiled_step_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forward and of the backward pass; the compiler itself is left out here."""
    from torch._inductor import compile_fx

    handed: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **_: handed.append(gm) or gm)
    monkeypatch.setattr(_products, "LARGE", 0)
    torch.set_default_dtype(torch.float32)  # a fixture puts back what it was
    compiled = compile(svi_of(vae())[0])
    # The first one makes the parameters.
    loss = [compiled.step(*batches(ROWS)[0]) for _ in range(2)][-1]
    assert torch.isfinite(loss) and compiled.num_graphs == 1
    names = [str(node.target) for node in handed[0].graph.nodes]
    assert sum("pyro_vae_ext.linear" in name for name in names) > 8
    assert not any("aten.mm" in name or "aten.addmm" in name for name in names)
