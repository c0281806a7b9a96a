"""The methods of `kernel_couplings.py`: conditioners of one architecture, and two references."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import normflows as nf
import torch
from torch import Tensor, nn

from normflows_injective.flows.coupling import Affine, NetworkCoupling, Permutation
from normflows_injective.flows.kernel import KernelCoupling

from .kernel_data import Split

__all__ = ["METHODS", "Fitted", "Method", "Plan", "fit", "gaussian", "kernel_density", "timings"]

NUM_LAYERS = 6
NUM_POINTS = 100


class Method(NamedTuple):
    """A conditioner: a kernel, or an activation with a width and a weight decay."""

    title: str
    kernel: str = ""
    activation: Callable[[], nn.Module] = nn.Tanh
    matched: bool = True
    decay: float = 0.0
    precondition: bool = True
    few_only: bool = False


METHODS: dict[str, Method] = {
    "rbf": Method("kernel, RBF", "rbf"),
    "matern32": Method("kernel, Matern-3/2", "matern32"),
    "tanh": Method("tanh network, matched parameters"),
    "tanh_decay": Method("tanh network, matched, decay 0.1", decay=0.1),
    "relu": Method("ReLU network, matched parameters", activation=nn.ReLU),
    "tanh_wide": Method("tanh network, width N", matched=False),
    "relu_wide": Method("ReLU network, width N", activation=nn.ReLU, matched=False, few_only=True),
    "rbf_plain": Method("kernel, RBF, no basis", "rbf", precondition=False, few_only=True),
}


class Plan(NamedTuple):
    """How long a model is trained."""

    steps: int
    patience: int
    batch: int = 200
    every: int = 25


class Fitted(NamedTuple):
    """Log-likelihoods in nats in the units of the table, at the best validation step."""

    validation: float
    test: float
    median: float
    at_the_end: float
    best_step: int
    parameters: int
    seconds: float


def coupling(method: Method, dim: int, reverse: bool) -> nf.flows.Flow:
    """One coupling; all have the element transform of the package, a softly clamped affine map."""
    if method.kernel:
        return KernelCoupling(
            dim,
            NUM_POINTS,
            method.kernel,
            reverse=reverse,
            transform=Affine(),
            precondition=method.precondition,
        )
    width = matched_width(dim) if method.matched else NUM_POINTS
    return NetworkCoupling(
        dim, Affine(), (width, width), reverse=reverse, activation=method.activation
    )


def matched_width(dim: int) -> int:
    """Width w at which two hidden layers have at most the n parameters of the kernel expansion.

    From d given coordinates to scale and shift of a others: w^2 + w (d + 2a + 2) + 2a = n.
    """
    d, a = dim // 2, dim - dim // 2
    n = NUM_POINTS * (2 * a + d) + d
    half = (d + 2 * a + 2) / 2
    return int(math.sqrt(half**2 + n - 2 * a) - half)


def model_of(method: Method, dim: int) -> nf.NormalizingFlow:
    """Couplings that keep the first and the last half in turn, permutations after every two."""
    flows: list[nf.flows.Flow] = []
    for layer in range(NUM_LAYERS):
        if layer and layer % 2 == 0:
            flows.append(Permutation(dim))
        flows.append(coupling(method, dim, reverse=layer % 2 == 1))
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), flows)


def fit(method: Method, split: Split, rate: float, seed: int, plan: Plan) -> Fitted:
    """Train by maximum likelihood, and score at the step of the best validation likelihood."""
    torch.manual_seed(seed)
    train, validation, test = (_standardised(rows, split) for rows in split[:3])
    shift = float(split.deviation.log().sum())
    model = model_of(method, train.shape[1])
    with torch.no_grad():
        model.log_prob(train)
    step_once = stepper(method, model, rate, plan.steps)
    best, best_state, best_step, seconds, step = -math.inf, model.state_dict(), 0, 0.0, 0
    while step < plan.steps and step - best_step < plan.patience:
        start = time.perf_counter()
        for _ in range(plan.every):
            step_once(train[torch.randint(len(train), (plan.batch,))])
        seconds, step = seconds + time.perf_counter() - start, step + plan.every
        score = float(log_likelihoods(model, validation).mean())
        if score > best:
            best, best_step = score, step
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
    at_the_end = float(log_likelihoods(model, test).mean())
    model.load_state_dict(best_state)
    return Fitted(
        best - shift,
        float(log_likelihoods(model, test).mean()) - shift,
        float(log_likelihoods(model, test).median()) - shift,
        at_the_end - shift,
        best_step,
        sum(p.numel() for p in model.parameters()),
        seconds / step,
    )


def stepper(
    method: Method, model: nf.NormalizingFlow, rate: float, steps: int
) -> Callable[[Tensor], None]:
    """One step of Adam on a batch, its rate falling to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=method.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def step_once(batch: Tensor) -> None:
        loss = -model.log_prob(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()

    return step_once


@torch.no_grad()
def log_likelihoods(model: nf.NormalizingFlow, rows: Tensor) -> Tensor:
    """Log-likelihoods of rows (B, D) in nats, of shape (B,)."""
    return torch.cat([model.log_prob(part) for part in rows.split(1000)]).double()


def timings(dim: int, batch: int, repeats: int) -> dict[str, float]:
    """Seconds of a training step of every method, the methods in turn, the median of each."""
    rows = torch.randn(batch, dim)
    steps = {}
    for name, method in METHODS.items():
        model = model_of(method, dim)
        steps[name] = stepper(method, model, 1e-3, 1000)
        steps[name](rows)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step_once in steps.items():
            start = time.perf_counter()
            step_once(rows)
            taken[name].append(time.perf_counter() - start)
    return {name: sorted(values)[repeats // 2] for name, values in taken.items()}


def gaussian(split: Split) -> float:
    """Mean test log-likelihood of a Gaussian with the mean and covariance of the train rows."""
    return float(
        torch.distributions.MultivariateNormal(split.mean.double(), split.train.double().T.cov())
        .log_prob(split.test.double())
        .mean()
    )


def kernel_density(split: Split) -> float:
    """Mean test log-likelihood of a kernel density estimate shaped as the covariance.

    The bandwidth is that of the best validation likelihood.
    """
    factor = torch.linalg.cholesky(split.train.double().T.cov())
    train, validation, test = (
        torch.linalg.solve_triangular(factor, rows.double().T, upper=False).T for rows in split[:3]
    )
    widths = [0.05 * 1.25**k for k in range(16)]
    best = max(widths, key=lambda width: _density(validation, train, width))
    return _density(test, train, best) - float(factor.diagonal().log().sum())


def _density(rows: Tensor, centres: Tensor, width: float) -> float:
    count, dim = centres.shape
    constant = math.log(count) + dim * math.log(width * math.sqrt(2 * math.pi))
    values = [
        (-0.5 * (torch.cdist(part, centres) / width).square()).logsumexp(1)
        for part in rows.split(500)
    ]
    return float(torch.cat(values).mean()) - constant


def _standardised(rows: Tensor, split: Split) -> Tensor:
    return (rows - split.mean) / split.deviation
