"""Inverse autoregressive flows in JAX: ours, FlowJAX's and NumPyro's own, for `suite_flows.py`.

Every flow has the same number of steps and the same masked networks, and is one jitted program.
The peers' base is a standard Normal, ours a Normal whose mean and scale depend on the context, so
that ours has one layer more; NumPyro's own network takes no context at all. A peer that is not
installed is left out.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax.example_libraries import stax
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.nn import AutoregressiveNN

from numpyro_vae_ext.guides import IAF

PEERS = {"FlowJAX": "flowjax"}


def ours(sizes, update):
    """Our flow: its parameters, and a function of them, a key and the context."""
    flow = IAF(
        sizes.dim,
        sizes.context_dim,
        hidden_dims=sizes.hidden_dims,
        num_flows=sizes.num_flows,
        update=update,
        activation="relu",
        rngs=nnx.Rngs(0),
    )
    graph, params = nnx.split(flow)

    def draw(params, key, context):
        distribution = nnx.merge(graph, params).distribution(context)
        z, extra = distribution.sample_with_intermediates(key)
        return z, distribution.log_prob(z, extra)

    return params, draw, graph


def without_context(sizes):
    """Our flow as a global posterior, over the same batch."""
    params, _, graph = ours(sizes._replace(context_dim=None), "affine")

    def draw(params, key, context):
        distribution = nnx.merge(graph, params).distribution().expand((len(context),))
        z, extra = distribution.sample_with_intermediates(key)
        return z, distribution.log_prob(z, extra)

    return params, draw, graph


def flowjax_flow(sizes):
    """FlowJAX's flow in the direction that samples in one pass."""
    import equinox as eqx
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    flow = masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(sizes.dim)),
        cond_dim=sizes.context_dim,
        flow_layers=sizes.num_flows,
        nn_width=sizes.hidden_dims[0],
        nn_depth=len(sizes.hidden_dims),
        invert=False,
    )
    params, static = eqx.partition(flow, eqx.is_inexact_array)

    def draw(params, key, context):
        return eqx.combine(params, static).sample_and_log_prob(key, condition=context)

    return params, draw, static


def numpyro_flow(sizes):
    """NumPyro's autoregressive transforms, the order reversed between them."""
    nets = [
        AutoregressiveNN(
            sizes.dim,
            list(sizes.hidden_dims),
            permutation=jnp.arange(sizes.dim),
            nonlinearity=stax.Relu,
        )
        for _ in range(sizes.num_flows)
    ]
    keys = jax.random.split(jax.random.key(0), len(nets))
    params = [net[0](key, (sizes.dim,))[1] for net, key in zip(nets, keys, strict=True)]

    def draw(params, key, context):
        base = dist.Normal(jnp.zeros((len(context), sizes.dim)), 1.0).to_event(1)
        transforms = []
        for (_, apply), weights in zip(nets, params, strict=True):
            step = InverseAutoregressiveTransform(lambda x, a=apply, w=weights: a(w, x))
            reverse = dist.transforms.PermuteTransform(jnp.arange(sizes.dim)[::-1])
            transforms += [step, reverse]
        flow = dist.TransformedDistribution(base, transforms[:-1])
        z, extra = flow.sample_with_intermediates(key)
        return z, flow.log_prob(z, extra)

    return params, draw, None


def programs(sizes):
    """Programs by kind, `sample` and `gradient`, and by name; and the peers that are missing."""
    context = jax.random.normal(jax.random.key(1), (sizes.batch, sizes.context_dim))
    flows = {
        "vae-ext": ours(sizes, "affine"),
        "vae-ext, gated": ours(sizes, "gated"),
        "vae-ext, no context": without_context(sizes),
        "NumPyro, no context": numpyro_flow(sizes),
    }
    missing = [name for name, module in PEERS.items() if not importlib.util.find_spec(module)]
    if "FlowJAX" not in missing:
        flows["FlowJAX"] = flowjax_flow(sizes)

    def bind(params, draw, _):
        key = [jax.random.key(2)]

        def loss(params, key, context):
            z, log_q = draw(params, key, context)
            return (log_q + 0.5 * jnp.square(z - 1.0).sum(-1)).mean()

        compiled = {"sample": jax.jit(draw), "gradient": jax.jit(jax.grad(loss))}

        def program(kind):
            def run():
                jax.block_until_ready(compiled[kind](params, key[0], context))

            return run

        return program

    bound = {name: bind(*flow) for name, flow in flows.items()}
    kinds = {
        kind: {name: program(kind) for name, program in bound.items()}
        for kind in ("sample", "gradient")
    }
    return kinds, missing


def scoring(sizes):
    """Programs that score a value of unknown noise; the sequential one comes first."""
    context = jax.random.normal(jax.random.key(1), (sizes.batch, sizes.context_dim))
    params, draw, graph = ours(sizes, "affine")
    flow = nnx.merge(graph, params)
    for net in flow.nets:
        net.layers[-1].kernel[...] = 10.0 * net.layers[-1].kernel[...]  # far from the identity
    params = nnx.state(flow)
    value = jax.jit(draw)(params, jax.random.key(2), context)[0]

    @jax.jit
    def sequential(params, value, context):
        """One pass of a net for each coordinate."""
        flow = nnx.merge(graph, params)
        transform = flow.distribution(context).transform
        z, terms = value, -transform.log_scale
        for net in reversed(flow.nets):
            target, order = z, jnp.asarray(net.order)

            def refine(i, z, net=net, target=target, order=order):
                image, log_slope = transform._step(z, net(z, context))
                new = z + (target - image) * jnp.exp(-log_slope)
                return z.at[..., order[i]].set(new[..., order[i]])

            z = jax.lax.fori_loop(0, sizes.dim, refine, jnp.zeros_like(z))
            terms = terms - transform._step(z, net(z, context))[1]
        noise = (z - transform.loc) * jnp.exp(-transform.log_scale)
        return (terms + dist.Normal(0.0, 1.0).log_prob(noise)).sum(-1)

    @jax.jit
    def score(params, value, context):
        return nnx.merge(graph, params).distribution(context).log_prob(value)

    def bind(program, *args):
        return lambda: jax.block_until_ready(program(*args))

    named = {
        "one pass a coordinate": bind(sequential, params, value, context),
        "vae-ext": bind(score, params, value, context),
    }
    if importlib.util.find_spec("flowjax"):
        import equinox as eqx

        weights, other, static = flowjax_flow(sizes)
        drawn = jax.jit(other)(weights, jax.random.key(2), context)[0]

        @jax.jit
        def peer(params, value, context):
            return eqx.combine(params, static).log_prob(value, condition=context)

        named["FlowJAX"] = bind(peer, weights, drawn, context)
    reference = sequential(params, value, context)
    gap = jnp.abs(reference - score(params, value, context)).max() / jnp.abs(reference).max()
    return named, float(gap)
