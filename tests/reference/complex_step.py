"""Exact derivatives of analytic functions by a complex step.

`f(x + i h) = f(x) + i h f'(x) + O(h^2)`, so `f'(x) = Im f(x + i h) / h` loses no digits
to cancellation and `h` may be as small as 1e-30.

References:
    Squire and Trapp (1998), Using complex variables to estimate derivatives of real
    functions, SIAM Review 40(1), eq. 1-2.
"""

import numpy as np

STEP = 1e-30


def gradient(function, parameters):
    """Gradient of a scalar function of a dictionary of arrays.

    Args:
        function: maps a dictionary of (complex) arrays to a scalar.
        parameters: dictionary of real arrays.

    Returns:
        A dictionary of gradients with the shapes of `parameters`.
    """
    gradients = {}
    for name, value in parameters.items():
        value = np.asarray(value, dtype=float)
        result = np.empty(value.shape)
        for index in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[index] += 1j * STEP
            result[index] = np.imag(function({**parameters, name: moved})) / STEP
        gradients[name] = result
    return gradients


def jacobian(function, x):
    """Jacobian of `function: (*batch, D) -> (*batch, *out)` row by row.

    Returns:
        Array of shape `(*batch, *out, D)`.
    """
    x = np.asarray(x, dtype=float)
    columns = []
    for j in range(x.shape[-1]):
        moved = x.astype(complex)
        moved[..., j] += 1j * STEP
        columns.append(np.imag(function(moved)) / STEP)
    return np.stack(columns, axis=-1)
