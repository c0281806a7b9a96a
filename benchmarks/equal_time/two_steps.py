"""An autoencoder first, then a density of its codes: as it is usually done, and carefully.

Plans F and N are the careful ones: averaged weights chosen by held-out scores, codes of unit
deviation that are computed once, and three times the usual rate for the density.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import normflows as nf
import torch
from torch import Tensor, nn

import normflows_injective as nfi
from normflows_injective.flows.coupling import Affine, LULinear, NetworkCoupling

from .competitors import FittedAffine, normal, spline_block
from .job import Fitted, Job
from .matching import MatchingLaw
from .phases import Choice, Phase, PhaseReport, rise_and_cosine, train
from .plain import RATE, one_cycle_phase

__all__ = [
    "Scaling",
    "coupling_block",
    "fit_latent_matching",
    "fit_latent_splines",
    "fit_plan_f",
    "fit_plan_n",
]

DENSITY_RATE = 3e-3
NUM_COUPLINGS, COUPLING_HIDDEN, MAX_LOG_SCALE = 8, (128, 128), 2.0
# Rows of a held-out score: more are left out, fewer are repeated for the noise of matching. An
# image costs a convolutional autoencoder about a millisecond.
HELD_OUT_ROWS, HELD_OUT_IMAGES = 2048, 512
CHUNK = 2048


class Scaling(nf.flows.Flow):
    """Latents of zero mean and unit deviation to codes like those given, one by one."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", codes.mean(0))
        self.register_buffer("deviation", codes.std(0).clamp_min(1e-6))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, d) to codes (B, d), with the log-det (B,)."""
        return z * self.deviation + self.mean, self.deviation.log().sum().expand(len(z))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, d) to latents (B, d), with the log-det (B,)."""
        return (z - self.mean) / self.deviation, -self.deviation.log().sum().expand(len(z))


class Codes(NamedTuple):
    """Codes of an autoencoder.

    Attributes:
        train: Scaled codes (N, d) of the training rows.
        validation: Those of the validation rows.
        layers: The layers that undo the scaling and decode.
        seconds: Processor time of the encoding, which the density's phase has to spare.
        report: Of the autoencoder's phase.
    """

    train: Tensor
    validation: Tensor
    layers: list[nf.flows.Flow]
    seconds: float
    report: PhaseReport


def fit_latent_splines(job: Job) -> Fitted:
    """Half of the time for an autoencoder, half for a spline flow on its whitened codes."""
    codes = _codes(job, is_careful=False, scaling=FittedAffine)
    flow = nf.NormalizingFlow(normal(job.latent_dim), spline_block(job.latent_dim))
    report = train(_usual(job, "splines", flow.forward_kld, flow, codes))
    layers = [*flow.flows, *codes.layers]
    return Fitted(
        nfi.InjectiveNormalizingFlow(normal(job.latent_dim), layers), _reports(codes, report)
    )


def fit_latent_matching(job: Job) -> Fitted:
    """Half of the time for an autoencoder, half for flow matching of its scaled codes."""
    codes = _codes(job, is_careful=False, scaling=Scaling)
    law = MatchingLaw(job.latent_dim)
    report = train(_usual(job, "matching", law.loss, law, codes))
    model = nfi.InjectiveNormalizingFlow(law, codes.layers)
    return Fitted(model, _reports(codes, report), matching=law)


