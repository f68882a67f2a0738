"""Inverse autoregressive flows in PyTorch: ours, Zuko's and Pyro's own, for `suite_flows.py`.

Every flow has the same number of steps, the same masked networks and the same context. The peers'
base is a standard Normal, ours a Normal whose mean and scale depend on the context, so that ours
has one layer more. A peer that is not installed is left out.
"""

import importlib.util

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ConditionalAffineAutoregressive, Permute
from pyro.nn import ConditionalAutoRegressiveNN
from torch import nn

from pyro_vae_ext.guides import IAF

PEERS = {"Zuko": "zuko"}


def setting():
    """One thread and a seed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.enable_validation(False)


def ours(sizes, update):
    """Our flow: its module, and a function that gives its distribution."""
    flow = IAF(
        sizes.dim,
        sizes.context_dim,
        hidden_dims=sizes.hidden_dims,
        num_flows=sizes.num_flows,
        update=update,
        activation="relu",
    )
    return flow, flow.distribution


def draw(distribution):
    """A sample and its log-density, as the hosts' traces take them."""
    z = distribution.rsample()
    return z, distribution.log_prob(z)


def zuko_flow(sizes):
    """Zuko's masked autoregressive transforms, inverted: they sample in one pass."""
    import zuko

    forwards = torch.arange(sizes.dim)
    flow = zuko.flows.Flow(
        [
            zuko.lazy.LazyInverse(
                zuko.flows.MaskedAutoregressiveTransform(
                    sizes.dim,
                    sizes.context_dim,
                    order=forwards if step % 2 == 0 else forwards.flip(0),
                    hidden_features=sizes.hidden_dims,
                )
            )
            for step in range(sizes.num_flows)
        ],
        zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal,
            torch.zeros(sizes.dim),
            torch.ones(sizes.dim),
            buffer=True,
        ),
    )
    return flow, flow


class PyroFlow(nn.Module):
    """Pyro's conditional affine autoregressive transforms, the order reversed between them."""

    def __init__(self, sizes):
        super().__init__()
        self.dim = sizes.dim
        self.steps = nn.ModuleList(
            ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(
                    sizes.dim,
                    sizes.context_dim,
                    list(sizes.hidden_dims),
                    permutation=torch.arange(sizes.dim),
                )
            )
            for _ in range(sizes.num_flows)
        )

    def forward(self, context):
        """The distribution given the context."""
        loc = context.new_zeros(len(context), self.dim)
        transforms = []
        for step in self.steps:
            transforms += [step.condition(context), Permute(torch.arange(self.dim).flip(0))]
        base = dist.Normal(loc, torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(base, transforms[:-1])


def pyro_flow(sizes):
    """Pyro's flow, and the same as the function of its distribution."""
    flow = PyroFlow(sizes)
    return flow, flow


def programs(sizes):
    """Programs by kind, `sample` and `gradient`, and by name; and the peers that are missing."""
    setting()
    context = torch.randn(sizes.batch, sizes.context_dim)
    flows = {
        "vae-ext": (*ours(sizes, "affine"), draw),
        "vae-ext, gated": (*ours(sizes, "gated"), draw),
        "Pyro": (*pyro_flow(sizes), draw),
    }
    missing = [name for name, module in PEERS.items() if not importlib.util.find_spec(module)]
    if "Zuko" not in missing:
        flows["Zuko"] = (*zuko_flow(sizes), lambda q: q.rsample_and_log_prob())

    def bind(module, distribution, pair):
        @torch.no_grad()
        def sample():
            pair(distribution(context))

        def gradient():
            z, log_q = pair(distribution(context))
            (log_q + 0.5 * (z - 1.0).square().sum(-1)).mean().backward()
            for parameter in module.parameters():
                parameter.grad = None

        return sample, gradient

    bound = {name: bind(*flow) for name, flow in flows.items()}
    kinds = {
        kind: {name: pair[i] for name, pair in bound.items()}
        for i, kind in enumerate(("sample", "gradient"))
    }
    return kinds, missing


def scoring(sizes):
    """Programs that score a value of unknown noise; the sequential one comes first."""
    setting()
    context = torch.randn(sizes.batch, sizes.context_dim)
    flow, distribution = ours(sizes, "affine")
    with torch.no_grad():
        for net in flow.nets:
            net.layers[-1].weight.mul_(10.0)  # undoes the start near the identity
        value = distribution(context).sample()

    @torch.no_grad()
    def sequential():
        """One pass of a net for each coordinate."""
        transform = distribution(context).transform
        z, terms = value, -transform.log_scale
        for net in reversed(flow.nets):
            target, z = z, torch.zeros_like(z)
            for i in net.order:
                image, log_diagonal = transform._step(z, net(z, context))
                z[..., i] += ((target - image) * (-log_diagonal).exp())[..., i]
            terms = terms - transform._step(z, net(z, context))[1]
        noise = (z - transform.loc) * (-transform.log_scale).exp()
        return (terms + dist.Normal(0.0, 1.0).log_prob(noise)).sum(-1)

    @torch.no_grad()
    def score():
        return distribution(context).log_prob(value)

    named = {"one pass a coordinate": sequential, "vae-ext": score}
    if importlib.util.find_spec("zuko"):
        other, lazy = zuko_flow(sizes)
        with torch.no_grad():
            drawn = lazy(context).sample()

        @torch.no_grad()
        def peer():
            return lazy(context).log_prob(drawn)

        named["Zuko"] = peer
    gap = (sequential() - score()).abs().max() / sequential().abs().max()
    return named, float(gap)
