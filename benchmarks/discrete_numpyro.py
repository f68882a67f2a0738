"""Gradient estimators of a sigmoid belief net in NumPyro and plain JAX.

`candidates` trains one net and returns every estimator at its parameters, for `discrete.py`. Each
step is one compiled update: gradient and Adam.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, TraceGraph_ELBO

from numpyro_vae_ext.elbos import (
    TraceDisARM_ELBO,
    TraceNVIL_ELBO,
    TraceREBAR_ELBO,
    TraceRELAX_ELBO,
)

WIDTH = 200
LEARNING_RATE = 1e-3


def bits(logits):
    """One layer of independent bits."""
    return dist.Bernoulli(logits=logits).to_event(1)


def programs(mean, num_layers, seed):
    """Model and guide; the guide's networks are called `up1`, `up2`."""
    rngs, glorot = nnx.Rngs(seed), nnx.initializers.glorot_uniform()
    widths = (len(mean), *[WIDTH] * num_layers)

    def linear(width_in, width_out):
        return nnx.Linear(width_in, width_out, kernel_init=glorot, rngs=rngs)

    up = [linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    down = [linear(b, a) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    pixels = jnp.clip(mean, 1e-3, 1 - 1e-3)
    down[0].bias[...] = jnp.log(pixels) - jnp.log1p(-pixels)

    def model(x):
        with numpyro.plate("data", len(x)):
            logits = numpyro.param("prior", jnp.zeros(WIDTH))
            for i, layer in reversed(list(enumerate(down, 1))):
                h = numpyro.sample(f"h{i}", bits(logits))
                logits = nnx_module(f"down{i}", layer)(h)
            numpyro.sample("x", bits(logits), obs=x)

    def guide(x):
        h = x - mean
        with numpyro.plate("data", len(x)):
            for i, layer in enumerate(up, 1):
                logits = nnx_module(f"up{i}", layer)(h)
                h = numpyro.sample(f"h{i}", bits(logits), infer={"baseline_input": x})

    return model, guide


class Plain:
    """REINFORCE by hand, with the two functions of an objective that a step needs."""

    def __init__(self, mean, num_layers):
        self.mean, self.num_layers = mean, num_layers

    def __call__(self, rng_key, params, x):
        def apply(name, h):
            return h @ params[f"{name}$params"]["kernel"] + params[f"{name}$params"]["bias"]

        def log_bits(logits, h):
            # Written out, because jax.nn.softplus takes several times as long on a CPU.
            softplus = jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
            return (h * logits - softplus).sum(-1)

        h, values, log_q = x - self.mean, [x], []
        for i, key in enumerate(jax.random.split(rng_key, self.num_layers), 1):
            logits = apply(f"up{i}", h)
            uniform = jax.random.uniform(key, logits.shape)
            h = (uniform < jax.nn.sigmoid(jax.lax.stop_gradient(logits))).astype(x.dtype)
            values.append(h)
            log_q.append(log_bits(logits, h))
        cost = log_bits(params["prior"], h)
        for i, (below, above) in enumerate(zip(values[:-1], values[1:], strict=True), 1):
            cost = cost + log_bits(apply(f"down{i}", above), below)
        surrogate, known = cost, jax.lax.stop_gradient(cost)
        for term in reversed(log_q):
            known = known - jax.lax.stop_gradient(term)
            surrogate = surrogate + term * known
        return -surrogate.sum()


class Candidate:
    """One estimator at the trained net.

    Args:
        params: parameters of the net.
        extra: what the estimator learns for itself, and its mutable state.
        loss: function of a key, all parameters, the state and a batch that returns loss and state.
        draw: function of a key that returns a batch.
        batch: the batch of variance and time.
    """

    def __init__(self, params, extra, loss, draw, batch):
        self.params, (self.tuning, self.state) = params, extra
        self.loss, self.draw, self.batch = loss, draw, batch
        self.adam = optax.adam(LEARNING_RATE)
        self.run = None

    def tune(self, num_steps):
        """Train what the estimator learns for itself, the net held fixed."""

        def step(carry, key):
            tuning, state, adam = carry
            draw_key, key = jax.random.split(key)

            def loss(tuning):
                return self.loss(key, {**self.params, **tuning}, state, self.draw(draw_key))

            grads, state = jax.grad(loss, has_aux=True)(tuning)
            updates, adam = self.adam.update(grads, adam, tuning)
            return (optax.apply_updates(tuning, updates), state, adam), None

        if self.tuning or self.state:
            carry = (self.tuning, self.state, self.adam.init(self.tuning))
            keys = jax.random.split(jax.random.key(1), num_steps)
            self.tuning, self.state, _ = jax.jit(lambda c: jax.lax.scan(step, c, keys)[0])(carry)

    def variance(self, repetitions):
        """Trace of the covariance of the guide's gradient at one batch.

        Running averages stay those of the many batches before.
        """
        guide = {name: value for name, value in self.params.items() if name.startswith("up")}

        def step(carry, key):
            mean, total, n = carry

            def loss(guide):
                params = {**self.params, **self.tuning, **guide}
                return self.loss(key, params, self.state, self.batch)[0]

            grads = jax.grad(loss)(guide)
            flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])
            change = flat - mean
            mean = mean + change / n
            return (mean, total + change @ (flat - mean), n + 1.0), None

        size = sum(leaf.size for leaf in jax.tree.leaves(guide))
        carry = (jnp.zeros(size), jnp.zeros(()), jnp.ones(()))
        keys = jax.random.split(jax.random.key(2), repetitions)
        total = jax.jit(lambda c: jax.lax.scan(step, c, keys)[0])(carry)[1]
        return float(total) / (repetitions - 1)

    def step(self):
        """One compiled training step: gradient and update of everything."""
        if self.run is None:
            params = {**self.params, **self.tuning}
            self.run = jax.jit(self._update, donate_argnums=0)
            # The carry is donated, and the candidates share arrays.
            carry = (params, self.state, self.adam.init(params), jax.random.key(3))
            self.carry = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), carry)
        self.carry, loss = self.run(self.carry, self.batch)
        return jax.block_until_ready(loss)

    def _update(self, carry, x):
        params, state, adam, key = carry
        key, draw = jax.random.split(key)

        def loss(params):
            return self.loss(draw, params, state, x)

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, adam = self.adam.update(grads, adam, params)
        return (optax.apply_updates(params, updates), state, adam, key), value


