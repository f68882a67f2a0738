"""What the two scripts `chorales_*.py` share: options, names, the table and the picture."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import report

COLUMNS = (
    "backend",
    "data",
    "decoder",
    "guide",
    "epochs",
    "best epoch",
    "bound per step",
    "log p per step",
    "KL per step",
    "seconds",
)


def parser(description):
    """Options of the two scripts."""
    result = report.parser(description)
    result.add_argument("--data-dir", help="folder of polyphonic_jsb.npz; synthetic data without")
    result.add_argument("--guide", choices=("MeanField", "IAF"), default="MeanField")
    result.add_argument("--latent-dim", type=int, default=16, help="0: no latents, no guide")
    result.add_argument("--hidden-dim", type=int, default=150)
    result.add_argument("--cell", choices=("gru", "lstm"), default="gru")
    result.add_argument("--max-epochs", type=int, default=200)
    result.add_argument("--batch-size", type=int, default=16)
    result.add_argument("--learning-rate", type=float, default=2e-3)
    result.add_argument(
        "--kl-annealing", type=int, default=40, metavar="EPOCHS", help="of a linear rise to 1"
    )
    result.add_argument(
        "--num-evaluation-samples", type=int, default=100, help="samples behind log p"
    )
    return result


def defaults(args):
    """Change, in place, what a smoke test changes."""
    if args.smoke_test:
        args.max_epochs, args.kl_annealing, args.hidden_dim = 2, 2, 10
        args.num_evaluation_samples = 10


def annealed(args, step, num_batches):
    """The weight of the KL divergence at a step."""
    return min(1.0, (step + 1) / max(1, args.kl_annealing * num_batches))


def key_logits(chorales):
    """The share of the training steps in which each key sounds, as logits: a start."""
    notes, lengths = chorales.train
    share = np.clip(notes.sum((0, 1)) / lengths.sum(), 1e-4, 1 - 1e-4)
    return np.log(share / (1 - share)).astype(np.float32)


def batches(rng, num_rows, batch_size):
    """Rows of each batch of one epoch, `(batches, rows)`; what is left over waits."""
    batch_size = min(batch_size, num_rows)
    order = rng.permutation(num_rows)
    return order[: num_rows // batch_size * batch_size].reshape(-1, batch_size)


def name(args):
    """`gru 150`, and the guide of its latents."""
    return f"{args.cell} {args.hidden_dim}", args.guide if args.latent_dim else "no latents"


def title(backend, args):
    """What the progress bar says."""
    return f"{backend} chorales, {', '.join(name(args))}"


def finish(backend, args, chorales, result, samples):
    """Write a run's numbers and its picture; return its row of results and the path's stem."""
    decoder, guide = name(args)
    row = {
        "backend": backend,
        "data": chorales.name,
        "decoder": decoder,
        "guide": guide,
        "epochs": args.max_epochs,
        **result,
    }
    words = f"chorales {backend} {decoder} {guide} s{args.seed}".lower()
    stem = args.output_dir / words.replace(" ", "_")
    report.write_row(stem.with_suffix(".json"), row)
    notes, lengths = chorales.test
    longest = np.argsort(-lengths, kind="stable")[:2]
    rolls = [*notes[longest], *samples[:2]]
    titles = ["Test chorale"] * 2 + ["Sample"] * 2
    figure, panels = plt.subplots(2, 2, figsize=(8, 4), layout="constrained", sharey=True)
    for axes, roll, text in zip(panels.flat, rolls, titles, strict=True):
        axes.imshow(roll.T, origin="lower", aspect="auto", cmap="gray_r", interpolation="nearest")
        axes.set_title(text, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_ylim(20, 78)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("key of the piano", fontsize=8)
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    plt.close(figure)
    return row, stem


def table(rows):
    """The runs' rows as aligned text."""
    return report.table(rows, COLUMNS, num_text=4)
