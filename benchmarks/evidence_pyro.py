"""`log_evidence` in Pyro, and by hand, for `suite_evidence.py`."""

import math

import pyro
import steps_pyro
import torch
import torch.nn.functional as F

from pyro_vae_ext.diagnostics import log_evidence


def programs(data, sizes, num_samples, chunk):
    """Programs by name; all of them run the same networks on the same chunks."""
    pyro.clear_param_store()
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    x = torch.from_numpy(data)
    model, guide, (encoder, posterior, decoder) = steps_pyro.program(
        lambda name, net: pyro.module(name, net), sizes
    )
    half_log_2pi = 0.5 * math.log(2 * math.pi)
    starts = range(0, num_samples, chunk)

    def forward(size):
        loc, log_scale = posterior.loc_and_log_scale(encoder(x - 0.3))
        noise = torch.randn(size, *loc.shape)
        z = loc + log_scale.exp() * noise
        return z, noise, log_scale, decoder(z)

    def log_weights(size):
        z, noise, log_scale, logits = forward(size)
        log_likelihood = -F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        ).sum(-1)
        log_q = (-0.5 * noise * noise - log_scale - half_log_2pi).sum(-1)
        return log_likelihood + (-0.5 * z * z - half_log_2pi).sum(-1) - log_q

    @torch.no_grad()
    def by_hand():
        parts = [log_weights(min(chunk, num_samples - start)).logsumexp(0) for start in starts]
        return torch.stack(parts).logsumexp(0) - math.log(num_samples)

    @torch.no_grad()
    def networks_only():
        for start in starts:
            forward(min(chunk, num_samples - start))

    def ours():
        options = {"num_samples": num_samples, "chunk_size": chunk, "progress_bar": False}
        return log_evidence(model, guide, x, **options)

    return {"by hand": by_hand, "vae-ext": ours, "networks only": networks_only}
