"""The rows of the comparison.

A method is a function of a :class:`Job` that returns a :class:`Fitted`, and a line in METHODS.
"""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec

import torch

import normflows_injective as nfi
from examples.support.tabular_models import normal

from .job import Fitted, Job, Method
from .phases import PhaseReport
from .plain import fit_free_form, fit_pca, fit_published, fit_recipe, fit_vae
from .two_steps import (
    coupling_block,
    fit_latent_matching,
    fit_latent_splines,
    fit_plan_f,
    fit_plan_n,
)

__all__ = ["METHODS", "available"]

# The rate of ``nfi.training.fit`` for autoencoders, which plans F and N get as well.
FAST_RATE = 8e-3


def fit_defaults(job: Job) -> Fitted:
    """The package's own model and training, both with their defaults."""
    return _fitted(job, nfi.injective_flow(job.split.train, latent_dim=job.latent_dim))


def fit_couplings(job: Job) -> Fitted:
    """The package's own training of the common networks with the couplings of plan N."""
    shapes = (job.latent_dim,), (job.split.dim,)
    injection = nfi.flows.FreeFormInjection(*job.networks.pair(job.seed), *shapes)
    layers = [*coupling_block(job.latent_dim), injection]
    return _fitted(job, nfi.InjectiveNormalizingFlow(normal(job.latent_dim), layers))


def _fitted(job: Job, model: nfi.InjectiveNormalizingFlow) -> Fitted:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        result = nfi.training.fit(
            model,
            job.split.train,
            seconds=job.seconds,
            validation=job.split.validation,
            seed=job.seed,
            progress=False,
        )
    reports = [
        PhaseReport(
            phase.name,
            phase.steps,
            phase.seconds,
            phase.seconds / max(1, phase.steps),
            chosen_at=math.nan,
            score=phase.after,
        )
        for phase in result.phases
    ]
    return Fitted(model, reports)


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
    "plan_f8": Method("plan F, autoencoder at 8e-3", partial(fit_plan_f, rate=FAST_RATE)),
    "plan_n8": Method("plan N, autoencoder at 8e-3", partial(fit_plan_n, rate=FAST_RATE)),
    "fit": Method("nfi.training.fit", fit_defaults),
    "fit_couplings": Method("nfi.training.fit, couplings of plan N", fit_couplings),
}


def available() -> list[str]:
    """Names of the methods that this version of the package can run."""
    has_training = find_spec("normflows_injective.training") is not None
    missing = {"fit": not hasattr(nfi, "injective_flow"), "fit_couplings": not has_training}
    return [name for name in METHODS if not missing.get(name, False)]
