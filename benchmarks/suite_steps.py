"""Suite `steps`: one training step, ours, by hand and with the hosts' objectives.

Two variational autoencoders, the digits' and one of MNIST's size, at K = 1, 5 and 50.
"""

import importlib

import cells
from sizes import DIGITS, MNIST, TINY

MODELS = {"digits": DIGITS, "MNIST": MNIST}
PARTICLES = (1, 5, 50)


def cases(options):
    """Names and sizes of the models, and numbers of particles."""
    if options.smoke_test:
        return [("tiny", TINY, 2)]
    chosen = [(name, sizes, k) for name, sizes in MODELS.items() for k in PARTICLES]
    return [case for case in chosen if case[0] == "digits"] if options.quick else chosen


def rows(backend, options):
    """Rows of the suite, and what is missing."""
    module = importlib.import_module(f"steps_{backend}")
    found, made = [], {"compiler": options.compiler}
    names = cells.smoke_names(backend) if options.smoke_test else None
    for name, sizes, num_particles in cases(options):
        steps = module.steps(num_particles, "reparam", sizes, names, **made)
        found += cells.take_turns(steps, options, model=name, K=num_particles)
    return found, module.missing()
