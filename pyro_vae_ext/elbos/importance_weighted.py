"""The importance-weighted bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae_ext.elbos._base import LogWeightELBO


class ImportanceWeightedELBO(LogWeightELBO):
    r"""Importance-weighted bound, per datum and summed over the data.

    .. math:: L_K = E\Big[\log \frac1K \sum_{k=1}^K w_k\Big] \le \log p(x), \qquad
              w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x).

    With :math:`\tilde w_k = w_k / \sum_j w_j`, model parameters :math:`\theta` and guide
    parameters :math:`\phi`, the gradient is estimated by

    * ``"reparam"``: the derivative of the sampled bound, through the samples; unbiased;
    * ``"stl"``: the direct derivative of :math:`\log q` in :math:`\phi` left out,
      :math:`\sum_k \tilde w_k\, \partial_z \log w_k\, \partial_\phi z_k`. At ``num_particles=1``
      this is sticking the landing, unbiased; above, it is biased and of low variance;
    * ``"dreg"``: doubly reparameterised, :math:`\sum_k \tilde w_k^2\, \partial_z \log w_k\,
      \partial_\phi z_k` for :math:`\phi` and the importance-weighted gradient for :math:`\theta`;
      unbiased;
    * ``"vimco"``: for guides with discrete sites. The score of those sites of particle
      :math:`k`, times :math:`\hat L_K - \hat L_{-k}`, where :math:`\hat L_{-k}` has the geometric
      mean of the other weights in the place of :math:`w_k`, is added to the derivative of the
      sampled bound; continuous sites keep their reparameterised gradient. Unbiased.

    With ``num_outer`` groups of ``K`` particles the loss is the mean of :math:`M` such bounds, and
    so are its gradients: :math:`\tilde w_k` and what follows are those of a group. The bound is
    that of ``K``, with less noise. ``num_particles=1, num_outer=16, gradient="stl"`` is the plain
    bound over 16 draws under path gradients.

    Parameters that model and guide share get both parts. Both path gradients vanish sample by
    sample when the guide is the posterior. For a flow they cost one triangular solve per step
    (see :class:`~pyro_vae_ext.guides.IAF`).

    Args:
        num_particles: Number :math:`K` of samples per datum in a group; 1 is the ELBO.
        num_outer: Number :math:`M` of groups; the loss is the mean of their bounds.
        gradient: ``"reparam"``, ``"stl"``, ``"dreg"`` or ``"vimco"``, which needs two particles.
        vectorize_particles: Run all particles at once in an outermost plate (networks must take
            any left batch), or one after another.
        chunk_size: Particles of all ``K * M`` to run at a time, with activations recomputed in the
            backward pass: the memory of that many, for one more forward pass. None runs all at
            once.
        max_plate_nesting: Largest number of nested plates of model and guide; found by running
            the pair once if left out.

    Raises:
        ValueError: At construction for an unknown option; at a step for a pair whose number
            would be no bound, for latent sites without a reparameterised sampler, for sites that
            only one of model and guide has, and for NaN data.
        TypeError: At a step for integer data at a site with a continuous distribution.

    References:
        Burda, Grosse and Salakhutdinov, 2016, *Importance Weighted Autoencoders*,
        arXiv:1509.00519, eq. 8 and 14. Roeder, Wu and Duvenaud, 2017, *Sticking the Landing*,
        arXiv:1703.09194, eq. 8. Mnih and Rezende, 2016, *Variational Inference for Monte Carlo
        Objectives*, arXiv:1602.06725, per-sample signals. Tucker, Lawson, Gu and Maddison, 2019,
        *Doubly Reparameterized Gradient Estimators*, arXiv:1810.04152, eq. 7. Rainforth et al.,
        2018, *Tighter Variational Bounds are Not Necessarily Better*, arXiv:1802.04537, section 3
        (``num_outer``).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_vae_ext.guides import MeanField
        >>> x, posterior = torch.zeros(8, 2), MeanField(latent_dim=2, context_dim=2)
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     pyro.module("posterior", posterior)
        ...     with pyro.plate("data", len(x)):
        ...         posterior("z", x)
        >>> elbo = ImportanceWeightedELBO(num_particles=5, gradient="dreg")
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        >>> loss = svi.step(x)
        >>> plain = ImportanceWeightedELBO(num_outer=16, gradient="stl")
        >>> plain.log_weights(model, guide, x).shape
        torch.Size([16, 1, 8])
    """

    def bound(self, log_weights: Tensor) -> Tensor:
        """Logarithm of the mean weight, ``(*common_plates)``."""
        return torch.logsumexp(log_weights, 0) - math.log(log_weights.shape[0])

    def _others(self, log_weights: Tensor) -> Tensor:
        num_particles = log_weights.shape[0]
        # Sums over the particles before and after each one: no difference of large numbers.
        edge = torch.full_like(log_weights[:1], -math.inf)
        before = torch.cat([edge, torch.logcumsumexp(log_weights[:-1], 0)])
        after = torch.cat([torch.logcumsumexp(log_weights[1:].flip(0), 0).flip(0), edge])
        mean = (log_weights.sum(0) - log_weights) / (num_particles - 1)
        rest = torch.logaddexp(before, after)
        return torch.logaddexp(rest, mean) - math.log(num_particles)
