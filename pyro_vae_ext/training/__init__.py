"""Training: compiled steps, epochs with everything around them, and checkpoints."""

from pyro_vae_ext.training.checkpoint import load_checkpoint, save_checkpoint
from pyro_vae_ext.training.compile import CompiledSVI, compile
from pyro_vae_ext.training.fit import FitResult, fit
from pyro_vae_ext.training.fit_posterior import PosteriorResult, fit_posterior
from pyro_vae_ext.training.history import History, Skipped
from pyro_vae_ext.training.pathfinder import PathfinderResult, pathfinder
from pyro_vae_ext.training.posterior_history import PosteriorHistory

__all__ = [
    "CompiledSVI",
    "FitResult",
    "History",
    "PathfinderResult",
    "PosteriorHistory",
    "PosteriorResult",
    "Skipped",
    "compile",
    "fit",
    "fit_posterior",
    "load_checkpoint",
    "pathfinder",
    "save_checkpoint",
]
