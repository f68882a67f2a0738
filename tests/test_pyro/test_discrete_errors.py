"""Objectives for discrete latents: bad input, parameters of their own, layouts of the pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro import poutine
from pyro.infer import SVI
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae_ext import _relaxation, distributions, elbos
from pyro_vae_ext.elbos import (
    ImportanceWeightedELBO,
    TraceDisARM_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
)

ALL = (TraceREBAR_ELBO, TraceRELAX_ELBO, TraceNVIL_ELBO, TraceDisARM_ELBO)


def says(error: type[Exception], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def one(fn: Callable[[], Any], name: str = "b") -> Callable[[], Any]:
    """A program of one latent site."""
    return lambda: pyro.sample(name, fn())


def bernoulli() -> Any:
    return dist.Bernoulli(logits=torch.zeros(2)).to_event(1)


def normal() -> Any:
    return dist.Normal(torch.zeros(2), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("cls", "kwargs", "text"),
    [
        (TraceREBAR_ELBO, {"num_particles": 0}, "Expected num_particles >= 1; got 0."),
        (TraceREBAR_ELBO, {"temperature": 0.0}, "Expected temperature > 0; got 0.0."),
        (TraceREBAR_ELBO, {"temperature": {"b": -1}}, "Expected temperature > 0; got -1."),
        (TraceRELAX_ELBO, {"temperature": -0.5}, "Expected temperature > 0; got -0.5."),
        (TraceRELAX_ELBO, {"hidden_dims": (0,)}, "Expected hidden_dims >= 1; got 0."),
        (
            TraceNVIL_ELBO,
            {"baselines": ("foo",)},
            "Expected baselines among 'running', 'learned', 'leave_one_out'; got 'foo'.",
        ),
        (
            TraceNVIL_ELBO,
            {"baselines": ("running", "running")},
            "Expected baselines among 'running', 'learned', 'leave_one_out'; got ('running', ",
        ),
        (
            TraceNVIL_ELBO,
            {"baselines": ("leave_one_out",)},
            "Expected num_particles >= 2 for a leave-one-out baseline; got 1.",
        ),
        (TraceNVIL_ELBO, {"decay": 1.0}, "Expected decay in [0, 1); got 1.0."),
        (
            ImportanceWeightedELBO,
            {"gradient": "vimco"},
            "Expected num_particles >= 2 under gradient='vimco'; got 1.",
        ),
    ],
)
def test_options(cls: Callable, kwargs: dict, text: str) -> None:
    says(ValueError, text, lambda: cls(**kwargs))


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (TraceREBAR_ELBO, "vectorize_particles"),
        (TraceREBAR_ELBO, "learn"),
        (TraceNVIL_ELBO, "normalize_variance"),
    ],
)
def test_options_that_are_bools(cls: Callable, name: str) -> None:
    says(TypeError, f"Expected {name} to be a bool; got str.", lambda: cls(**{name: "yes"}))


@pytest.mark.parametrize("looped", [False, True])
def test_discrete_in_one_program_alone(looped: bool) -> None:
    texts = ["got Bernoulli in the guide and Normal in the model. Use the same family"]
    texts += ["got Normal in the guide and Bernoulli in the model. Use the same family"]
    elbos = [cls(2, vectorize_particles=not looped) for cls in ALL]
    elbos.append(ImportanceWeightedELBO(2, gradient="vimco", vectorize_particles=not looped))
    for elbo in elbos:
        for text, (model, guide) in zip(
            texts, [(normal, bernoulli), (bernoulli, normal)], strict=True
        ):
            guide = elbo.tunable(one(guide)) if hasattr(elbo, "tunable") else one(guide)
            prefix = "Expected site 'b' to be discrete in both model and guide; "
            model = one(model)
            says(
                ValueError,
                prefix + text,
                lambda e=elbo, m=model, g=guide: e.differentiable_loss(m, g),
            )


REMEDIES = {
    "Categorical": "Use OneHotCategorical of the package's distributions module, or TraceNVIL_",
    "Poisson": "Marginalise it with the host's TraceEnum_ELBO, or use TraceNVIL_ELBO.",
}
OTHERS = {
    "Categorical": lambda: dist.Categorical(logits=torch.zeros(3)),
    "Poisson": lambda: dist.Poisson(torch.ones(2)).to_event(1),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
@pytest.mark.parametrize("cls", [TraceREBAR_ELBO, TraceRELAX_ELBO])
def test_sites_without_a_relaxation(cls: Any, name: str) -> None:
    elbo, program = cls(), one(OTHERS[name])
    text = (
        f"Expected Bernoulli or one-hot categorical latent sites under {cls.__name__}; got site "
        f"'b' with the distribution {name}. {REMEDIES[name]}"
    )
    for guide in (program, elbo.tunable(program)):
        says(ValueError, text, lambda g=guide: elbo.differentiable_loss(program, g))
    if name == "Poisson":
        # A site of the model has no relaxed density either.
        guide = elbo.tunable(one(bernoulli))
        says(ValueError, text, lambda: elbo.differentiable_loss(program, guide))


def test_antithetic_pairs_are_of_bernoulli_sites() -> None:
    program = one(lambda: dist.OneHotCategorical(logits=torch.zeros(3)))
    text = (
        "Expected Bernoulli latent sites under TraceDisARM_ELBO; got site 'b' with the "
        "distribution OneHotCategorical. Use TraceREBAR_ELBO, or TraceNVIL_ELBO with the "
        "leave-one-out baseline."
    )
    says(ValueError, text, lambda: TraceDisARM_ELBO().differentiable_loss(program, program))


@pytest.mark.parametrize(
    ("elbo", "extra"),
    [
        (TraceREBAR_ELBO(), "Pass that guide to SVI, or use learn=False."),
        (TraceRELAX_ELBO(), "Pass that guide to SVI."),
        (TraceNVIL_ELBO(), "Pass that guide to SVI, or use baselines without state."),
    ],
)
def test_guide_without_its_tuning_parameters(elbo: Any, extra: str) -> None:
    name, program = type(elbo).__name__, one(bernoulli)
    text = (
        f"Expected the guide that {name}.tunable(guide) returns; got site 'b' without its tuning "
        f"parameters. {extra}"
    )
    says(ValueError, text, lambda: elbo.differentiable_loss(program, program))
    # That of another objective will not do, and the value alone asks for none.
    other = TraceRELAX_ELBO() if isinstance(elbo, TraceNVIL_ELBO) else TraceNVIL_ELBO()
    says(ValueError, text, lambda: elbo.differentiable_loss(program, other.tunable(one(bernoulli))))
    assert elbo.loss(program, program) == 0.0


@pytest.mark.parametrize("learn", [False, True])
def test_mapping_without_a_site(learn: bool) -> None:
    program = one(bernoulli)
    for what in ("temperature", "eta"):
        elbo = TraceREBAR_ELBO(learn=learn, **{what: {"a": 0.5}})
        guide = elbo.tunable(program)
        text = (
            f"Expected a {what} for every discrete site; got none for site 'b'. Add it to the "
            "mapping, or pass one number."
        )
        says(ValueError, text, lambda e=elbo, g=guide: e.differentiable_loss(program, g))
    elbo = TraceREBAR_ELBO(temperature={"b": 0.3}, eta={"b": 0.8}, learn=learn)
    elbo.differentiable_loss(program, elbo.tunable(program))


@pytest.mark.parametrize("cls", ALL)
def test_existing_checks_hold(cls: Any) -> None:
    elbo = cls()

    def both() -> None:
        pyro.sample("b", bernoulli())
        pyro.sample("a", normal())

    def wide() -> None:
        with pyro.plate("data", 4):
            pyro.sample("b", dist.Bernoulli(torch.full((3, 4), 0.5)))

    def missing() -> None:
        pyro.sample("b", bernoulli())
        pyro.sample("x", normal(), obs=torch.full((2,), torch.nan))

    cases = [
        (one(bernoulli), both, "got guide site 'a' that the model lacks. Mark it"),
        (both, one(bernoulli), "got model site 'a' that the guide lacks. Add it"),
        (wide, wide, "Expected a log-density over the plates of site 'b' alone; got shape"),
        (missing, one(bernoulli), "Expected observed data without NaN at site 'x'; got NaN."),
    ]
    for model, guide, text in cases:
        guide = elbo.tunable(guide)
        says(ValueError, text, lambda m=model, g=guide: elbo.differentiable_loss(m, g))


@pytest.mark.parametrize("cls", ALL)
def test_no_discrete_site_is_a_warning(cls: Any) -> None:
    """And the plain ELBO goes on."""
    elbo, loc = cls(3), torch.tensor(0.3, requires_grad=True)
    guide = elbo.tunable(one(lambda: dist.Delta(loc), "z"))
    text = f"Expected discrete latent sites under {cls.__name__}; got none. Use the host's Trace_"
    with pytest.warns(UserWarning) as caught:
        loss = elbo.differentiable_loss(one(lambda: dist.Normal(0.0, 1.0), "z"), guide)
    assert text + "ELBO, or ImportanceWeightedELBO." in str(caught[0].message)
    assert torch.allclose(loss, -dist.Normal(0.0, 1.0).log_prob(loc))
    loss.backward()
    assert torch.allclose(loc.grad, loc.detach())


def test_vimco_without_a_discrete_site_is_a_warning() -> None:
    elbo = ImportanceWeightedELBO(2, gradient="vimco")
    program = one(normal)
    with pytest.warns(UserWarning) as caught:
        elbo.differentiable_loss(program, program)
    text = (
        "Expected discrete latent sites under gradient='vimco'; got none. Use gradient='reparam'."
    )
    assert str(caught[0].message) == text


class Pair:
    """Two discrete layers, a continuous site between them, plates, a mask and a scale.

    ``noise`` is that of the continuous site, ``(num_particles, 4)``, in place of the host's.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        mask: bool = True,
        scale: float = 2.0,
        one_hot: bool = True,
    ) -> None:
        self.batch_size, self.scale, self.one_hot = batch_size, scale, one_hot
        self.mask = torch.tensor([[True, mask, True, True]] * 3)
        make = torch.Generator().manual_seed(5)
        shapes = {"p": (2,), "c": (2, 3), "z": (3,), "x": (2,), "q": (2,), "r": (2, 3), "s": (3,)}
        for name in shapes:
            value = torch.randn(shapes[name], generator=make, dtype=torch.float64)
            value = value.to(torch.get_default_dtype())
            shapes[name] = torch.nn.Parameter(value)
        self.parameters = torch.nn.ParameterDict(shapes)
        self.data = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
        self.noise: torch.Tensor | None = None

    def prior(self, name: str) -> torch.Tensor:
        return pyro.param(f"t_{name}", self.parameters[name])

    def second(self, logits: torch.Tensor, one_hot: Callable) -> Any:
        if self.one_hot:
            return one_hot(logits=logits)
        return dist.Bernoulli(logits=logits).to_event(1)

    def model(self) -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=self.prior("p")).to_event(1))
        with poutine.scale(scale=self.scale), pyro.plate("cols", 4, self.batch_size) as i:
            c = pyro.sample("c", self.second(b @ self.prior("c"), distributions.OneHotCategorical))
            z = pyro.sample("z", dist.Normal((c * self.prior("z")).sum(-1), 1.0))
            with pyro.plate("rows", 3, dim=-2), poutine.mask(mask=self.mask[:, i]):
                loc = z + b @ self.prior("x")
                pyro.sample("x", dist.Normal(loc, 1.0), obs=self.data[:, i])

    def guide(self) -> None:
        b = pyro.sample("b", dist.Bernoulli(logits=self.prior("q")).to_event(1))
        with poutine.scale(scale=self.scale), pyro.plate("cols", 4, self.batch_size) as i:
            logits = b @ self.prior("r") + self.data[0, i].unsqueeze(-1)
            c = pyro.sample("c", self.second(logits, dist.OneHotCategorical))
            loc = (c * self.prior("s")).sum(-1)
            fn = dist.Normal(loc, 0.7) if self.noise is None else Given(loc, 0.7, self.noise)
            pyro.sample("z", fn)


