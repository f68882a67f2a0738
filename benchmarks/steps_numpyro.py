"""One training step of a VAE in NumPyro and in plain JAX, the digits' one by default.

`steps` returns callables that each run one whole compiled step: batch in, gradients,
update of Adam. All of them train the same networks on the same objective.
"""

import importlib.util
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from sizes import DIGITS

from numpyro_vae_ext import guides
from numpyro_vae_ext.elbos import ImportanceWeightedELBO

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


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


def random_batch(sizes):
    """One batch of random bits."""
    bits = np.random.default_rng(0).random((sizes.batch, sizes.num_pixels)) < 0.3
    return jnp.asarray(bits.astype(np.float32))


def hand_written(sizes=DIGITS):
    """Parameters, and two functions of them: the encoder's and the joint log-density."""
    rng = np.random.default_rng(0)

    def dense(width_in, width_out):
        bound = math.sqrt(6 / (width_in + width_out))
        weight = rng.uniform(-bound, bound, (width_in, width_out)).astype(np.float32)
        return {"w": jnp.asarray(weight), "b": jnp.zeros(width_out)}

    width, latent_dim = sizes.width, sizes.latent_dim
    params = {
        "encoder": [dense(sizes.num_pixels, width), dense(width, width)],
        "loc": dense(width, latent_dim),
        "log_scale": dense(width, latent_dim),
        "decoder": [
            dense(latent_dim, width),
            dense(width, width),
            dense(width, sizes.num_pixels),
        ],
    }

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
        return (x * logits - softplus).sum(-1) + (-0.5 * z * z - HALF_LOG_2PI).sum(-1)

    return params, encode, log_joint


def plain(num_particles, gradient, sizes=DIGITS):
    """The hand-written step on dictionaries of arrays."""
    params, encode, log_joint = hand_written(sizes)
    adam = optax.adam(2e-3)

    def reparam(params, noise, x):
        z, _, log_scale = encode(params, noise, x)
        log_q = (-0.5 * noise * noise - log_scale - HALF_LOG_2PI).sum(-1)
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
            log_q = (-0.5 * standard * standard - log_scale - HALF_LOG_2PI).sum(-1)
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
        shape = (sizes.batch, sizes.latent_dim)
        shape = shape if num_particles == 1 else (num_particles, *shape)
        loss, grads = value_and_grad(params, jax.random.normal(draw, shape), x)
        updates, optim_state = adam.update(grads, optim_state, params)
        return (optax.apply_updates(params, updates), optim_state, key), loss

    return update, (params, adam.init(params), jax.random.key(0))


def program(sizes=DIGITS, family="MeanField"):
    """Model and guide."""
    rngs, width, latent_dim = nnx.Rngs(0), sizes.width, sizes.latent_dim
    encoder = MLP(sizes.num_pixels, width, width, rngs=rngs)
    decoder = MLP(latent_dim, width, width, sizes.num_pixels, rngs=rngs)
    posterior = getattr(guides, family)(latent_dim, context_dim=width, rngs=rngs)

    def model(x):
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([latent_dim]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = nnx_module("encoder", encoder)
        draw = nnx_module("posterior", posterior)
        with numpyro.plate("data", len(x)):
            draw("z", jnp.tanh(encode(x - 0.3)))

    return model, guide


def svi(elbo, sizes=DIGITS, family="MeanField"):
    """Update and state of the host's SVI."""
    host = SVI(*program(sizes, family), optax.adam(2e-3), elbo)
    return host.update, host.init(jax.random.key(0), random_batch(sizes))


def compiled(elbo, sizes=DIGITS):
    """Update, already compiled, and state of the host's SVI."""
    from numpyro_vae_ext import training

    host = training.compile(SVI(*program(sizes), optax.adam(2e-3), elbo))
    return host.update, host.init(jax.random.key(0), random_batch(sizes))


def missing():
    """Candidates that this checkout cannot make."""
    return [] if importlib.util.find_spec("numpyro_vae_ext.training") else ["vae-ext, compiled"]


def makers(num_particles, gradient, sizes=DIGITS, hosts=True, compiler=None):
    """Functions that make update and state of each candidate, by name.

    Args:
        num_particles: particles of the bound.
        gradient: gradient of the bound.
        sizes: sizes of networks and batch.
        hosts: whether to add the host's own objectives.
        compiler: whether to add the step that `training.compile` makes.
    """
    options = {"num_particles": num_particles, "gradient": gradient}
    made = {
        "plain JAX": partial(plain, **options, sizes=sizes),
        "vae-ext, SVI": lambda: svi(ImportanceWeightedELBO(**options), sizes),
    }
    if compiler and not missing():
        made["vae-ext, compiled"] = lambda: compiled(ImportanceWeightedELBO(**options), sizes)
    if hosts:
        host = {"num_particles": num_particles}
        made["Trace_ELBO, SVI"] = lambda: svi(Trace_ELBO(**host), sizes)
        made["TraceGraph_ELBO, SVI"] = lambda: svi(TraceGraph_ELBO(**host), sizes)
        made["RenyiELBO, SVI"] = lambda: svi(RenyiELBO(alpha=0, **host), sizes)
    return made


def steps(num_particles, gradient, sizes=DIGITS, names=None, scan=1, **options):
    """Named steps, each a callable without arguments.

    Args:
        num_particles: particles of the bound.
        gradient: gradient of the bound.
        sizes: sizes of networks and batch.
        names: candidates to make; None for all of them.
        scan: steps that one call runs, in one compiled scan if more than 1.
        options: options of `makers`.
    """
    numpyro.enable_validation(False)
    made = makers(num_particles, gradient, sizes, **options)
    candidates = {name: make() for name, make in made.items() if names is None or name in names}
    return _compiled(candidates, scan, sizes)


def families(names, num_particles, gradient):
    """Steps of the guide families in the host's SVI, named by family."""
    numpyro.enable_validation(False)
    options = {"num_particles": num_particles, "gradient": gradient}
    made = {name: svi(ImportanceWeightedELBO(**options), family=name) for name in names}
    return _compiled(made, 1, DIGITS)


def _compiled(candidates, scan, sizes):
    """Callables that run `scan` steps of each candidate `(update, state)`."""
    batch = random_batch(sizes)

    def bind(update, state):
        def many(state, x):
            if scan == 1:
                return update(state, x)
            return jax.lax.scan(lambda s, _: update(s, x), state, length=scan)

        own = hasattr(getattr(update, "__self__", None), "svi")
        compiled = update if own else jax.jit(many, donate_argnums=0)
        # The state is donated, and states of different candidates may share arrays.
        holder = [jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)]

        def step():
            holder[0], loss = compiled(holder[0], batch)
            return jax.block_until_ready(loss)

        def memory():
            """Bytes that XLA plans for one call beside its arguments and results."""
            analysis = compiled.lower(holder[0], batch).compile().memory_analysis()
            return analysis.temp_size_in_bytes

        if not own:
            step.memory = memory
        return step

    return {name: bind(*candidate) for name, candidate in candidates.items()}
