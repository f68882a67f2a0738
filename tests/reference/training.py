"""Plain training loops over minibatches of a linear regression, with a gradient in closed form.

`w ~ N(0, I)`, `y_n ~ N(x_n w, 1)`, and a point estimate of `w`: the loss of a batch of `b` of the
`N` rows is `-log N(w; 0, I) - N/b sum_batch log N(y_n; x_n w, 1)`, whose minimum on all rows is
ridge regression.

References:
    Kingma and Ba, 2015, Adam, arXiv:1412.6980, algorithm 1. Bishop (2006), Pattern Recognition
    and Machine Learning, eq. 3.52-3.55.
"""

import numpy as np

LOG_2PI = np.log(2.0 * np.pi)


def loss(w, x, y, num_rows):
    """The loss of a batch, scaled to that of `num_rows` rows."""
    prior = 0.5 * np.sum(w**2) + 0.5 * len(w) * LOG_2PI
    errors = 0.5 * (y - x @ w) ** 2 + 0.5 * LOG_2PI
    return prior + num_rows * np.sum(errors) / len(y)


def gradient(w, x, y, num_rows):
    """Its derivative in `w`."""
    return w - num_rows * x.T @ (y - x @ w) / len(y)


def minimum(x, y):
    """The minimum of the loss on all rows."""
    return np.linalg.solve(np.eye(x.shape[1]) + x.T @ x, x.T @ y)


def sgd(rate, momentum=0.0):
    """Descent along the gradient, or along its running sum."""
    sums = 0.0

    def update(w, gradient, step):
        nonlocal sums
        sums = momentum * sums + gradient
        return w - rate(step) * sums

    return update


def adam(rate, beta1=0.9, beta2=0.999, epsilon=1e-8):
    """Adam; steps that were skipped do not count for its bias correction."""
    first, second, count = 0.0, 0.0, 0

    def update(w, gradient, step):
        nonlocal first, second, count
        count += 1
        first = beta1 * first + (1.0 - beta1) * gradient
        second = beta2 * second + (1.0 - beta2) * gradient**2
        mean, square = first / (1.0 - beta1**count), second / (1.0 - beta2**count)
        return w - rate(step) * mean / (np.sqrt(square) + epsilon)

    return update


def batches(order, batch_size, drop_last=False):
    """The rows of each step of an epoch, in the order given."""
    starts = range(0, len(order), batch_size)
    found = [order[start : start + batch_size] for start in starts]
    return [rows for rows in found if len(rows) == batch_size or not drop_last]


def train(w, x, y, epochs, update, validation=None):
    """Epochs of batches, each a list of rows; a step with a non-finite loss changes nothing.

    Returns a dictionary: `w`; `step_losses` and `loss` by step and by epoch, per datum;
    `validation_loss` by epoch, of the rows of `validation`, another `(x, y)`, as one batch; and
    the `trace` of `w` after each step.
    """
    num_rows, step = len(y), 0
    found = {"step_losses": [], "loss": [], "validation_loss": [], "trace": []}
    for epoch in epochs:
        total, seen = 0.0, 0
        for rows in epoch:
            value = loss(w, x[rows], y[rows], num_rows) / num_rows
            slope = gradient(w, x[rows], y[rows], num_rows)
            if np.isfinite(value) and np.isfinite(slope).all():
                w = update(w, slope, step)
                total, seen = total + value * len(rows), seen + len(rows)
            else:
                value = np.nan
            found["step_losses"].append(value)
            found["trace"].append(w)
            step += 1
        found["loss"].append(total / seen if seen else np.nan)
        if validation is not None:
            found["validation_loss"].append(loss(w, *validation, num_rows) / num_rows)
    return {name: np.array(value) for name, value in found.items()} | {"w": w}
