"""What the examples share: options, learning rates, the table of results and pictures."""

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BACKENDS = tuple(name for name in ("pyro", "numpyro") if find_spec(name))
COLUMNS = ("backend", "data", "guide", "objective", "bound", "NLL", "active units", "seconds")
NET_COLUMNS = (
    "backend",
    "data",
    "layers",
    "estimator",
    "training ELBO",
    "last 1000 steps",
    "test bound, 100 samples",
    "seconds",
)
GUIDES = ("MeanField", "IAF", "Auxiliary", "VGP")
ESTIMATORS = ("reinforce", "nvil", "leave-one-out", "rebar", "relax", "disarm", "vimco")
# Guide of the eight schools: particles, gradient, learning rate.
SCHOOLS_OBJECTIVES = {"MeanField": (1, "reparam", 5e-2), "IAF": (10, "stl", 5e-3)}
COLOURS = {"MeanField": "#d1772f", "IAF": "#2f6fb0", "NUTS": "#333333"}


def parser(description):
    """Options that every example has."""
    result = argparse.ArgumentParser(description=description.splitlines()[0])
    result.add_argument("--output-dir", type=Path, default=Path("results"))
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--smoke-test", action="store_true", help="a run of seconds")
    return result


def fit_parser(description):
    """Options of the examples that train a guide."""
    result = parser(description)
    result.add_argument("--num-steps", type=int, help="steps of the optimiser")
    result.add_argument(
        "--num-evaluation-samples", type=int, default=5000, help="samples behind the NLL"
    )
    return result


def vae_parser(description):
    """Options of the two variational autoencoders."""
    result = fit_parser(description)
    result.add_argument("--guide", choices=GUIDES, default="MeanField")
    result.add_argument("--num-particles", type=int, default=1, metavar="K")
    result.add_argument("--gradient", choices=("reparam", "stl", "dreg"), default="reparam")
    result.add_argument("--dataset", choices=("digits", "mnist"), default="digits")
    result.add_argument("--data-dir", type=Path, help="folder of binarized_mnist_static.npz")
    result.add_argument(
        "--max-epochs", type=int, default=3280, help="epochs on MNIST; the schedule shrinks"
    )
    result.add_argument("--batch-size", type=int, default=20, help="rows of a batch on MNIST")
    result.add_argument(
        "--schedule",
        choices=("stages", "cosine"),
        default="stages",
        help="learning rate on MNIST: the paper's stages, or a half cosine for short runs",
    )
    return result


def belief_net_parser(description):
    """Options of the two sigmoid belief nets."""
    result = parser(description)
    result.add_argument("--estimator", choices=ESTIMATORS, default="rebar")
    result.add_argument("--num-layers", type=int, choices=(1, 2), default=1)
    result.add_argument("--dataset", choices=("digits", "mnist"), default="digits")
    result.add_argument("--data-dir", type=Path, help="folder of binarized_mnist_static.npz")
    result.add_argument(
        "--num-steps", type=int, help="steps of the optimiser; 20,000, or 2,000,000 on MNIST"
    )
    result.add_argument("--batch-size", type=int, help="rows of a batch; 50, or 24 on MNIST")
    result.add_argument(
        "--learning-rate", type=float, help="before its half cosine; 3e-3, or 1e-3 on MNIST"
    )
    result.add_argument(
        "--num-evaluations", type=int, help="samples of every row behind the ELBOs; 50, or 4"
    )
    return result


def belief_net_defaults(args):
    """Fill in, in place, what depends on the data set."""
    digits = args.dataset == "digits"
    args.num_steps = args.num_steps or (20_000 if digits else 2_000_000)
    args.batch_size = args.batch_size or (50 if digits else 24)
    args.learning_rate = args.learning_rate or (3e-3 if digits else 1e-3)
    args.num_evaluations = args.num_evaluations or (50 if digits else 4)
    if args.smoke_test:
        args.num_steps, args.num_evaluations = 20, 2


def belief_net_title(backend, args):
    """What the progress bar of a belief net says."""
    return f"{backend} {args.dataset} {args.num_layers} x {args.estimator}"


def belief_net_stem(backend, args):
    """Path, without a suffix, of the files that a run of a belief net writes."""
    name = f"belief_net_{args.dataset}_{backend}_{args.num_layers}_{args.estimator}_s{args.seed}"
    return args.output_dir / name


def objective_name(num_particles, gradient):
    """`ELBO`, `ELBO, stl`, `IW-50, dreg`, ..."""
    name = "ELBO" if num_particles == 1 else f"IW-{num_particles}"
    return name if gradient == "reparam" else f"{name}, {gradient}"


def vae_title(backend, args):
    """What the progress bar of an autoencoder says."""
    objective = objective_name(args.num_particles, args.gradient)
    return f"{backend} {args.dataset} {args.guide} {objective}"


def vae_stem(backend, args):
    """Path, without a suffix, of the files that a run of an autoencoder writes."""
    name = f"{args.dataset}_{backend}_{args.guide}_k{args.num_particles}_{args.gradient}"
    return args.output_dir / name.lower()


def cosine(step, num_steps, floor=0.01):
    """Factor of the learning rate: a half cosine from 1 down to `floor`."""
    progress = min(step / num_steps, 1.0)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def stages(max_epochs, num_stages=8):
    """`(end, rate)` of each stage: `10^(-3 - i/7)` for `3^i` epochs, i = 0..7.

    The ends are in epochs, shrunk in proportion to sum to `max_epochs`
    (Burda, Grosse and Salakhutdinov 2016, section 5).
    """
    total = sum(3**i for i in range(num_stages))
    ends = [sum(3**j for j in range(i + 1)) for i in range(num_stages)]
    return [(max_epochs * end / total, 10.0 ** (-3 - i / 7)) for i, end in enumerate(ends)]


