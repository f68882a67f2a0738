"""Data of the examples: digits, statically binarised MNIST, chorales and the eight schools."""

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


class Chorales(NamedTuple):
    """Sequences of chords, each part as `(notes, lengths)`.

    `notes` is `(sequences, steps, 88)` in {0, 1}, one column per key of the piano, and zeros
    from the end of a sequence on; `lengths` is `(sequences,)`.
    """

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    name: str


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


def jsb_chorales(data_dir):
    """Bach's chorales of Boulanger-Lewandowski et al. (2012) from `data_dir/polyphonic_jsb.npz`.

    The file holds `train`, `valid` and `test`, the steps of all sequences one below the other,
    rows of 11 bytes with eight keys each, and `train_len`, ..., the lengths of the sequences.
    """
    path = Path(data_dir) / "polyphonic_jsb.npz"
    if not path.exists():
        raise FileNotFoundError(f"Expected {path.name} in --data-dir; got {data_dir}.")
    with np.load(path) as file:
        parts = {
            part: (np.unpackbits(file[part], axis=1)[:, :88], file[f"{part}_len"])
            for part in ("train", "valid", "test")
        }
    longest = max(int(lengths.max()) for _, lengths in parts.values())
    padded = {}
    for part, (steps, lengths) in parts.items():
        notes = np.zeros((len(lengths), longest, 88), np.float32)
        notes[np.arange(longest) < lengths[:, None]] = steps
        padded[part] = (notes, lengths)
    return Chorales(**padded, name="JSB chorales")


def synthetic_chorales():
    """Made-up chorales for a run without files: triads of a key that walk about the circle."""
    rng = np.random.default_rng(0)
    steps = 24

    def part(num_sequences):
        lengths = rng.integers(steps // 2, steps + 1, num_sequences)
        notes = np.zeros((num_sequences, steps, 88), np.float32)
        for row, length in enumerate(lengths):
            root = rng.integers(30, 42)
            for step in range(length):
                # The same chord, a fifth up or a fifth down; close to where it began.
                root += int(rng.choice([0, 0, 7, -5, 5, -7]))
                root = 30 + (root - 30) % 12
                triad = root + np.array([0, 4 if rng.random() < 0.7 else 3, 7])
                notes[row, step, [root - 12, *triad]] = 1.0
        return notes, lengths

    return Chorales(part(60), part(20), part(20), name="synthetic")


def chorales(args):
    """The chorales of `--data-dir`, made-up ones without it; cut down for a smoke test."""
    loaded = synthetic_chorales() if args.data_dir is None else jsb_chorales(args.data_dir)
    if args.smoke_test:
        train, valid, test = ((notes[:20], lengths[:20]) for notes, lengths in loaded[:3])
        return loaded._replace(train=train, valid=valid, test=test)
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