def objectives():
    """Named objectives."""
    return {
        "REINFORCE": TraceNVIL_ELBO(baselines=()),
        "NVIL": TraceNVIL_ELBO(),
        "leave-one-out, 2 particles": TraceNVIL_ELBO(2, baselines=("leave_one_out",)),
        "DisARM": TraceDisARM_ELBO(),
        "REBAR": TraceREBAR_ELBO(),
        "RELAX": TraceRELAX_ELBO(),
        "TraceGraph_ELBO": TraceGraph_ELBO(),
    }


def left_out(args):
    """Why candidates are missing, one sentence each."""
    return []


def candidates(args, rows):
    """Train one net with REBAR, then every estimator at its parameters."""
    numpyro.enable_validation(False)
    mean = jnp.asarray(rows.mean(0, dtype=np.float64), jnp.float32)
    rows = jnp.asarray(rows)
    model, guide = programs(mean, args.num_layers, args.seed)

    def draw(key):
        chosen = jax.random.randint(key, (args.batch_size,), 0, len(rows))
        return rows[chosen].astype(jnp.float32)

    batch = draw(jax.random.key(args.seed))

    def initial(elbo):
        """The host's SVI with its first state."""
        tunable = getattr(elbo, "tunable", lambda guide: guide)(guide)
        svi = SVI(model, tunable, optax.adam(LEARNING_RATE), elbo)
        return svi, svi.init(jax.random.key(args.seed), batch)

    svi, state = initial(TraceREBAR_ELBO())
    names = {name for name in svi.get_params(state) if name.startswith(("prior", "up", "down"))}

    def train(state, key):
        return svi.update(state, draw(key))[0], None

    keys = jax.random.split(jax.random.key(args.seed + 1), args.train_steps)
    state, _ = jax.jit(lambda state: jax.lax.scan(train, state, keys))(state)
    net = {name: value for name, value in svi.get_params(state).items() if name in names}

    def by_hand(key, params, state, x):
        return Plain(mean, args.num_layers)(key, params, x), state

    made = {"plain JAX, REINFORCE": Candidate(net, ({}, {}), by_hand, draw, batch)}
    for name, elbo in objectives().items():
        svi, state = initial(elbo)
        own = svi.optim.get_params(state.optim_state)
        own = {name: value for name, value in own.items() if name not in names}
        tunable = svi.guide

        def loss(key, params, state, x, elbo=elbo, tunable=tunable):
            if not hasattr(elbo, "tunable"):
                return elbo.loss(key, params, model, tunable, x), state
            params = {**params, **(state or {})}
            result = elbo.loss_with_mutable_state(key, params, model, tunable, x)
            return result["loss"], result["mutable_state"]

        made[name] = Candidate(net, (own, state.mutable_state), loss, draw, batch)
    return made
