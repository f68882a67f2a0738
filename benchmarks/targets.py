"""What the benchmarks are held against: targets of the suites' rows.

Every ratio is the median, over the rounds, of two candidates' times in the same round.
"""

import statistics
from typing import NamedTuple

SLACK = 1.05  # "fastest or within 5 %"


class Target(NamedTuple):
    """One comparison: `value` must not be above `limit`, or below it where `at_least`."""

    suite: str
    backend: str
    cell: str
    ours: str
    against: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self):
        """Whether the target is met."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def ratio(row, other):
    """Median of the paired ratios of two rows of one cell."""
    return statistics.median(a / b for a, b in zip(row["rounds"], other["rounds"], strict=True))


def by_cell(rows, *labels):
    """Rows grouped by labels: `{labels' values: {candidate: row}}`."""
    grouped = {}
    for row in rows:
        key = tuple(row.get(label) for label in labels)
        grouped.setdefault(key, {})[row["candidate"]] = row
    return grouped


# Candidate, what it stands against, and the greatest ratio.
STEPS = {
    "pyro": (
        ("vae-ext, compiled", "plain PyTorch", 0.85),
        ("vae-ext, compiled", "torch.compile", 1.0),
        ("vae-ext, compiled", "torch.compile, fused Adam", 1.0),
        ("vae-ext, SVI", "Trace_ELBO, SVI", 1.0),
        ("vae-ext, module", "Trace_ELBO, module", 1.0),
        ("vae-ext, SVI", "RenyiELBO, SVI", 1.0),
    ),
    "numpyro": (
        ("vae-ext, SVI", "plain JAX", 1.02),
        ("vae-ext, compiled", "plain JAX", 1.02),
        ("vae-ext, SVI", "Trace_ELBO, SVI", 1.02),
        ("vae-ext, SVI", "RenyiELBO, SVI", 1.02),
    ),
}


def steps(backend, rows):
    """Targets of the suite `steps`."""
    for (model, k), cell in by_cell(rows, "model", "K").items():
        for ours, other, limit in STEPS[backend]:
            if ours in cell and other in cell:
                value = ratio(cell[ours], cell[other])
                yield Target("steps", backend, f"{model}, K = {k}", ours, other, value, limit)


def curves(backend, rows):
    """Targets of the suite `curves`: those against the hosts' objectives."""
    for (axis, value), cell in by_cell(rows, "axis", "value").items():
        for ours, other, limit in STEPS[backend]:
            if "ELBO" in other and ours in cell and other in cell:
                measured = ratio(cell[ours], cell[other])
                yield Target("curves", backend, f"{axis} = {value}", ours, other, measured, limit)


def flows(backend, rows):
    """Targets of the suite `flows`."""
    for (kind, dim), cell in by_cell(rows, "kind", "D").items():
        where = f"{kind}, D = {dim}"
        if kind == "score":
            value = ratio(cell["one pass a coordinate"], cell["vae-ext"])
            yield Target(
                "flows",
                backend,
                where,
                "vae-ext",
                "one pass a coordinate",
                value,
                5.0,
                " times faster",
                True,
            )
            continue
        for other, row in cell.items():
            if other.startswith("vae-ext"):
                continue
            # A peer without a context stands against ours without one.
            ours = "vae-ext, no context" if "no context" in other else "vae-ext"
            if ours in cell:
                value = ratio(cell[ours], row)
                yield Target("flows", backend, where, ours, other, value, SLACK)


def evidence(backend, rows):
    """Targets of the suite `evidence`."""
    for (what, *numbers), cell in by_cell(rows, "what", "num_rows", "num_samples").items():
        if "vae-ext" not in cell:
            continue
        if what == "memory":
            where, value = f"{numbers[0]} rows", cell["vae-ext"]["peak_mib"]
            yield Target("evidence", backend, where, "vae-ext", "2 GiB", round(value), 2048, " MiB")
        else:
            where = f"{numbers[0]} rows, {numbers[1]} samples"
            value = ratio(cell["vae-ext"], cell["by hand"])
            yield Target("evidence", backend, where, "vae-ext", "by hand", value, 1.1)


def fit(backend, rows):
    """Targets of the suite `fit`."""
    for (model,), cell in by_cell(rows, "model").items():
        if "bare scan" in cell:
            value = ratio(cell["vae-ext, fit"], cell["bare scan"])
            yield Target("fit", backend, model, "vae-ext, fit", "bare scan", value, 1.02)


SUITES = {"steps": steps, "fit": fit, "curves": curves, "flows": flows, "evidence": evidence}


def of(run):
    """Targets of one run of a suite, in order."""
    made = SUITES.get(run["suite"])
    return list(made(run["backend"], run["rows"])) if made else []
