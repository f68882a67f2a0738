"""Densities with a known normaliser, what is reported of them, and their pictures.

The four energies of Rezende and Mohamed (2015, arXiv 1505.05770, table 1), with a smooth wall
at |z1| = 4 that makes the last three integrable, Neal's funnel, a banana and a mixture of two
Normals six standard deviations apart. The functions take their array module, `jax.numpy`,
`torch` or `numpy`, as an argument.
"""

import argparse
import functools
import json
import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import report

GUIDES = ("MeanField", "IAF", "Auxiliary", "VGP")
# Learning rate and options of each guide.
RATES = {"MeanField": 1e-2, "IAF": 5e-3, "Auxiliary": 5e-3, "VGP": 1e-2}
OPTIONS = {"IAF": {"num_flows": 8}, "Auxiliary": {"aux_dim": 2}}
COLUMNS = ("backend", "target", "guide", "KL", "log Z, error", "what", "found", "true", "seconds")


def _wall(z, xp):
    beyond = xp.abs(z) - 4.0
    return 500.0 * (beyond * (beyond > 0.0)) ** 2


def _normal(z, loc, scale, xp):
    return -0.5 * ((z - loc) / scale) ** 2 - xp.log(scale) - 0.5 * math.log(2.0 * math.pi)


def _u1(z, xp):
    z1, z2 = z[..., 0], z[..., 1]
    ring = 0.5 * ((xp.sqrt(z1**2 + z2**2) - 2.0) / 0.4) ** 2
    lobes = xp.logaddexp(-0.5 * ((z1 - 2.0) / 0.6) ** 2, -0.5 * ((z1 + 2.0) / 0.6) ** 2)
    return lobes - ring - _wall(z1, xp)


def _u2(z, xp):
    z1, z2 = z[..., 0], z[..., 1]
    return -0.5 * ((z2 - xp.sin(0.5 * math.pi * z1)) / 0.4) ** 2 - _wall(z1, xp)


def _u3(z, xp):
    z1, z2 = z[..., 0], z[..., 1]
    rest = z2 - xp.sin(0.5 * math.pi * z1)
    bump = 3.0 * xp.exp(-0.5 * ((z1 - 1.0) / 0.6) ** 2)
    halves = -0.5 * (rest / 0.35) ** 2, -0.5 * ((rest + bump) / 0.35) ** 2
    return xp.logaddexp(*halves) - _wall(z1, xp)


def _u4(z, xp):
    z1, z2 = z[..., 0], z[..., 1]
    rest = z2 - xp.sin(0.5 * math.pi * z1)
    step = 1.5 * (1.0 + xp.tanh((z1 - 1.0) / 0.6))  # 3 sigmoid((z1 - 1) / .3)
    halves = -0.5 * (rest / 0.4) ** 2, -0.5 * ((rest + step) / 0.35) ** 2
    return xp.logaddexp(*halves) - _wall(z1, xp)


def _funnel(z, xp):
    v = z[..., 0]
    one = xp.ones_like(v)
    rest = _normal(z[..., 1:], 0.0, xp.exp(0.5 * v)[..., None], xp).sum(-1)
    return _normal(v, 0.0, 3.0 * one, xp) + rest


def _banana(z, xp):
    z1, z2 = z[..., 0], z[..., 1]
    one = xp.ones_like(z1)
    return _normal(z1, 0.0, one, xp) + _normal(z2, z1**2 - 1.0, 0.3 * one, xp)


def _mixture(z, xp):
    one = xp.ones_like(z)
    centre = one * (z[..., :1] * 0.0) + 3.0 * xp.stack([one[..., 0], 0.0 * one[..., 0]], -1)
    halves = (_normal(z, sign * centre, one, xp).sum(-1) for sign in (1.0, -1.0))
    return xp.logaddexp(*halves) - math.log(2.0)


@dataclass(frozen=True)
class Target:
    """An unnormalised log-density, and one number that a good guide gets right.

    Attributes:
        log_density: function of values `(*batch, dim)` and an array module.
        dim: dimension.
        what: name of the number.
        number: function of draws `(n, dim)`.
        truth: its value under the target; None if found by quadrature.
        annealed: whether training starts from a flat density.
    """

    log_density: object
    dim: int
    what: str
    number: object
    truth: float | None = None
    annealed: bool = True


def _right_half(draws):
    return float((draws[:, 0] > 0.0).mean())


