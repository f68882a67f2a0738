"""A mixture of diagonal Normals as a prior."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyro_vae_ext._checks import positive_int


class Mixture(nn.Module):
    r"""Mixture of diagonal Normals with learned weights, locations and scales.

    .. math:: p(z) = \sum_{k=1}^{K} \pi_k \prod_i N(z_i;\, \mu_{k,i},\, \sigma_{k,i}^2)

    It starts with equal weights, standard Normal draws as locations and scales of 1. Called inside
    a model it gives the host's ``MixtureSameFamily``, of which the component is summed out.

    Args:
        latent_dim: Dimension of the latent vector :math:`z`.
        num_components: Number :math:`K` of components.

    Raises:
        ValueError: If a number is not positive.

    References:
        Dilokthanakul et al., 2016, *Deep Unsupervised Clustering with Gaussian Mixture Variational
        Autoencoders*, arXiv:1611.02648. Tomczak and Welling, 2018, *VAE with a VampPrior*,
        arXiv:1705.07120, sec. 3 (a baseline there).

    Example:
        >>> import pyro
        >>> prior = Mixture(latent_dim=2, num_components=5)
        >>> with pyro.plate("data", 7):
        ...     z = pyro.sample("z", prior())
        >>> z.shape
        torch.Size([7, 2])
    """

    def __init__(self, latent_dim: int, *, num_components: int = 10) -> None:
        super().__init__()
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.num_components = positive_int("num_components", num_components)
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.locs = nn.Parameter(torch.randn(num_components, latent_dim))
        self.log_scales = nn.Parameter(torch.zeros(num_components, latent_dim))

    def forward(self) -> TorchDistribution:
        """The prior as a distribution, ``batch_shape ()`` and ``event_shape (latent_dim,)``."""
        components = dist.Normal(self.locs, self.log_scales.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)
