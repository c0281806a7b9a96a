"""How well a flow on a known surface learns a density given by a formula, by reverse KL.

    python -m benchmarks.surfaces.inference [--seeds 3] [--page docs/results/surface_inference.md]

Targets: mixtures of four von Mises-Fisher laws on S^2 and on S^9, and posteriors of a linear
regression on a level set of a penalty. Every row is trained by ``reverse_kld``, with and without
annealing of the target, and judged by samples of the flow: the divergence, the share of effective
importance samples, and the log-evidence beside an estimate that knows nothing of the flow.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import trange

import normflows_injective as nfi
from benchmarks.shared.tables import report, table
from normflows_injective.flows import gauges

BATCH, EVALUATED, ORACLE = 512, 100_000, 2_000_000


class Mixture(nn.Module):
    """Four von Mises-Fisher laws of equal weight in random directions, which stay normalised."""

    on_manifold = True

    def __init__(self, dim: int, concentration: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(100 + dim)
        self.components = nn.ModuleList(
            nfi.distributions.VonMisesFisher(torch.randn(dim, generator=generator), concentration)
            for _ in range(4)
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats of unit vectors (B, D)."""
        scores = torch.stack([component.log_prob(x) for component in self.components])
        return scores.logsumexp(0) - math.log(len(self.components))

    def log_evidence(self) -> tuple[float, float]:
        """Zero: the mixture is normalised."""
        return 0.0, 0.0


class LevelSetPosterior(nn.Module):
    """Posterior of regression coefficients that are uniform, a priori, on a surface."""

    on_manifold = True

    def __init__(self, prior: nfi.distributions.UniformOnSurface) -> None:
        super().__init__()
        self.prior = prior
        generator = torch.Generator().manual_seed(5)
        mixing = torch.randn(prior.dim, prior.dim, generator=generator)
        self.design = torch.randn(7, prior.dim, generator=generator) @ mixing / prior.dim**0.5
        truth = torch.randn(prior.dim, generator=generator)
        self.outcome = self.design @ truth + torch.randn(7, generator=generator)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Gaussian log-likelihood (B,) of coefficients (B, D), without its constant."""
        residuals = self.outcome.to(x) - x @ self.design.to(x).T
        return -0.5 * residuals.square().sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log of likelihood times prior, (B,), at coefficients (B, D)."""
        return self.log_likelihood(x) + self.prior.log_prob(x)

    def log_evidence(self) -> tuple[float, float]:
        """Log of the mean likelihood over draws from the prior, and its standard error."""
        torch.manual_seed(11)
        scores = torch.cat([self.log_likelihood(self.prior(ORACLE // 10)[0]) for _ in range(10)])
        shares = (scores - scores.logsumexp(0)).double().exp()
        variance = (shares.square().sum() - 1 / len(shares)).clamp_min(0)
        return float(scores.double().logsumexp(0)) - math.log(len(scores)), float(variance.sqrt())


class Task(NamedTuple):
    """A target, its surface, and the first temperatures of training, 1 for no annealing."""

    name: str
    dim: int
    gauge: gauges.Gauge | None
    target: Callable[[], Mixture | LevelSetPosterior]
    temperatures: tuple[float, ...]
    steps: int
    num_layers: int


class Scores(NamedTuple):
    """Divergence, effective share and log-evidence by samples of a trained flow."""

    divergence: float
    effective: float
    log_evidence: float
    error: float


def _posterior() -> LevelSetPosterior:
    prior = nfi.distributions.UniformOnSurface(
        gauges.LpGauge(1.0), 3.0, dim=5, off_manifold="project"
    )
    return LevelSetPosterior(prior)


TASKS = (
    Task("mixture on S^2, κ = 10", 3, None, lambda: Mixture(3, 10.0), (3,), 600, 4),
    Task(
        "mixture on S^9, κ = 20",
        10,
        None,
        lambda: Mixture(10, 20.0),
        (20, 1),
        1200,
        6,
    ),
    Task(
        "posterior on an l_1 sphere, D = 5",
        5,
        gauges.LpGauge(1.0),
        _posterior,
        (5,),
        800,
        6,
    ),
)


def train(
    task: Task, target: nn.Module, temperature: float, seed: int
) -> nfi.InjectiveNormalizingFlow:
    """Train a flow by reverse KL to p^(1/T), with T falling to one over 60 % of the steps."""
    torch.manual_seed(seed)
    model = nfi.flows.star_like_flow(
        task.dim,
        task.gauge,
        level=1.0 if task.gauge is None else 3.0,
        num_layers=task.num_layers,
        p=target,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    for step in trange(task.steps, desc=f"{task.name}, T {temperature:g}, seed {seed}"):
        done = min(1.0, step / (0.6 * task.steps))
        loss = model.reverse_kld(BATCH, beta=temperature ** (done - 1.0))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def judge(model: nfi.InjectiveNormalizingFlow, log_evidence: float | None) -> Scores:
    """Scores by samples of a flow, whose own estimate serves where the evidence is unknown."""
    weights = []
    for _ in range(EVALUATED // 10_000):
        x, log_q = model.sample(10_000)
        weights.append((model.p.log_prob(x) - log_q).double())
    log_w = torch.cat(weights)
    evidence = float(log_w.logsumexp(0)) - math.log(len(log_w))
    share = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp() / len(log_w)
    error = math.sqrt((1 / float(share) - 1) / len(log_w))
    known = evidence if log_evidence is None else log_evidence
    return Scores(known - float(log_w.mean()), float(share), evidence, error)


def measure(task: Task, seeds: int, steps: int | None) -> list[list[str]]:
    """Rows of the table for one task, one for each first temperature."""
    task = task if steps is None else task._replace(steps=steps)
    target = task.target()
    true, error = target.log_evidence()
    rows = []
    for temperature in task.temperatures:
        start = time.perf_counter()
        runs = [judge(train(task, target, temperature, seed), true) for seed in range(seeds)]
        seconds = (time.perf_counter() - start) / seeds
        row = [
            task.name,
            f"{temperature:g} → 1" if temperature > 1 else "none",
            spread([run.divergence for run in runs], 3),
            spread([run.effective for run in runs], 3),
            spread([run.log_evidence - true for run in runs], 4),
            f"{true:.4f} ± {error:.4f}",
            f"{seconds:.0f}",
        ]
        print(*row, sep=", ", flush=True)
        rows.append(row)
    return rows


def spread(values: Sequence[float], digits: int) -> str:
    """Mean of runs with their least and greatest value."""
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Train, judge, print the table and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="index of one task")
    parser.add_argument("--steps", type=int, help="of every training, to try it")
    parser.add_argument("--page", type=Path, help="page whose table to write")
    arguments = parser.parse_args()
    tasks = TASKS if arguments.only is None else TASKS[arguments.only : arguments.only + 1]
    head = (
        "target",
        "annealing",
        "KL(q, p)",
        "effective share",
        "log Z error",
        "log Z",
        "seconds",
    )
    rows = [row for task in tasks for row in measure(task, arguments.seeds, arguments.steps)]
    report({"Densities on known surfaces": table(head, rows, 2)}, arguments.page)


if __name__ == "__main__":
    main()
