"""One training step of the digits VAE in NumPyro and in plain JAX.

`steps` returns callables that each run one whole compiled step: batch in, gradients,
update of Adam. All of them train the same networks on the same objective.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

from numpyro_vae_ext import guides
from numpyro_vae_ext.elbos import ImportanceWeightedELBO

NUM_PIXELS, WIDTH, LATENT_DIM, BATCH = 64, 100, 10, 50


class MLP(nnx.Module):
    """Dense layers with a tanh between them."""

    def __init__(self, *widths, rngs):
        self.layers = nnx.List(
            nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jnp.tanh(layer(x))
        return self.layers[-1](x)


def _batch():
    rng = np.random.default_rng(0)
    return jnp.asarray((rng.random((BATCH, NUM_PIXELS)) < 0.3).astype(np.float32))


def plain(num_particles, gradient):
    """The hand-written step on dictionaries of arrays."""
    rng = np.random.default_rng(0)

    def dense(width_in, width_out):
        bound = math.sqrt(6 / (width_in + width_out))
        weight = rng.uniform(-bound, bound, (width_in, width_out)).astype(np.float32)
        return {"w": jnp.asarray(weight), "b": jnp.zeros(width_out)}

    params = {
        "encoder": [dense(NUM_PIXELS, WIDTH), dense(WIDTH, WIDTH)],
        "loc": dense(WIDTH, LATENT_DIM),
        "log_scale": dense(WIDTH, LATENT_DIM),
        "decoder": [
            dense(LATENT_DIM, WIDTH),
            dense(WIDTH, WIDTH),
            dense(WIDTH, NUM_PIXELS),
        ],
    }
    adam = optax.adam(2e-3)
    half_log_2pi = 0.5 * math.log(2 * math.pi)

    def apply(layer, x):
        return x @ layer["w"] + layer["b"]

    def encode(params, noise, x):
        hidden = x - 0.3
        for layer in params["encoder"]:
            hidden = jnp.tanh(apply(layer, hidden))
        loc, log_scale = apply(params["loc"], hidden), apply(params["log_scale"], hidden)
        return loc + jnp.exp(log_scale) * noise, loc, log_scale

    def log_joint(decoder, z, x):
        hidden = z
        for layer in decoder[:-1]:
            hidden = jnp.tanh(apply(layer, hidden))
        logits = apply(decoder[-1], hidden)
        # Written out, because jax.nn.softplus takes several times as long on a CPU.
        softplus = jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        return (x * logits - softplus).sum(-1) + (-0.5 * z * z - half_log_2pi).sum(-1)

    def reparam(params, noise, x):
        z, _, log_scale = encode(params, noise, x)
        log_q = (-0.5 * noise * noise - log_scale - half_log_2pi).sum(-1)
        log_w = log_joint(params["decoder"], z, x) - log_q
        if num_particles == 1:
            return -log_w.sum()
        return -(jax.nn.logsumexp(log_w, axis=0) - math.log(num_particles)).sum()

    def path(params, noise, x):
        """Value and gradient of STL at K = 1 and of DReG at K > 1, in one sweep."""
        z, pull_back, (loc, log_scale) = jax.vjp(
            lambda p: (lambda z, *rest: (z, rest))(*encode(p, noise, x)), params, has_aux=True
        )

        def log_weight(decoder, z):
            standard = (z - loc) * jnp.exp(-log_scale)
            log_q = (-0.5 * standard * standard - log_scale - half_log_2pi).sum(-1)
            return log_joint(decoder, z, x) - log_q

        log_w, pull = jax.vjp(log_weight, params["decoder"], z)
        if num_particles == 1:
            value = -log_w.sum()
            to_decoder, to_z = pull(-jnp.ones_like(log_w))
        else:
            value = -(jax.nn.logsumexp(log_w, axis=0) - math.log(num_particles)).sum()
            weight = jax.nn.softmax(log_w, axis=0)
            to_decoder, to_z = pull(-weight)
            to_z = to_z * weight[..., None]
        return value, {**pull_back(to_z)[0], "decoder": to_decoder}

    value_and_grad = jax.value_and_grad(reparam) if gradient == "reparam" else path

    def update(state, x):
        params, optim_state, key = state
        key, draw = jax.random.split(key)
        shape = (BATCH, LATENT_DIM) if num_particles == 1 else (num_particles, BATCH, LATENT_DIM)
        loss, grads = value_and_grad(params, jax.random.normal(draw, shape), x)
        updates, optim_state = adam.update(grads, optim_state, params)
        return (optax.apply_updates(params, updates), optim_state, key), loss

    return update, (params, adam.init(params), jax.random.key(0))


def svi(elbo, family="MeanField"):
    """Update and state of the host's SVI."""
    rngs = nnx.Rngs(0)
    encoder = MLP(NUM_PIXELS, WIDTH, WIDTH, rngs=rngs)
    decoder = MLP(LATENT_DIM, WIDTH, WIDTH, NUM_PIXELS, rngs=rngs)
    posterior = getattr(guides, family)(LATENT_DIM, context_dim=WIDTH, rngs=rngs)

    def model(x):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT_DIM]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = nnx_module("encoder", encoder)
        draw = nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x)):
            draw("z", jnp.tanh(encode(x - 0.3)))

    host = SVI(model, guide, optax.adam(2e-3), elbo)
    return host.update, host.init(jax.random.key(0), _batch())


def steps(num_particles, gradient, hosts=True, scan=1):
    """Named steps, each a callable without arguments.

    Args:
        num_particles: particles of the bound.
        gradient: gradient of the bound.
        hosts: whether to add the host's own objectives.
        scan: steps that one call runs, in one compiled scan if more than 1.
    """
    numpyro.enable_validation(False)
    options = {"num_particles": num_particles, "gradient": gradient}
    candidates = {
        "plain JAX": plain(**options),
        "vae-ext, SVI": svi(ImportanceWeightedELBO(**options)),
    }
    if hosts:
        candidates["Trace_ELBO, SVI"] = svi(Trace_ELBO(num_particles=num_particles))
        if num_particles > 1:
            candidates["RenyiELBO, SVI"] = svi(RenyiELBO(alpha=0, num_particles=num_particles))
    return _compiled(candidates, scan)


def families(names, num_particles, gradient):
    """Steps of the guide families in the host's SVI, named by family."""
    numpyro.enable_validation(False)
    options = {"num_particles": num_particles, "gradient": gradient}
    return _compiled({name: svi(ImportanceWeightedELBO(**options), name) for name in names}, 1)


def _compiled(candidates, scan):
    """Callables that run `scan` steps of each candidate `(update, state)`."""
    batch = _batch()

    def bind(update, state):
        def many(state, x):
            if scan == 1:
                return update(state, x)
            return jax.lax.scan(lambda s, _: update(s, x), state, length=scan)

        compiled = jax.jit(many, donate_argnums=0)
        # The state is donated, and states of different candidates may share arrays.
        holder = [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)]

        def step():
            holder[0], loss = compiled(holder[0], batch)
            return jax.block_until_ready(loss)

        return step

    return {name: bind(*candidate) for name, candidate in candidates.items()}
