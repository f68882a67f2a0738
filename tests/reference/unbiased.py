"""Is the mean of many draws the exact value? z-scores of every coordinate."""

import numpy as np

BATCHES = 10


def scores(residuals):
    """z-scores of draws minus their exact mean, `(draws, coordinates)`, where there is noise.

    What has no noise must be exact. Returns those of the mean over all draws, and those of
    the means over a few batches of them.
    """
    error = residuals.std(0, ddof=1)
    random = error > 1e-9
    np.testing.assert_allclose(residuals[:, ~random], 0.0, atol=1e-9)
    z = residuals[:, random] / error[random]
    batches = np.array_split(z, BATCHES)
    return z.mean(0) * np.sqrt(len(z)), [part.mean(0) * np.sqrt(len(part)) for part in batches]


def check(residuals, largest=4.5):
    """The scores of all parameters' residuals are those of a standard Normal.

    Coordinates hang together, so that the root mean square over them is not 1 to the percent
    even for the right mean. Over independent batches of the draws as well it is; over all
    draws at once it sees a smaller bias.
    """
    flat = [draws.reshape(len(draws), -1) for draws in residuals.values()]
    z, batches = scores(np.concatenate(flat, axis=1))
    rms, all_rms = np.sqrt(np.mean(np.square(batches))), np.sqrt(np.mean(z**2))
    report = f"{len(z)} coordinates: rms {rms:.3f}, {all_rms:.3f}, largest {np.abs(z).max():.2f}"
    assert 0.9 < rms < 1.1 and all_rms < 1.25, report
    assert np.abs(z).max() < largest, report
    return report
