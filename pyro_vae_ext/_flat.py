"""A model as the density of one vector of unconstrained numbers.

The vector is that of ``AutoPosterior``: every latent site is unconstrained by ``biject_to`` and
raveled, and the sites follow one another as in the model. What is masked out of a latent site is a
standard Normal in unconstrained space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae_ext import _checks, _masks
from pyro_vae_ext._record import Record, Sites, log_prob

Values = dict[str, Tensor]
# Relative difference of a batch of densities from those of one row after the other.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


class Part(NamedTuple):
    """A latent site and its place in the vector.

    Attributes:
        name: Name of the site.
        shape: Shape of an unconstrained value.
        dtype: Type of a value.
        transform: Bijection onto the support; None if that depends on other sites.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transform: Any


class FlatModel:
    """The joint log-density of a model, with its data, as a function of vectors ``(S, size)``.

    Attributes:
        names: Names of the latent sites, in the order of the vector.
        shapes: Shape of the unconstrained value of every site, in that order.
        size: Unconstrained numbers.
        dtype: Type of the vector.
        device: Device of the vector.
        widest: Numbers of the site that has most.
        batched: Whether the rows of a batch are run at once, by ``torch.func.vmap``. Of a model
            that looks at its numbers they are run one after the other.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple, kwargs: dict, parts: list[Part], like: Tensor
    ) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        self._parts = parts
        self.names = tuple(part.name for part in parts)
        self.shapes = {part.name: part.shape for part in parts}
        self.size = sum(math.prod(part.shape) for part in parts)
        self.dtype, self.device = like.dtype, like.device
        self.widest = 1
        self.batched = False

    def start(self, num_rows: int = 1, radius: float = 2.0) -> Tensor:
        """Vectors ``(num_rows, size)`` of uniform numbers between ``-radius`` and ``radius``."""
        shape = (num_rows, self.size)
        return (2 * torch.rand(shape, dtype=self.dtype, device=self.device) - 1) * radius

    def unpack(self, u: Tensor) -> Values:
        """The unconstrained values of every site, ``(*rows, *shape)``, from ``(*rows, size)``."""
        pieces = u.split([math.prod(part.shape) for part in self._parts], -1)
        return {
            part.name: piece.reshape(u.shape[:-1] + part.shape).to(part.dtype)
            for part, piece in zip(self._parts, pieces, strict=True)
        }

    def constrain(self, u: Tensor) -> Values:
        """The values of every site, on its support, ``(S, *site)``."""
        if all(part.transform is not None for part in self._parts):
            free = self.unpack(u)
            return {part.name: part.transform(free[part.name]) for part in self._parts}
        return self._rows(lambda row: self._run(row)[0], u)

    def log_densities(self, u: Tensor) -> Values:
        """What every site adds to the log-densities ``(S,)``, with its log-determinant."""
        return self._rows(lambda row: self._run(row)[1], u)

    def log_density(self, u: Tensor) -> Tensor:
        """The joint log-densities ``(S,)`` of vectors ``(S, size)``, in their own coordinates."""
        try:
            return self._rows(self._total, u)[""]
        except torch.linalg.LinAlgError:
            # One row's matrix has no factor: it alone has no density.
            if len(u) == 1:
                return u.sum(-1) * math.nan
            half = len(u) // 2
            return torch.cat([self.log_density(u[:half]), self.log_density(u[half:])])

    def gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log-densities ``(S,)`` and their gradients ``(S, size)``."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            value = self.log_density(u)
            (slope,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), slope

    def hessian(self, u: Tensor) -> Tensor:
        """Hessians ``(S, size, size)``."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.log_density(u).sum(), u, create_graph=True)
            rows = [
                torch.autograd.grad(slope[:, i].sum(), u, retain_graph=True, allow_unused=True)[0]
                for i in range(self.size)
            ]
        return torch.stack([torch.zeros_like(u) if row is None else row for row in rows], 1)

    def _run(self, row: Tensor) -> tuple[Values, Values]:
        """Values and log-densities of the sites at one vector."""
        free = self.unpack(row)
        log_dets: Values = {}

        def place(msg: Any) -> Tensor:
            transform = biject_to(msg["fn"].support)
            x = free[msg["name"]]
            value = transform(x)
            log_det = transform.log_abs_det_jacobian(x, value).sum()
            if (hidden := _masks.hidden(msg)) is not None:
                # A density for what is masked out, where that of the model is flat.
                log_det = log_det - hidden.missing(x, value).sum()
            log_dets[msg["name"]] = log_det
            return value

        sites = _recorded(self._model, self._args, self._kwargs, place)
        terms = {}
        for name, site in sites.items():
            term = scale_and_mask(log_prob(site), site["scale"], site["mask"])
            # A tensor in any case: a site that is masked out is a number.
            terms[name] = row.new_zeros(()) + term.sum()
            if name in log_dets:
                terms[name] = terms[name] + log_dets[name]
        return {name: sites[name]["value"] for name in free}, terms

    def _total(self, row: Tensor) -> Values:
        return {"": torch.stack(list(self._run(row)[1].values())).sum()}

    def _rows(self, fn: Callable[[Tensor], Values], u: Tensor) -> Values:
        """A function of one vector at every row."""
        if self.batched:
            return torch.func.vmap(fn, randomness="same")(u)
        found = [fn(row) for row in u]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def _try_batch(self) -> None:
        """Run rows at once if the model allows it, and if it makes no difference."""
        with torch.random.fork_rng(_devices()), torch.no_grad():
            torch.manual_seed(0)
            u = self.start(2)
            one_by_one = self.log_density(u)
            self.batched = True
            try:
                at_once = self.log_density(u)
                slope = self.gradient(u)[1]
            except Exception:  # what a model does under vmap is open
                self.batched = False
                return
        close = torch.isclose(one_by_one, at_once, rtol=TOLERANCE.get(self.dtype, 1e-4), atol=1e-6)
        same = close | ~(one_by_one.isfinite() | at_once.isfinite())
        self.batched = bool(same.all()) and slope.shape == u.shape


