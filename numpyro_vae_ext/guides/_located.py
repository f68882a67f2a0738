r"""Where the draws of a family are put: a trained affine step, and a fixed Normal to start from.

The step, :math:`w = l + s \odot z`, is the last one of the family's own law. A handler gives it to
the site that the family is called for, so that any family has it: the host records :math:`w` under
the law with the step, the family goes on with :math:`z`. A reverse model of a family hence reads
the standardised value, and path gradients know the step's parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from numpyro.distributions import constraints
from numpyro.primitives import Messenger

from numpyro_vae_ext.guides._flow import MaskedFlow


class Step(NamedTuple):
    r"""The affine step :math:`w = l + s \odot z`; both vectors, ``(latent_dim,)``."""

    loc: jax.Array
    log_scale: jax.Array

    def forward(self, value: jax.Array) -> jax.Array:
        """The value after the step."""
        return self.loc + jnp.exp(self.log_scale) * value

    def inverse(self, value: jax.Array) -> jax.Array:
        """The value before the step."""
        return (value - self.loc) * jnp.exp(-self.log_scale)


class SteppedDraw(NamedTuple):
    """What a sample's value before the step carries."""

    inner: Any

    def path(self) -> SteppedDraw | None:
        """The draw for a score at the fixed value; None where the usual formula has it."""
        kept = self.inner.path() if hasattr(self.inner, "path") else None
        return None if kept is None else SteppedDraw(kept)


