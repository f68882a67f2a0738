"""The variational Gaussian process family."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_vae_ext._checks import check_context, one_of, positive_int, widths
from pyro_vae_ext.guides._base import GuideFamily
from pyro_vae_ext.guides._gaussian_process import Kernel, Process, squared_exponential
from pyro_vae_ext.guides._hierarchy import (
    AUXILIARY,
    built_direct,
    joined,
    reverse_factor,
)
from pyro_vae_ext.guides._normal import CarryingNormal
from pyro_vae_ext.guides._reverse_flow import ReverseFlow
from pyro_vae_ext.guides.mean_field import MeanField
from pyro_vae_ext.nn._scales import head_bounded

_LENGTHSCALE = 1.0  # at the start, in units of a standard Normal's own size
_SCALE = 0.3  # of z around the process at the start, where the process has an output of its own


class VGP(GuideFamily):
    r"""Variational Gaussian process: a random nonlinear map of random inputs.

    .. math::
        \xi \sim N(0, I), \qquad
        f_i(\xi) \sim GP(0, K) \mid \{(s_n, t_{n,i})\}_{n \le m}, \qquad
        z_i \sim N(\mu_i(c) + f_i(\xi),\, \sigma_i(c)^2)

    The variational data :math:`(s, t)` bend the inputs' Normal into any density. The process has
    the identity as its mean function, so that far from the sources the map falls back to
    :math:`\xi`, or with ``mean="zero"`` to 0. The kernel is
    :math:`K(x, y) = \alpha^2\, k(x / \ell, y / \ell)` with a length scale per input (ARD). Process
    and likelihood are Gaussian: with the process's mean :math:`m(\xi)` and variance
    :math:`v(\xi)`, :math:`q(z_i \mid \xi, c) = N(\mu_i + m_i,\, v + \sigma_i^2)` is drawn as one.
    The paper's reverse model :math:`r(\xi \mid z, c)\, r(f \mid \xi, z, c)` has a second factor
    whose optimum is known, :math:`q(f \mid \xi, z, c)`; with it :math:`f` cancels draw by draw,
    and the guide's log-density is

    .. math:: \log q(\xi) + \log q(z \mid \xi, c) - \log r(\xi \mid z, c).

    The sites are ``{name}_xi`` (auxiliary), ``{name}``, and the factor ``{name}_reverse``. It
    starts near the identity: targets are equal to sources.

    The Cholesky factor costs :math:`O(m^3)` once per run of the guide, whatever the number of rows
    and of vectorised particles, and every draw :math:`O(m^2)`; with ``amortize="all"`` each row of
    the context has sources and a factor of its own, :math:`O(m^3)` per row.

    Args:
        latent_dim: Dimension of the latent vector :math:`z`.
        context_dim: Width of the context, or None for a global posterior.
        input_dim: Dimension of the latent input :math:`\xi`; ``latent_dim`` by default.
        num_inducing: Number :math:`m` of variational data.
        sources: First values of :math:`s`, ``(m, input_dim)``; centred standard Normal draws by
            default.
        targets: First values of :math:`t`, ``(m, latent_dim)``; the sources by default.
        kernel: :math:`k`, called with ``(*batch, n, input_dim)`` and ``(*batch, m, input_dim)``
            for ``(*batch, n, m)``; the squared-exponential one by default. The parameters of a
            kernel that is a module are trained as well.
        jitter: White noise of the process, relative to the kernel's diagonal.
        mean: Mean function of the process before it is conditioned: ``"identity"`` (coordinate i
            of :math:`\xi` for output i, 0 for outputs beyond ``input_dim``) or ``"zero"``.
        amortize: What linear heads on the context move: ``"none"`` (the default without a
            context), ``"targets"`` (the default with one), or ``"all"``, which is targets,
            sources and kernel parameters. The location and the scale of :math:`z` and the reverse
            model see the context at any rate.
        reverse_family: Builds :math:`r(\xi \mid z, c)`, ``(latent_dim, context_dim) -> family``,
            which must have a density of its own. By default a masked autoregressive flow of two
            steps without a context, and a mean-field network with one.
        hidden_dims: Widths of the hidden layers of the default reverse model.
        activation: Their activation, ``"elu"``, ``"relu"`` or ``"tanh"``.

    Raises:
        ValueError: If a width or number is not positive, there are not as many targets as
            sources, they have other widths, an option is unknown, something is to be amortised
            without a context; at a call, if the kernel is not positive definite.
        TypeError: If a function builds no family, or one without a density of its own.

    References:
        Tran, Ranganath and Blei, 2016, *The Variational Gaussian Process*, arXiv:1511.06499,
        sec. 2.2 (the process), sec. 3.1 (the reverse model), sec. 3.2 (inference networks).
        Salimbeni and Deisenroth, 2017, *Doubly Stochastic Variational Inference for Deep Gaussian
        Processes*, arXiv:1705.08933 (the mean function).

    Example:
        >>> import torch
        >>> posterior = VGP(latent_dim=3, context_dim=5, num_inducing=20)
        >>> z = posterior("z", torch.zeros(7, 5))
        >>> z.shape, posterior.log_prob(z, torch.zeros(7, 5), num_samples=50).shape
        (torch.Size([7, 3]), torch.Size([7]))
    """

    # Modules and families, which torch's attributes are not typed as.
    base: Any
    reverse: Any

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        *,
        input_dim: int | None = None,
        num_inducing: int = 50,
        sources: Any = None,
        targets: Any = None,
        kernel: Kernel | None = None,
        jitter: float = 1e-4,
        mean: str = "identity",
        amortize: str | None = None,
        reverse_family: Callable[..., Any] | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        activation: str = "elu",
    ) -> None:
        super().__init__(latent_dim, context_dim)
        self.input_dim = latent_dim if input_dim is None else positive_int("input_dim", input_dim)
        default = "none" if context_dim is None else "targets"
        self.amortize = one_of("amortize", amortize or default, ("none", "targets", "all"))
        if context_dim is None and self.amortize != "none":
            raise ValueError(
                f"Expected amortize='none' without a context; got '{amortize}'. Build the family "
                "with the width of the encoder's output as context_dim."
            )
        if not jitter > 0.0:
            raise ValueError(f"Expected jitter > 0; got {jitter}.")
        self.jitter = jitter
        self.mean = one_of("mean", mean, ("identity", "zero"))
        self.kernel = squared_exponential if kernel is None else kernel
        if sources is None:
            shape = (positive_int("num_inducing", num_inducing), self.input_dim)
            sources = torch.randn(shape)
            sources = sources - sources.mean(0)
        sources = _matrix("sources", sources, self.input_dim)
        shared = min(latent_dim, self.input_dim)
        if targets is None:
            targets = nn.functional.pad(sources[:, :shared], (0, latent_dim - shared))
        targets = _matrix("targets", targets, latent_dim)
        if len(targets) != len(sources):
            raise ValueError(
                f"Expected as many targets as sources; got {len(targets)} targets and "
                f"{len(sources)} sources."
            )
        self.num_inducing = len(sources)
        self.sources = nn.Parameter(sources.clone())
        self.targets = nn.Parameter(targets.clone())
        scale = math.log(_LENGTHSCALE * self.input_dim**0.5)
        self.log_lengthscale = nn.Parameter(torch.full((self.input_dim,), scale))
        self.log_amplitude = nn.Parameter(torch.zeros(()))
        self.base = MeanField(latent_dim, context_dim)
        with torch.no_grad():
            start = self.base.log_scale if context_dim is None else self.base.log_scale.bias
            start[:shared] += math.log(_SCALE)
        if self.amortize != "none":
            self.targets_head = _small_linear(context_dim, self.num_inducing * latent_dim)
        if self.amortize == "all":
            self.sources_head = _small_linear(context_dim, self.num_inducing * self.input_dim)
            self.kernel_head = _small_linear(context_dim, self.input_dim + 1)
        hidden_dims = widths("hidden_dims", hidden_dims)
        # For rows from an encoder the flow ended no higher.
        default_reverse = ReverseFlow if context_dim is None else MeanField
        default_family = partial(default_reverse, hidden_dims=hidden_dims, activation=activation)
        width = latent_dim + (context_dim or 0)
        self.reverse = built_direct(
            "reverse_family", reverse_family or default_family, self.input_dim, width
        )

    def conditional(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Mean and covariance of the process :math:`f` at several inputs.

        Args:
            inputs: ``(*batch, n, input_dim)``.
            context: ``(*batch, context_dim)``, or None for a family without a context.

        Returns:
            The mean ``(*batch, n, latent_dim)`` and the covariance ``(*batch, n, n)``, which all
            outputs share, the process's white noise on its diagonal.

        Raises:
            ValueError: If inputs or context have another width, or the kernel is not positive
                definite.
            TypeError: If the context is not of a floating-point type.
        """
        check_context(context, self.context_dim, " at conditional")
        if inputs.dim() < 2 or inputs.shape[-1] != self.input_dim:
            raise ValueError(
                f"Expected inputs of shape (*batch, n, {self.input_dim}) at conditional; got "
                f"shape {tuple(inputs.shape)}."
            )
        process, targets = self._process(context)
        weights, covariance = process.covariance(inputs)
        return self._before(inputs) + weights.mT @ targets, covariance

    def _process(self, context: Tensor | None) -> tuple[Process, Tensor]:
        """The process, and how far its targets are from its mean function."""
        sources: Tensor = self.sources
        targets: Tensor = self.targets
        log_lengthscale: Tensor = self.log_lengthscale
        log_amplitude: Tensor = self.log_amplitude
        if self.amortize != "none":
            targets = targets + self.targets_head(context).unflatten(-1, targets.shape)
        if self.amortize == "all":
            sources = sources + self.sources_head(context).unflatten(-1, sources.shape)
            shape = head_bounded(self.kernel_head(context))
            log_lengthscale = log_lengthscale + shape[..., :-1]
            log_amplitude = log_amplitude + shape[..., -1]
        process = Process(self.kernel, sources, log_lengthscale, log_amplitude, self.jitter)
        return process, targets - self._before(sources)

    def _before(self, inputs: Tensor) -> Tensor:
        """The mean function, ``(*batch, latent_dim)`` of inputs ``(*batch, input_dim)``."""
        shared = min(self.latent_dim, self.input_dim) if self.mean == "identity" else 0
        return nn.functional.pad(inputs[..., :shared], (0, self.latent_dim - shared))

    def _law(self, context: Tensor | None) -> _Law:
        return _Law(self, context, *self._process(context), *self.base.loc_and_log_scale(context))

    def _sample(self, name: str, context: Tensor | None, infer: Any) -> Tensor:
        law = self._law(context)
        xi = pyro.sample(f"{name}_xi", law.inputs().to_event(1), infer=AUXILIARY)
        value = pyro.sample(name, law.given(xi).to_event(1), infer=infer)
        reverse_factor(name, self.reverse.log_prob(xi, joined(value, context)))
        return value

    def _log_prob(self, value: Tensor, context: Tensor | None, num_samples: int) -> Tensor:
        r"""Importance sampling under the reverse model, as in :class:`Auxiliary`.

        Its exponential is an unbiased estimate of :math:`q(z \mid c)`.
        """
        law = self._law(context)
        reverse = self.reverse.distribution(joined(value, context))
        xi = reverse.rsample((num_samples,))
        log_inputs = law.inputs().to_event(1).log_prob(xi)
        log_joint = log_inputs + law.given(xi).to_event(1).log_prob(value)
        log_weights = log_joint - reverse.log_prob(xi)
        return log_weights.logsumexp(0) - math.log(num_samples)


