"""What the two comparisons of posteriors share: settings, start, k-hat, errors and pictures."""

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import posterior_data
import report
from report import plt

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

OLD_ARVIZ = int(az.__version__.split(".")[0]) < 1
COLUMNS = {
    "posterior": "s",
    "guide": "s",
    "objective": "s",
    "ELBO": ".2f",
    "bound": ".2f",
    "log evidence": ".2f",
    "k-hat": ".2f",
    "mean error": ".3f",
    "sd ratio": ".3f",
    "weighted mean error": ".3f",
    "weighted sd ratio": ".3f",
    "seconds": ".0f",
}
REFERENCE = "reference"
COLOURS = {
    REFERENCE: "#333333",
    "MeanField": "#d1772f",
    "full-rank": "#6f9c3d",
    "IAF": "#2f6fb0",
    "Auxiliary": "#a0489b",
    "VGP": "#2a9d8f",
}


class Training(NamedTuple):
    """How a guide is trained: particles, gradient, learning rate at the start, steps."""

    num_particles: int
    gradient: str
    rate: float
    num_steps: int


# At several particles "stl" is biased, and good all the same: near the posterior both its bias and
# its variance vanish, as those of "dreg" do, and where a guide falls short it leaves fewer draws
# in regions that importance weights then have to take out.
TRAINING = {
    "MeanField": Training(1, "stl", 1e-2, 4_000),
    "full-rank": Training(1, "stl", 1e-3, 4_000),
    "IAF": Training(10, "stl", 3e-3, 10_000),
    "Auxiliary": Training(10, "stl", 3e-3, 10_000),
    "VGP": Training(10, "stl", 3e-3, 10_000),
}


def parser(description):
    """Options of the two comparisons."""
    result = report.parser(description)
    result.add_argument("--data-dir", type=Path, help="folder of the files of posteriordb")
    result.add_argument(
        "--posteriors",
        nargs="+",
        choices=list(posterior_data.POSTERIORS),
        help="which ones; all with --data-dir, the eight schools alone without it",
    )
    result.add_argument("--guides", nargs="+", choices=list(TRAINING), default=list(TRAINING))
    result.add_argument("--num-steps", type=int, help="steps of every guide (in hundreds)")
    result.add_argument(
        "--num-evaluation-samples", type=int, default=100_000, help="samples behind the table"
    )
    return result


def settle(args):
    """Fill in what depends on other options."""
    if args.posteriors is None:
        everything = list(posterior_data.POSTERIORS)
        args.posteriors = everything if args.data_dir else ["eight_schools"]
    if args.smoke_test:
        args.num_steps, args.num_evaluation_samples = 20, 400
    args.output_dir.mkdir(parents=True, exist_ok=True)


def training(args, guide):
    """The settings of a guide, with the number of steps from the command line."""
    chosen = TRAINING[guide]
    return chosen._replace(num_steps=args.num_steps) if args.num_steps else chosen


def laplace(value_and_gradient, start):
    """Mode of `exp(-value)`, and the inverse of the Hessian there, by differences of gradients."""
    from scipy.optimize import minimize

    options = {"gtol": 1e-4, "maxiter": 2_000}
    mode = minimize(value_and_gradient, start, jac=True, method="BFGS", options=options).x
    # Differences in steps of about a thousandth of a standard deviation, then Newton's steps.
    scale = np.full(len(mode), 1e-3)
    for _ in range(5):
        columns = []
        for i, step in enumerate(np.diag(1e-3 * scale)):
            up, down = value_and_gradient(mode + step)[1], value_and_gradient(mode - step)[1]
            columns.append((up - down) / (2e-3 * scale[i]))
        hessian = 0.5 * (np.stack(columns) + np.stack(columns, 1))
        covariance = np.linalg.inv(hessian)
        scale = np.sqrt(np.diag(covariance))
        mode = mode - covariance @ value_and_gradient(mode)[1]
    return mode, covariance


def diagonal_start(parts, covariance):
    """Where a guide starts: the parts of an unconstrained vector by site, in its scales."""
    return SimpleNamespace(
        loc=np.concatenate([np.ravel(part) for part in parts.values()]),
        scale_tril=np.diag(np.sqrt(np.diag(covariance))),
        sites={site: tuple(part.shape) for site, part in parts.items()},
    )


def inducing(covariance, number=50):
    """Sources of a process, and the targets that make its map a Normal with these correlations.

    In units of the standard deviations, which the guide is scaled by.
    """
    scale = np.sqrt(np.diag(covariance))
    factor = np.linalg.cholesky(covariance / np.outer(scale, scale))
    sources = np.random.default_rng(0).normal(size=(number, len(scale)))
    return sources, sources @ factor.T


def k_hat(log_weights):
    """Shape of the Pareto tail of the importance weights; below 0.7 they can be relied upon."""
    if OLD_ARVIZ:
        return float(az.psislw(log_weights)[1])
    from arviz_stats.base import array_stats

    # This one takes what leave-one-out weights are made from: logarithms of their inverses.
    return float(array_stats.psislw(-log_weights)[1])


def weights_and_draws(fitted):
    """Log-weights, and draws of every site, of what `to_arviz` gives."""
    log_weights = np.asarray(fitted["sample_stats"]["log_weight"].values).ravel()
    draws = {name: value.values for name, value in fitted["posterior"].data_vars.items()}
    return log_weights, {name: x.reshape(-1, *x.shape[2:]) for name, x in draws.items()}