class SteppedDistribution(dist.Distribution):
    """The law of a step's value, whose samples carry what those before the step do."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    pytree_data_fields = ("inner", "step")

    def __init__(self, inner: dist.Distribution, step: Step) -> None:
        self.inner = inner
        self.step = step
        super().__init__(inner.batch_shape, inner.event_shape)

    @property
    def has_rsample(self) -> bool:
        """Whether the law before the step has a reparameterised sampler."""
        return self.inner.has_rsample

    def expand(self, batch_shape: Any) -> SteppedDistribution:
        """The same law over a wider batch."""
        return SteppedDistribution(self.inner.expand(batch_shape), self.step)

    def mask(self, mask: Any) -> MaskedFlow:
        """The law with some rows left out of its log-density."""
        return MaskedFlow(self, mask)

    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Samples of shape ``(*sample_shape, *batch_shape, latent_dim)``."""
        return self.sample_with_intermediates(key, sample_shape)[0]

    def sample_with_intermediates(
        self, key: jax.Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[jax.Array, SteppedDraw]:
        """Samples, and what they carry."""
        value, draw = self.inner.sample_with_intermediates(key, sample_shape)
        return self.step.forward(value), SteppedDraw(draw)

    def log_prob(self, value: jax.Array, intermediates: SteppedDraw | None = None) -> jax.Array:
        """Log-density of shape ``(*batch,)``."""
        before = self.step.inverse(value)
        given = [intermediates.inner] if intermediates and intermediates.inner else []
        return self.inner.log_prob(before, *given) - self.step.log_scale.sum()


class Stepped(Messenger):
    """Gives the site called ``name`` a step; what runs inside goes on with the value before it.

    Attributes:
        value: The value of the site, once it has been run.
    """

    def __init__(self, name: str, step: Step) -> None:
        super().__init__()
        self.name = name
        self.step = step
        self.value: Any = None

    def process_message(self, msg: Any) -> None:
        """Put the step into the law of the site."""
        if msg["type"] == "sample" and msg["name"] == self.name:
            msg["fn"] = SteppedDistribution(msg["fn"], self.step)

    def postprocess_message(self, msg: Any) -> None:
        """Hand the value before the step inwards; handlers outside have the value itself."""
        if msg["type"] == "sample" and msg["name"] == self.name:
            self.value = msg["value"]
            msg["value"] = self.step.inverse(self.value)


def drawn_through(family: Any, name: str, step: Step | None, infer: Any) -> jax.Array:
    """The family's draw at the site ``name``, after the step if there is one."""
    if step is None:
        return family(name, infer=infer)
    stepped = Stepped(name, step)
    with stepped:
        family(name, infer=infer)
    if stepped.value is None:
        raise ValueError(
            f"Expected the family to sample the site '{name}' that it is called for; got no such "
            "site. Pass the name on to the sample statement of its latent vector."
        )
    return stepped.value


class Place(NamedTuple):
    """A Normal that a guide's vector starts from: its mean, and its Cholesky factor if given."""

    loc: jax.Array
    scale_tril: jax.Array | None

    def vector(self, value: jax.Array) -> jax.Array:
        r""":math:`u = m + A w`, neither of the two trained."""
        loc = lax.stop_gradient(self.loc)
        if self.scale_tril is None:
            return loc + value
        # In full precision also where a device's default is less: A is known by its log-det.
        scale = lax.stop_gradient(self.scale_tril)
        return loc + jnp.matmul(scale, value, precision=lax.Precision.HIGHEST)

    def composed(self, step: Step | None) -> tuple[jax.Array, jax.Array]:
        """Location and scale, a vector or lower triangular, of what is before the step."""
        loc = jnp.zeros_like(self.loc) if step is None else step.loc
        scale = jnp.ones_like(self.loc) if step is None else jnp.exp(step.log_scale)
        if self.scale_tril is None:
            return self.loc + loc, scale
        return self.loc + self.scale_tril @ loc, self.scale_tril * scale


def checked_start(start: Any, shapes: dict[str, tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Location and Cholesky factor of a start, for these sites with unconstrained shapes."""
    check_attributes(start)
    fault = _fault({name: tuple(shape) for name, shape in start.sites.items()}, shapes)
    if fault:
        raise ValueError(
            f"Expected start to be of this model; got {fault}. Pass what training.pathfinder "
            "returns for the same model and arguments."
        )
    loc, scale = np.asarray(start.loc), np.asarray(start.scale_tril)
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    if loc.shape != (size,) or not np.isfinite(loc).all():
        raise ValueError(
            f"Expected start.loc to be {size} finite numbers; got shape {loc.shape}, "
            f"{int((~np.isfinite(loc)).sum())} of them not finite."
        )
    lower = scale.shape == (size, size) and np.isfinite(scale).all() and not np.triu(scale, 1).any()
    if not lower or not (np.diagonal(scale) > 0).all():
        raise ValueError(
            f"Expected start.scale_tril to be a lower triangular matrix of shape {(size, size)} "
            f"with a positive diagonal; got shape {scale.shape} and other numbers. Pass the "
            "Cholesky factor of a covariance."
        )
    return loc, scale


def check_attributes(start: Any) -> None:
    """Refuse what is no start."""
    if not all(hasattr(start, name) for name in ("loc", "scale_tril", "sites")):
        raise TypeError(
            "Expected start with the attributes loc, scale_tril and sites; got "
            f"{type(start).__name__}. Pass what training.pathfinder returns."
        )


def _fault(given: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> str:
    """What tells the sites of a start from those of a model; nothing if they are the same."""
    for name, shape in shapes.items():
        if name not in given:
            return f"no site '{name}'"
        if given[name] != shape:
            return f"site '{name}' of unconstrained shape {given[name]} instead of {shape}"
    for name in given:
        if name not in shapes:
            return f"a site '{name}', which the model does not have"
    wrong = [new for new, old in zip(given, shapes, strict=True) if new != old]
    return f"site '{wrong[0]}' in another place of the vector" if wrong else ""


class Start(NamedTuple):
    """A Normal over the unconstrained vector of some sites, as :func:`checked_start` reads it."""

    loc: np.ndarray
    scale_tril: np.ndarray
    sites: dict[str, tuple[int, ...]]


def marginal(start: Any, hidden: frozenset[str]) -> Start:
    """The marginal of a start without the sites in ``hidden``."""
    sizes = [int(np.prod(shape)) for shape in start.sites.values()]
    kept = np.repeat([name not in hidden for name in start.sites], sizes)
    loc, scale = np.asarray(start.loc), np.asarray(start.scale_tril)
    sites = {name: shape for name, shape in start.sites.items() if name not in hidden}
    if loc.shape != kept.shape or scale.shape != 2 * kept.shape:
        return Start(loc, scale, sites)
    # The rows' own triangle: L L^T is the block of the covariance.
    rows = scale[kept]
    triangle = np.asarray(np.linalg.qr(rows.T, mode="r")).T
    return Start(loc[kept], triangle * np.sign(np.diagonal(triangle)), sites)
