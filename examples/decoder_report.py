"""The table and the picture of the runs of `decoders_*.py`, and what these scripts share.

python examples/decoder_report.py results
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import report

DECODERS = ("factorised", "MADE", "Recurrent", "PixelCNN")
COLUMNS = (
    "backend",
    "decoder",
    "training",
    "seed",
    "NLL",
    "below factorised",
    "standard error",
    "KL",
    "active units",
    "swap drop",
    "I(x; z) from",
    "to",
    "seconds",
)


def parser(description):
    """Options of the two scripts."""
    result = report.fit_parser(description)
    result.add_argument("--decoder", choices=DECODERS, default="PixelCNN")
    result.add_argument(
        "--window", type=int, default=1, help="preceding pixels that Recurrent is fed"
    )
    result.add_argument(
        "--receptive-field", type=int, help="side of PixelCNN's window; the whole image by default"
    )
    result.add_argument("--channels", type=int, default=16, help="of PixelCNN")
    result.add_argument("--latent-dim", type=int, default=10, help="0: no latents, no guide")
    result.add_argument(
        "--kl-annealing", type=int, default=0, metavar="STEPS", help="of a linear rise to 1"
    )
    result.add_argument("--free-bits", type=float, default=0.0, help="nats per latent dimension")
    result.add_argument("--num-utilisation-samples", type=int, default=100)
    return result


def defaults(args):
    """Fill in, in place, what a smoke test changes."""
    args.dataset, args.data_dir = "digits", None
    args.num_steps = args.num_steps or 20_000
    if args.smoke_test:
        args.num_steps, args.num_evaluation_samples, args.num_utilisation_samples = 20, 20, 4
    if args.decoder == "factorised" and not args.latent_dim:
        raise SystemExit("Expected --latent-dim of at least 1 for the factorised decoder; got 0.")


def options(args):
    """Arguments of the likelihood's constructor."""
    if args.decoder == "MADE":
        return {"hidden_dims": (200, 200)}
    if args.decoder == "Recurrent":
        return {"hidden_dim": 100, "window": args.window}
    return {"channels": args.channels, "receptive_field": args.receptive_field}


def annealed(args, steps):
    """The weight of the KL divergence at every step."""
    if not args.kl_annealing:
        return np.ones(len(steps))
    return np.minimum(1.0, (steps + 1) / args.kl_annealing)


def decoder_name(args):
    """`PixelCNN, 5 x 5`, `Recurrent, window 3`, ..."""
    name = args.decoder
    if name == "Recurrent":
        name = f"{name}, window {args.window}"
    if name == "PixelCNN":
        side = args.receptive_field
        name = f"{name}, {side} x {side}" if side else f"{name}, whole"
    return name if args.latent_dim else f"{name}, no latents"


def training_name(args):
    """What was done to keep the latents."""
    if args.kl_annealing:
        return f"annealed, {args.kl_annealing} steps"
    return f"free bits {args.free_bits:g}" if args.free_bits else "ELBO"


def title(backend, args):
    """What the progress bar says."""
    return f"{backend} {decoder_name(args)}, {training_name(args)}"


def stem(backend, args):
    """Path, without a suffix, of the files that a run writes."""
    words = f"decoder {backend} {decoder_name(args)} {training_name(args)} s{args.seed}"
    name = words.lower().replace(",", "").replace(" x ", "x").replace(" ", "_").replace(".", "p")
    return args.output_dir / name


def estimate(table, quantity, column="estimate"):
    """One number of the table of `latent_utilisation`: that of all latents."""
    rows = table[(table["quantity"] == quantity) & (table["dimension"].astype(str) == "all")]
    return float(rows[column].iloc[0])


