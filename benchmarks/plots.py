"""Pictures of the benchmark page, made of the rows alone."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from targets import by_cell, ratio

NAMES = {"pyro": "Pyro", "numpyro": "NumPyro"}
# Labels of the axes of the curves.
AXES = {"K": "particles K", "latent_dim": "latent dimensions", "batch": "rows of a batch"}
# A candidate has one colour in all pictures.
COLOURS = {
    "plain PyTorch": "0.35",
    "plain JAX": "0.35",
    "torch.compile": "0.65",
    "torch.compile, fused Adam": "0.8",
    "vae-ext, SVI": "C0",
    "vae-ext, module": "C9",
    "vae-ext, compiled": "C3",
    "Trace_ELBO, SVI": "C2",
    "Trace_ELBO, module": "C8",
    "TraceGraph_ELBO, SVI": "C5",
    "RenyiELBO, SVI": "C1",
}


def save(figure, path):
    """Write a small picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path


def steps(run, path):
    """Ratios to the plain loop, one group of bars for each model and K."""
    cells = by_cell(run["rows"], "model", "K")
    figure, axes = plt.subplots(figsize=(9, 3.6))
    names = list(dict.fromkeys(row["candidate"] for row in run["rows"]))
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        places, values = [], []
        for j, cell in enumerate(cells.values()):
            if name in cell:
                places.append(j + (i - (len(names) - 1) / 2) * width)
                values.append(ratio(cell[name], cell[names[0]]))
        axes.bar(places, values, width, label=name, color=COLOURS.get(name))
    axes.axhline(1.0, color="k", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [f"{model}\nK = {k}" for model, k in cells])
    axes.set_ylabel(f"time over {names[0]}")
    axes.set_title(f"{NAMES[run['backend']]}: one training step")
    axes.legend(fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return save(figure, path)


def curves(run, path):
    """Milliseconds of a step against K, dimension and batch."""
    cells = by_cell(run["rows"], "axis")
    figure, panels = plt.subplots(1, len(cells), figsize=(9, 3.2), squeeze=False)
    for axis, panel in zip(cells, panels[0], strict=True):
        rows = [row for row in run["rows"] if row["axis"] == axis[0]]
        for name in dict.fromkeys(row["candidate"] for row in rows):
            line = [row for row in rows if row["candidate"] == name]
            panel.loglog(
                [row["value"] for row in line],
                [row["microseconds"] / 1000 for row in line],
                marker="o",
                markersize=3,
                label=name,
                color=COLOURS.get(name),
            )
        panel.set_xlabel(AXES[axis[0]])
    panels[0, 0].set_ylabel("milliseconds a step")
    panels[0, 0].legend(fontsize=6)
    figure.suptitle(f"{NAMES[run['backend']]}: cost of a step", fontsize=11)
    return save(figure, path)


def memory_and_compile(run, path):
    """Peak memory and time to the first step, side by side."""
    cells = by_cell(run["rows"], "model", "K")
    model, k = list(cells)[-1]
    cell = cells[model, k]
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.7 + 0.35 * len(cell)), sharey=True)
    names = list(cell)[::-1]
    for panel, column, label in zip(
        panels,
        ("first_steps_seconds", "peak_mib"),
        ("seconds of the first steps", "MiB above the start"),
        strict=True,
    ):
        values = [cell[name][column] for name in names]
        panel.barh(names, values, color=[COLOURS.get(name) for name in names])
        panel.set_xlabel(label)
    figure.suptitle(f"{NAMES[run['backend']]}: {model}, K = {k}", fontsize=11)
    return save(figure, path)


def flows(run, path):
    """Milliseconds of sampling, gradient and score of a foreign value."""
    cells = by_cell(run["rows"], "kind", "D")
    figure, panels = plt.subplots(1, len(cells), figsize=(10, 2.8))
    for ((kind, dim), cell), panel in zip(cells.items(), panels, strict=True):
        names = list(cell)[::-1]
        colours = ["C0" if name.startswith("vae-ext") else "0.6" for name in names]
        panel.barh(names, [cell[name]["microseconds"] / 1000 for name in names], color=colours)
        panel.tick_params(axis="y", labelsize=7)
        panel.set_xlabel("milliseconds")
        panel.set_title(f"{kind}, D = {dim}", fontsize=9)
        if kind == "score":
            panel.set_xscale("log")
    figure.suptitle(f"{NAMES[run['backend']]}: inverse autoregressive flows", fontsize=11)
    return save(figure, path)


DRAWN = {
    "steps": steps,
    "curves": curves,
    "memory_and_compile": memory_and_compile,
    "flows": flows,
}


def draw(run, folder):
    """The picture of one run, or None where its suite has none."""
    made = DRAWN.get(run["suite"])
    return made(run, folder / f"{run['suite']}_{run['backend']}.png") if made else None
