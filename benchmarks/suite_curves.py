"""Suite `curves`: the cost of a step against K, the latent dimension and the batch.

One of the three varies at a time, around K = 5, 16 latent dimensions and 64 rows; the networks are
those of the digits.
"""

import importlib

import cells
from sizes import CURVES, TINY

AXES = {
    "K": (1, 5, 50, 500),
    "latent_dim": (2, 8, 32, 128, 256),
    "batch": (1, 16, 128, 1024, 4096),
}
CENTRE = 5
CANDIDATES = {
    "pyro": (
        "plain PyTorch",
        "torch.compile",
        "vae-ext, SVI",
        "vae-ext, compiled",
        "Trace_ELBO, SVI",
        "RenyiELBO, SVI",
    ),
    "numpyro": (
        "plain JAX",
        "vae-ext, SVI",
        "vae-ext, compiled",
        "Trace_ELBO, SVI",
        "RenyiELBO, SVI",
    ),
}


def cases(options):
    """Axis, value, sizes and number of particles of every cell."""
    if options.smoke_test:
        return [("K", 2, TINY, 2)]
    found = []
    for axis, values in AXES.items():
        for value in values[:: 2 if options.quick else 1]:
            sizes = CURVES if axis == "K" else CURVES._replace(**{axis: value})
            found.append((axis, value, sizes, value if axis == "K" else CENTRE))
    return found


def rows(backend, options):
    """Rows of the suite, and what is missing."""
    module = importlib.import_module(f"steps_{backend}")
    # Compilation takes longer than all else, and the steps' suite has these two.
    made = {"compiler": None if options.quick else options.compiler}
    found = []
    names = ("vae-ext, SVI",) if options.smoke_test else CANDIDATES[backend]
    for axis, value, sizes, num_particles in cases(options):
        steps = module.steps(num_particles, "reparam", sizes, names, **made)
        found += cells.take_turns(steps, options, axis=axis, value=value)
    return found, module.missing()
