"""`log_evidence` in NumPyro, and by hand, for `suite_evidence.py`."""

import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import steps_numpyro
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae_ext.diagnostics import log_evidence


def programs(data, sizes, num_samples, chunk):
    """Programs by name; each compiles one function, as `log_evidence` does, and runs the chunks."""
    numpyro.enable_validation(False)
    x = jnp.asarray(data)
    model, guide = steps_numpyro.program(sizes)
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    trained = svi.get_params(svi.init(jax.random.key(0), x[:1]))
    params, encode, _ = steps_numpyro.hand_written(sizes)
    shape = (chunk, len(x), sizes.latent_dim)
    keys = jax.random.split(jax.random.key(1), -(-num_samples // chunk))
    half_log_2pi = steps_numpyro.HALF_LOG_2PI

    def decode(layers, hidden):
        for layer in layers[:-1]:
            hidden = jnp.tanh(hidden @ layer["w"] + layer["b"])
        return hidden @ layers[-1]["w"] + layers[-1]["b"]

    def add(params, x, total, key, start):
        noise = jax.random.normal(key, shape)
        z, _, log_scale = encode(params, noise, x)
        log_q = (-0.5 * noise * noise - log_scale - half_log_2pi).sum(-1)
        logits = decode(params["decoder"], z)
        # The host's likelihood, as in the pair: it takes care of infinite logits, which costs.
        log_likelihood = dist.Bernoulli(logits=logits).log_prob(x).sum(-1)
        log_w = log_likelihood + (-0.5 * z * z - half_log_2pi).sum(-1) - log_q
        kept = start + jnp.arange(chunk) < num_samples
        log_w = jnp.where(kept[:, None], log_w, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_w, axis=0))

    def forward(params, x, key):
        z, _, _ = encode(params, jax.random.normal(key, shape), x)
        return decode(params["decoder"], z).max()

    def by_hand():
        total, step = jnp.full(len(x), -jnp.inf), jax.jit(lambda *args: add(*args))
        for i, key in enumerate(keys):
            total = step(params, x, total, key, i * chunk)
        return jax.block_until_ready(total - math.log(num_samples))

    def networks_only():
        step = jax.jit(lambda *args: forward(*args))
        for key in keys:
            jax.block_until_ready(step(params, x, key))

    def ours():
        options = {"num_samples": num_samples, "chunk_size": chunk, "progress_bar": False}
        key = jax.random.key(1)
        return jax.block_until_ready(log_evidence(key, model, guide, x, params=trained, **options))

    return {"by hand": by_hand, "vae-ext": ours, "networks only": networks_only}