def worst_errors(columns, truth, weights=None):
    """The error of a mean in standard deviations, and the ratio of two, that are the worst."""
    errors, ratios = {}, {}
    for name, exact in truth.items():
        mean = np.average(columns[name], weights=weights)
        variance = np.average((columns[name] - mean) ** 2, weights=weights)
        errors[name] = float((mean - exact.mean()) / exact.std())
        ratios[name] = float(np.sqrt(variance) / exact.std())
    error = max(errors, key=lambda name: abs(errors[name]))
    ratio = max(ratios, key=lambda name: abs(math.log(max(ratios[name], 1e-300))))
    return {
        "mean error": errors[error],
        "mean error at": error,
        "sd ratio": ratios[ratio],
        "sd ratio at": ratio,
    }


def bound(log_weights, num_particles):
    """The importance-weighted bound that many particles give, from many independent draws."""
    groups = log_weights[: len(log_weights) // num_particles * num_particles]
    groups = groups.reshape(-1, num_particles)
    return float(np.mean(np.logaddexp.reduce(groups, 1)) - math.log(num_particles))


def row(backend, posterior, guide, used, log_weights, log_evidence, columns, truth, seconds):
    """One line of the table; `truth` are draws per name."""
    weights = np.exp(log_weights - log_weights.max())
    weighted = worst_errors(columns, truth, weights)
    return {
        "backend": backend,
        "posterior": posterior,
        "guide": guide,
        "objective": report.objective_name(used.num_particles, used.gradient),
        "steps": used.num_steps,
        "rate": used.rate,
        "ELBO": float(log_weights.mean()),
        "bound": bound(log_weights, used.num_particles),
        "log evidence": float(log_evidence),
        "k-hat": k_hat(log_weights),
        **worst_errors(columns, truth),
        "weighted mean error": weighted["mean error"],
        "weighted sd ratio": weighted["sd ratio"],
        "seconds": seconds,
    }


def table(rows):
    """Rows of results in Markdown."""
    cells = [list(COLUMNS), [":--" if kind == "s" else "--:" for kind in COLUMNS.values()]]
    cells += [[format(line[name], kind) for name, kind in COLUMNS.items()] for line in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        lines.append("| " + " | ".join(left + right) + " |")
    return "\n".join(lines)


def inference_data(columns, num_draws):
    """Some draws of every name as an ArviZ object of one chain."""
    posterior = {name: value[None, :num_draws] for name, value in columns.items()}
    return (
        az.from_dict(posterior=posterior) if OLD_ARVIZ else az.from_dict({"posterior": posterior})
    )


def legend(figure, labels):
    """The colours of the fits, to the right of the figure."""
    handles = [plt.Line2D([], [], marker="o", color=COLOURS[label]) for label in labels]
    figure.legend(handles, list(labels), loc="center left", bbox_to_anchor=(1.0, 0.5))


def forest_picture(path, fits):
    """Intervals of every quantity, one colour per fit."""
    models = {label: inference_data(columns, 10_000) for label, columns in fits.items()}
    size = (7.0, 1.0 + 0.13 * len(fits) * len(next(iter(fits.values()))))
    if OLD_ARVIZ:
        axes = az.plot_forest(
            list(models.values()),
            model_names=list(models),
            var_names=list(next(iter(fits.values()))),
            combined=True,
            hdi_prob=0.9,
            colors=[COLOURS[label] for label in models],
            figsize=size,
        )
        figure = axes[0].figure
        axes[0].get_legend().remove()
    else:
        drawn = az.plot_forest(
            models,
            combined=True,
            ci_probs=(0.5, 0.9),
            figure_kwargs={"figsize": size},
            color=[COLOURS[label] for label in models],
            aes={"color": ["model"]},
        )
        figure = drawn.viz["figure"].item()
    legend(figure, fits)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def pair_names(columns, truth, number=4):
    """The first quantities, without those that follow from one before, as in a simplex of two."""
    names = []
    for name in columns:
        known = (abs(np.corrcoef(truth[name], truth[other])[0, 1]) > 0.9999 for other in names)
        if len(names) < number and not any(known):
            names.append(name)
    return names


def pair_picture(path, label, columns, truth):
    """Scatter plots of a guide's draws over those of the reference, of the first quantities."""
    names = pair_names(columns, truth)
    axes = matrix = None
    for who, draws in ((REFERENCE, truth), (label, columns)):
        some = inference_data({name: draws[name] for name in names}, 2_000)
        if OLD_ARVIZ:
            style = {"color": COLOURS[who], "alpha": 0.3, "s": 9}
            size = (2.2 * len(names), 2.0 * len(names))
            axes = az.plot_pair(some, ax=axes, scatter_kwargs=style, figsize=size, textsize=9)
            figure = np.ravel(axes)[0].figure
        else:
            style = {"scatter": {"color": COLOURS[who], "alpha": 0.3, "s": 3}}
            style["label"] = {} if matrix is None else False
            matrix = az.plot_pair(some, plot_matrix=matrix, marginal=False, visuals=style)
            figure = matrix.viz["figure"].item()
    legend(figure, (REFERENCE, label))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def write(args, backend, name, rows, fits):
    """Rows so far as JSON, and the pictures of the posterior that is done."""
    stem = args.output_dir / f"posteriors_{backend}"
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    with warnings.catch_warnings():
        # Of ArviZ about its own future, and of layouts.
        warnings.simplefilter("ignore")
        forest_picture(f"{stem}_{name}_forest.png", fits)
        for label in fits:
            if label != REFERENCE:
                path = f"{stem}_{name}_pair_{label.lower()}.png"
                pair_picture(path, label, fits[label], fits[REFERENCE])
