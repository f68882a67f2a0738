"""One of the processes that ``test_distributed.py`` starts; writes what it found as JSON.

The reference is one process on the rows of all ranks, with the noise of all ranks.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from test_pyro.models import family, shaken
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_vae_ext.elbos import ImportanceWeightedELBO

NUM_ROWS, LATENT, CONTEXT, PIXELS = 40, 3, 4, 6
EVEN, RAGGED = (5, 5), (7, 3)
FAMILIES = {"MeanField": {}, "IAF": {"hidden_dims": (7,)}}
OBJECTIVES = [(1, "reparam"), (1, "stl"), (5, "reparam"), (5, "dreg")]


class Model(nn.Module):
    def __init__(self, num_rows: int | None, registered: bool = False) -> None:
        super().__init__()
        self.num_rows, self.registered = num_rows, registered
        self.decoder = nn.Linear(LATENT, PIXELS)

    def forward(self, x: Tensor) -> None:
        if self.registered:
            pyro.module("decoder", self.decoder)
        with pyro.plate("data", self.num_rows or len(x), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, num_rows: int | None, posterior: nn.Module, registered: bool = False):
        super().__init__()
        self.num_rows, self.registered = num_rows, registered
        self.encoder, self.posterior = nn.Linear(PIXELS, CONTEXT), posterior

    def forward(self, x: Tensor) -> Tensor:
        if self.registered:
            pyro.module("encoder", self.encoder)
            pyro.module("posterior", self.posterior)
        with pyro.plate("data", self.num_rows or len(x), subsample_size=len(x)):
            return self.posterior("z", torch.tanh(self.encoder(x)))


def pair(name: str, *, seed: int = 0, num_rows: int | None = NUM_ROWS, registered: bool = False):
    torch.manual_seed(seed)
    posterior = shaken(family(name, latent_dim=LATENT, context_dim=CONTEXT, **FAMILIES[name]))
    return Model(num_rows, registered), Guide(num_rows, posterior, registered)


@contextmanager
def noise_of(rows: slice, total: int) -> Iterator[None]:
    """Draws of all ranks, of which these rows are taken: ``(..., total, dim)``."""
    randn, generator = torch.randn, torch.Generator().manual_seed(1)

    def draw(shape: tuple, **kwargs) -> Tensor:
        everyones = (*shape[:-2], total, shape[-1])
        return randn(everyones, generator=generator, **kwargs)[..., rows, :]

    torch.randn = draw
    try:
        yield
    finally:
        torch.randn = randn


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, relative to the largest number."""
    scale = max(x.abs().max() for x in theirs)
    found = max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) / scale
    return found.item()


def gradients(module: nn.Module) -> list[Tensor]:
    missing = [name for name, leaf in module.named_parameters() if leaf.grad is None]
    if missing:
        raise AssertionError(f"no gradient of {missing}")
    return [leaf.grad for leaf in module.parameters()]


def mean_of(x: Tensor) -> Tensor:
    x = x.detach().clone()
    distributed.all_reduce(x)
    return x / distributed.get_world_size()


def compare(
    rank: int, name: str, num_particles: int, gradient: str, *, ranks=EVEN, registered=False
) -> float:
    """Difference of loss and gradients between all ranks and one process."""
    pyro.clear_param_store()
    total = sum(ranks)
    x = torch.bernoulli(torch.full((total, PIXELS), 0.4), generator=torch.Generator())
    mine = slice(sum(ranks[:rank]), sum(ranks[: rank + 1]))

    def elbo() -> ImportanceWeightedELBO:
        return ImportanceWeightedELBO(num_particles, gradient=gradient)

    # Other parameters on the other rank: DDP sends those of the first.
    bound = elbo()(*pair(name, seed=rank, registered=registered))
    parallel = DistributedDataParallel(bound)
    reference = elbo()(*pair(name))
    with noise_of(mine, total):
        # A mean over ranks of equal rows is that over rows; else each rank counts by its rows.
        share = ranks[rank] * len(ranks) / total
        loss = share * parallel(x[mine])
        loss.backward()
    with noise_of(slice(None), total):
        expected = reference(x)
        expected.backward()
    both = difference([mean_of(loss)[None]], [expected.detach()[None]])
    return max(both, difference(gradients(bound), gradients(reference)))


def scale(rank: int) -> float:
    """Difference of the ranks' loss from that of a plate without a subsample, times N/B."""
    x, mine = torch.ones(10, PIXELS), slice(5 * rank, 5 * rank + 5)
    subsampled = ImportanceWeightedELBO(5)(*pair("MeanField"))
    whole = ImportanceWeightedELBO(5)(*pair("MeanField", num_rows=None))
    with noise_of(mine, 10):
        ours = mean_of(subsampled(x[mine]))
    with noise_of(slice(None), 10):
        theirs = NUM_ROWS / 10 * whole(x).detach()
    return difference([ours[None]], [theirs[None]])


def train(rank: int) -> tuple[float, float]:
    """After a few steps: difference from one process, and between the ranks."""
    x, mine = torch.bernoulli(torch.full((10, PIXELS), 0.4)), slice(5 * rank, 5 * rank + 5)
    distributed.broadcast(x, 0)
    bound = ImportanceWeightedELBO(5)(*pair("IAF"))
    reference = copy.deepcopy(bound)
    for module, rows in ((DistributedDataParallel(bound), mine), (reference, slice(None))):
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
        with noise_of(rows, 10):
            for _ in range(4):
                optimiser.zero_grad()
                module(x[rows]).backward()
                optimiser.step()
    ours, theirs = list(bound.parameters()), list(reference.parameters())
    spread = max((mean_of(leaf) - leaf).abs().max().item() for leaf in ours)
    return difference(ours, theirs), spread


def noise(rank: int, same_seed: bool) -> float:
    """Largest difference between the ranks' draws for the same row."""
    parallel = DistributedDataParallel(ImportanceWeightedELBO()(*pair("MeanField")))
    drawn: list[Tensor] = []
    parallel.module.guide.register_forward_hook(lambda *call: drawn.append(call[2]))
    pyro.set_rng_seed(0 if same_seed else rank)
    parallel(torch.ones(5, PIXELS)).backward()
    z = drawn[-1].detach()
    return (z - mean_of(z)).abs().max().item()


def main(rank: int, folder: Path, dtype: str) -> None:
    torch.set_default_dtype(getattr(torch, dtype))
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    found = {
        f"{name} {gradient} K={k}": compare(rank, name, k, gradient)
        for name in FAMILIES
        for k, gradient in OBJECTIVES
    }
    found["ragged ranks"] = compare(rank, "IAF", 5, "dreg", ranks=RAGGED)
    found["registered"] = compare(rank, "IAF", 5, "dreg", registered=True)
    found["scale"] = scale(rank)
    found["training"], found["spread"] = train(rank)
    found["noise, one seed"] = noise(rank, same_seed=True)
    own = noise(rank, same_seed=False)
    (folder / f"{rank}.json").write_text(json.dumps({"zero": found, "own noise": own}))
    # DDP lies in reference cycles and holds on to the group: left to the end of the interpreter,
    # gloo's threads abort the process every few runs.
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
