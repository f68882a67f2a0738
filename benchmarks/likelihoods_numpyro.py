"""The likelihoods in NumPyro at one batch, for `likelihoods.py`."""

import jax
import jax.numpy as jnp
from flax import nnx

from numpyro_vae_ext import likelihoods


class Candidate:
    """One likelihood with random data; its methods are the programs to time."""

    def __init__(self, name, batch_size, context_dim, **options):
        self.module = getattr(likelihoods, name)(
            context_dim=context_dim, **options, rngs=nnx.Rngs(0)
        )
        keys = jax.random.split(jax.random.key(0), 3)
        self.context = jax.random.normal(keys[0], (batch_size, context_dim))
        output = self.module.output
        shape = (batch_size, *self.module.shape)
        num_categories = getattr(output, "num_categories", 2)
        self.x = jax.random.randint(keys[1], shape, 0, num_categories).astype(float)
        self.noise = output.noise(keys[2], shape, jnp.float32)
        self.key = keys[2]
        leaves = jax.tree.leaves(nnx.state(self.module, nnx.Param))
        self.num_parameters = sum(leaf.size for leaf in leaves)

        @jax.jit
        def gradient(module, context, x):
            return jax.grad(lambda module: -module(context).log_prob(x).mean())(module)

        @jax.jit
        def draw(module, context, x, noise, element):
            inputs = output.encode(x, jnp.float32)
            params = module._params(inputs, module(context).conditioned)
            params = params.reshape(batch_size, -1, params.shape[-1])[:, element]
            noise = noise.reshape(batch_size, -1, noise.shape[-1])[:, element]
            drawn = output.draw(params, noise).astype(x.dtype)
            return x.reshape(batch_size, -1).at[:, element].set(drawn).reshape(x.shape)

        self._gradient, self._draw = gradient, draw

    def density(self):
        """The log-density of the batch, and its gradient in all weights, compiled."""
        jax.block_until_ready(self._gradient(self.module, self.context, self.x))

    def cached(self):
        """A batch of samples, as it is called outside of a compiled program."""
        jax.block_until_ready(self.module(self.context).sample(self.key))

    def naive(self, num_passes):
        """The first elements of a batch of samples, with one compiled pass for each."""
        value = jnp.zeros_like(self.x)
        for element in range(num_passes):
            value = self._draw(self.module, self.context, value, self.noise, element)
        jax.block_until_ready(value)