def write_row(path, row):
    """The run's row of results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=2) + "\n")


def table(rows, columns=COLUMNS, num_text=4):
    """Rows of results as aligned text, the first `num_text` columns to the left."""

    def text(value):
        if value is None:
            return "-"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    cells = [list(columns)] + [[text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = []
    for line in cells:
        left = [
            cell.ljust(width)
            for cell, width in zip(line[:num_text], widths[:num_text], strict=True)
        ]
        right = [
            cell.rjust(width)
            for cell, width in zip(line[num_text:], widths[num_text:], strict=True)
        ]
        lines.append("  ".join(left + right))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def mosaic(rows, shape, gap=1):
    """A `(rows, columns, pixels)` array as one image with white gaps."""
    rows = np.asarray(rows)
    tiles = rows.reshape(*rows.shape[:2], *shape)
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan)
    height, width = padded.shape[2:]
    image = padded.transpose(0, 2, 1, 3).reshape(len(rows) * height, -1)
    return image[: len(rows) * height - gap, : rows.shape[1] * width - gap]


def draw_mosaic(axes, rows, shape, title, labels=None):
    """Images in a grid, one line of them per row."""
    palette = matplotlib.colormaps["gray_r"].with_extremes(bad="white")
    axes.imshow(mosaic(rows, shape), cmap=palette, vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left")
    height = shape[0] + 1
    ticks = [] if labels is None else [i * height + shape[0] / 2 for i in range(len(labels))]
    axes.set_yticks(ticks, labels or [], fontsize=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def vae_picture(path, arrays):
    """Reconstructions and prior samples of one autoencoder."""
    figure, (left, right) = plt.subplots(2, 1, figsize=(6.4, 2.1), layout="constrained")
    shape = tuple(arrays["shape"])
    draw_mosaic(
        left,
        [arrays["data"], arrays["reconstruction"]],
        shape,
        "Test rows and their reconstructions",
        ["data", "mean"],
    )
    prior = arrays["prior"]
    draw_mosaic(right, prior.reshape(2, -1, prior.shape[-1]), shape, "Means of prior samples")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def posterior_draws(draws):
    """Arrays `(chain * draw, ...)` of the posterior group of an ArviZ object."""
    posterior = draws["posterior"]
    return {
        name: (values := posterior[name].values).reshape(-1, *values.shape[2:])
        for name in posterior.data_vars
    }


def flatten(fits):
    """`{fit: {name: draws}}` as one dictionary of arrays, for `numpy.savez`."""
    return {f"{fit}/{name}": x for fit, draws in fits.items() for name, x in draws.items()}


def unflatten(arrays):
    """The inverse of `flatten`."""
    fits = {}
    for key, value in arrays.items():
        fit, name = key.split("/")
        fits.setdefault(fit, {})[name] = value
    return fits


def draw_intervals(axes, fits, schools):
    """Medians, 50% and 90% intervals of each school's effect, one colour per fit."""
    for offset, (label, fit) in enumerate(fits.items()):
        low, q25, median, q75, high = np.quantile(fit["theta"], [0.05, 0.25, 0.5, 0.75, 0.95], 0)
        y = np.arange(len(schools)) + 0.22 * (offset - (len(fits) - 1) / 2)
        colour = COLOURS[label]
        axes.hlines(y, low, high, color=colour, linewidth=1)
        axes.hlines(y, q25, q75, color=colour, linewidth=3)
        axes.plot(median, y, "o", color=colour, markersize=3.5, label=label)
    axes.set_yticks(range(len(schools)), schools, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("effect of coaching (points); median, 50% and 90%", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_funnel(axes, label, fit, reference):
    """One guide's draws of `(theta_0, log tau)` over those of NUTS."""
    for name, draws in (("NUTS", reference), (label, fit)):
        axes.plot(
            draws["theta"][:2000, 0],
            np.log(draws["tau"][:2000]),
            ".",
            markersize=2.5,
            alpha=0.5 if name == label else 0.35,
            color=COLOURS[name] if name == label else "#999999",
            markeredgewidth=0,
            label=name,
        )
    axes.set_xlim(-20, 40)
    axes.set_ylim(-4, 4.5)
    axes.set_xlabel("effect of the first school", fontsize=8)
    axes.set_ylabel("log tau", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(
        fontsize=8,
        frameon=False,
        ncols=2,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        markerscale=4,
    )


def draw_schools(axes, fits, schools):
    """Intervals of all fits, then each guide's funnel over that of NUTS: three panels."""
    draw_intervals(axes[0], fits, schools)
    guides = [label for label in fits if label != "NUTS"]
    for panel, label in zip(axes[1:], guides, strict=True):
        draw_funnel(panel, label, fits[label], fits["NUTS"])


def schools_picture(path, fits, schools):
    """The guides' posteriors of the eight schools against those of NUTS."""
    figure, axes = plt.subplots(
        1, 3, figsize=(10, 3.6), layout="constrained", width_ratios=(1.4, 1, 1)
    )
    draw_schools(axes, fits, schools)
    figure.savefig(path, dpi=150)
    plt.close(figure)
