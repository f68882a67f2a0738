"""What the guides made from a model can be asked: draws, medians and quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops.stats import quantile
from torch import Tensor

from pyro_vae_ext._checks import positive_int
from pyro_vae_ext.guides._auto import FamilyGuide, Site
from pyro_vae_ext.guides._importance import picked, pool


class QueriedGuide(FamilyGuide):
    """Base of the guides made from a model, with what their users ask them."""

    _reads_arguments = False  # a draw depends on the arguments of the model

    def sample_posterior(
        self,
        *args: Any,
        sample_shape: Sequence[int] = (),
        num_importance: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Draw from the guide, or by its importance weights from nearer to the posterior.

        There is no gradient.

        Args:
            args: Positional arguments of the model; :class:`AutoPosterior` needs none once it
                has been called.
            sample_shape: Leading shape of the draws.
            num_importance: If given, each draw is picked out of that many fresh ones of the
                guide, with a probability in proportion to its importance weight
                ``p(x, z) / q(z)``, Pareto-smoothed over the whole pool: every row for itself
                where rows have weights of their own. Needs the arguments with the data; all of
                the pool is in memory, and the model must be able to run many draws at once.
            kwargs: Keyword arguments of the model.

        Returns:
            Constrained draws ``(*sample_shape, *site)`` by site; of a subsampled plate the rows
            of one subsample.

        Raises:
            ValueError: If there are no arguments where the answer depends on them; under
                ``num_importance``, if it is below 1, if the guide is a part of a list, if a
                weight is NaN or infinite, if the model's weights are not those of a bound, or if
                all of the draws to pick from have weight 0.
        """
        if num_importance is not None:
            return self._picked(tuple(sample_shape), num_importance, args, kwargs)
        draws = self._draw(tuple(sample_shape), args, kwargs)
        return {site.name: site.transform(value) for site, value in draws}

    def median(self, *args: Any, num_samples: int = 10_000, **kwargs: Any) -> dict[str, Tensor]:
        """Median of every unconstrained number, mapped to the support.

        Exact where the guide is a Normal in unconstrained space, and by Monte Carlo elsewhere.

        Args:
            args: Positional arguments of the model, as for :meth:`sample_posterior`.
            num_samples: Number of draws.
            kwargs: Keyword arguments of the model.

        Returns:
            Constrained values of the shape of the site, by site: a simplex is one.
        """
        shape = (positive_int("num_samples", num_samples),)
        exact = self._exact_median(args, kwargs)
        if exact is not None:
            return exact
        draws = self._draw(shape, args, kwargs)
        return {site.name: site.transform(value.quantile(0.5, 0)) for site, value in draws}

    def quantiles(
        self, quantiles: Any, *args: Any, num_samples: int = 10_000, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of the marginals of every latent site.

        Exact where the guide is a Normal in unconstrained space and the support is one of
        numbers, each for itself; by Monte Carlo elsewhere.

        Args:
            quantiles: A number between 0 and 1, or a list of them.
            args: Positional arguments of the model, as for :meth:`sample_posterior`.
            num_samples: Number of draws, all of them in memory at once.
            kwargs: Keyword arguments of the model.

        Returns:
            Quantiles of the constrained values, ``(*quantiles.shape, *site)``, by site.
        """
        shape = (positive_int("num_samples", num_samples),)
        exact, complete = self._exact_quantiles(quantiles, args, kwargs)
        if complete:
            return exact
        result = {}
        for site, draws in self._draw(shape, args, kwargs):
            levels = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device)
            result[site.name] = quantile(site.transform(draws), levels)
        return {**result, **exact}

    def _exact_median(self, args: tuple, kwargs: dict) -> dict[str, Tensor] | None:
        """The medians of the unconstrained numbers on the support, if they are known."""
        return None

    def _exact_quantiles(
        self, quantiles: Any, args: tuple, kwargs: dict
    ) -> tuple[dict[str, Tensor], bool]:
        """Quantiles of the sites of which they are known, and whether these are all."""
        return {}, False

    @torch.no_grad()
    def _picked(
        self, sample_shape: tuple[int, ...], num_importance: int, args: tuple, kwargs: dict
    ) -> dict[str, Tensor]:
        count = math.prod(sample_shape) * positive_int("num_importance", num_importance)
        with poutine.block():
            # The first call of a guide, as everywhere, and with its checks.
            sites = [site for site, _ in self._draw((1,), args, kwargs)]
            found = picked(pool(self, sites, count, args, kwargs), sites, num_importance)
        return {name: x.reshape(sample_shape + tuple(x.shape[1:])) for name, x in found.items()}

    @torch.no_grad()
    def _draw(
        self, sample_shape: tuple[int, ...], args: tuple, kwargs: dict
    ) -> list[tuple[Site, Tensor]]:
        """Unconstrained draws ``(*sample_shape, *site)`` of every site."""
        if self._reads_arguments and self._has_arguments and not args and not kwargs:
            raise ValueError(
                f"Expected the arguments of the model, which the encoder of {type(self).__name__} "
                "reads; got none. Pass the rows to draw for."
            )
        with poutine.block(), self._pyro_context:
            plates = self._plates(self._ready(args, kwargs), args, kwargs)
            sites = [site for _, site in self.prototype_trace.iter_stochastic_nodes()]
            depth = max(site["value"].dim() - site["fn"].event_dim for site in sites)
            draws = []
            with pyro.plate("_draws", math.prod(sample_shape), dim=-1 - depth):
                for site, value, _ in self._latents(plates, args, kwargs):
                    own = value.shape[value.dim() - len(site.batch + site.event) :]
                    draws.append((site, value.reshape(sample_shape + tuple(own))))
        return draws

    def _ready(self, args: tuple, kwargs: dict) -> Any:
        """Make the first call where there was none; whose plates a draw is in."""
        # The plates of a list's part are those of the list.
        master = self if self.master is None else self.master()
        if master is not self and master.prototype_trace is None:
            master._setup_prototype(*args, **kwargs)
        self._prepare(args, kwargs)
        return master

    def _plates(self, master: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
        """The plates of a question; without arguments those of the first call."""
        if args or kwargs or not self._has_arguments:
            return master._create_plates(*args, **kwargs)
        return {
            name: pyro.plate(name, frame.full_size or frame.size, dim=frame.dim)
            for name, frame in self._prototype_frames.items()
        }
