"""The importance-weighted bound."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from numpyro_vae_ext.elbos._base import LogWeightELBO


class ImportanceWeightedELBO(LogWeightELBO):
    r"""The importance-weighted bound, for every datum by itself.

    .. math::
        \mathcal L_K = \sum_n \mathbb E \log \frac1K \sum_{k=1}^K w_{nk}, \qquad
        w_{nk} = \frac{p(x_n, z_{nk})}{q(z_{nk} \mid x_n)}, \qquad z_{nk} \sim q(\cdot \mid x_n)

    The rows :math:`n` are those of the plates that enclose every latent and observed site of model
    and guide; their N/B scale multiplies the sum. Without such a plate there is one joint weight.
    ``K = 1`` is the evidence lower bound, with the scales and plates as free as in the host's
    ``Trace_ELBO``.

    With ``num_outer`` groups of ``K`` particles the loss is the mean of :math:`M` such bounds, and
    so are its gradients: :math:`\tilde w_k` and what follows are those of a group. The bound is
    that of ``K``, with less noise. ``num_particles=1, num_outer=16, gradient="stl"`` is the plain
    bound over 16 draws under path gradients.

    Four gradient estimators, with :math:`\tilde w_k = w_k / \sum_j w_j`, model parameters
    :math:`\theta` and guide parameters :math:`\phi`. All are unbiased but ``"stl"`` at ``K > 1``:

    - ``"reparam"``: :math:`\sum_k \tilde w_k \nabla \log w_k`, plain differentiation;
    - ``"stl"``: the same without the derivative of :math:`\log q` in its own parameters. At
      ``K = 1`` this is *sticking the landing*, unbiased; at ``K > 1`` it is biased for
      :math:`\phi`;
    - ``"dreg"``: :math:`\theta` as before, and for :math:`\phi`
      :math:`\sum_k \tilde w_k^2 \,\partial_z \log w_k \,\partial_\phi z_k`;
    - ``"vimco"``: for discrete latent sites, continuous ones beside them keep ``"reparam"``.
      To the plain derivative it adds :math:`\sum_k (\hat L - \hat L_{-k}) \nabla \log q(b_k)`,
      where :math:`\hat L_{-k}` has the geometric mean of the other weights in place of
      :math:`w_k`. It needs ``K >= 2``.

    Under ``"stl"`` and ``"dreg"`` the guide's gradient is 0 for every sample once the guide is the
    posterior. A parameter that model and guide share gets both parts. Factors and observed sites
    of the guide count as part of the model. Both know the guide's parameters by ``params`` alone:
    the gradient in a value that the guide closes over, or takes as an argument, is wrong without
    a word. Make it a ``numpyro.param`` or a part of an ``nnx_module``, or use ``"reparam"``.

    Args:
        num_particles: number of particles `K` of a group.
        num_outer: number of groups `M`; the loss is the mean of their bounds.
        gradient: ``"reparam"``, ``"stl"``, ``"dreg"`` or ``"vimco"``.
        vectorize_particles: run the particles side by side, or one at a time.
        chunk_size: run this many particles of all ``K * M`` at a time; memory is that of one chunk,
            in the backward pass too, where each chunk is computed again.

    Raises:
        ValueError: if an argument is out of range; at the loss, if a latent site is in the model
            or the guide alone, or has no reparameterised sampler (under ``"vimco"``: is discrete
            in one of the two alone), if a subsampled plate does not enclose every site, if the
            scales of a weight differ, if a site has no log-density for every row, or if the data
            hold NaN.
        TypeError: if an argument, or the data at a continuous site, has the wrong type.

    References:
        Burda, Grosse and Salakhutdinov (2016), arXiv 1509.00519, eq. 8 and 13 (the bound);
        Roeder, Wu and Duvenaud (2017), arXiv 1703.09194, eq. 8 (``"stl"``);
        Tucker, Lawson, Gu and Maddison (2019), arXiv 1810.04152, eq. 8 (``"dreg"``);
        Mnih and Rezende (2016), arXiv 1602.06725 (``"vimco"``);
        Rainforth et al. (2018), arXiv 1802.04537, section 3 (``num_outer``).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from flax import nnx
        >>> from numpyro.contrib.module import nnx_module
        >>> from numpyro.infer import SVI
        >>> from numpyro_vae_ext.guides import MeanField
        >>> posterior = MeanField(1, context_dim=1, rngs=nnx.Rngs(0))
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        ...         numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     post = nnx_module("posterior", posterior)
        ...     with numpyro.plate("data", len(x)):
        ...         post("z", x)
        >>> elbo = ImportanceWeightedELBO(num_particles=5, gradient="dreg")
        >>> svi = SVI(model, guide, optax.adam(1e-2), elbo)
        >>> x = jnp.linspace(-1.0, 1.0, 8)[:, None]
        >>> result = svi.run(jax.random.key(0), 10, x, progress_bar=False)
        >>> elbo.log_weights(jax.random.key(1), result.params, model, guide, x).shape
        (5, 8)
        >>> plain = ImportanceWeightedELBO(num_outer=16, gradient="stl")
        >>> plain.log_weights(jax.random.key(1), result.params, model, guide, x).shape
        (16, 1, 8)
    """

    def bound(self, log_weights: jax.Array) -> jax.Array:
        """Log of the mean weight of every datum."""
        return logsumexp(log_weights, axis=0) - jnp.log(self.num_particles)