def fit_plan_f(job: Job, rate: float = RATE) -> Fitted:
    """Plan F: flow matching of scaled codes, by a held-out loss of fixed noise and times.

    The rate is the autoencoder's.
    """
    codes = _codes(job, is_careful=True, scaling=Scaling, rate=rate)
    law = MatchingLaw(job.latent_dim)
    held_out = _about(codes.validation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        noise, times = torch.randn_like(held_out), torch.rand(len(held_out), 1)
    choice = Choice(lambda: law.loss_at(held_out, noise, times))
    report = train(_careful(job, "matching", law.loss, law, codes, choice))
    model = nfi.InjectiveNormalizingFlow(law, codes.layers)
    return Fitted(model, _reports(codes, report), matching=law)


def fit_plan_n(job: Job, rate: float = RATE) -> Fitted:
    """Plan N: eight affine couplings on scaled codes, chosen by the held-out likelihood.

    The rate is the autoencoder's.
    """
    codes = _codes(job, is_careful=True, scaling=Scaling, rate=rate)
    flow = nf.NormalizingFlow(normal(job.latent_dim), coupling_block(job.latent_dim))
    held_out = codes.validation[:HELD_OUT_ROWS]
    choice = Choice(lambda: flow.forward_kld(held_out))
    report = train(_careful(job, "couplings", flow.forward_kld, flow, codes, choice))
    model = nfi.InjectiveNormalizingFlow(normal(job.latent_dim), [*flow.flows, *codes.layers])
    return Fitted(model, _reports(codes, report))


def coupling_block(latent_dim: int) -> list[nf.flows.Flow]:
    """Affine couplings with bounded log-scales, each followed by a dense linear layer."""
    block: list[nf.flows.Flow] = []
    for index in range(NUM_COUPLINGS):
        coupling = NetworkCoupling(
            latent_dim, Affine(MAX_LOG_SCALE), COUPLING_HIDDEN, 0, bool(index % 2), nn.SiLU
        )
        block += [coupling, LULinear(latent_dim)]
    return block


def _codes(
    job: Job, is_careful: bool, scaling: Callable[[Tensor], nf.flows.Flow], rate: float = RATE
) -> Codes:
    """Train an autoencoder for half of the time, and encode all rows once."""
    pair = job.networks.pair(job.seed)

    def loss(x: Tensor) -> Tensor:
        return (x - pair.decoder(pair.encoder(x))).square().sum(1).mean()

    phase = one_cycle_phase(job, "autoencoder", loss, nn.ModuleList(pair), share=0.5)
    phase = phase._replace(rate=rate)
    if is_careful:
        is_image = job.networks.image_shape is not None
        held_out = job.split.validation[: HELD_OUT_IMAGES if is_image else HELD_OUT_ROWS]
        phase = phase._replace(schedule=rise_and_cosine, choice=Choice(lambda: loss(held_out)))
    report = train(phase)
    start = time.process_time()
    with torch.no_grad():
        raw = _encoded(pair.encoder, job.split.train)
        undo = scaling(raw)
        codes, _ = undo.inverse(raw)
        validation, _ = undo.inverse(_encoded(pair.encoder, job.split.validation))
    seconds = time.process_time() - start
    shapes = (job.latent_dim,), (job.split.dim,)
    injection = nfi.flows.FreeFormInjection(*pair, *shapes)
    return Codes(codes, validation, [undo, injection], seconds, report)


def _usual(
    job: Job, name: str, loss: Callable[[Tensor], Tensor], density: nn.Module, codes: Codes
) -> Phase:
    """What autoencoder and encoding left of the time: half of it, or more after an early end."""
    left = job.seconds - codes.report.seconds - codes.seconds
    if left <= 0:
        raise SystemExit(
            f"Autoencoder and encoding of the rows took {job.seconds - left:.1f} s, nothing is "
            f"left of {job.seconds:g} s: give more --seconds."
        )
    return one_cycle_phase(job, name, loss, density)._replace(rows=codes.train, seconds=left)


def _careful(
    job: Job,
    name: str,
    loss: Callable[[Tensor], Tensor],
    density: nn.Module,
    codes: Codes,
    choice: Choice,
) -> Phase:
    phase = _usual(job, name, loss, density, codes)
    return phase._replace(rate=DENSITY_RATE, schedule=rise_and_cosine, choice=choice)


def _reports(codes: Codes, density: PhaseReport) -> list[PhaseReport]:
    """Both phases, the encoding counted in the second."""
    return [codes.report, density._replace(seconds=density.seconds + codes.seconds)]


def _encoded(encoder: nn.Module, rows: Tensor) -> Tensor:
    return torch.cat([encoder(part) for part in rows.split(CHUNK)])


def _about(rows: Tensor) -> Tensor:
    """The rows, repeated or cut to the number of a held-out score."""
    repeats = -(-HELD_OUT_ROWS // len(rows))
    return rows.repeat(repeats, 1)[:HELD_OUT_ROWS]
