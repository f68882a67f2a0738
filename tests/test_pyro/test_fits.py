"""What a richer guide is for: densities that a diagonal Normal misses, with a known normaliser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from reference import energies

from pyro_vae_ext import guides
from pyro_vae_ext.elbos import ImportanceWeightedELBO

OPTIONS = {
    "IAF": {"num_flows": 4, "hidden_dims": (32,)},
    "Auxiliary": {"hidden_dims": (32, 32)},
    "VGP": {"num_inducing": 30, "hidden_dims": (32, 32)},
}


def fitted(
    name: str, log_density: Callable, num_steps: int, flat_for: float, dim: int = 2, **options: Any
) -> tuple[float, torch.Tensor]:
    """The ELBO after training, and draws; the density grows from flat for a part of the steps."""
    family = getattr(guides, name)(dim, **OPTIONS.get(name, {}), **options)
    flat = dist.ImproperUniform(dist.constraints.real_vector, (), (dim,))

    def model(temperature: float) -> None:
        with pyro.plate("draws", 64):
            z = pyro.sample("z", flat)
            pyro.factor("energy", temperature * log_density(z, torch))

    def guide(temperature: float) -> torch.Tensor:
        with pyro.plate("draws", 64):
            return family("z")

    loss = ImportanceWeightedELBO()(model, guide)
    adam = torch.optim.Adam(family.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_steps)
    for step in range(num_steps):
        adam.zero_grad()
        loss(min(1.0, 0.01 + step / max(flat_for * num_steps, 1e-9))).backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        elbo = ImportanceWeightedELBO(200, max_plate_nesting=1)
        return elbo.log_weights(model, guide, 1.0).mean().item(), torch.cat(
            [guide(1.0) for _ in range(50)]
        )


@pytest.mark.parametrize("name", ["MeanField", "IAF", "Auxiliary", "VGP"])
def test_divergence_from_a_curved_density(name: str) -> None:
    """Examples run longer and come closer; the diagonal Normal stays where it is."""
    num_steps = {"MeanField": 300, "VGP": 3000}.get(name, 1500)
    elbo, _ = fitted(name, energies.sine, num_steps, 0.0)
    divergence = energies.log_normaliser(energies.sine) - elbo
    if name == "MeanField":
        assert 1.6 < divergence < 2.5
    else:
        assert 0.0 < divergence < 1.05  # half of a diagonal Normal's


@pytest.mark.parametrize("name", ["MeanField", "Auxiliary", "VGP"])
def test_mass_on_both_modes(name: str) -> None:
    """And a bound above that of the best Normal on one of them, which loses log 2."""
    elbo, draws = fitted(name, energies.mixture, 5000 if name == "VGP" else 1500, 0.3)
    share = (draws[:, 0] > 0.0).double().mean().item()
    if name == "MeanField":
        assert elbo < -0.65
    else:
        assert 0.25 < share < 0.75 and elbo > -0.65


@pytest.mark.parametrize("tails", ["normal", "exponential"])
def test_exponential_tail(tails: str) -> None:
    """The logarithm of an exponential number: to a flow of one dimension its base is all."""
    elbo, _ = fitted("IAF", energies.log_exponential, 1500, 0.0, dim=1, tails=tails)
    if tails == "normal":
        assert -0.1 < elbo < -0.075  # the best Normal's is log(2 pi) / 2 - 1
    else:
        assert -0.03 < elbo < 0.005
