"""Concrete relaxation of the discrete sites of a program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from numpyro_vae_ext._checks import is_discrete
from numpyro_vae_ext._relaxation import check_relaxable, check_temperature, kind, logits
from numpyro_vae_ext.distributions import RelaxedOneHotCategorical
from numpyro_vae_ext.handlers._program import Program, wrapped


def relax(fn: Program, *, temperature: Any) -> Program:
    r"""Turn the discrete latent sites of a model or guide into Concrete ones.

    A Bernoulli site with logits :math:`a` becomes a binary Concrete one and a one-hot categorical
    site a Concrete one. The program gets the soft value,

    .. math::
        \tilde b = \sigma(y), \quad y = \frac{a + \operatorname{logit} u}{t}
        \qquad\text{or}\qquad
        \tilde b = e^y, \quad
        y = \log \operatorname{softmax} \frac{\log p - \log(-\log u)}{t},

    and the site is scored by the *relaxed* density, which is what makes the ELBO of a relaxed
    model and a relaxed guide a bound on the evidence of the relaxed model. Any reparameterised
    objective of the host or of this package trains the pair. ``fn`` itself stays discrete.

    The site's own value, in a trace, is :math:`y`: between two values of :math:`\tilde b` next to
    1 there is room for most of a distribution at a low temperature, while log-odds never run out of
    numbers. The weights are the same, since the change of variables is that of model and guide.
    Soft values are kept away from 0 and 1.

    Events, expanded batches, masks, plates, subsamples, continuous and observed sites stay as they
    are.

    Args:
        fn: the program. Not one whose sites are drawn by another handler, such as an AutoGuide.
        temperature: a positive number; or an array that broadcasts with the batch of each
            distribution, before ``to_event``; or a function of the arguments of ``fn`` that
            returns either, evaluated at every call, which makes an annealing schedule of a step
            among the arguments: traced, and compiled once. Model and guide may have different
            temperatures.

    Raises:
        ValueError: if the temperature is not positive (and not traced); at the call, if a latent
            site is discrete, and neither Bernoulli nor one-hot.

    References:
        Maddison, Mnih and Teh (2017), The Concrete Distribution, arXiv 1611.00712, eq. 7, 10 and
        appendix C.3 (log-odds). Jang, Gu and Poole (2017), Categorical Reparameterization with
        Gumbel-Softmax, arXiv 1611.01144.

    Example:
        >>> import jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> def model():
        ...     return numpyro.sample("b", dist.Bernoulli(logits=jnp.zeros(3)).to_event(1))
        >>> with numpyro.handlers.seed(rng_seed=0):
        ...     soft, hard = relax(model, temperature=0.5)(), model()
        >>> bool(((soft > 0) & (soft < 1)).all()), bool(((hard == 0) | (hard == 1)).all())
        (True, True)
    """
    return wrapped(fn, temperature, check_temperature, _Relax)


class _Relax(Messenger):
    """Replaces distributions on the way out, and softens values on the way back in."""

    def __init__(self, temperature: Any) -> None:
        super().__init__()
        self.temperature = temperature
        self.kinds: dict[str, str] = {}

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or msg["value"] is not None:
            return
        found = kind(msg["fn"])
        if found is not None:
            msg["fn"] = _relaxed(found, msg["fn"], self.temperature)
            self.kinds[msg["name"]] = found
        elif not msg["fn"].has_rsample and is_discrete(msg["fn"]):
            check_relaxable("relax", msg["name"], msg["fn"])

    def postprocess_message(self, msg: Any) -> None:
        # Handlers outside, a trace among them, have had their look at the site by now.
        found = self.kinds.pop(msg["name"], None) if msg["type"] == "sample" else None
        if found is not None:
            msg["value"] = _soft(found, msg["value"])


def _relaxed(found: str, fn: Any, temperature: Any) -> Any:
    """The Concrete distribution in log-odds or log-probabilities, in the wrappers of ``fn``."""
    if isinstance(fn, dist.Independent):
        inner = _relaxed(found, fn.base_dist, temperature)
        return inner.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return _relaxed(found, fn.base_dist, temperature).mask(fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return _relaxed(found, fn.base_dist, temperature).expand(fn.batch_shape)
    a = logits(fn)
    if found == "bernoulli":
        temperature = jnp.asarray(temperature, a.dtype)
        return dist.Logistic(a / temperature, 1.0 / temperature)
    return RelaxedOneHotCategorical(temperature, logits=a).base_dist


def _soft(found: str, value: jax.Array) -> jax.Array:
    limits = jnp.finfo(value.dtype)
    soft = jax.nn.sigmoid(value) if found == "bernoulli" else jnp.exp(value)
    return jnp.clip(soft, limits.tiny, 1.0 - limits.eps)
