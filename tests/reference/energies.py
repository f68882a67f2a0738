"""Two-dimensional densities that a diagonal Normal cannot follow.

- `sine`: the energy U2 of Rezende and Mohamed (2015), arXiv 1505.05770, table 1, with a smooth wall
  at `|z1| = 4` that makes it integrable;
- `mixture`: two standard Normals whose means are 6 apart;
- `log_exponential`: logarithms of exponential numbers, with an exponential tail on the left.

The functions take their array module (`numpy` here, a backend's in the tests of the backends).
"""

import numpy as np


def sine(z, xp=np):
    """`log` density up to a constant, `(*batch,)` from `(*batch, 2)`."""
    z1, z2 = z[..., 0], z[..., 1]
    beyond = xp.abs(z1) - 4.0
    wall = 500.0 * (beyond * (beyond > 0.0)) ** 2
    return -0.5 * ((z2 - xp.sin(0.5 * np.pi * z1)) / 0.4) ** 2 - wall


def mixture(z, xp=np):
    """Normalised log-density, `(*batch,)` from `(*batch, 2)`."""
    z1, z2 = z[..., 0], z[..., 1]
    halves = (-0.5 * (z1 - 3.0) ** 2, -0.5 * (z1 + 3.0) ** 2)
    return xp.logaddexp(*halves) - 0.5 * z2**2 - np.log(4.0 * np.pi)


def log_exponential(z, xp=np):
    """Normalised log-density of logarithms of exponential numbers, of any dimension."""
    return (z - xp.exp(z)).sum(-1)


def log_normaliser(log_density):
    """By quadrature over a rectangle that holds all of the mass."""
    z1, z2 = np.linspace(-9.0, 9.0, 1801), np.linspace(-9.0, 9.0, 901)
    values = log_density(np.stack(np.meshgrid(z1, z2, indexing="ij"), -1))
    return np.log(np.exp(values).sum() * (z1[1] - z1[0]) * (z2[1] - z2[0]))
