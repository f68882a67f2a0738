"""Normal models with a part masked out: posterior and evidence in closed form."""

from __future__ import annotations

import numpy as np
from scipy.stats import multivariate_normal

X = np.array([0.3, -1.0, 2.0, 0.7])
COUNTS = np.array([True, False, True, True])
# Where the guide is told to put what is masked out.
ASIDE = 0.7
KINDS = ("partly_observed", "masked_rows", "masked_entries")


def evidence(kind: str) -> float:
    """Of the data that count; all share a mean with the prior N(0, 1)."""
    noise = 1.0 if kind == "partly_observed" else 2.0
    count = COUNTS.sum()
    return multivariate_normal.logpdf(X[COUNTS], np.zeros(count), noise * np.eye(count) + 1.0)


def free(kind: str) -> np.ndarray:
    """Which of the four numbers of the second site count in the model's density."""
    return ~COUNTS if kind == "partly_observed" else COUNTS


def posterior(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the mean and the four numbers; N(ASIDE, 1) where one is masked out.

    The four are the data that were not observed, given the mean, or latents of the data's rows.
    """
    precision, linear = np.eye(5), np.zeros(5)
    for i in range(4):
        if not free(kind)[i]:
            linear[1 + i] = ASIDE
            continue
        # N(number; mean, 1), and for a latent row N(x; number, 1).
        precision[0, 0] += 1.0
        precision[0, 1 + i] = precision[1 + i, 0] = -1.0
        if kind != "partly_observed":
            precision[1 + i, 1 + i] = 2.0
            linear[1 + i] = X[i]
    if kind == "partly_observed":
        precision[0, 0] += COUNTS.sum()
        linear[0] = X[COUNTS].sum()
    covariance = np.linalg.inv(precision)
    return covariance @ linear, covariance