class Given(dist.Normal):
    """A Normal of given noise."""

    def __init__(self, loc: Any, scale: Any, noise: torch.Tensor):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = Given(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)
        return new

    def rsample(self, sample_shape: Any = ()) -> torch.Tensor:
        noise = self.noise[..., : self.loc.shape[-1]]
        if self.loc.dim() > 1:
            # (num_slices * num_particles, 1, 4): every slice has the particles' noise.
            noise = noise.unsqueeze(-2).repeat(len(self.loc) // len(noise), 1, 1)
            noise = noise.reshape(self.loc.shape)
        else:
            noise = noise[Given.particle]
        return self.loc + self.scale * noise

    particle = 0


class Noise:
    """Uniform numbers of ``num_particles`` particles, the same however they are asked for."""

    def __init__(self, num_particles: int, num_draws: int) -> None:
        self.num_particles, self.num_draws = num_particles, num_draws
        self.calls = 0
        self.numbers = torch.rand(num_draws, num_particles, 64).clamp(0.01, 0.99)

    def __call__(self, shape: Any, dtype: Any, device: Any) -> torch.Tensor:
        draw, particle = self.calls % self.num_draws, self.calls // self.num_draws
        self.calls += 1
        stacked = len(shape) > 2  # (num_particles, plate, event), against (plate, event)
        Given.particle = particle
        width = 1
        for size in shape[1:] if stacked else shape:
            width *= size
        numbers = self.numbers[draw] if stacked else self.numbers[draw, particle]
        return numbers[..., :width].reshape(shape).to(dtype)


@pytest.fixture
def particles() -> Iterator[None]:
    yield
    Given.particle = 0


LAYOUTS = [
    pytest.param(TraceREBAR_ELBO, {}, 4, id="rebar"),
    pytest.param(TraceREBAR_ELBO, {"learn": False, "eta": 0.7}, 4, id="fixed"),
    pytest.param(TraceRELAX_ELBO, {"hidden_dims": (5,)}, 4, id="relax"),
    pytest.param(
        TraceNVIL_ELBO,
        {"baselines": ("running", "learned", "leave_one_out"), "normalize_variance": True},
        2,
        id="nvil",
    ),
    pytest.param(TraceDisARM_ELBO, {}, 2, id="disarm"),
    pytest.param(ImportanceWeightedELBO, {"gradient": "vimco"}, 2, id="vimco"),
]


@pytest.mark.parametrize(("cls", "kwargs", "draws"), LAYOUTS)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_layouts_agree(
    cls: Any, kwargs: dict, draws: int, batch_size: int | None, monkeypatch: Any, particles: None
) -> None:
    """One pass over all slices of all particles, or one after another: the same numbers."""
    vimco = cls is ImportanceWeightedELBO
    if vimco:
        batch_size = None  # Its plates must enclose every site, or be whole.
    results = []
    noise = Noise(3, draws)
    for vectorized in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(1)
        pair = Pair(
            batch_size,
            mask=False,
            scale=1.0 if vimco else 2.0,
            one_hot=cls is not TraceDisARM_ELBO,
        )
        elbo = cls(3, vectorize_particles=vectorized, **kwargs)
        guide = elbo.tunable(pair.guide) if hasattr(elbo, "tunable") else pair.guide
        if isinstance(guide, torch.nn.Module):
            guide()  # Networks are made here, out of the way of the numbers that follow.
            for parameter in guide.parameters():
                numbers = torch.linspace(0.0, 0.1, parameter.numel())
                parameter.data.add_(numbers.view_as(parameter))
        pair.noise = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
        monkeypatch.setattr(_relaxation, "uniform", noise)
        losses = []
        for _ in range(2):
            # What is left to torch is the subsample.
            torch.manual_seed(2)
            noise.calls = Given.particle = 0
            losses.append(elbo.differentiable_loss(pair.model, guide))
            losses[-1].backward()
        grads = {name: p.grad for name, p in pyro.get_param_store()._params.items()}
        results.append((torch.stack(losses).detach(), grads, guide))
    (loss, grads, guide), (other, others, again) = results
    close = close_as(loss.dtype)
    close(loss, other)
    assert set(grads) == set(others)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    for name, grad in grads.items():
        close(grad, others[name])
    if isinstance(guide, torch.nn.Module):
        for name, value in guide.state_dict().items():
            close(value, again.state_dict()[name])


def close_as(dtype: torch.dtype) -> Callable[[Any, Any], None]:
    rtol, atol = (1e-9, 1e-10) if dtype == torch.float64 else (1e-3, 1e-4)
    return lambda a, b: torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def small(one_hot: bool = False) -> tuple[Callable, Callable, torch.nn.Module]:
    """A belief net of six rows and three bits, or of one of three categories."""
    make = torch.nn.ModuleDict({"encoder": torch.nn.Linear(4, 3), "decoder": torch.nn.Linear(3, 4)})
    data = (torch.rand(6, 4) > 0.5).to(torch.get_default_dtype())

    def latent(logits: torch.Tensor) -> Any:
        if one_hot:
            return dist.OneHotCategorical(logits=logits)
        return dist.Bernoulli(logits=logits).to_event(1)

    def model() -> None:
        pyro.module("decoder", make["decoder"])
        with pyro.plate("data", 6, 4) as i:
            b = pyro.sample("b", latent(torch.zeros(3)))
            pyro.sample("x", dist.Bernoulli(logits=make["decoder"](b)).to_event(1), obs=data[i])

    def guide() -> None:
        pyro.module("encoder", make["encoder"])
        with pyro.plate("data", 6, 4) as i:
            pyro.sample("b", latent(make["encoder"](data[i])))

    return model, guide, make


PARAMETERS = [
    (TraceREBAR_ELBO, {}, {"b_log_temperature", "b_eta"}),
    (
        TraceRELAX_ELBO,
        {"hidden_dims": ()},
        {"b_log_temperature", "b_eta", "b_surrogate$$$0.weight", "b_surrogate$$$0.bias"},
    ),
    (
        TraceNVIL_ELBO,
        {"hidden_dims": ()},
        {"b_baseline_network$$$0.weight", "b_baseline_network$$$0.bias"},
    ),
]


@pytest.mark.parametrize(("cls", "kwargs", "names"), PARAMETERS)
def test_own_parameters_are_saved_and_loaded(
    cls: Any, kwargs: dict, names: set[str], tmp_path: Any
) -> None:
    model, guide, nets = small()
    elbo = cls(**kwargs)
    tuned = elbo.tunable(guide)
    svi = SVI(model, tuned, pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(3):
        svi.step()
    store = pyro.get_param_store()
    own = {name for name in store if name.startswith("b_")}
    assert own == names
    assert set(store) - own == {
        f"{a}coder$$$" + b for a in ("en", "de") for b in ("weight", "bias")
    }
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    buffers = {f"b_baseline.{name}" for name in ("mean", "variance", "count")}
    assert set(state) == {name.replace("$$$", ".") for name in names} | (
        buffers if cls is TraceNVIL_ELBO else set()
    )
    for name in names:
        assert torch.equal(store[name], state[name.replace("$$$", ".")])
        assert not torch.equal(store[name], torch.zeros_like(store[name]))
    if cls is TraceNVIL_ELBO:
        assert state["b_baseline.count"] == 3

    # The store, into a new guide; then a state_dict, into another before its first run.
    store.save(tmp_path / "store")
    pyro.clear_param_store()
    store.load(tmp_path / "store")
    fresh = elbo.tunable(guide)
    fresh()
    pyro.clear_param_store()
    again = elbo.tunable(guide)
    again.load_state_dict(state)
    again()
    for name in names:
        key = name.replace("$$$", ".")
        assert torch.equal(fresh.state_dict()[key], state[key])
        assert torch.equal(again.state_dict()[key], state[key])
        assert torch.equal(store[name], state[key])
    if cls is TraceNVIL_ELBO:
        assert again.state_dict()["b_baseline.count"] == 3
    again.load_state_dict(fresh.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected"):
        again.load_state_dict({**again.state_dict(), "foo.bar": torch.zeros(())})
        again()


def test_guides_that_need_no_parameters() -> None:
    _, guide, _ = small()
    elbos = [TraceDisARM_ELBO(), TraceREBAR_ELBO(learn=False), TraceNVIL_ELBO(baselines=())]
    elbos += [TraceNVIL_ELBO(2, baselines=("leave_one_out",))]
    assert all(elbo.tunable(guide) is guide for elbo in elbos)
    elbo = TraceNVIL_ELBO(2, baselines=("leave_one_out",), normalize_variance=True)
    assert elbo.tunable(guide) is not guide


@pytest.mark.parametrize("cls", [TraceREBAR_ELBO, TraceRELAX_ELBO])
@pytest.mark.parametrize("one_hot", [False, True])
def test_tuning_touches_nothing_else(cls: Any, one_hot: bool, exact: None) -> None:
    """Its derivative is that of the squares at fixed noise, and nobody else gets any of it."""
    model, guide, nets = small(one_hot)
    elbo = cls(3, temperature=0.4, eta=0.8)
    fixed = TraceREBAR_ELBO(3, temperature=0.4, eta=0.8, learn=False)
    squares: list[float] = []
    variance = elbo._variance
    elbo._variance = lambda *args: squares.append(v := variance(*args)) or v
    tuned = elbo.tunable(guide)

    def grads(objective: Any, program: Callable) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        loss = objective.differentiable_loss(model, program)
        for parameter in pyro.get_param_store()._params.values():
            parameter.grad = None
        loss.backward()
        return {n: p.grad for n, p in pyro.get_param_store()._params.items()}

    grads(elbo, tuned)  # Finds the plates, and makes the parameters.
    with_tuning = grads(elbo, tuned)
    without = grads(fixed, guide)
    shared = [name for name in with_tuning if not name.startswith("b_")]
    assert len(shared) == 4
    for name in shared:
        # The default surrogate starts at zero: RELAX is REBAR there.
        torch.testing.assert_close(with_tuning[name], without[name])
    assert all(value is None for name, value in without.items() if name.startswith("b_"))
    own = {name: pyro.get_param_store()._params[name] for name in with_tuning if name[:2] == "b_"}
    for parameter in own.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    slopes = grads(elbo, tuned)
    for name, parameter in own.items():
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -2e-5, 1e-5):
            parameter.data += step * direction
            grads(elbo, tuned)
            values.append(squares[-1].item())
        measured = (values[0] - values[1]) / 2e-5
        assert measured == pytest.approx((slopes[name] * direction).sum().item(), rel=1e-5)


STEPS = [
    *(
        getattr(elbos, name)(**case)
        for name, cases in CASES["elbos"].items()
        if hasattr(getattr(elbos, name), "tunable")
        for case in cases
    ),
    TraceRELAX_ELBO(surrogate=lambda width: Mean(width)),
    ImportanceWeightedELBO(3, gradient="vimco"),
    ImportanceWeightedELBO(3, gradient="vimco", chunk_size=2),
]


class Mean(torch.nn.Module):
    """A surrogate without a dimension for its one number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features * self.weight).mean(-1)


@pytest.mark.parametrize("elbo", STEPS, ids=lambda elbo: type(elbo).__name__)
@pytest.mark.parametrize("dtype_", [torch.float32, torch.float64])
def test_steps_of_svi_and_of_a_module(elbo: Any, dtype_: torch.dtype) -> None:
    """One kept objective: it moves between pairs, dtypes, and the host's two interfaces."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype_)
    try:
        one_hot = not isinstance(elbo, TraceDisARM_ELBO)
        model, guide, nets = small(one_hot)
        tuned = elbo.tunable(guide) if hasattr(elbo, "tunable") else guide
        svi = SVI(model, tuned, pyro.optim.Adam({"lr": 0.05}), elbo)
        start = {name: value.clone() for name, value in nets.named_parameters()}
        assert all(isinstance(svi.step(), float) for _ in range(3))
        assert isinstance(svi.evaluate_loss(), float)
        assert all(not torch.equal(start[n], p) for n, p in nets.named_parameters())
        assert all(p.dtype == dtype_ for p in pyro.get_param_store().values())
        host = elbo(Both(model, nets), tuned if tuned is not guide else Both(guide, nets))
        host().backward()
        found = {name: p.grad for name, p in host.named_parameters()}
        assert all(g is not None and torch.isfinite(g).all() for g in found.values())
        if isinstance(elbo, ImportanceWeightedELBO):
            return
        # Another pair, of more sites and plates.
        pair = Pair(one_hot=one_hot, scale=1.0)
        tuned = elbo.tunable(pair.guide) if hasattr(elbo, "tunable") else pair.guide
        pyro.clear_param_store()
        loss = elbo.differentiable_loss(pair.model, tuned)
        assert loss.dtype == dtype_ and loss.shape == () and torch.isfinite(loss)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in pair.parameters.values())
    finally:
        torch.set_default_dtype(before)


class Both(torch.nn.Module):
    """A program and its networks."""

    def __init__(self, program: Callable, nets: torch.nn.Module) -> None:
        super().__init__()
        self.program, self.nets = program, nets

    def forward(self) -> None:
        self.program()


@pytest.mark.parametrize("elbo", STEPS, ids=lambda elbo: type(elbo).__name__)
def test_a_step_traces_into_one_graph(elbo: Any) -> None:
    """No look at a number on the way: the graph draws afresh, and gives what the step gives."""
    model, guide, _ = small()
    tuned = elbo.tunable(guide) if hasattr(elbo, "tunable") else guide
    with pyro.validation_enabled(False):
        elbo.differentiable_loss(model, tuned)
        parameters = list(pyro.get_param_store()._params.values())

        def step(_: torch.Tensor) -> tuple:
            loss = elbo.differentiable_loss(model, tuned)
            return loss, *torch.autograd.grad(loss, parameters, allow_unused=True)

        graph = make_fx(step)(torch.zeros(()))
        assert not any("local_scalar" in str(node.target) for node in graph.graph.nodes)
        results = []
        for seed, run in ((7, graph), (7, step), (8, graph)):
            torch.manual_seed(seed)
            results.append(run(torch.zeros(())))
    traced, eager, other = results
    assert len(traced) == 1 + len(parameters)
    # Running averages move between the calls; loops and chunks put random numbers back, which a
    # graph need not.
    moves = isinstance(elbo, TraceNVIL_ELBO) or not elbo.vectorize_particles
    if not moves and getattr(elbo, "chunk_size", None) is None:
        for a, b in zip(traced, eager, strict=True):
            torch.testing.assert_close(a, b)
    assert not torch.equal(traced[0], other[0])


@pytest.mark.parametrize("cls", ALL)
def test_without_a_gradient_only_the_hard_values_run(cls: Any) -> None:
    sizes = []

    def model() -> None:
        b = pyro.sample("b", bernoulli())
        sizes.append(b.shape)
        assert ((b == 0) | (b == 1)).all()

    elbo = cls()
    guide = elbo.tunable(one(bernoulli))
    assert elbo.loss(model, guide) == 0.0
    with torch.no_grad():
        assert elbo.differentiable_loss(model, guide) == 0.0
    assert sizes == [(2,), (2,)]
    state = guide.state_dict() if isinstance(guide, torch.nn.Module) else {}
    assert state.get("b_baseline.count", 0) == 0


@pytest.mark.parametrize("vectorized", [True, False])
def test_continuous_sites_share_their_noise(vectorized: bool) -> None:
    """Between slices, not between particles; whatever torch draws it with."""
    seen: dict[str, list[torch.Tensor]] = {}
    skewed = dist.TransformedDistribution(dist.Gumbel(0.0, 1.0), [dist.transforms.ExpTransform()])
    tall = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    fns = {
        "normal": dist.Normal(0.0, 1.0),
        "laplace": dist.Laplace(0.0, 1.0),
        "uniform": dist.Uniform(0.0, 1.0),
        "exponential": dist.Exponential(1.0),
        "cauchy": dist.Cauchy(0.0, 1.0),
        "skewed": skewed,
        "tall": tall,
    }

    def program() -> None:
        for name, fn in fns.items():
            value = pyro.sample(name, fn)
            seen.setdefault(name, []).append(value.detach())
        pyro.sample("b", bernoulli())

    elbo = TraceREBAR_ELBO(2, learn=False, vectorize_particles=vectorized)
    if vectorized:
        elbo.differentiable_loss(program, program)  # Finds the plates.
        seen.clear()
    elbo.differentiable_loss(program, program)
    for values in seen.values():
        if vectorized:
            # Of the guide's run, slice by slice.
            table = values[0].reshape(3, 2, -1)
        else:
            # The guide's and the model's runs in turn, particle by particle.
            table = torch.stack(values[::2]).reshape(2, 3, -1).transpose(0, 1)
        assert torch.equal(table[0], table[1]) and torch.equal(table[0], table[2])
        assert not torch.equal(table[:, 0], table[:, 1])


def test_auxiliary_discrete_site() -> None:
    """A guide-only site has a score as well; of any kind, where no relaxation is needed."""

    def guide(fn: Callable) -> Callable:
        def program() -> None:
            weight = pyro.param("weight", torch.tensor([0.2, -0.4, 0.1]))
            n = pyro.sample("n", fn(weight), infer={"is_auxiliary": True})
            n = n if n.shape[-1:] == (3,) else torch.nn.functional.one_hot(n.long(), 3)
            pyro.sample("b", dist.Bernoulli(logits=(n * weight).sum(-1)))

        return program

    def model() -> None:
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(0.7))

    cases = [(cls(2), lambda w: distributions.OneHotCategorical(logits=w)) for cls in ALL[:3]]
    cases.append((TraceNVIL_ELBO(2), lambda w: dist.Categorical(logits=w)))
    cases.append((TraceNVIL_ELBO(2), lambda w: dist.Binomial(2, logits=w.sum())))
    cases.append(
        (ImportanceWeightedELBO(2, gradient="vimco"), lambda w: dist.Categorical(logits=w))
    )
    for elbo, fn in cases:
        pyro.clear_param_store()
        program = guide(fn)
        tuned = elbo.tunable(program) if hasattr(elbo, "tunable") else program
        elbo.differentiable_loss(model, tuned).backward()
        assert pyro.get_param_store()._params["weight"].grad.abs().sum() > 0


