"""`fit_posterior` on nine posteriors of posteriordb, against reference draws and the hosts' guides.

    python benchmarks/posteriors.py --backend numpyro --data-dir posteriordb --seeds 0 1 2 3 4
    python benchmarks/posteriors.py --backend pyro --data-dir posteriordb
    python benchmarks/posteriors.py --data-dir posteriordb --methods pathfinder hosts nuts
    python benchmarks/posteriors.py --backend pyro --data-dir posteriordb --methods pathfinder nuts
    python benchmarks/posteriors.py --data-dir posteriordb --family VGP --num-restarts 3
    python benchmarks/posteriors.py --backend numpyro --regression 10 20 35 100
    python benchmarks/posteriors.py --backend numpyro --energies --family VGP --temper

A row is a fit with all defaults: the worst error of a mean in the posterior's standard deviations,
the worst ratio of standard deviations (always above 1), k-hat of 20,000 draws, the bound, steps,
seconds by part and draws a second of race and training. `smoothed` are error and ratio after
importance resampling. `pathfinder` is `training.pathfinder` alone, its 4,000 resampled draws;
`hosts` are the host's AutoNormal, AutoMultivariateNormal, AutoIAFNormal and, in NumPyro alone,
AutoBNAFNormal, 10,000 steps of Adam, 16 draws, at the better of 1e-2 and 1e-3 by the final loss;
`nuts` is NUTS with 1,000 warmup steps and 1,000 or, in NumPyro alone, 10,000 draws in one chain,
compilation in its seconds; in Pyro it is given up after `--most-seconds`. There a flat prior gets a
sampler: without one neither starts. Data and draws are those that `examples/posterior_data.py`
names. With `--regression` the rows are linear regressions whose evidence is known, by size, with
`--energies` the densities of `examples/targets.py`, and the bound is given in nats below the
evidence.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import posterior_data
import targets


def compared(name, draws, arguments, truth):
    """Worst error of a mean, worst ratio of standard deviations, and whose it is."""
    found = posterior_data.quantities(name, draws, arguments)
    errors = {k: abs(found[k].mean() - truth[k].mean()) / truth[k].std() for k in truth}
    ratios = {k: found[k].std() / truth[k].std() for k in truth}
    ratios = {k: max(x, 1 / x) if x > 0 else np.inf for k, x in ratios.items()}
    worst = max(ratios, key=ratios.get)
    return max(errors.values()), ratios[worst], worst


def regression(size):
    """Design, outcome and log evidence of a regression with a unit Normal prior and noise."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal((40, size)) * np.logspace(-0.5, 0.5, size)
    y = x @ rng.standard_normal(size) + rng.standard_normal(40)
    marginal = x @ x.T + np.eye(40)
    log_det = np.linalg.slogdet(2 * np.pi * marginal)[1]
    return x, y, -0.5 * (y @ np.linalg.solve(marginal, y) + log_det)


def seconds_of(history):
    parts = " ".join(f"{k} {v:.1f}" for k, v in history.seconds.items())
    return f"{parts} s, {history.draws_per_second:.0f} draws/s"


def show_fit(title, backend, model, values, args, seed, compare):
    """Fit and print a row."""
    family = backend.families(args.family)
    options = {"temper": args.temper, "num_restarts": args.num_restarts}
    found, draws, again = backend.fit(model, values, family, seed, options)
    told, history = found.diagnosis, found.history
    print(
        f"{title:22s} {args.family:9s} seed {seed}: {compare(draws, told)}k-hat {told.khat:.2f}, "
        f"smoothed {compare(again, told)}bound {told.elbo:.3f}, evidence {told.log_evidence:.3f}, "
        f"{len(history.step_elbos)} steps, {history.stopped}, {seconds_of(history)}",
        flush=True,
    )


def main(args):
    backend = import_module(f"posteriors_{args.backend}").Backend()
    for size in args.regression:
        x, y, evidence = regression(size)
        for seed in args.seeds:
            show_fit(
                f"regression {size}",
                backend,
                backend.linear(),
                backend.values({"x": x, "y": y}),
                args,
                seed,
                lambda draws, told, evidence=evidence: f"{evidence - told.elbo:.4f} nats below, ",
            )
    for name in () if args.energies is None else args.energies or targets.TARGETS:
        log_z, truth = targets.exact(name)
        for seed in args.seeds:
            show_fit(
                name,
                backend,
                backend.energy(targets.TARGETS[name]),
                (),
                args,
                seed,
                lambda draws, told, name=name, log_z=log_z, truth=truth: (
                    f"{log_z - told.elbo:.4f} nats below, {targets.TARGETS[name].what} "
                    f"{targets.TARGETS[name].number(np.asarray(draws['z'])):.3f} ({truth:.3f}), "
                ),
            )
    for name in [] if args.regression or args.energies is not None else args.posteriors:
        arguments = posterior_data.arguments(name, args.data_dir)
        values, model = backend.values(arguments), backend.models[name]
        truth = posterior_data.reference(name, args.data_dir)

        def compare(draws, told=None, name=name, arguments=arguments, truth=truth):
            draws = {site: np.asarray(value) for site, value in draws.items()}
            error, ratio, worst = compared(name, draws, arguments, truth)
            return f"error {error:.3f}, ratio {ratio:.3f} ({worst}), "

        for seed in args.seeds:
            if "fit" in args.methods:
                show_fit(name, backend, model, values, args, seed, compare)
            if "pathfinder" in args.methods:
                found, seconds = backend.pathfinder(model, values, seed)
                told = f"k-hat {found.khat:.2f}, bound {found.elbo:.3f}, {seconds:.1f} s"
                print(f"{name:22s} Pathfinder, resampled {compare(found.resampled)}{told}")
            if "hosts" in args.methods:
                for label, loss, draws, seconds in backend.hosts(model, values, seed):
                    print(
                        f"{name:22s} {label:22s} {compare(draws)}loss {loss:.3f}, {seconds:.1f} s"
                    )
            if "nuts" in args.methods:
                for num_draws in backend.nuts_draws:
                    title = f"{name:22s} NUTS, {num_draws:6d}: "
                    try:
                        draws, seconds = backend.nuts(
                            model, values, seed, num_draws, args.most_seconds
                        )
                    except TimeoutError as end:
                        print(f"{title}given up after {args.most_seconds:.0f} s, {end}")
                        continue
                    print(f"{title}{compare(draws)}{seconds:.1f} s")
            sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("numpyro", "pyro"), default="numpyro")
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--family", default="IAF")
    parser.add_argument("--temper", action="store_true")
    parser.add_argument("--num-restarts", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=["fit"])
    parser.add_argument("--most-seconds", type=float, default=600.0)
    parser.add_argument("--posteriors", nargs="+", default=list(posterior_data.POSTERIORS))
    parser.add_argument("--energies", nargs="*", choices=list(targets.TARGETS), metavar="TARGET")
    parser.add_argument("--regression", type=int, nargs="*", default=[])
    main(parser.parse_args())
