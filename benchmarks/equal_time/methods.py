"""The rows of the comparison.

A method is a function of a :class:`Job` that returns a :class:`Fitted`, and a line in METHODS.
"""

from __future__ import annotations

import time
from importlib.util import find_spec

import torch

import normflows_injective as nfi

from .job import Fitted, Job, Method
from .phases import PhaseReport
from .plain import fit_free_form, fit_pca, fit_published, fit_recipe, fit_vae
from .two_steps import fit_latent_matching, fit_latent_splines, fit_plan_f, fit_plan_n

__all__ = ["FIT", "METHODS", "available"]


def fit_package(job: Job) -> Fitted:
    """The package's own training with its defaults; it holds out rows by itself.

    It gets training and validation rows together, and is counted as one phase.
    """
    rows = torch.cat([job.split.train, job.split.validation])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = nfi.injective_flow(rows, latent_dim=job.latent_dim)
    start = time.process_time()
    nfi.training.fit(model, rows, seconds=job.seconds)
    seconds = time.process_time() - start
    return Fitted(model, [PhaseReport("fit", 0, seconds, float("nan"))])


FIT = "fit"
METHODS = {
    "pca": Method("PCA + Gaussian", fit_pca),
    "vae": Method("VAE, learned noise", fit_vae),
    "free_form": Method("free-form flow, beta 10", fit_free_form),
    "published": Method("free-form flow, published algorithm", fit_published),
    "recipe": Method("free-form flow, recipe of 0.1", fit_recipe),
    "ae_splines": Method("autoencoder, then splines, rate 1e-3", fit_latent_splines),
    "ae_matching": Method("autoencoder, then matching, rate 1e-3", fit_latent_matching),
    "plan_f": Method("plan F: autoencoder, then matching, careful", fit_plan_f),
    "plan_n": Method("plan N: autoencoder, then couplings, careful", fit_plan_n),
    FIT: Method("`nfi.training.fit`", fit_package),
}


def available() -> list[str]:
    """Names of the methods that this version of the package can run."""
    has_fit = hasattr(nfi, "injective_flow") and find_spec("normflows_injective.training")
    return [name for name in METHODS if name != FIT or has_fit]