def test_costs_of_nested_plates(exact: None) -> None:
    """Each row of a site has the cost of its own rows, scaled and masked; REINFORCE by hand."""
    a = torch.linspace(-1, 1, 3).requires_grad_()
    b = torch.linspace(-0.5, 1, 6).reshape(2, 3).requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, True]])
    drawn: dict[str, torch.Tensor] = {}

    def model() -> None:
        with pyro.plate("outer", 3, dim=-1), poutine.scale(scale=2.0):
            u = pyro.sample("u", dist.Bernoulli(0.3))
            with pyro.plate("inner", 2, dim=-2), poutine.mask(mask=mask):
                v = pyro.sample("v", dist.Bernoulli(0.2 + 0.5 * u))
                pyro.sample("x", dist.Normal(u + 2 * v, 1.0), obs=torch.ones(2, 3))
        pyro.sample("all", dist.Normal(u.sum(-1), 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        with pyro.plate("outer", 3, dim=-1), poutine.scale(scale=2.0):
            drawn["u"] = pyro.sample("u", dist.Bernoulli(logits=a))
            with pyro.plate("inner", 2, dim=-2), poutine.mask(mask=mask):
                drawn["v"] = pyro.sample("v", dist.Bernoulli(logits=b))

    loss = TraceNVIL_ELBO(baselines=()).differentiable_loss(model, guide)
    loss.backward()
    u, v = drawn["u"], drawn["v"]
    with torch.no_grad():
        prior = 2 * dist.Bernoulli(0.3).log_prob(u)
        own_u = prior - 2 * dist.Bernoulli(logits=a).log_prob(u)
        inner = dist.Bernoulli(0.2 + 0.5 * u).log_prob(v) - dist.Bernoulli(logits=b).log_prob(v)
        inner = 2 * mask * (inner + dist.Normal(u + 2 * v, 1.0).log_prob(torch.ones(2, 3)))
        top = dist.Normal(u.sum(-1), 1.0).log_prob(torch.tensor(0.5))
        cost_u = own_u + inner.sum(0) + top
        cost_v = prior + inner + top
        # What the plates do not hold apart belongs to every row.
        assert torch.allclose(loss, -(own_u.sum() + inner.sum() + top))
        assert torch.allclose(a.grad, -cost_u * (u - torch.sigmoid(a)))
        assert torch.allclose(b.grad, -cost_v * (v - torch.sigmoid(b)))
