"""One training step of a VAE in Pyro and in plain PyTorch, the digits' one by default.

`steps` returns callables that each run one whole step: batch in, gradients, update of
Adam. All of them train the same networks on the same objective.
"""

import itertools
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from sizes import DIGITS
from torch import nn

from pyro_vae_ext import guides
from pyro_vae_ext.elbos import ImportanceWeightedELBO

# Each candidate has its own names in the parameter store, where equal names share parameters.
_COUNT = itertools.count()


def networks(sizes):
    """Encoder, without the heads of the posterior, and decoder."""
    torch.manual_seed(0)
    width = sizes.width
    encoder = nn.Sequential(
        nn.Linear(sizes.num_pixels, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    )
    decoder = nn.Sequential(
        nn.Linear(sizes.latent_dim, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, sizes.num_pixels),
    )
    return encoder, decoder


def random_batch(sizes):
    """One batch of random bits."""
    bits = np.random.default_rng(0).random((sizes.batch, sizes.num_pixels)) < 0.3
    return torch.from_numpy(bits.astype(np.float32))


def program(register, sizes=DIGITS, family="MeanField"):
    """Model, guide and their modules."""
    encoder, decoder = networks(sizes)
    posterior = getattr(guides, family)(sizes.latent_dim, context_dim=sizes.width)
    zeros = torch.zeros(sizes.latent_dim)
    prior = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)

    def model(x):
        register("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        register("encoder", encoder)
        register("posterior", posterior)
        with pyro.plate("data", len(x)):
            posterior("z", encoder(x - 0.3))

    return model, guide, nn.ModuleList([encoder, posterior, decoder])


def plain(num_particles, gradient, sizes=DIGITS, compiler=None, fused=None):
    """The hand-written step: no trace, no plates, one Adam over all parameters.

    Args:
        num_particles: particles of the bound.
        gradient: gradient of the bound.
        sizes: sizes of networks and batch.
        compiler: backend of `torch.compile` for the loss, None for an eager one.
        fused: whether Adam is PyTorch's fused one.
    """
    encoder, decoder = networks(sizes)
    loc_head, scale_head = (nn.Linear(sizes.width, sizes.latent_dim) for _ in range(2))
    modules = nn.ModuleList([encoder, loc_head, scale_head, decoder])
    adam = torch.optim.Adam(modules.parameters(), lr=2e-3, fused=fused)
    half_log_2pi = 0.5 * math.log(2 * math.pi)

    def loss_of(x):
        hidden = encoder(x - 0.3)
        loc, log_scale = loc_head(hidden), scale_head(hidden)
        shape = (num_particles, *loc.shape) if num_particles > 1 else loc.shape
        noise = torch.randn(shape)
        scale = log_scale.exp()
        z = loc + scale * noise
        if gradient == "reparam":
            log_q = (-0.5 * noise * noise - log_scale - half_log_2pi).sum(-1)
        else:
            standard = (z - loc.detach()) / scale.detach()
            log_q = (-0.5 * standard * standard - log_scale.detach() - half_log_2pi).sum(-1)
        logits = decoder(z)
        log_likelihood = -F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        ).sum(-1)
        log_prior = (-0.5 * z * z - half_log_2pi).sum(-1)
        log_w = log_likelihood + log_prior - log_q
        if num_particles == 1:
            loss = -log_w.sum()
        else:
            loss = -(log_w.logsumexp(0) - math.log(num_particles)).sum()
            if gradient == "dreg":
                weight = log_w.detach().softmax(0).unsqueeze(-1)
                z.register_hook(lambda grad: grad * weight)
        return loss

    if compiler:
        loss_of = torch.compile(loss_of, backend=compiler, dynamic=False)

    def step(x):
        loss = loss_of(x)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


def host_svi(elbo, sizes=DIGITS):
    """The host's SVI, with the host's Adam."""
    count = next(_COUNT)
    model, guide, _ = program(lambda name, net: pyro.module(f"{name}{count}", net), sizes)
    return SVI(model, guide, pyro.optim.Adam({"lr": 2e-3}), elbo)


