"""Data of the examples: digits, statically binarised MNIST and the eight schools."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Images(NamedTuple):
    """Binary images, one per row.

    `train` holds intensities in [0, 1] that are binarised anew in every batch if
    `dynamic`, and bits otherwise; `test` holds bits; `centre` is subtracted from a row
    before it enters the encoder; `shape` is that of one image.
    """

    train: np.ndarray
    test: np.ndarray
    centre: np.ndarray
    shape: tuple[int, int]
    dynamic: bool


class EightSchools(NamedTuple):
    """Estimated effect of coaching in eight schools, and its standard error."""

    effect: np.ndarray
    error: np.ndarray
    schools: list[str]


def digits():
    """The 8x8 digits of scikit-learn: 1,437 training and 360 test rows."""
    from sklearn.datasets import load_digits

    pixels = load_digits().data / 16.0
    pixels = pixels[np.random.default_rng(0).permutation(len(pixels))]
    train, test = pixels[:1437], pixels[1437:]
    test = np.random.default_rng(1).random(test.shape) < test
    return Images(
        train=train.astype(np.float32),
        test=test.astype(np.float32),
        centre=np.full(64, 0.3, np.float32),
        shape=(8, 8),
        dynamic=True,
    )


def static_mnist(data_dir):
    """Larochelle's binarisation of MNIST from `data_dir/binarized_mnist_static.npz`.

    The file holds `train`, `valid` and `test`, rows of 98 bytes with eight pixels each.
    """
    path = Path(data_dir) / "binarized_mnist_static.npz"
    if not path.exists():
        raise FileNotFoundError(f"Expected {path.name} in --data-dir; got {data_dir}.")
    with np.load(path) as file:
        train, test = (np.unpackbits(file[part], axis=1) for part in ("train", "test"))
    return Images(
        train=train,
        test=test.astype(np.float32),
        centre=train.mean(0, dtype=np.float64).astype(np.float32),
        shape=(28, 28),
        dynamic=False,
    )


def images(args):
    """The data set that `--dataset` names, cut down for a smoke test."""
    loaded = digits() if args.dataset == "digits" else static_mnist(args.data_dir)
    if args.smoke_test:
        return loaded._replace(train=loaded.train[:100], test=loaded.test[:20])
    return loaded


def eight_schools():
    """The eight schools of Rubin (1981) from the data that ArviZ ships."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz as az

    observed = az.load_arviz_data("centered_eight")["observed_data"]["obs"]
    return EightSchools(
        effect=np.asarray(observed.values, np.float32),
        error=np.array([15, 10, 16, 11, 9, 11, 10, 18], np.float32),
        schools=[str(name) for name in observed["school"].values],
    )


def eight_schools_log_evidence(num_nodes=2000):
    """`log p(effect)` of the centred model by quadrature, `mu` and `theta` in closed form.

    Given `tau`, the effects are jointly Normal: independent variances `error^2 + tau^2`
    and the common mean's 25. The half-Cauchy `tau` is 5 tan of a uniform angle.
    """
    schools = eight_schools()
    effect, error = schools.effect.astype(float), schools.error.astype(float)
    angle = (np.arange(num_nodes) + 0.5) / num_nodes * np.pi / 2
    variance = error**2 + (5 * np.tan(angle))[:, None] ** 2
    precision, total = (1 / variance).sum(1), (effect / variance).sum(1)
    quadratic = (effect**2 / variance).sum(1) - total**2 / (1 / 25 + precision)
    log_det = np.log(variance).sum(1) + np.log1p(25 * precision)
    log_p = -0.5 * (quadratic + log_det + len(effect) * np.log(2 * np.pi))
    return float(np.logaddexp.reduce(log_p) - np.log(num_nodes))