def write(backend, path, args, log_px, use, seconds):
    """Write the run's numbers; return its row of results."""
    row = {
        "backend": backend,
        "decoder": decoder_name(args),
        "training": training_name(args),
        "NLL": float(-log_px.mean()),
        "seed": args.seed,
        "steps": args.num_steps,
        "receptive field": args.receptive_field if args.decoder == "PixelCNN" else None,
        "seconds": seconds,
    }
    if use is not None:
        row["active units"] = int(use.count)
        for name, quantity in (
            ("KL", "kl"),
            ("swap drop", "swap_drop"),
            ("I(x; z) from", "mi_lower"),
            ("to", "mi_upper"),
        ):
            row[name] = estimate(use.table, quantity)
            row[f"{name}, standard error"] = estimate(use.table, quantity, "standard_error")
        path.parent.mkdir(parents=True, exist_ok=True)
        use.table.to_csv(path.with_suffix(".csv"), index=False)
        axes = use.plot()
        axes.figure.savefig(path.with_name(f"{path.name}_latents.png"), dpi=150)
        plt.close(axes.figure)
    report.write_row(path.with_suffix(".json"), row)
    np.savez(path.with_suffix(".npz"), log_px=log_px)
    return row


def picture(path, images, samples):
    """Test images, and samples from the prior."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.4, 2.1), layout="constrained")
    pixels = images.test.shape[1]
    report.draw_mosaic(
        above,
        images.test[:40].reshape(2, -1, pixels) if len(images.test) >= 40 else images.test[None],
        images.shape,
        "Test rows",
    )
    report.draw_mosaic(
        below, samples.reshape(2, -1, pixels).astype(float), images.shape, "Samples from the prior"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(rows):
    """The runs' rows as aligned text."""
    return report.table(rows, COLUMNS, num_text=3)


def compared(folder):
    """Rows of a folder, each with its difference from the factorised decoder, image by image."""
    paths = sorted(Path(folder).glob("decoder_*.json"))
    rows = [json.loads(path.read_text()) for path in paths]
    log_px = [np.load(path.with_suffix(".npz"))["log_px"] for path in paths]
    base = {
        (row["backend"], row["seed"]): values
        for row, values in zip(rows, log_px, strict=True)
        if row["decoder"] == "factorised" and row["training"] == "ELBO"
    }
    for row, values in zip(rows, log_px, strict=True):
        other = base.get((row["backend"], row["seed"]))
        if other is not None and other is not values and len(other) == len(values):
            gain = values - other
            row["below factorised"] = float(gain.mean())
            row["standard error"] = float(gain.std(ddof=1) / np.sqrt(len(gain)))
    return sorted(rows, key=lambda row: (row["backend"], row["decoder"], row["training"]))


def utilisation_picture(path, rows):
    """How the use of the latents falls with what the decoder sees by itself: seeds and means."""
    places = {"factorised": 0, 3: 1, 5: 2, 7: 3, None: 4}
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.0), layout="constrained")
    columns = {
        "NLL": "NLL (nats)",
        "I(x; z) from": "I(x; z), lower bound (nats)",
        "active units": "active units",
    }
    for backend, colour in (("NumPyro", "#2f6fb0"), ("Pyro", "#d1772f")):
        found = {}
        for row in rows:
            if row["backend"] != backend or row["training"] != "ELBO" or "KL" not in row:
                continue
            seen = (
                row["receptive field"] if row["decoder"].startswith("PixelCNN") else row["decoder"]
            )
            if seen in places:
                found.setdefault(places[seen], []).append(row)
        for axes, column in zip(panels, columns, strict=True):
            values = {place: [row[column] for row in found[place]] for place in sorted(found)}
            means = [np.mean(numbers) for numbers in values.values()]
            axes.plot(values.keys(), means, "-", color=colour, label=backend)
            for place, numbers in values.items():
                axes.plot(
                    [place] * len(numbers), numbers, "o", color=colour, markersize=4, alpha=0.6
                )
    for axes, text in zip(panels, columns.values(), strict=True):
        axes.set_xticks(range(5), ["none", "3 x 3", "5 x 5", "7 x 7", "whole"])
        axes.set_xlabel("pixels that the decoder sees", fontsize=8)
        axes.set_ylabel(text, fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=Path, help="where the runs wrote their files")
    folder = arguments.parse_args().folder
    found = compared(folder)
    print(table(found))
    utilisation_picture(folder / "utilisation.png", found)
