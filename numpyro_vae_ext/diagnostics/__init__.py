"""Diagnostics of a trained (model, guide) pair."""

from numpyro_vae_ext.diagnostics.active_units import active_units
from numpyro_vae_ext.diagnostics.arviz import to_arviz
from numpyro_vae_ext.diagnostics.importance import importance
from numpyro_vae_ext.diagnostics.latent_utilisation import latent_utilisation
from numpyro_vae_ext.diagnostics.log_evidence import log_evidence

__all__ = ["active_units", "importance", "latent_utilisation", "log_evidence", "to_arviz"]
