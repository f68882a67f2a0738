"""The registry: every public member of every family, as strings and numbers only.

``CASES[family][member]`` lists the keyword arguments that the contract tests of both backends
build the member with. A member that is missing here fails ``test_mirror.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

CASES: dict[str, dict[str, list[dict]]] = {
    "guides": {
        "AutoAmortized": [
            {"family": {"name": "MeanField"}},
            {"family": {"name": "IAF", "hidden_dims": (5,)}},
            {"family": {"name": "Auxiliary", "hidden_dims": (6,)}},
            {"family": {"name": "VGP", "num_inducing": 6, "hidden_dims": (6,)}},
        ],
        "AutoPosterior": [
            {"family": {"name": "MeanField"}},
            {"family": {"name": "IAF", "hidden_dims": (5,)}},
            {"family": {"name": "Auxiliary", "hidden_dims": (6,)}},
            {"family": {"name": "VGP", "num_inducing": 6, "hidden_dims": (6,)}},
        ],
        "MeanField": [
            {"latent_dim": 3, "context_dim": 4},
            {"latent_dim": 3, "context_dim": 4, "hidden_dims": (6, 5), "activation": "tanh"},
            {"latent_dim": 1, "context_dim": 4},
            {"latent_dim": 3, "context_dim": None},
            {"latent_dim": 1, "context_dim": None},
        ],
        "IAF": [
            {"latent_dim": 3, "context_dim": 4, "hidden_dims": (7,), "update": "gated"},
            {"latent_dim": 3, "context_dim": 4, "hidden_dims": (7,), "update": "affine"},
            {
                "latent_dim": 4,
                "context_dim": 2,
                "hidden_dims": (8, 6),
                "num_flows": 3,
                "activation": "tanh",
                "tails": "exponential",
            },
            {"latent_dim": 1, "context_dim": 4, "hidden_dims": (5,)},
            {
                "latent_dim": 3,
                "context_dim": None,
                "hidden_dims": (7,),
                "num_flows": 1,
                "update": "gated",
            },
            {"latent_dim": 3, "context_dim": None, "hidden_dims": (7,), "tails": "exponential"},
            {"latent_dim": 1, "context_dim": None, "hidden_dims": (5,)},
        ],
        "Auxiliary": [
            {"latent_dim": 3, "context_dim": 4, "aux_dim": 2, "hidden_dims": (6,)},
            {"latent_dim": 3, "context_dim": None, "aux_dim": 2, "hidden_dims": (6, 5)},
            {"latent_dim": 1, "context_dim": 4, "hidden_dims": (6,), "activation": "tanh"},
            {"latent_dim": 1, "context_dim": None, "hidden_dims": (5,)},
            {
                "latent_dim": 3,
                "context_dim": 4,
                "aux_dim": 2,
                "hidden_dims": (6,),
                "latent_family": {"name": "IAF", "hidden_dims": (7,)},
            },
            {
                "latent_dim": 2,
                "context_dim": 4,
                "aux_dim": 3,
                "hidden_dims": (6,),
                "reverse_family": {"name": "IAF", "hidden_dims": (7,)},
            },
            {
                "latent_dim": 2,
                "context_dim": None,
                "aux_dim": 3,
                "hidden_dims": (6,),
                "aux_family": {"name": "IAF", "hidden_dims": (7,), "update": "affine"},
                "latent_family": {"name": "MeanField", "hidden_dims": (5,), "activation": "tanh"},
                "reverse_family": {"name": "IAF", "hidden_dims": (7,), "num_flows": 1},
            },
        ],
        "VGP": [
            {"latent_dim": 3, "context_dim": 4, "num_inducing": 6, "hidden_dims": (5,)},
            {"latent_dim": 3, "context_dim": None, "num_inducing": 6, "hidden_dims": (5,)},
            {"latent_dim": 1, "context_dim": 4, "num_inducing": 5, "hidden_dims": (5,)},
            {"latent_dim": 1, "context_dim": None, "num_inducing": 1, "hidden_dims": (5,)},
            {
                "latent_dim": 3,
                "context_dim": 4,
                "input_dim": 2,
                "num_inducing": 6,
                "mean": "zero",
                "amortize": "none",
                "hidden_dims": (5, 4),
                "activation": "tanh",
            },
            {
                "latent_dim": 2,
                "context_dim": 4,
                "input_dim": 3,
                "num_inducing": 5,
                "amortize": "all",
                "jitter": 1e-3,
                "hidden_dims": (5,),
            },
            {
                "latent_dim": 2,
                "context_dim": None,
                "num_inducing": 5,
                "reverse_family": {"name": "IAF", "hidden_dims": (7,)},
            },
        ],
    },
    "elbos": {
        "ImportanceWeightedELBO": [
            {"num_particles": num_particles, "gradient": gradient, **layout}
            for gradient in ("reparam", "stl", "dreg")
            for num_particles, layout in (
                (1, {}),
                (6, {}),
                (6, {"vectorize_particles": False}),
                (6, {"chunk_size": 4}),
            )
        ]
        + [
            {"num_outer": 4, "gradient": "stl"},
            {"num_outer": 3, "vectorize_particles": False},
            {"num_particles": 3, "num_outer": 2, "gradient": "dreg", "chunk_size": 4},
        ],
        "TraceDisARM_ELBO": [
            {},
        ],
        "TraceFreeBits_ELBO": [
            {},
            {"num_particles": 3, "free_bits": 0.2, "groups": "site"},
            {
                "num_particles": 2,
                "free_bits": 1.0,
                "groups": {"z": (0, 1, 0)},
                "vectorize_particles": False,
            },
        ],
        "TraceNVIL_ELBO": [
            {},
            {"baselines": (), "vectorize_particles": False},
            {
                "num_particles": 2,
                "baselines": ("running", "learned", "leave_one_out"),
                "hidden_dims": (),
                "decay": 0.5,
                "normalize_variance": True,
            },
        ],
        "TraceREBAR_ELBO": [
            {},
            {
                "num_particles": 2,
                "temperature": 0.3,
                "eta": 0.7,
                "learn": False,
                "vectorize_particles": False,
            },
        ],
        "TraceRELAX_ELBO": [
            {"hidden_dims": (4,)},
            {"num_particles": 2, "temperature": 0.3, "eta": 0.7, "hidden_dims": ()},
        ],
    },
    "distributions": {
        "OneHotCategorical": [
            {"probs": (0.5, 0.2, 0.3)},
            {"logits": ((0.4, -1.0, 2.0, 0.1), (-0.3, 0.0, 0.7, -2.0))},
            {"logits": (0.3, -0.4)},
        ],
        "RelaxedOneHotCategorical": [
            {"temperature": 0.5, "probs": (0.5, 0.2, 0.3)},
            {"temperature": 0.7, "logits": ((0.4, -1.0, 2.0, 0.1), (-0.3, 0.0, 0.7, -2.0))},
            {"temperature": (0.2, 2.0), "logits": ((0.4, -1.0, 2.0), (-0.3, 0.0, 0.7))},
            {"temperature": (0.4, 1.0, 1.5), "logits": (0.3, -0.4)},
        ],
    },
    "handlers": {
        "kl_weight": [
            {"weight": 0.0},
            {"weight": 0.3},
            {"weight": 2.0},
        ],
        "relax": [
            {"temperature": 0.5},
            {"temperature": 0.2},
            {"temperature": 1.5},
        ],
    },
    "likelihoods": {
        "MADE": [
            {"shape": (3, 3), "context_dim": 2, "hidden_dims": (12,)},
            {
                "shape": (3, 3),
                "context_dim": 2,
                "covariate_dim": 1,
                "hidden_dims": (13, 7),
                "order": (4, 0, 8, 2, 6, 1, 7, 3, 5),
                "activation": "tanh",
            },
            {
                "shape": (3, 3),
                "context_dim": 2,
                "hidden_dims": (6, 14),
                "num_masks": 3,
                "mask_seed": 8,
            },
            {
                "shape": (3, 3),
                "context_dim": 2,
                "hidden_dims": (10, 10, 10),
                "residual": True,
                "activation": "elu",
            },
            {
                "shape": 6,
                "context_dim": 2,
                "hidden_dims": (10,),
                "output": "categorical",
                "num_categories": 3,
            },
            {
                "shape": (2, 2, 2),
                "context_dim": 2,
                "hidden_dims": (9,),
                "output": "categorical",
                "num_categories": 4,
            },
            {
                "shape": (2, 2, 2),
                "context_dim": 2,
                "hidden_dims": (9, 9),
                "output": "discretized_logistic_mixture",
                "num_categories": 4,
                "num_components": 2,
                "num_masks": 2,
                "order_agnostic": False,
                "mask_seed": 5,
                "residual": True,
            },
            {
                "shape": 4,
                "context_dim": 2,
                "hidden_dims": (8, 6),
                "output": "normal",
                "activation": "tanh",
            },
            {
                "shape": (2, 2),
                "context_dim": 2,
                "hidden_dims": (8,),
                "output": "logistic_mixture",
                "num_components": 3,
                "num_masks": 2,
            },
            {"shape": (2, 3), "context_dim": None, "hidden_dims": (7,)},
            {"shape": (2, 2), "context_dim": None, "covariate_dim": 2, "hidden_dims": (7,)},
            {"shape": 1, "context_dim": 2, "hidden_dims": (3, 3)},
        ],
        "PixelCNN": [
            {
                "shape": (3, 3),
                "context_dim": 2,
                "channels": 4,
                "num_layers": 2,
                "first_kernel_size": 3,
            },
            {
                "shape": (2, 3),
                "context_dim": 2,
                "covariate_dim": 1,
                "channels": 5,
                "num_layers": 3,
                "output": "categorical",
                "num_categories": 3,
            },
            {
                "shape": (2, 2, 2),
                "context_dim": 2,
                "channels": 4,
                "num_layers": 2,
                "output": "categorical",
                "num_categories": 4,
            },
            {
                "shape": (2, 2, 2),
                "context_dim": 2,
                "channels": 6,
                "num_layers": 2,
                "spatial_channels": 0,
                "output": "discretized_logistic_mixture",
                "num_categories": 4,
                "num_components": 2,
            },
            {
                "shape": (5, 5),
                "context_dim": 2,
                "channels": 4,
                "num_layers": 3,
                "receptive_field": 3,
            },
            {"shape": (2, 3), "context_dim": None, "channels": 4, "num_layers": 1},
            {
                "shape": (2, 2),
                "context_dim": 2,
                "channels": 4,
                "num_layers": 2,
                "output": "normal",
            },
        ],
        "Recurrent": [
            {"shape": (3, 3), "context_dim": 2, "hidden_dim": 5},
            {
                "shape": (3, 3),
                "context_dim": 2,
                "covariate_dim": 1,
                "cell": "lstm",
                "hidden_dim": 5,
                "num_layers": 2,
                "window": 4,
            },
            {
                "shape": (6,),
                "context_dim": 2,
                "hidden_dim": 5,
                "num_layers": 2,
                "window": 2,
                "output": "categorical",
                "num_categories": 3,
            },
            {
                "shape": (2, 2, 2),
                "context_dim": 2,
                "hidden_dim": 5,
                "output": "categorical",
                "num_categories": 4,
            },
            {"shape": (3, 4), "context_dim": 2, "hidden_dim": 5, "window": 2, "block_dims": 1},
            {
                "shape": (3, 2),
                "context_dim": 2,
                "covariate_dim": 1,
                "hidden_dim": 5,
                "block_dims": 1,
                "context_per_step": True,
            },
            {"shape": 4, "context_dim": 2, "hidden_dim": 5, "output": "normal"},
            {"shape": (2, 3), "context_dim": None, "cell": "lstm", "hidden_dim": 5, "window": 2},
        ],
    },
    "priors": {
        "FlowPrior": [
            {"latent_dim": 2, "hidden_dims": (6,)},
            {"latent_dim": 3, "hidden_dims": (8, 6), "num_flows": 3, "activation": "tanh"},
            {"latent_dim": 1, "hidden_dims": (5,), "num_flows": 1},
        ],
        "Mixture": [
            {"latent_dim": 2, "num_components": 3},
            {"latent_dim": 3},
            {"latent_dim": 1, "num_components": 1},
        ],
        "VampPrior": [
            {"input_shape": 4, "num_pseudo_inputs": 3},
            {"input_shape": (2, 3), "num_pseudo_inputs": 5, "bounds": (0.0, 1.0)},
            {"input_shape": (2,), "pseudo_inputs": ((0.3, -1.0), (1.2, 0.4)), "num_samples": 3},
        ],
    },
    "nn": {
        "MaskedLinear": [
            {"in_features": 3, "out_features": 2, "mask": ((1, 0, 0), (1, 1, 0))},
            {"in_features": 1, "out_features": 1, "mask": ((0,),)},
        ],
        "MaskedMLP": [
            {"features": 4, "hidden_dims": (9,), "num_outputs": 2, "context_dim": 3},
            {
                "features": 4,
                "hidden_dims": (9, 7),
                "num_outputs": 1,
                "context_dim": 3,
                "order": (2, 0, 3, 1),
                "activation": "tanh",
            },
            {"features": 3, "hidden_dims": (5,), "num_outputs": 2, "activation": "relu"},
            {"features": 1, "hidden_dims": (5,), "num_outputs": 2, "context_dim": 3},
            {"features": 1, "hidden_dims": (5, 4), "num_outputs": 2},
        ],
    },
    "diagnostics": {
        "log_evidence": [
            {"num_samples": 7, "progress_bar": False},
            {"num_samples": 7, "chunk_size": 3, "progress_bar": False},
            {"num_samples": 7, "chunk_size": 100, "progress_bar": False},
        ],
        "importance": [
            {"num_samples": 7, "progress_bar": False},
            {"num_samples": 120, "chunk_size": 50, "progress_bar": False},
        ],
        "active_units": [
            {"num_samples": 40},
            {"num_samples": 41, "threshold": 0.1},
        ],
        "latent_utilisation": [
            {"num_samples": 40, "num_contrasts": 5, "progress_bar": False},
            {"num_samples": 11, "num_contrasts": 30, "chunk_size": 4, "progress_bar": False},
        ],
        "to_arviz": [
            {"num_samples": 5, "num_chains": 2},
            {"num_samples": 5, "num_chains": 1, "posterior_predictive": False},
            {"num_samples": 5, "num_chains": 1, "chunk_size": 2, "progress_bar": False},
        ],
    },
    "training": {
        "CompiledSVI": [{"num_particles": 1}, {"num_particles": 5}],
        "FitResult": [{"num_epochs": 1}],
        "History": [
            {"loss": (2.5, 2.0), "validation_loss": (2.75, float("nan")), "best_epoch": 0},
            {"loss": (1.5,), "validation_loss": (float("nan"),), "best_epoch": None},
            {"loss": (), "validation_loss": (), "best_epoch": None},
        ],
        "PathfinderResult": [{"num_paths": 2}],
        "PosteriorHistory": [{"num_steps": 200, "learning_rates": 0.01}],
        "PosteriorResult": [{"num_steps": 400, "learning_rates": 0.01}],
        "Skipped": [
            {"epoch": 0, "step": 1, "site": "x", "reason": "data"},
            {"epoch": 1, "step": 3, "site": None, "reason": "loss"},
        ],
        "compile": [{"num_particles": 1}, {"num_particles": 5}],
        "fit": [
            {"num_epochs": 3},
            {"num_epochs": 3, "batch_size": 5},
            {"num_epochs": 3, "batch_size": 5, "shuffle": False},
            {"num_epochs": 3, "batch_size": 5, "drop_last": True},
            {"num_epochs": 3, "batch_size": 40},
        ],
        "fit_posterior": [
            {"num_steps": 400, "learning_rates": 0.01},
            {"num_steps": 1200, "learning_rates": (0.03, 0.01), "num_particles": 8},
        ],
        "load_checkpoint": [{"optimiser": "Adam"}, {"optimiser": "SGD"}],
        "pathfinder": [
            {"num_paths": 1, "hessian": False},
            {"num_paths": 3, "num_samples": 50, "num_particles": 10, "history_size": 4},
        ],
        "save_checkpoint": [
            {"metadata": None},
            {"metadata": {"epoch": 3, "names": ["a", "b"], "loss": 0.1, "best": None}},
        ],
    },
}

# Families with a density of their own, and those whose density is an integral.
DIRECT = ("MeanField", "IAF")
HIERARCHICAL = ("Auxiliary", "VGP")


def resolved(guides: Any, case: dict) -> dict:
    """The case with families in the place of their names, out of the package's ``guides``."""

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return partial(
            getattr(guides, value["name"]), **{k: v for k, v in value.items() if k != "name"}
        )

    return {key: build(value) for key, value in case.items()}


def outputs_of_reverse(names: Iterable[str]) -> list[str]:
    """Names of the last layers of the default reverse model of VGP, step by step; none of others.

    The first half of such a layer's outputs are shifts, the second half log-scales.
    """
    if any("reverse.base." in name for name in names):
        return []
    found: dict[int, tuple[int, str]] = {}
    for name in names:
        if match := re.match(r"(.*reverse\.nets\.(\d+)\.layers\.(\d+))\.bias$", name):
            step, layer = int(match[2]), int(match[3])
            found[step] = max(found.get(step, (-1, "")), (layer, match[1]))
    return [found[step][1] for step in sorted(found)]
