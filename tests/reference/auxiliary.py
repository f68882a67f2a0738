"""Hierarchical guide with a learned reverse model.

`a ~ q(a | c)`, `z ~ q(z | a, c)`, and `r(a | z, c)` in the place of `q(a | z, c)`. Every part is
a diagonal Normal or a flow.

References:
    Ranganath, Tran and Blei (2016), Hierarchical Variational Models, arXiv 1511.02386, eq. 5-7.
    Maaloe, Sonderby, Sonderby and Winther (2016), Auxiliary Deep Generative Models,
    arXiv 1602.05473, eq. 3-5.
"""

import numpy as np

from . import iaf, masked_flow, mean_field


def part(weights, prefix):
    """The weights of one part, without its prefix."""
    return {
        name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)
    }


def joined(*parts):
    """Vectors of one batch, broadcast and put side by side; those that are `None` left out."""
    given = [np.asarray(p) for p in parts if p is not None]
    batch = np.broadcast_shapes(*(p.shape[:-1] for p in given))
    return np.concatenate([np.broadcast_to(p, (*batch, p.shape[-1])) for p in given], axis=-1)


def log_prob(value, weights, context, family, activation):
    """Log-density of a part; `family` is its entry in the registry, `None` for the default."""
    options = dict(family or {"name": "MeanField", "activation": activation})
    name = options.pop("name")
    activation = options.get("activation", "elu")
    if name == "MeanField":
        heads = mean_field.heads(weights, context, activation)
        return mean_field.log_prob(value, *heads)
    if name == "ReverseFlow":
        return masked_flow.log_prob(value, weights, context, activation)
    update = options.get("update", "affine")
    return iaf.log_prob(value, weights, context, update=update, activation=activation)


def log_density(values, weights, context=None, **case):
    """`log q(a | c) + log q(z | a, c) - log r(a | z, c)`, the guide's total, `(*batch,)`.

    Args:
        values: `aux` and `z`, `(*batch, aux_dim)` and `(*batch, latent_dim)`.
        weights: arrays named as in a PyTorch state dict: `aux.*`, `conditional.*`, `reverse.*`.
        context: `(*batch, context_dim)` or `None`.
        case: the family's arguments.
    """
    a, z = values["aux"], values["z"]
    activation = case.get("activation", "elu")
    log_aux = log_prob(a, part(weights, "aux."), context, case.get("aux_family"), activation)
    log_z = log_prob(
        z,
        part(weights, "conditional."),
        joined(a, context),
        case.get("latent_family"),
        activation,
    )
    log_reverse = log_prob(
        a, part(weights, "reverse."), joined(z, context), case.get("reverse_family"), activation
    )
    return log_aux + log_z - log_reverse
