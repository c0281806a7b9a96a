"""The methods as they are usually trained: one cycle at rate 1e-3, and the last weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import normflows as nf
from torch import Tensor, nn

import normflows_injective as nfi
from benchmarks.steps.models import Pair, published_loss

from .competitors import GaussianVAE, normal, pca_model, spline_block
from .job import Fitted, Job, median_seconds
from .phases import BATCH, Phase, one_cycle, train

__all__ = [
    "RATE",
    "fit_free_form",
    "fit_pca",
    "fit_published",
    "fit_recipe",
    "fit_vae",
    "one_cycle_phase",
]

RATE = 1e-3
PLAIN_BETA, RECIPE_BETA = 10.0, 20.0
WARMUP = (0.1, 0.4)


class Ramp(nfi.SurrogateLikelihood):
    """A surrogate likelihood whose weight is set from outside, for warm-ups by time."""

    weight = 0.0

    def likelihood_weight(self) -> float:
        """The weight of likelihood and volume that was set last."""
        return self.weight


def fit_pca(job: Job) -> Fitted:
    """Principal components with a Gaussian on their plane."""
    return Fitted(pca_model(job.split.train, job.latent_dim), [])


def fit_vae(job: Job) -> Fitted:
    """A variational autoencoder with one learned noise level."""
    vae = GaussianVAE(job.split.dim, job.latent_dim)
    vae.encoder, vae.decoder = job.networks.pair_with_scales(job.seed)
    report = train(one_cycle_phase(job, "vae", vae.forward_kld, vae))
    means = Means(vae.encoder)
    injection = nfi.flows.FreeFormInjection(
        means, vae.decoder, (job.latent_dim,), (job.split.dim,)
    )
    model = nfi.InjectiveNormalizingFlow(normal(job.latent_dim), [injection])
    return Fitted(model, [report], sample_data=vae.sample)


class Means(nn.Module):
    """The first half of an encoder's outputs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Means (B, d) of data (B, D)."""
        outputs: Tensor = self.encoder(x)
        return outputs.chunk(2, dim=1)[0]


def fit_free_form(job: Job) -> Fitted:
    """A free-form injective flow with a normal base, under the full loss from the first step."""
    model = _free_form(job, nfi.SurrogateLikelihood(beta=PLAIN_BETA))
    return Fitted(model, [train(one_cycle_phase(job, "free form", model.forward_kld, model))])


def fit_published(job: Job) -> Fitted:
    """The same loss by the algorithm as it was published (arXiv 2306.01843), with one probe."""
    model = _free_form(job, nfi.SurrogateLikelihood(beta=PLAIN_BETA))
    injection = model.flows[0]
    pair = Pair(injection.encoder, injection.decoder, (job.split.dim,), job.latent_dim)
    phase = one_cycle_phase(job, "published", published_loss(pair, 1), model)
    return Fitted(model, [train(phase)])


def fit_recipe(job: Job) -> Fitted:
    """The recipe of release 0.1: four spline couplings, and reconstruction alone at first.

    Shares of *steps* are those of the recipe: a tenth for the reconstruction, a ramp until two
    fifths. How long the cheaper first steps take is estimated from a few of both kinds.
    """
    likelihood = Ramp(beta=RECIPE_BETA)
    model = _free_form(job, likelihood, spline_block(job.latent_dim))
    timed = _free_form(job, Ramp(beta=RECIPE_BETA), spline_block(job.latent_dim))
    first_share = _share_of_reconstruction(timed, job.split.train[:BATCH])
    ramp_start, ramp_end = WARMUP

    def steps_of(spent: float) -> float:
        if spent < first_share:
            return ramp_start * spent / first_share
        return ramp_start + (1 - ramp_start) * (spent - first_share) / (1 - first_share)

    def set_weight(spent: float) -> None:
        share = (steps_of(spent) - ramp_start) / (ramp_end - ramp_start)
        likelihood.weight = min(1.0, max(0.0, share))

    phase = one_cycle_phase(job, "recipe", model.forward_kld, model)
    phase = phase._replace(
        schedule=lambda spent: one_cycle(steps_of(spent)), before_step=set_weight
    )
    report = train(phase)
    likelihood.weight = 1.0
    return Fitted(model, [report])


def one_cycle_phase(
    job: Job, name: str, loss: Callable[[Tensor], Tensor], model: nn.Module, share: float = 1.0
) -> Phase:
    """A share of the time on the training rows, in one cycle."""
    return Phase(
        name=name,
        loss=loss,
        parameters=[p for p in model.parameters() if p.requires_grad],
        rows=job.split.train,
        seconds=share * job.seconds,
        seed=job.seed,
        rate=RATE,
        schedule=one_cycle,
    )


def _free_form(
    job: Job, likelihood: nfi.SurrogateLikelihood, block: Sequence[nf.flows.Flow] = ()
) -> nfi.InjectiveNormalizingFlow:
    shapes = (job.latent_dim,), (job.split.dim,)
    injection = nfi.flows.FreeFormInjection(*job.networks.pair(job.seed), *shapes)
    return nfi.InjectiveNormalizingFlow(normal(job.latent_dim), [*block, injection], likelihood)


def _share_of_reconstruction(model: nfi.InjectiveNormalizingFlow, x: Tensor) -> float:
    """Share of the time that the recipe's first steps take, by the times of both kinds."""
    seconds = []
    for weight in (0.0, 1.0):
        model.likelihood.weight = weight
        seconds.append(median_seconds(lambda: model.forward_kld(x).backward()))
    first, later = WARMUP[0] * seconds[0], (1 - WARMUP[0]) * seconds[1]
    return first / (first + later)