def flat_model(
    model: Callable[..., Any], args: tuple, kwargs: dict, owner: str = "pathfinder"
) -> FlatModel:
    """The model at these arguments as a density of one vector.

    What the model draws besides its latent sites is the same at every evaluation.

    Args:
        model: Program of Pyro primitives, without a discrete latent site.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        owner: What an error calls the caller.

    Raises:
        ValueError: If a latent site is discrete or masked and read, if there is none, or if a
            plate is subsampled; the message names the site.
    """
    given = _floats((*args, *kwargs.values()))
    likes: dict[str, Tensor] = {}

    def place(msg: Any) -> Tensor:
        fn = msg["fn"]
        _check_site(msg, owner)
        try:
            like = fn.sample()
        except NotImplementedError:
            like = given.new_zeros(())
        likes[msg["name"]] = like
        transform = biject_to(fn.support)
        return transform(like.new_zeros(transform.inverse_shape(fn.shape())))

    with torch.no_grad():
        sites = _recorded(model, args, kwargs, place)
    if not likes:
        raise ValueError("Expected at least one continuous latent site in the model; got none.")
    _checks.check_data(sites)
    _check_whole(sites, owner)
    if any(_masks.is_masked(sites[name]) for name in likes):
        _masks.check_unread(model, args, kwargs, owner)
    parts = []
    for name, like in likes.items():
        transform = biject_to(sites[name]["fn"].support)
        shape = tuple(transform.inverse_shape(sites[name]["fn"].shape()))
        parts.append(Part(name, shape, like.dtype, transform))
    like = given.new_zeros(())
    for value in likes.values():
        like = value.new_zeros((), dtype=torch.promote_types(like.dtype, value.dtype))
    flat = FlatModel(model, args, kwargs, parts, like)
    flat.widest = max(1, *(site["fn"].shape().numel() for site in sites.values()))
    flat._parts = _static(flat, parts)
    flat._try_batch()
    return flat


def _static(flat: FlatModel, parts: list[Part]) -> list[Part]:
    """The parts, without transforms that are others at another point."""
    again: dict[str, Any] = {}
    free = flat.unpack(torch.full((flat.size,), 0.5, dtype=flat.dtype, device=flat.device))

    def place(msg: Any) -> Tensor:
        again[msg["name"]] = biject_to(msg["fn"].support)
        return again[msg["name"]](free[msg["name"]])

    with torch.no_grad():
        _recorded(flat._model, flat._args, flat._kwargs, place)
    same = {part.name: part.transform == again.get(part.name) for part in parts}
    return [part if same[part.name] else part._replace(transform=None) for part in parts]


def _recorded(
    model: Callable[..., Any], args: tuple, kwargs: dict, place: Callable[[Any], Tensor]
) -> Sites:
    """Sites of one run with the latent ones where ``place`` puts them; leaves no other trace."""
    with (
        poutine.block(),
        torch.random.fork_rng(_devices()),
        # A look at the numbers, as validation has it, cannot be batched.
        pyro.validation_enabled(False),
        Record(sampler=place) as record,
    ):
        torch.manual_seed(0)
        model(*args, **kwargs)
    return record.sites


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def _floats(values: Iterable[Any]) -> Tensor:
    """A tensor of the type and on the device of the floats among some values."""
    found = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    like = found[0] if found else torch.zeros(())
    for value in found:
        like = value if torch.promote_types(value.dtype, like.dtype) != like.dtype else like
    return like


def _check_site(msg: Any, owner: str) -> None:
    """A latent site must have an unconstrained space."""
    fn, name = msg["fn"], msg["name"]
    if fn.support.is_discrete:
        raise ValueError(
            f"Expected continuous latent sites under {owner}; got site '{name}' with the "
            f"distribution {_checks.distribution_name(fn)}. Marginalise it: sum over its values in "
            "the model."
        )


def _check_whole(sites: Sites, owner: str) -> None:
    for name, site in sites.items():
        for frame in site["cond_indep_stack"]:
            full = frame.full_size or frame.size
            if full != frame.size:
                raise ValueError(
                    f"Expected no subsampled plate under {owner}; got site '{name}' in plate "
                    f"'{frame.name}' ({frame.size} of {full} rows). Pass the full data."
                )
