"""The inverse autoregressive flow posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from jax import lax

from numpyro_vae_ext._checks import one_of, positive_int, widths
from numpyro_vae_ext._masked_flow import masked_nets
from numpyro_vae_ext.guides._base import DirectFamily, param_dtype_or_default
from numpyro_vae_ext.guides._flow import FlowDistribution, Transform
from numpyro_vae_ext.guides.mean_field import MeanField
from numpyro_vae_ext.nn._scales import bounded, log_scale_bound
from numpyro_vae_ext.nn._tails import FIRST_LOGIT, stretch, stretch_and_bend, unstretch
from numpyro_vae_ext.nn.masked import MaskedMLP


class IAF(DirectFamily):
    r"""The inverse autoregressive flow: a diagonal Normal sent through masked nets.

    .. math::
        z_0 = \mu_0(c) + \sigma_0(c) \odot \varepsilon, \qquad
        (m_t, s_t) = \operatorname{net}_t(z_{t-1}, c), \qquad \varepsilon \sim \mathcal N(0, I)

    .. math::
        \text{affine:}\quad z_t = e^{a_t} \odot z_{t-1} + m_t,
        \qquad a_t = b \tanh(s_t / b), \quad b = \min(3, 12 / T)

    .. math::
        \text{gated:}\quad z_t = e^{b} g_t \odot z_{t-1} + (1 - g_t) \odot m_t,
        \qquad g_t = e^{a_t - b} \in (e^{-2b}, 1)

    .. math::
        \log q(z_T \mid c) = \log \mathcal N(\varepsilon; 0, I) - \sum_i \log \sigma_{0,i}
        - \sum_t \sum_i a_{t,i}

    All steps together scale by :math:`e^{-12}` to :math:`e^{12}` at most: no training makes
    them nearly singular. The gate is that of the paper with its shrinkage taken out: what it
    keeps of :math:`z` is scaled up by :math:`e^b`, or else the base would have to grow against
    it, and path gradients with it. The order of the features is reversed from step to step. A
    sample carries its log-density and nothing is inverted in training. Another value is inverted
    exactly, all features at a time, by at most ``latent_dim`` fixed-point iterations a step,
    fewer where they converge. The derivative at a fixed value, which ``gradient="stl"`` and
    ``"dreg"`` ask for, costs ``latent_dim`` forward-mode columns and one triangular solve a step.

    With ``tails="exponential"`` the base is
    :math:`z_0 = \mu_0 + \sigma_0 \odot h(\varepsilon)`, where each side of each coordinate has a
    trained tail between those of a Normal and of an exponential law:
    :math:`h(\varepsilon) = \varepsilon + \kappa_+ q(\varepsilon) - \kappa_- q(-\varepsilon)` with
    :math:`q(x) = \frac12 \log^2(1 + e^x)` and :math:`0 < \kappa_\pm < 1`, .047 at the start. The
    logarithm of a positive parameter often has such a tail, and steps with bounded scales make
    none of a Normal's (Jaini et al. 2020).

    Args:
        latent_dim: width of the latent variable; 1 works too.
        context_dim: width of the context, or None for a global posterior.
        hidden_dims: widths of the hidden layers of each net, at least one.
        num_flows: number of steps `T`.
        update: ``"affine"`` (eq. 10) or ``"gated"`` (eq. 13-14).
        tails: ``"normal"``, as in the paper, or ``"exponential"``.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.
        rngs: source of the initial weights.
        param_dtype: type of the parameters, JAX's default float if None.

    Raises:
        ValueError: if a width or ``num_flows`` is below 1, or an option is unknown; at the call,
            if the context has the wrong width or holds NaN.
        TypeError: at the call, if the context is not floating-point.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improved Variational
        Inference with Inverse Autoregressive Flow, arXiv 1606.04934, algorithm 1, eq. 10-14.

        Jaini, Kobyzev, Yu and Brubaker (2020), Tails of Lipschitz Triangular Flows, arXiv
        1907.04481 (what steps can do to a tail).

    Example:
        >>> import jax.numpy as jnp, numpyro
        >>> from flax import nnx
        >>> posterior = IAF(2, context_dim=4, hidden_dims=(16,), rngs=nnx.Rngs(0))
        >>> with numpyro.handlers.seed(rng_seed=0), numpyro.plate("data", 5):
        ...     z = posterior("z", jnp.ones((5, 4)))
        >>> z.shape, posterior.log_prob(z, jnp.ones((5, 4))).shape
        ((5, 2), (5,))
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        *,
        hidden_dims: Sequence[int] = (64,),
        num_flows: int = 2,
        update: str = "affine",
        tails: str = "normal",
        activation: str = "elu",
        rngs: nnx.Rngs,
        param_dtype: Any = None,
    ) -> None:
        super().__init__(latent_dim, context_dim)
        num_flows = positive_int("num_flows", num_flows)
        self.update = one_of("update", update, ("affine", "gated"))
        self.tails = one_of("tails", tails, ("normal", "exponential"))
        self._bound = log_scale_bound(num_flows)
        dtype = param_dtype_or_default(param_dtype)
        self.base = MeanField(latent_dim, context_dim, rngs=rngs, param_dtype=dtype)
        if tails == "exponential":
            self.tail_logits = nnx.Param(jnp.full((2, latent_dim), FIRST_LOGIT, dtype))
        self.nets = masked_nets(
            latent_dim,
            widths("hidden_dims", hidden_dims),
            num_flows,
            context_dim=context_dim,
            activation=activation,
            rngs=rngs,
            param_dtype=dtype,
        )

    def distribution(self, context: Any = None) -> dist.Distribution:
        """The flow's distribution given ``context``; a sample carries its log-density."""
        steps = _Steps(self, context, *self.base.loc_and_log_scale(context))
        return FlowDistribution(steps, steps.loc.shape[:-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Steps(Transform):
    """The transform of one :class:`IAF` at one context."""

    family: IAF
    context: jax.Array | None
    loc: jax.Array
    log_scale: jax.Array

    @property
    def latent_dim(self) -> int:
        return self.family.latent_dim

    @property
    def dtype(self) -> Any:
        return jnp.result_type(self.loc)

    def forward(self, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        terms = -0.5 * noise**2 - 0.5 * math.log(2.0 * math.pi) - self.log_scale
        if self.family.tails == "exponential":
            noise, log_slope = stretch(noise, self.family.tail_logits[...])
            terms = terms - log_slope
        z = self.loc + jnp.exp(self.log_scale) * noise
        for net in self.family.nets:
            z, log_scale = self._step(z, net(z, self.context))
            terms = terms - log_scale
        return z, terms

    def inverse(self, value: jax.Array) -> jax.Array:
        for net in reversed(self.family.nets):
            value = self._undo(net, value)
        noise = (value - self.loc) * jnp.exp(-self.log_scale)
        if self.family.tails == "exponential":
            return unstretch(noise, self.family.tail_logits[...])
        return noise

    def score(self, noise: jax.Array) -> jax.Array:
        score = -noise
        if self.family.tails == "exponential":
            noise, slope, bend = stretch_and_bend(noise, self.family.tail_logits[...])
            score = (score - bend) / slope
        score = score * jnp.exp(-self.log_scale)
        z = self.loc + jnp.exp(self.log_scale) * noise
        for net in self.family.nets:
            outputs, slopes = net.jacobian(z, self.context)
            new, log_scale = self._step(z, outputs)
            diagonal = jnp.exp(log_scale)
            d_shift, d_log = slopes[..., 0, :, :], slopes[..., 1, :, :]
            d_log = (1 - (log_scale / self.family._bound) ** 2)[..., None] * d_log
            moved = diagonal * z
            if self.family.update == "gated":
                gate = jnp.exp(log_scale - self.family._bound)
                d_shift = (1 - gate)[..., None] * d_shift
                moved = moved - gate * outputs[..., 0, :]
            eye = jnp.eye(self.latent_dim, dtype=z.dtype)
            jacobian = diagonal[..., None] * eye + moved[..., None] * d_log + d_shift
            # In the step's own order the Jacobian is lower triangular.
            order = np.asarray(net.order)
            solved = lax.linalg.triangular_solve(
                jacobian[..., order[:, None], order],
                (score - d_log.sum(-2))[..., order, None],
                left_side=True,
                lower=True,
                transpose_a=True,
            )
            score = solved[..., np.argsort(order), 0]
            z = new
        return score

    def _step(self, z: jax.Array, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One update of ``z``, and the logarithm of its diagonal derivative."""
        shift, log_scale = self._shift_and_log_scale(outputs)
        return jnp.exp(log_scale) * z + shift, log_scale

    def _shift_and_log_scale(self, outputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a step adds and, as a logarithm, multiplies by."""
        shift, bound = outputs[..., 0, :], self.family._bound
        log_scale = bounded(outputs[..., 1, :], bound)
        if self.family.update == "gated":
            shift = (1 - jnp.exp(log_scale - bound)) * shift
        return shift, log_scale

    def _undo(self, net: MaskedMLP, target: jax.Array) -> jax.Array:
        """Solve one step for its input, all features at once."""
        # Feature i of the step's order is exact after i+1 rounds, all of them after latent_dim.
        tolerance = 4 * jnp.finfo(target.dtype).eps
        State = tuple[jax.Array, jax.Array, jax.Array]

        def unfinished(state: State) -> jax.Array:
            rounds, _, change = state
            return (rounds < self.latent_dim) & ~(change <= tolerance)

        def refine(state: State) -> State:
            rounds, z, _ = state
            shift, log_scale = self._shift_and_log_scale(net(z, self.context))
            new = (target - shift) * jnp.exp(-log_scale)
            change = jnp.max(jnp.abs(new - z) / (1 + jnp.abs(new)), initial=0.0)
            return rounds + 1, new, change

        start = (jnp.array(0), target, jnp.array(jnp.inf, target.dtype))
        return lax.while_loop(unfinished, refine, start)[1]
