"""Sizes of what the benchmarks run."""

from typing import NamedTuple


class VAE(NamedTuple):
    """A variational autoencoder with two tanh layers on each side, and its batch."""

    num_pixels: int
    width: int
    latent_dim: int
    batch: int


class Flow(NamedTuple):
    """An inverse autoregressive flow, and its batch."""

    dim: int
    context_dim: int
    hidden_dims: tuple[int, ...]
    num_flows: int
    batch: int


DIGITS = VAE(num_pixels=64, width=100, latent_dim=10, batch=50)
MNIST = VAE(num_pixels=784, width=200, latent_dim=50, batch=100)
# The digits' networks, at the middle of what the curves vary.
CURVES = VAE(num_pixels=64, width=100, latent_dim=16, batch=64)
TINY = VAE(num_pixels=6, width=4, latent_dim=2, batch=3)

# Sampling and gradients of a flow, and scores of values whose noise is unknown.
FLOW = Flow(dim=50, context_dim=32, hidden_dims=(128, 128), num_flows=2, batch=256)
WIDE_FLOW = FLOW._replace(dim=256, batch=64)
TINY_FLOW = Flow(dim=3, context_dim=2, hidden_dims=(6, 6), num_flows=2, batch=2)
