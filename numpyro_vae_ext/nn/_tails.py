r"""Tails between those of a Normal and of an exponential law, on each side of each coordinate.

.. math::
    h(\varepsilon) = \varepsilon + \kappa_+ q(\varepsilon) - \kappa_- q(-\varepsilon), \qquad
    q(x) = \tfrac12 \log^2(1 + e^x), \qquad \kappa_\pm = \operatorname{sigmoid}(\lambda_\pm)

Far out :math:`h` grows as a square, and a Normal's square is exponential. The slope is 1 at least.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# At the start: the law is nearly a Normal, 5 % wider.
FIRST_LOGIT = -3.0
# Newton's method has the last digit after fewer.
_ROUNDS = 20


def stretch(noise: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``h`` of noise ``(*batch, D)``, and the logarithm of its slope; logits ``(2, D)``."""
    (upper, lower), above, below = jax.nn.sigmoid(logits), _square(noise), _square(-noise)
    value = noise + upper * above[0] - lower * below[0]
    return value, jnp.log1p(upper * above[1] + lower * below[1])


def stretch_and_bend(noise: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``h``, its slope, and the derivative of the slope's logarithm: what a score needs."""
    (upper, lower), above, below = jax.nn.sigmoid(logits), _square(noise), _square(-noise)
    value = noise + upper * above[0] - lower * below[0]
    slope = 1.0 + upper * above[1] + lower * below[1]
    return value, slope, (upper * above[2] - lower * below[2]) / slope


def unstretch(value: jax.Array, logits: jax.Array) -> jax.Array:
    """The noise that ``h`` sends to a value."""
    upper, lower = jax.nn.sigmoid(logits)
    # Where h is its square alone; from there on Newton's method cannot miss.
    first = 2 * value / (1 + jnp.sqrt(1 + 2 * jnp.where(value > 0, upper, lower) * jnp.abs(value)))

    def refine(_: int, noise: jax.Array) -> jax.Array:
        image, log_slope = stretch(noise, logits)
        return noise + (value - image) * jnp.exp(-log_slope)

    return lax.fori_loop(0, _ROUNDS, refine, first)


def _square(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``q`` and its first two derivatives."""
    soft, rise = jax.nn.softplus(x), jax.nn.sigmoid(x)
    return 0.5 * soft**2, soft * rise, rise**2 + soft * rise * (1 - rise)
