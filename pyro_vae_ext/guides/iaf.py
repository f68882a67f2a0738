"""The inverse autoregressive flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae_ext._checks import one_of, positive_int
from pyro_vae_ext._masked_flow import masked_nets
from pyro_vae_ext.guides._base import DirectFamily
from pyro_vae_ext.guides._flow import FlowDistribution, Transform
from pyro_vae_ext.guides.mean_field import MeanField
from pyro_vae_ext.nn._scales import bounded, log_scale_bound
from pyro_vae_ext.nn._tails import FIRST_LOGIT, stretch, stretch_and_bend, unstretch


class IAF(DirectFamily):
    r"""Inverse autoregressive flow on a diagonal Normal.

    .. math::
        z_0 = \mu_0(c) + \sigma_0(c) \odot \epsilon, \qquad
        z_t = e^{a_t} \odot z_{t-1} + m_t, \qquad
        (m_t, s_t) = \mathrm{net}_t(z_{t-1}, c), \quad
        a_t = b \tanh(s_t / b), \quad b = \min(3, 12 / T),

    where every net is autoregressive in :math:`z_{t-1}` and the order is reversed from one step to
    the next. All steps together scale by :math:`e^{-12}` to :math:`e^{12}` at most, so that no
    training makes them nearly singular. ``update="gated"`` takes

    .. math::
        z_t = e^b g_t \odot z_{t-1} + (1 - g_t) \odot m_t, \qquad
        g_t = e^{a_t - b} \in (e^{-2b}, 1)

    instead: the gate of the paper with its shrinkage taken out. What it keeps of :math:`z` is
    scaled up by :math:`e^b`, or else the base would have to grow against it, and path gradients
    with it. Sampling runs all steps in parallel over dimensions and accumulates

    .. math:: \log q(z_T \mid c) = \log N(\epsilon; 0, I) - \sum_i \Big(\log \sigma_{0,i}
              + \sum_t a_{t,i}\Big),

    so that no step is inverted in training. A foreign value is scored by an exact inverse: a
    fixed-point iteration over all dimensions at once, which ends when it no longer moves and
    after ``latent_dim`` rounds a step at the latest. Its gradient (and the path derivative that
    the ``"stl"`` and ``"dreg"`` gradients need) costs ``latent_dim`` forward-mode columns of each
    net and one triangular solve per step; first derivatives only.

    With ``tails="exponential"`` the base is
    :math:`z_0 = \mu_0 + \sigma_0 \odot h(\varepsilon)`, where each side of each coordinate has a
    trained tail between those of a Normal and of an exponential law:
    :math:`h(\varepsilon) = \varepsilon + \kappa_+ q(\varepsilon) - \kappa_- q(-\varepsilon)` with
    :math:`q(x) = \frac12 \log^2(1 + e^x)` and :math:`0 < \kappa_\pm < 1`, .047 at the start. The
    logarithm of a positive parameter often has such a tail, and steps with bounded scales make
    none of a Normal's (Jaini et al. 2020).

    Args:
        latent_dim: Dimension of the latent vector.
        context_dim: Width of the context, or None for a global posterior.
        hidden_dims: Widths of the hidden layers of each step's masked network.
        num_flows: Number of steps; at least two are advisable, since the order alternates.
        update: ``"affine"`` (eq. 10 of the paper) or ``"gated"`` (eq. 13-14).
        tails: ``"normal"``, as in the paper, or ``"exponential"``.
        activation: ``"elu"``, ``"relu"`` or ``"tanh"``.

    Raises:
        ValueError: If a width or number is not positive, or an option is unknown.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling, 2016, *Improving Variational
        Inference with Inverse Autoregressive Flow*, arXiv:1606.04934, algorithm 1, eq. 10-14.

        Jaini, Kobyzev, Yu and Brubaker, 2020, *Tails of Lipschitz Triangular Flows*,
        arXiv:1907.04481 (what steps can do to a tail).

    Example:
        >>> import torch
        >>> posterior = IAF(latent_dim=3, context_dim=5, hidden_dims=(16,), num_flows=2)
        >>> posterior("z", torch.zeros(7, 5)).shape
        torch.Size([7, 3])
    """

    nets: Any  # an nn.ModuleList, whose members are typed as modules of any kind

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
    ) -> None:
        super().__init__(latent_dim, context_dim)
        positive_int("num_flows", num_flows)
        self.update = one_of("update", update, ("affine", "gated"))
        self.tails = one_of("tails", tails, ("normal", "exponential"))
        self._bound = log_scale_bound(num_flows)
        self.base = MeanField(latent_dim, context_dim)
        if tails == "exponential":
            self.tail_logits = nn.Parameter(torch.full((2, latent_dim), FIRST_LOGIT))
        self.nets = masked_nets(
            latent_dim, hidden_dims, num_flows, context_dim=context_dim, activation=activation
        )

    def distribution(self, context: Tensor | None = None) -> TorchDistribution:
        """The flow's distribution given ``context``; a sample carries its log-density."""
        transform = _Steps(self, context)
        return FlowDistribution(transform, transform.loc.shape[:-1])