class _Law(NamedTuple):
    """The conditional laws of one :class:`VGP` at one context."""

    family: VGP
    context: Tensor | None
    process: Process
    targets: Tensor
    loc: Tensor
    log_scale: Tensor

    def inputs(self) -> Any:
        """The Normal of the latent inputs."""
        batch = () if self.context is None else self.context.shape[:-1]
        zeros = self.loc.new_zeros(()).expand(*batch, self.family.input_dim)
        return CarryingNormal(zeros, zeros)

    def given(self, xi: Tensor) -> Any:
        """The Normal of z at inputs ``(*batch, input_dim)``, one draw of the process a row."""
        # All rows of one process are the columns of one solve.
        rows = self.process.sources.dim() - 2
        batch = xi.shape[:-1]
        kept = batch[len(batch) - rows :]
        columns = xi.reshape(-1, *kept, xi.shape[-1]).movedim(0, -2)
        weights, variance = self.process.weights(columns)
        weights = weights.movedim(-1, 0).reshape(*batch, -1)
        variance = variance.movedim(-1, 0).reshape(*batch, 1)
        mean = torch.einsum("...m,...md->...d", weights, self.targets)
        total = variance + (2.0 * self.log_scale).exp()
        mean = mean + self.family._before(xi)
        return CarryingNormal(self.loc + mean, 0.5 * total.log())


def _matrix(name: str, values: Any, width: int) -> Tensor:
    matrix = torch.as_tensor(values, dtype=torch.get_default_dtype())
    if matrix.dim() != 2 or matrix.shape[1] != width or len(matrix) == 0:
        raise ValueError(
            f"Expected {name} of shape (num_inducing, {width}); got shape {tuple(matrix.shape)}."
        )
    return matrix


def _small_linear(width_in: int | None, width_out: int) -> nn.Linear:
    layer = nn.Linear(width_in or 0, width_out, bias=False)
    nn.init.xavier_uniform_(layer.weight, gain=0.1)
    return layer
