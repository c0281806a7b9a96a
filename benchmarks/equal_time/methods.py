"""The rows of the comparison.

A method is a function of a :class:`Job` that returns a :class:`Fitted`, and a line in METHODS.
"""

from __future__ import annotations

import math
from functools import partial
from importlib.util import find_spec

import torch

import normflows_injective as nfi

from .competitors import normal
from .data import Split
from .job import Fitted, Job, Method
from .phases import PhaseReport
from .plain import fit_free_form, fit_pca, fit_published, fit_recipe, fit_vae
from .two_steps import (
    fit_latent_matching,
    fit_latent_splines,
    fit_plan_f,
    fit_plan_n,
)

__all__ = ["KINDS", "METHODS", "available"]

# The rate of ``nfi.training.fit`` for autoencoders, which plans F and N get as well.
FAST_RATE = 8e-3


def fit_defaults(job: Job) -> Fitted:
    """The package's own model and training, both with their defaults; it sees images as such."""
    shape = job.networks.image_shape or (job.split.dim,)
    split = Split(*(rows.unflatten(1, shape) for rows in job.split[:3]))
    model = nfi.injective_flow(split.train, latent_dim=job.latent_dim)
    fitted = _fitted(job._replace(split=split), model)
    if len(shape) == 1:
        return fitted
    layers = [*model.flows, nfi.flows.Reshape(shape, (job.split.dim,))]
    return fitted._replace(model=nfi.InjectiveNormalizingFlow(model.q0, layers))


def fit_paired(job: Job, kind: str | None = None) -> Fitted:
    """The package's own training and latent density, from the start that all methods have.

    ``kind`` is that of the latent block, None for the default.
    """
    built = nfi.injective_flow(job.split.train, latent_dim=job.latent_dim, latent_density=kind)
    *latent_block, _, _ = built.flows
    shapes = (job.latent_dim,), (job.split.dim,)
    injection = nfi.flows.FreeFormInjection(*job.networks.pair(job.seed), *shapes)
    model = nfi.InjectiveNormalizingFlow(normal(job.latent_dim), [*latent_block, injection])
    return _fitted(job, model)


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
    "fit_paired": Method("nfi.training.fit, start of the others", fit_paired),
}
# Rows that are run if they are asked for.
KINDS = {
    f"fit_{kind}": Method(f"nfi.training.fit, {kind} density", partial(fit_paired, kind=kind))
    for kind in ("mixed", "spline", "affine", "autoregressive", "matching")
}
METHODS |= KINDS


def available() -> list[str]:
    """Names of the methods that this version of the package can run, if none is asked for."""
    has_training = find_spec("normflows_injective.training") is not None
    missing = {"fit": not hasattr(nfi, "injective_flow"), "fit_paired": not has_training}
    return [name for name in METHODS if name not in KINDS and not missing.get(name, False)]