class _Steps(Transform):
    """The transform of one :class:`IAF` at one context."""

    def __init__(self, family: IAF, context: Tensor | None) -> None:
        self.family = family
        self.context = context
        self.event_size = family.latent_dim
        self.loc, self.log_scale = family.base.loc_and_log_scale(context)

    def like(self) -> Tensor:
        return self.loc

    def _step(self, z: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """One update of ``z``, and the logarithm of its diagonal derivative."""
        shift, log_scale = self._shift_and_log_scale(outputs)
        return z * log_scale.exp() + shift, log_scale

    def _shift_and_log_scale(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """What a step adds and, as a logarithm, multiplies by."""
        shift, raw = outputs.unbind(-2)
        bound = self.family._bound
        log_scale = bounded(raw, bound)
        if self.family.update == "gated":
            shift = shift * (1.0 - (log_scale - bound).exp())
        return shift, log_scale

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        terms = -0.5 * noise.square() - 0.5 * math.log(2.0 * math.pi) - self.log_scale
        if self.family.tails == "exponential":
            noise, log_slope = stretch(noise, self.family.tail_logits)
            terms = terms - log_slope
        z = self.loc + self.log_scale.exp() * noise
        for net in self.family.nets:
            z, log_diagonal = self._step(z, net(z, self.context))
            terms = terms - log_diagonal
        return z, terms

    @torch.no_grad()
    def inverse(self, value: Tensor) -> Tensor:
        z = value
        for net in reversed(self.family.nets):
            z = self._invert_step(net, z)
        noise = (z - self.loc) * (-self.log_scale).exp()
        if self.family.tails == "exponential":
            return unstretch(noise, self.family.tail_logits)
        return noise

    def _invert_step(self, net: nn.Module, target: Tensor) -> Tensor:
        # The k-th round makes the k-th coordinate in the net's order exact, whatever the others
        # are. The clamp keeps coordinates whose turn has not come from reaching infinity, where
        # a masked connection would turn into NaN.
        limits = torch.finfo(target.dtype)
        bound, tolerance = limits.max**0.5, 4 * limits.eps
        z = target
        for _ in range(self.event_size):
            image, log_diagonal = self._step(z, net(z, self.context))
            update = (z + (target - image) * (-log_diagonal).exp()).clamp(-bound, bound)
            moved = (update - z).abs() > tolerance * (1.0 + update.abs())
            z = update
            if not moved.any():
                break
        return z

    @torch.no_grad()
    def score(self, noise: Tensor) -> Tensor:
        gradient = -noise
        if self.family.tails == "exponential":
            noise, slope, bend = stretch_and_bend(noise, self.family.tail_logits)
            gradient = (gradient - bend) / slope
        gradient = gradient * (-self.log_scale).exp()
        z = self.loc + self.log_scale.exp() * noise
        for net in self.family.nets:
            outputs, jacobian = net.jacobian(z, self.context)
            new, log_scale = self._step(z, outputs)
            scale, bound = log_scale.exp(), self.family._bound
            shift_rows, log_rows = jacobian.unbind(-3)
            log_rows = (1.0 - (log_scale / bound).square()).unsqueeze(-1) * log_rows
            moved = scale * z
            if self.family.update == "gated":
                gate = (log_scale - bound).exp()
                shift_rows = (1.0 - gate).unsqueeze(-1) * shift_rows
                moved = moved - gate * outputs[..., 0, :]
            # dz_t/dz_{t-1}: triangular in the order of the net, with `scale` on the diagonal.
            step = moved.unsqueeze(-1) * log_rows + shift_rows + torch.diag_embed(scale)
            gradient = torch.linalg.solve_triangular(
                step.mT,
                (gradient - log_rows.sum(-2)).unsqueeze(-1),
                upper=net.order[0] <= net.order[-1],
            ).squeeze(-1)
            z = new
        return gradient
