"""One training step of the digits VAE in Pyro and in plain PyTorch.

`steps` returns callables that each run one whole step: batch in, gradients, update of
Adam. All of them train the same networks on the same objective.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import nn

from pyro_vae_ext import guides
from pyro_vae_ext.elbos import ImportanceWeightedELBO

NUM_PIXELS, WIDTH, LATENT_DIM, BATCH = 64, 100, 10, 50


def _networks():
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Linear(NUM_PIXELS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
    )
    decoder = nn.Sequential(
        nn.Linear(LATENT_DIM, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, NUM_PIXELS),
    )
    return encoder, decoder


def _batch():
    rng = np.random.default_rng(0)
    return torch.from_numpy((rng.random((BATCH, NUM_PIXELS)) < 0.3).astype(np.float32))


def _program(register, family="MeanField"):
    encoder, decoder = _networks()
    posterior = getattr(guides, family)(LATENT_DIM, context_dim=WIDTH)
    prior = dist.Normal(torch.zeros(LATENT_DIM), torch.ones(LATENT_DIM)).to_event(1)

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


def plain(num_particles, gradient):
    """The hand-written step: no trace, no plates, one Adam over all parameters."""
    encoder, decoder = _networks()
    loc_head, scale_head = nn.Linear(WIDTH, LATENT_DIM), nn.Linear(WIDTH, LATENT_DIM)
    modules = nn.ModuleList([encoder, loc_head, scale_head, decoder])
    adam = torch.optim.Adam(modules.parameters(), lr=2e-3)
    half_log_2pi = 0.5 * math.log(2 * math.pi)

    def step(x):
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
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


def svi(elbo, family="MeanField"):
    """A step of the host's SVI, with the host's Adam."""
    model, guide, _ = _program(pyro.module, family)
    return SVI(model, guide, pyro.optim.Adam({"lr": 2e-3}), elbo).step


def module(elbo, family="MeanField"):
    """The loss as a module, outside the parameter store, with one Adam of PyTorch."""
    model, guide, modules = _program(lambda name, module: None, family)
    loss_module = elbo(model, guide)
    adam = torch.optim.Adam(modules.parameters(), lr=2e-3)

    def step(x):
        loss = loss_module(x)
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


def steps(num_particles, gradient, hosts=True):
    """Named steps, each a callable without arguments."""
    pyro.clear_param_store()
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    options = {"num_particles": num_particles, "gradient": gradient}
    candidates = {
        "plain PyTorch": plain(**options),
        "vae-ext, SVI": svi(ImportanceWeightedELBO(**options)),
        "vae-ext, module": module(ImportanceWeightedELBO(**options)),
    }
    if hosts:
        host = {"num_particles": num_particles, "vectorize_particles": num_particles > 1}
        if num_particles > 1:
            host["max_plate_nesting"] = 1
        candidates["Trace_ELBO, SVI"] = svi(Trace_ELBO(**host))
        candidates["Trace_ELBO, module"] = module(Trace_ELBO(**host))
        if num_particles > 1:
            candidates["RenyiELBO, SVI"] = svi(RenyiELBO(alpha=0, **host))
    batch = _batch()

    def bind(step):
        return lambda: step(batch)

    return {name: bind(step) for name, step in candidates.items()}


def families(names, num_particles, gradient):
    """Steps of the guide families through the loss as a module, named by family."""
    pyro.clear_param_store()
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    batch = _batch()

    def bind(name):
        step = module(ImportanceWeightedELBO(num_particles, gradient=gradient), name)
        return lambda: step(batch)

    return {name: bind(name) for name in names}
