"""Processor time of training steps, sampling and likelihoods of assignment flows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.shared.records import Record
from benchmarks.shared.timing import least_seconds
from normflows_injective import AssignmentFlow
from normflows_injective.nets.fields import DenseField, LeaveOneOutField

__all__ = ["costs"]

BATCH, FIXED = 32, 16
SIZES = tuple(2**k for k in (12, 14, 16, 18))
DENSE_SIZES, LIKELIHOOD_SIZES = SIZES[:3], (4, 8, 16, 32, 64)
HIDDEN, ENOUGH, FEWEST, LIKELIHOOD_STEPS = (128, 128, 128), 0.5, 4, 2


class Elementwise(nn.Module):
    """A network of next to no cost: the features by one number, and another for the time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, 0.1]))

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Features (B, n, c) at times (B,) to as many numbers."""
        return self.weight[0] * features + self.weight[1] * t.view(-1, 1, 1)


class Blind(Elementwise):
    """An elementwise network of the time alone, so that it leaves every variable out."""

    leave_one_out = True

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Times (B,) to as many numbers as there are features (B, n, c)."""
        return self.weight[1] * t.view(-1, 1, 1).expand_as(features)


def costs(quick: bool) -> Record:
    """Seconds for each number of variables and classes: our part, whole steps, likelihoods."""
    _keep_memory()
    ours, dense = (sizes[:1] if quick else sizes for sizes in (SIZES, DENSE_SIZES))
    rows = []
    for varied in ("variables", "classes"):
        for size in ours:
            n, c = (size // FIXED, FIXED) if varied == "variables" else (FIXED, size // FIXED)
            row = {"varied": varied, "variables": n, "classes": c, **_ours(n, c)}
            if size in dense:
                row |= _dense(n, c)
            rows.append(row)
    likelihoods = [
        {"variables": n, "classes": 4, **_likelihood(n, 4)}
        for n in (LIKELIHOOD_SIZES[:1] if quick else LIKELIHOOD_SIZES)
    ]
    return {"rows": rows, "likelihoods": likelihoods, "batch": BATCH}


def _keep_memory() -> None:
    """Tell the allocator of GNU systems to keep what is freed.

    It hands large pieces back, from about 2^17 numbers of 32 samples, and to get them again page
    by page takes as long as all the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def _ours(n: int, c: int) -> Record:
    flow, blind = AssignmentFlow(Elementwise(), n, c), AssignmentFlow(Blind(), n, c)
    return {
        "training": _seconds(partial(_train, flow, _labels(n, c))),
        "sampling": _sampling(flow),
        "likelihood": _divergence(blind, "exact"),
    }


def _dense(n: int, c: int) -> Record:
    flow = AssignmentFlow(DenseField(n, c, HIDDEN), n, c)
    return {
        "dense_training": _seconds(partial(_train, flow, _labels(n, c))),
        "dense_sampling": _sampling(flow),
    }


def _likelihood(n: int, c: int) -> Record:
    dense = AssignmentFlow(DenseField(n, c, HIDDEN), n, c)
    left_out = AssignmentFlow(LeaveOneOutField(n, c), n, c)
    return {
        "dense": _sampling(dense),
        "dense_exact": _divergence(dense, "exact"),
        "dense_hutchinson": _divergence(dense, "hutchinson"),
        "left_out": _sampling(left_out),
        "left_out_exact": _divergence(left_out, "exact"),
    }


def _labels(n: int, c: int) -> Tensor:
    return torch.randint(c, (BATCH, n))


def _train(flow: AssignmentFlow, labels: Tensor) -> None:
    flow.zero_grad()
    flow.flow_matching_loss(labels).backward()


def _sampling(flow: AssignmentFlow) -> float:
    """Seconds for one evaluation of the field, with its step."""
    v = flow.path.draw_start(BATCH, flow.field.like)
    t = torch.ones(BATCH)

    def run() -> None:
        with torch.no_grad():
            torch.add(v, flow.field(v, t), alpha=0.1)

    return _seconds(run)


def _divergence(flow: AssignmentFlow, kind: str) -> float:
    """Seconds for one evaluation of field and divergence, with its step."""
    layer = flow.layer(LIKELIHOOD_STEPS, "euler", kind)
    m = torch.randn(BATCH, flow.dim)

    def run() -> None:
        with torch.no_grad():
            layer.inverse(m)

    return _seconds(run) / LIKELIHOOD_STEPS


def _seconds(run: Callable[[], object]) -> float:
    return least_seconds(run, FEWEST, ENOUGH)
