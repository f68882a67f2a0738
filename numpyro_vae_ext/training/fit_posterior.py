"""A model's posterior in one call: a start, a race of learning rates, training, a diagnosis."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import random
from tqdm.auto import tqdm

from numpyro_vae_ext._checks import positive_int
from numpyro_vae_ext._flat import FlatModel, flat_model
from numpyro_vae_ext.guides import IAF, AutoPosterior
from numpyro_vae_ext.training._course import Course, check_steps, checked_rates
from numpyro_vae_ext.training._diagnosis import Diagnosis, count_modes, diagnose, pooled
from numpyro_vae_ext.training._posterior import PosteriorTrainer
from numpyro_vae_ext.training.pathfinder import pathfinder
from numpyro_vae_ext.training.posterior_history import PosteriorHistory

# Two steps more than the default of a guide for many data, and tails: a posterior often has them.
FAMILY = partial(IAF, num_flows=4, tails="exponential")


class PosteriorResult(NamedTuple):
    """What :func:`fit_posterior` returns.

    Attributes:
        guide: The guide, an ``AutoPosterior``.
        params: Its parameters, as ``svi.get_params`` gives them.
        history: Bounds, learning rates and seconds.
        diagnosis: How good the guide is, and what to do next.
        start: What ``pathfinder`` returned, or the ``start`` that was given.
    """

    guide: Any
    params: dict[str, Any]
    history: PosteriorHistory
    diagnosis: Diagnosis
    start: Any


def fit_posterior(
    rng_key: jax.Array,
    model: Callable[..., Any],
    *args: Any,
    family: Callable[..., Any] = FAMILY,
    num_steps: int = 10_000,
    num_particles: int = 64,
    learning_rates: float | Sequence[float] = (1e-2, 3e-3),
    start: Any = None,
    temper: bool = False,
    num_restarts: int = 1,
    num_samples: int = 20_000,
    progress_bar: bool = True,
    **kwargs: Any,
) -> PosteriorResult:
    r"""Fit a guide to the posterior of a model, with everything that it takes.

    1. :func:`pathfinder` finds a Normal :math:`N(m, A A^\top)` near the posterior. The guide is
       ``AutoPosterior(model, family, start=...)``: the family has to learn what is left, in
       coordinates in which all scales are near 1.
    2. The learning rates run 150 steps each, from the same start with the same noise. The one with
       the best bound goes on.
    3. Adam minimises the negative evidence lower bound, averaged over ``num_particles`` draws, by
       its path gradient ("sticking the landing"). The rate falls to 3 % in four stages. After each
       window of 250 steps, the mean of the window's parameters is judged by 1000 draws, always of
       the same noise. A stage ends when two windows in a row gain less than 0.002 nats; the next
       goes on from the mean. The last one ends when means and log standard deviations change by
       less than 0.02 of the posterior's as well, or when ``num_steps`` are spent.
    4. The mean parameters of the best window are the result. New draws diagnose it.

    With ``temper=True`` the first 30 % of ``num_steps`` go from the start's Normal :math:`\pi_0`
    to the posterior, along :math:`\pi_0^{1 - \beta} p^\beta` with :math:`\beta` from 0.01 to 1 in
    equal steps, and the start is the Normal with the mean and covariance of the Normals of all
    paths: several modes are then found that a start at one of them would miss. Which of two modes a
    guide holds on to is partly chance; ``num_restarts=3`` keeps the best of three runs.

    A step without a finite bound and gradient changes nothing. Parameters of the model, as
    ``numpyro.param`` makes them, stay at their first values: train those with ``SVI``.

    Args:
        rng_key: Random key; the same key gives the same result.
        model: Program of NumPyro primitives without discrete latent sites.
        args: Positional arguments of the model.
        family: As for ``AutoPosterior``; :class:`~numpyro_vae_ext.guides.IAF` with four steps and
            exponential tails by default.
        num_steps: The most steps; those of rates that lose the race come on top.
        num_particles: Draws of a step.
        learning_rates: Learning rates to race, or one of them; of rates that are as good the
            first is taken.
        start: What :func:`pathfinder` returned for the same model and arguments, or anything with
            its attributes ``loc``, ``scale_tril`` and ``sites``; instead of running it.
        temper: Go from a wide Normal to the posterior, for several modes.
        num_restarts: Runs from start to end with other random numbers; the one with the best
            bound is kept.
        num_samples: Draws of the diagnosis.
        progress_bar: Show bars on standard error.
        kwargs: Keyword arguments of the model.

    Returns:
        Guide, parameters, history and diagnosis, as :class:`PosteriorResult`.

    Raises:
        ValueError: If the model has no continuous latent site, or a discrete or masked one; if the
            log-density is finite at no start; if ``start`` is of another model; if the posterior is
            improper, so that the bound grows without an end; if ``num_steps`` are too few to race.
            The message names the site.
        TypeError: If an argument has the wrong type.
        FloatingPointError: If no window had a finite bound.

    References:
        Zhang, Carpenter, Gelman and Vehtari (2022), Pathfinder, arXiv 2108.03782 (the start);
        Agrawal, Sheldon and Domke (2020), Advances in Black-Box VI: Normalizing Flows, Importance
        Weighting, and Optimization, arXiv 2006.10343 (race, path gradient, many draws);
        Welandawe, Andersen, Vehtari and Huggins (2022), Robust, Automated, and Accurate Black-box
        Variational Inference, arXiv 2203.15945 (stages, means of parameters, the end).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_vae_ext.guides import MeanField
        >>> def model(x):
        ...     loc = numpyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     scale = numpyro.sample("scale", dist.HalfNormal(10.0))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("x", dist.Normal(loc, scale), obs=x)
        >>> x = jnp.linspace(100.0, 104.0, 50)
        >>> fitted = fit_posterior(jax.random.key(0), model, x, family=MeanField, num_steps=400,
        ...                        learning_rates=0.01, progress_bar=False)
        >>> draws = fitted.guide.sample_posterior(jax.random.key(1), fitted.params,
        ...                                       sample_shape=(1000,))
        >>> bool(abs(draws["loc"].mean() - 102) < 0.1), bool(fitted.diagnosis.ess > 3000)
        (True, True)
    """
    rates = checked_rates(learning_rates)
    check_steps(num_steps, rates)
    positive_int("num_particles", num_particles)
    positive_int("num_restarts", num_restarts)
    positive_int("num_samples", num_samples)
    if not isinstance(temper, bool):
        raise TypeError(f"Expected temper to be a bool; got {type(temper).__name__}.")
    flat_key, *keys = random.split(rng_key, 1 + num_restarts)
    flat = flat_model(flat_key, model, args, kwargs, "fit_posterior")
    runs: list[_Run] = []
    for key in keys:
        run = _Run(key, flat, family, start, num_particles, temper, progress_bar)
        with tqdm(total=num_steps, disable=not progress_bar, desc="fit_posterior") as bar:
            run.train(num_steps, rates, bar)
        runs.append(run)
    best = max(runs, key=lambda run: run.elbo)
    best.history.restarts = [run.elbo for run in runs]
    return best.result(num_samples)


class _Run:
    """One run: start, race, training."""

    def __init__(
        self,
        rng_key: jax.Array,
        flat: FlatModel,
        family: Callable[..., Any],
        start: Any,
        num_particles: int,
        temper: bool,
        progress_bar: bool,
    ) -> None:
        start_key, guide_key, train_key = random.split(rng_key, 3)
        pair = flat.pair
        self.history, self.temper, self.elbo = PosteriorHistory(), temper, -math.inf
        self._num_particles = num_particles
        self._clock = time.perf_counter()
        if start is None:
            start = pathfinder(
                start_key, pair.model, *pair.args, progress_bar=progress_bar, **pair.kwargs
            )
        self._lap("pathfinder")
        self.start = start
        begin = _wide(start) if temper and hasattr(start, "locs") else start
        self.guide = AutoPosterior(pair.model, family, start=begin, rngs=nnx.Rngs(guide_key))
        self.trainer = PosteriorTrainer(train_key, flat, self.guide, begin, num_particles)
        self._lap("compilation")
        self._flat = flat

    def train(self, num_steps: int, rates: tuple[float, ...], bar: Any) -> None:
        """Race and train; the trainer ends with the best mean parameters."""

        def show(steps: int, elbo: float) -> None:
            bar.set_postfix({"bound": f"{elbo:.6g}"}, refresh=False)
            bar.update(max(0, steps - bar.n))

        course = Course(
            self.trainer,
            self.history,
            num_steps=num_steps,
            rates=rates,
            temper=self.temper,
            where=self._site,
            on_block=show,
        )
        rate = course.race()
        self._lap("race")
        course.train(rate)
        self._lap("training")
        self.elbo = course.best_elbo
        self.history.num_draws = course.steps_in_all * self._num_particles

    def result(self, num_samples: int) -> PosteriorResult:
        """Diagnose."""
        self._clock = time.perf_counter()
        history = self.history
        diagnosis = diagnose(
            self.trainer.draw(num_samples).log_weights,
            converged=history.stopped == "converged",
            last_gain=history.last_gain,
            num_modes=count_modes(self.start),
            tempered=self.temper,
            is_flow=isinstance(self.guide._family, IAF),
            restarts=history.restarts,
        )
        self._lap("diagnosis")
        return PosteriorResult(self.guide, self.trainer.params(), history, diagnosis, self.start)

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self.history.seconds[part] = now - self._clock
        self._clock = now

    def _site(self, index: int) -> str:
        ends = np.cumsum([math.prod(shape) for shape in self._flat.shapes.values()])
        return self._flat.names[int(np.searchsorted(ends, index, side="right"))]


def _wide(start: Any) -> Any:
    """The start, as wide as all paths that belong to the posterior."""
    loc, scale_tril = pooled(start)
    return SimpleNamespace(loc=loc, scale_tril=scale_tril, sites=start.sites)
