"""The likelihoods in Pyro at one batch, for `likelihoods.py`."""

import pyro
import torch

from pyro_vae_ext import likelihoods


class Candidate:
    """One likelihood with random data; its methods are the programs to time."""

    def __init__(self, name, batch_size, context_dim, **options):
        pyro.enable_validation(False)
        pyro.set_rng_seed(0)
        torch.set_num_threads(1)
        self.module = getattr(likelihoods, name)(context_dim=context_dim, **options)
        self.context = torch.randn(batch_size, context_dim)
        output = self.module.output
        shape = (batch_size, *self.module.shape)
        num_categories = getattr(output, "num_categories", 2)
        self.x = torch.randint(num_categories, shape).float()
        self.noise = output.noise(shape, torch.float32)
        self.num_parameters = sum(p.numel() for p in self.module.parameters())

    def density(self):
        """The log-density of the batch, and its gradient in all weights."""
        (-self.module(self.context).log_prob(self.x).mean()).backward()
        for parameter in self.module.parameters():
            parameter.grad = None

    @torch.no_grad()
    def cached(self):
        """A batch of samples."""
        self.module(self.context).sample()

    @torch.no_grad()
    def naive(self, num_passes):
        """The first elements of a batch of samples, with one pass of the network for each."""
        module, output = self.module, self.module.output
        conditioned = module(self.context).conditioned
        value = torch.zeros_like(self.x).flatten(1)
        for element in range(num_passes):
            inputs = output.encode(value.reshape(self.x.shape), torch.float32)
            params = module._params(inputs, conditioned).flatten(1, -2)
            drawn = output.draw(params[:, element], self.noise.flatten(1, -2)[:, element])
            value[:, element] = drawn.to(value.dtype)