def svi(elbo, sizes=DIGITS):
    """A step of the host's SVI."""
    return host_svi(elbo, sizes).step


def compiled(elbo, sizes=DIGITS, backend="inductor"):
    """A compiled step of the host's SVI."""
    from pyro_vae_ext import training

    step = training.compile(host_svi(elbo, sizes), backend=backend).step
    return lambda x: step(x).item()


def module(elbo, sizes=DIGITS, family="MeanField"):
    """The loss as a module, outside the parameter store, with one Adam of PyTorch."""
    model, guide, modules = program(lambda name, net: None, sizes, family)
    loss_module = elbo(model, guide)
    adam = torch.optim.Adam(modules.parameters(), lr=2e-3)

    def step(x):
        loss = loss_module(x)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


def missing():
    """Candidates that this checkout cannot make."""
    try:
        from pyro_vae_ext import training
    except ImportError:
        return ["vae-ext, compiled"]
    return [] if callable(getattr(training, "compile", None)) else ["vae-ext, compiled"]


def makers(num_particles, gradient, sizes=DIGITS, hosts=True, compiler=None):
    """Functions that make the steps, by name.

    Args:
        num_particles: particles of the bound.
        gradient: gradient of the bound.
        sizes: sizes of networks and batch.
        hosts: whether to add the host's own objectives.
        compiler: whether to add the compiled steps, and with which of the compilers that
            `training.compile` knows, `"inductor"` or `"fx"`.
    """
    options = {"num_particles": num_particles, "gradient": gradient}
    hand = partial(plain, **options, sizes=sizes)
    made = {
        "plain PyTorch": hand,
        "vae-ext, SVI": lambda: svi(ImportanceWeightedELBO(**options), sizes),
        "vae-ext, module": lambda: module(ImportanceWeightedELBO(**options), sizes),
    }
    if compiler:
        torchs = "inductor" if compiler == "inductor" else "eager"
        made["torch.compile"] = partial(hand, compiler=torchs)
        made["torch.compile, fused Adam"] = partial(hand, compiler=torchs, fused=True)
    if compiler and not missing():
        made["vae-ext, compiled"] = lambda: compiled(
            ImportanceWeightedELBO(**options), sizes, compiler
        )
    if hosts:
        host = {"num_particles": num_particles, "vectorize_particles": num_particles > 1}
        if num_particles > 1:
            host["max_plate_nesting"] = 1
        made["Trace_ELBO, SVI"] = lambda: svi(Trace_ELBO(**host), sizes)
        made["Trace_ELBO, module"] = lambda: module(Trace_ELBO(**host), sizes)
        made["TraceGraph_ELBO, SVI"] = lambda: svi(TraceGraph_ELBO(**host), sizes)
        made["RenyiELBO, SVI"] = lambda: svi(RenyiELBO(alpha=0, **host), sizes)
    return made


def steps(num_particles, gradient, sizes=DIGITS, names=None, **options):
    """Named steps, each a callable without arguments.

    Args:
        num_particles: particles of the bound.
        gradient: gradient of the bound.
        sizes: sizes of networks and batch.
        names: candidates to make; None for all of them.
        options: options of `makers`.
    """
    pyro.clear_param_store()
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    # torch.compile gives a function up after eight sizes.
    torch.compiler.reset()
    batch = random_batch(sizes)
    made = makers(num_particles, gradient, sizes, **options)

    def bind(step):
        return lambda: step(batch)

    return {name: bind(make()) for name, make in made.items() if names is None or name in names}


def families(names, num_particles, gradient):
    """Steps of the guide families through the loss as a module, named by family."""
    pyro.clear_param_store()
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    batch = random_batch(DIGITS)

    def bind(name):
        step = module(ImportanceWeightedELBO(num_particles, gradient=gradient), family=name)
        return lambda: step(batch)

    return {name: bind(name) for name in names}
