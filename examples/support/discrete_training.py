"""How the example of assignment flows trains its models, and takes their likelihoods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import trange

import normflows_injective as nfi
from normflows_injective.flows.assignment import HorizonChoice

__all__ = ["Budget", "Fitted", "fit", "judge", "shown"]

# Divergences of networks that see all variables are taken by probes.
PROBES = 8


class Budget(NamedTuple):
    """How long to train and how much to judge.

    Attributes:
        net: Name of the network.
        steps: Training steps.
        batch: Rows in a batch.
        rate: Learning rate at the start.
        judged: Held-out rows whose likelihood is taken.
        draws: Importance samples for each of them.
        load: Whether to read the weights that an earlier run wrote, instead of training.
    """

    net: str
    steps: int
    batch: int
    rate: float
    judged: int
    draws: int
    load: bool = False


class Fitted(NamedTuple):
    """A trained model, the steps to sample it by, and a line about it."""

    flow: nfi.AssignmentFlow
    steps: int
    note: str


def fit(
    flow: nfi.AssignmentFlow,
    choice: HorizonChoice,
    loss_of: Callable[[Tensor], Tensor],
    rows: int,
    budget: Budget,
    path: Path,
) -> Fitted:
    """Train by an ordinary loop, with Adam and a cosine, and save; or load an earlier training.

    ``loss_of`` gives the loss of the rows of an index.
    """
    parameters = sum(p.numel() for p in flow.parameters())
    note = f"{parameters:,} parameters, to time {choice.horizon.end:.1f} in {choice.steps} steps"
    if budget.load:
        flow.load(path)
        return Fitted(flow.eval(), choice.steps, f"{note}, loaded")
    optimizer = torch.optim.Adam(flow.parameters(), budget.rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    start, mean = time.process_time(), math.nan
    progress = trange(budget.steps, desc="training", unit="step")
    for _ in progress:
        loss = loss_of(torch.randint(rows, (budget.batch,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        # Losses at random times vary, so the bar shows a running mean.
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        progress.set_postfix(loss=f"{mean:.3f}")
    minutes = (time.process_time() - start) / 60
    flow.save(path)
    trained = f"{budget.steps} training steps of {budget.batch} in {minutes:.1f} min"
    return Fitted(flow.eval(), choice.steps, f"{note}, {trained}")


def judge(
    fitted: Fitted, rows: Tensor, draws: int, context: Tensor | None = None
) -> tuple[Tensor, float]:
    """Negative log-likelihoods of rows in nats, and the mean effective number of draws."""
    estimate = fitted.flow.log_prob(
        rows,
        draws,
        divergence="hutchinson",
        num_probes=PROBES,
        steps=fitted.steps,
        context=context,
        max_rows=1024,
        progress=True,
    )
    return -estimate.log_prob.double(), float(estimate.effective_sample_size.mean()) * draws


def shown(values: Tensor, digits: int, sign: str = "") -> str:
    """Mean with its standard error over rows."""
    mean, error = values.mean(), values.std() / len(values) ** 0.5
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"
