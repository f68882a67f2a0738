"""Densities with a known normaliser, fitted by every guide family in Pyro.

The Kullback-Leibler divergence of a guide is the log normaliser minus its ELBO. The four energies
of Rezende and Mohamed (2015, arXiv 1505.05770), the funnel, a banana, a mixture.

    python examples/energies_pyro.py --targets U1 mixture
"""

import time

import pyro
import pyro.distributions as dist
import report
import targets
import torch
from tqdm import tqdm

from pyro_vae_ext import guides
from pyro_vae_ext.elbos import ImportanceWeightedELBO


def fit(args, name, guide_name):
    """Train one guide on one target; return its log-weights and its draws."""
    target = targets.TARGETS[name]
    family = getattr(guides, guide_name)(target.dim, **targets.OPTIONS.get(guide_name, {}))
    flat = dist.ImproperUniform(dist.constraints.real_vector, (), (target.dim,))

    def model(temperature):
        with pyro.plate("draws", args.batch_size):
            z = pyro.sample("z", flat)
            pyro.factor("energy", temperature * target.log_density(z, torch))

    def guide(temperature):
        with pyro.plate("draws", args.batch_size):
            return family("z")

    loss = ImportanceWeightedELBO()(model, guide)
    adam = torch.optim.Adam(family.parameters(), lr=targets.RATES[guide_name])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: report.cosine(step, args.num_steps)
    )
    bound = 0.0
    with tqdm(targets.schedule(target, args.num_steps), desc=f"pyro {name} {guide_name}") as bar:
        for step, temperature in enumerate(bar):
            value = loss(temperature)
            value.backward()
            torch.nn.utils.clip_grad_norm_(family.parameters(), 100.0 * args.batch_size)
            adam.step()
            schedule.step()
            adam.zero_grad()
            if step % 100 == 0:
                bound = -value.item() / args.batch_size
                bar.set_postfix(bound=f"{bound:.2f}", refresh=False)
    elbo = ImportanceWeightedELBO(10, max_plate_nesting=1)
    with torch.no_grad():
        log_weights = [elbo.log_weights(model, guide, 1.0) for _ in range(args.num_evaluations)]
        draws = [guide(1.0) for _ in range(args.num_evaluations)]
    return torch.cat(log_weights).flatten().numpy(), torch.cat(draws).numpy()


def main(args):
    """Fit all guides to all targets, write the files; return the rows of results."""
    pyro.enable_validation(False)
    args.num_evaluations = 2 if args.smoke_test else 100
    if args.smoke_test:
        args.num_steps, args.targets = 10, ["U1"]
    rows, fits = [], {}
    for name in args.targets:
        for guide in args.guides:
            torch.manual_seed(args.seed)
            start = time.perf_counter()
            log_weights, fits[name, guide] = fit(args, name, guide)
            seconds = time.perf_counter() - start
            rows.append(targets.row("Pyro", name, guide, log_weights, fits[name, guide], seconds))
    targets.write(args, "pyro", rows, fits)
    return rows


if __name__ == "__main__":
    rows = main(targets.parser(__doc__).parse_args())
    print(report.table(rows, targets.COLUMNS, 3))
