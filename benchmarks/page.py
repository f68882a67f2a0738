"""The page of the benchmark results, made of the JSON alone.

Nothing is measured here: `python benchmarks/run.py --page` writes the page and its pictures anew.
"""

import plots
import targets
from plots import NAMES

TITLES = {
    "steps": "One training step",
    "fit": "Whole trainings",
    "curves": "Cost against particles, dimension and batch",
    "memory_and_compile": "Memory and compile time",
    "flows": "Inverse autoregressive flows",
    "evidence": "Log evidence",
}
WORDS = {
    "steps": """
One step, batch in, gradients, update of Adam; validation off. The digits' networks are
64-100-100-10 and back with 50 rows, MNIST's 784-200-200-50 and back with 100. *plain* is the same
objective written by hand; the hosts' objectives run in the host's SVI as ours does.
""",
    "fit": """
The time of one step within `training.fit`, at $K = 1$: against one compiled program with a scan
over epochs and batches, which looks at no loss before its end.
""",
    "curves": """
One step of the digits' networks around $K = 5$, 16 latent dimensions and 64 rows, one of the three
varied at a time.
""",
    "memory_and_compile": """
Each candidate in a process of its own with cold caches. The first three steps include making and
compiling the program. The peak is that of the process above the start, imports excluded and the
compiler's own memory included; *of later steps* is the peak after those three. *XLA* is what the
compiled step plans beside its arguments and results.
""",
    "flows": """
The same depth, widths and batch, in the direction that samples in one pass; the affine update
against the peers' affine one. Our base is conditional, that of the peers a standard Normal.
*score* is the log-density of a value whose noise is unknown; *one pass a coordinate* inverts our
own flow in that way.
""",
    "evidence": """
`log_evidence` of binarised images with a variational autoencoder of MNIST's size; *by hand* is the
same estimator in the host's tensor library, chunk for chunk, *networks only* the forward passes
without densities.
""",
}
INTRODUCTION = """
Made by `benchmarks/run.py` from one JSON file; do not edit. Candidates of a cell take turns in one
process, and every ratio is the median, over the rounds, of two candidates' times in the same round:
a machine that slows down slows both. What is measured otherwise, and by which command, is on the
[page of the figures](benchmarks.md).
"""
# Suites whose rows are told apart by these labels.
LABELS = {
    "steps": ("model", "K"),
    "fit": ("model",),
    "curves": ("axis", "value"),
    "memory_and_compile": ("model", "K"),
    "flows": ("kind", "D"),
    "evidence": ("what", "num_rows", "num_samples"),
}


def table(head, rows):
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(value) for value in row) + " |" for row in rows]


def short(value):
    """A number with three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def times(run):
    """One line a cell, one column a candidate: milliseconds, and the ratio to the first one."""
    labels = LABELS[run["suite"]]
    timed = [row for row in run["rows"] if "rounds" in row]
    names = list(dict.fromkeys(row["candidate"] for row in timed))
    lines = []
    for key, cell in targets.by_cell(timed, *labels).items():
        line = [", ".join(str(value) for value in key if value is not None)]
        first = next(iter(cell.values()))
        for name in names:
            if name not in cell:
                line.append("")
                continue
            milliseconds = short(cell[name]["microseconds"] / 1000)
            line.append(f"{milliseconds} ({targets.ratio(cell[name], first):.2f})")
        lines.append(line)
    head = [", ".join(labels), *names]
    return ["Milliseconds, and in brackets the ratio to the first column:", "", *table(head, lines)]


def memory(run):
    """Rows without times."""
    measured = [row for row in run["rows"] if "peak_mib" in row]
    columns = {
        "first_steps_seconds": "first three steps, s",
        "peak_mib": "peak, MiB",
        "peak_of_steps_mib": "of later steps, MiB",
        "xla_temporary_mib": "XLA, MiB",
    }
    columns = {key: head for key, head in columns.items() if any(key in row for row in measured)}
    labels = [label for label in LABELS[run["suite"]] if label in measured[0]]
    rows = [
        [
            ", ".join(str(row[label]) for label in labels),
            row["candidate"],
            *(short(row[key]) if key in row else "" for key in columns),
        ]
        for row in measured
    ]
    return table([", ".join(labels), "candidate", *columns.values()], rows)


def held(found):
    """The targets, the missed ones shown as such."""
    rows = [
        [
            target.cell,
            target.ours,
            target.against,
            f"{target.value:.3g}{target.unit}" if target.unit else f"{target.value:.3f}",
            f"{'≥' if target.at_least else '≤'} {target.limit:g}",
            "met" if target.met else "**missed**",
        ]
        for target in found
    ]
    return table(["cell", "ours", "against", "measured", "target", ""], rows)


def section(run, folder):
    """Lines of one suite of one backend."""
    found = targets.of(run)
    lines = [f"### {NAMES[run['backend']]}", ""]
    if found:
        met = sum(target.met for target in found)
        lines += [f"{met} of {len(found)} targets met.", "", *held(found), ""]
    picture = plots.draw(run, folder)
    if picture:
        alt = f"{TITLES[run['suite']]}, {NAMES[run['backend']]}"
        lines += [f"![{alt}](_static/benchmarks/{picture.name})", ""]
    if any("rounds" in row for row in run["rows"]):
        lines += [*times(run), ""]
    if any("peak_mib" in row for row in run["rows"]):
        lines += [*memory(run), ""]
    if run["missing"]:
        lines += [f"Missing: {', '.join(run['missing'])}.", ""]
    packages = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    device = run["device"]
    lines += [
        f"{run['date']}, {device['name']}, {device['cores']} cores, one thread, "
        f"{run['clock']}, {run['seconds']:.0f} s; {packages}.",
        "",
        f"Command: `{run['command']}`",
        "",
    ]
    return lines


def write(runs, docs):
    """Write `benchmark_results.md` and its pictures under the folder `docs`."""
    lines = ["# Benchmark results", "", *INTRODUCTION.strip().splitlines(), ""]
    for suite, title in TITLES.items():
        chosen = [run for run in runs if run["suite"] == suite]
        if chosen:
            lines += [f"## {title}", "", *WORDS[suite].strip().splitlines(), ""]
        for run in sorted(chosen, key=lambda run: list(NAMES).index(run["backend"])):
            lines += section(run, docs / "_static" / "benchmarks")
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmark_results.md").write_text("\n".join(lines).rstrip() + "\n")