def _sd(axis):
    return lambda draws: float(draws[:, axis].std())


TARGETS = {
    "U1": Target(_u1, 2, "P(z1 > 0)", _right_half),
    "U2": Target(_u2, 2, "sd of z1", _sd(0)),
    "U3": Target(_u3, 2, "sd of z1", _sd(0)),
    "U4": Target(_u4, 2, "sd of z1", _sd(0)),
    "funnel": Target(_funnel, 10, "sd of v", _sd(0), 3.0, annealed=False),
    "banana": Target(_banana, 2, "sd of z2", _sd(1), math.sqrt(2.0 + 0.09), annealed=False),
    "mixture": Target(_mixture, 2, "P(z1 > 0)", _right_half, 0.5),
}


@functools.cache
def exact(name):
    """Log normaliser, and the true value of the target's number; by quadrature for U1-U4."""
    target = TARGETS[name]
    if target.truth is not None:
        return 0.0, target.truth
    z1, z2 = np.linspace(-4.5, 4.5, 1201), np.linspace(-9.0, 9.0, 1801)
    density = np.exp(target.log_density(np.stack(np.meshgrid(z1, z2, indexing="ij"), -1), np))
    cell = (z1[1] - z1[0]) * (z2[1] - z2[0])
    marginal = density.sum(1) / density.sum()
    if target.what.startswith("P"):
        truth = 0.5  # by symmetry
    else:
        truth = math.sqrt((marginal * z1**2).sum() - (marginal * z1).sum() ** 2)
    return float(np.log(density.sum() * cell)), truth


def schedule(target, num_steps):
    """Inverse temperatures of the steps: from .01 to 1 in the first half, where annealed."""
    if not target.annealed:
        return np.ones(num_steps)
    return np.minimum(1.0, 0.01 + 2.0 * np.arange(num_steps) / num_steps)


def row(backend, name, guide, log_weights, draws, seconds):
    """What is reported of one fit, from `(n,)` log-weights and `(m, dim)` draws."""
    log_z, truth = exact(name)
    log_weights = np.asarray(log_weights, dtype=float)
    largest = log_weights.max()
    log_mean = largest + math.log(np.exp(log_weights - largest).mean())
    return {
        "backend": backend,
        "target": name,
        "guide": guide,
        "KL": log_z - float(log_weights.mean()),
        "log Z, error": log_mean - log_z,
        "what": TARGETS[name].what,
        "found": TARGETS[name].number(draws),
        "true": truth,
        "seconds": seconds,
    }


def parser(description):
    """Options of the two scripts."""
    result = report.parser(description)
    result.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    result.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    result.add_argument("--num-steps", type=int, default=20_000, help="steps of the optimiser")
    result.add_argument("--batch-size", type=int, default=128, help="draws in a step")
    result.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return result


def picture(path, fits):
    """Densities of the 2-d targets and of the draws of every guide: `{(target, guide): draws}`."""
    names = [name for name in TARGETS if TARGETS[name].dim == 2 and any(n == name for n, _ in fits)]
    guides = [guide for guide in GUIDES if any(g == guide for _, g in fits)]
    if not names:
        return
    size = (1.5 * len(names) + 0.4, 1.5 * (len(guides) + 1))
    figure, axes = plt.subplots(
        len(guides) + 1, len(names), figsize=size, layout="constrained", squeeze=False
    )
    grid = np.linspace(-4.5, 4.5, 121)
    centres = 0.5 * (grid[1:] + grid[:-1])
    for column, name in enumerate(names):
        points = np.stack(np.meshgrid(centres, centres, indexing="ij"), -1)
        panels = [np.exp(TARGETS[name].log_density(points, np))]
        for guide in guides:
            draws = fits.get((name, guide), np.zeros((0, 2)))
            panels.append(np.histogram2d(draws[:, 0], draws[:, 1], (grid, grid))[0])
        for axis, panel, label in zip(axes[:, column], panels, ("target", *guides), strict=True):
            axis.imshow(panel.T, origin="lower", cmap="magma", interpolation="bilinear")
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(label, fontsize=8)
        axes[0, column].set_title(name, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(args, backend, rows, fits):
    """The rows as JSON, the draws, and the picture."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stem = args.output_dir / f"energies_{backend}"
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    np.savez(stem.with_suffix(".npz"), **{"/".join(key): draws for key, draws in fits.items()})
    picture(stem.with_suffix(".png"), fits)
