r"""Tails between those of a Normal and of an exponential law, on each side of each coordinate.

.. math::
    h(\varepsilon) = \varepsilon + \kappa_+ q(\varepsilon) - \kappa_- q(-\varepsilon), \qquad
    q(x) = \tfrac12 \log^2(1 + e^x), \qquad \kappa_\pm = \operatorname{sigmoid}(\lambda_\pm)

Far out :math:`h` grows as a square, and a Normal's square is exponential. The slope is 1 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

# At the start: the law is nearly a Normal, 5 % wider.
FIRST_LOGIT = -3.0
# Newton's method has the last digit after fewer.
_ROUNDS = 20


def stretch(noise: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``h`` of noise ``(*batch, D)``, and the logarithm of its slope; logits ``(2, D)``."""
    (upper, lower), above, below = logits.sigmoid(), _square(noise), _square(-noise)
    value = noise + upper * above[0] - lower * below[0]
    return value, torch.log1p(upper * above[1] + lower * below[1])


def stretch_and_bend(noise: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``h``, its slope, and the derivative of the slope's logarithm: what a score needs."""
    (upper, lower), above, below = logits.sigmoid(), _square(noise), _square(-noise)
    value = noise + upper * above[0] - lower * below[0]
    slope = 1.0 + upper * above[1] + lower * below[1]
    return value, slope, (upper * above[2] - lower * below[2]) / slope


def unstretch(value: Tensor, logits: Tensor) -> Tensor:
    """The noise that ``h`` sends to a value."""
    upper, lower = logits.sigmoid()
    # Where h is its square alone; from there on Newton's method cannot miss.
    curve = torch.where(value > 0, upper, lower)
    noise = 2.0 * value / (1.0 + (1.0 + 2.0 * curve * value.abs()).sqrt())
    for _ in range(_ROUNDS):
        image, log_slope = stretch(noise, logits)
        noise = noise + (value - image) * (-log_slope).exp()
    return noise


def _square(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``q`` and its first two derivatives."""
    # Not softplus, which drops what is small beside a large argument.
    soft, rise = torch.logaddexp(x, torch.zeros_like(x)), x.sigmoid()
    return 0.5 * soft.square(), soft * rise, rise.square() + soft * rise * (1.0 - rise)
