"""Laws of labels that are known in full, and how far samples are from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from normflows_injective.flows.assignment import AssignmentPath

__all__ = ["Target", "distances", "exact_rate", "grid", "independent", "ising", "pair"]

BACKGROUND = 0.01


class Target(NamedTuple):
    """A law of n labels of c classes each, all of whose S states are listed.

    Attributes:
        states: Labels (S, n), in the order of their codes.
        probs: Probabilities (S,), in double precision.
        classes: Number of classes c of every variable.
    """

    states: Tensor
    probs: Tensor
    classes: int

    @property
    def variables(self) -> int:
        """Number of variables n."""
        return self.states.shape[1]

    @property
    def entropy(self) -> float:
        """Entropy in nats."""
        return float(-(self.probs * self.probs.log()).sum())

    @property
    def coupling(self) -> float:
        """Sum of the entropies of the variables, minus the entropy of the law, in nats."""
        marginals = [_marginal(self, i) for i in range(self.variables)]
        return sum(float(-(m * m.log()).sum()) for m in marginals) - self.entropy

    def draw(self, num: int) -> Tensor:
        """True samples (num, n)."""
        return self.states[torch.multinomial(self.probs, num, replacement=True)]

    def histogram(self, labels: Tensor) -> Tensor:
        """Shares (S,) of labels (N, n)."""
        places = self.classes ** torch.arange(self.variables - 1, -1, -1)
        counts = torch.bincount((labels * places).sum(1), minlength=len(self.probs))
        return counts.double() / len(labels)


def ising(side: int = 3, strength: float = 0.5) -> Target:
    """The Ising model on a square, in which neighbours agree."""
    states = _states(2, side**2)
    spins = (2 * states - 1).double().view(-1, side, side)
    pairs = (spins[:, 1:] * spins[:, :-1]).sum((1, 2))
    pairs = pairs + (spins[:, :, 1:] * spins[:, :, :-1]).sum((1, 2))
    return Target(states, (strength * pairs).softmax(0), 2)


def grid(classes: int) -> Target:
    r"""Two labels near each other on a circle, the second after a random renaming.

    .. math:: p(i, j) \propto \big(1 + \tfrac45 \cos \tfrac{2\pi i}{c}\big)
              \big(e^{-d(i, \pi(j))^2 / 2 w^2} + .01\big), \qquad w = c / 16 + \tfrac12

    with the distance d on a circle of c places.
    """
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(classes))
    i = torch.arange(classes).unsqueeze(1)
    apart = (i - order).abs()
    apart = torch.minimum(apart, classes - apart).double()
    weight = 1 + 0.8 * (2 * math.pi * i.double() / classes).cos()
    table = weight * ((-0.5 * (apart / (classes / 16 + 0.5)).square()).exp() + BACKGROUND)
    return Target(_states(classes, 2), (table / table.sum()).flatten(), classes)


def pair(classes: int) -> Target:
    """Two labels that agree nine times of ten."""
    states = _states(classes, 2)
    probs = torch.full((len(states),), 0.1 / (classes**2 - classes), dtype=torch.float64)
    probs[states[:, 0] == states[:, 1]] = 0.9 / classes
    return Target(states, probs, classes)


def independent(target: Target) -> Tensor:
    """Probabilities (S,) of the product of the marginals of a law."""
    factors = [_marginal(target, i)[target.states[:, i]] for i in range(target.variables)]
    return torch.stack(factors).prod(0)


def distances(shares: Tensor, target: Target) -> dict[str, float]:
    """Total variation from a law, and the Kullback-Leibler divergence of shares (S,) from it."""
    ratio = (shares / target.probs).clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "tv": float((shares - target.probs).abs().sum()) / 2,
        "kl": float((shares * ratio.log()).sum()),
    }


def exact_rate(target: Target, path: AssignmentPath) -> Callable[[Tensor, float], Tensor]:
    """The marginal field of a law, by the posterior of every one of its states."""
    like = torch.zeros(())
    corners = path.simplices.corners(target.states, like)
    log_probs = target.probs.to(like).log()

    def rate(v: Tensor, time: float) -> Tensor:
        t = v.new_full((len(v),), time)
        evidence = (path.evidence_scale(v, t) * v).flatten(1) @ corners.flatten(1).T
        mean = ((log_probs + evidence).softmax(1) @ corners.flatten(1)).view(v.shape)
        contraction = path.horizon.contraction
        return (path.speeds(v) * mean - contraction * v) / (1 - contraction * time)

    return rate


def _marginal(target: Target, variable: int) -> Tensor:
    marginal = torch.zeros(target.classes, dtype=torch.float64)
    return marginal.index_add(0, target.states[:, variable], target.probs)


def _states(classes: int, variables: int) -> Tensor:
    return torch.tensor(list(product(range(classes), repeat=variables)))
