"""Mixtures of laws of angles, fitted by expectation and maximisation: competitors on tori."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KINDS", "Mixture", "best_mixture"]

KINDS = ("von Mises", "wrapped normal")
_STEPS, _WINDINGS = 40, (-1, 0, 1)


class Mixture(NamedTuple):
    """Log-weights (K,), means (K, d) and, by kind, concentrations (K, d) or factors (K, d, d)."""

    kind: str
    log_weights: Tensor
    means: Tensor
    spreads: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (N,) of angles (N, d) in radians."""
        return (self.log_weights + _log_components(self, x)).logsumexp(1)


def best_mixture(
    kind: str, train: Tensor, valid: Tensor, counts: list[int]
) -> tuple[Mixture, int]:
    """The mixture with the highest likelihood of validation rows, and its number of components."""
    fitted = [(_fit(kind, train, count), count) for count in counts]
    return max(fitted, key=lambda pair: float(pair[0].log_prob(valid).mean()))


def _fit(kind: str, x: Tensor, count: int) -> Mixture:
    dim = x.shape[1]
    means = x[torch.randperm(len(x))[:count]].clone()
    spreads = torch.full((count, dim), 4.0).to(x)
    if kind == "wrapped normal":
        spreads = torch.diag_embed(torch.full((count, dim), 0.5).to(x))
    mixture = Mixture(kind, torch.full((count,), -math.log(count)).to(x), means, spreads)
    for _ in range(_STEPS):
        shares = (mixture.log_weights + _log_components(mixture, x)).softmax(1)
        mass = shares.sum(0) + 1e-6
        mixture = _maximised(mixture, x, shares, mass)
    return mixture


def _maximised(old: Mixture, x: Tensor, shares: Tensor, mass: Tensor) -> Mixture:
    log_weights = (mass / mass.sum()).log()
    if old.kind == "von Mises":
        sines, cosines = shares.T @ x.sin(), shares.T @ x.cos()
        lengths = (sines.square() + cosines.square()).sqrt() / mass[:, None]
        lengths = lengths.clamp(max=1 - 1e-4)
        # The mean length of a von Mises law is close to this function of its concentration.
        concentrations = lengths * (2 - lengths.square()) / (1 - lengths.square())
        return Mixture(old.kind, log_weights, torch.atan2(sines, cosines), concentrations)
    gaps = _turned(x[:, None] - old.means)
    steps = (shares[..., None] * gaps).sum(0) / mass[:, None]
    means = _turned(old.means + steps)
    gaps = _turned(x[:, None] - means)
    covariances = torch.einsum("nk,nki,nkj->kij", shares, gaps, gaps) / mass[:, None, None]
    floor = 1e-3 * torch.eye(x.shape[1]).to(x)
    return Mixture(old.kind, log_weights, means, torch.linalg.cholesky(covariances + floor))


def _log_components(mixture: Mixture, x: Tensor) -> Tensor:
    """Log-densities (N, K) of the components."""
    gaps = _turned(x[:, None] - mixture.means)
    if mixture.kind == "von Mises":
        law = torch.distributions.VonMises(torch.zeros(()).to(x), mixture.spreads)
        return law.log_prob(gaps).sum(-1)
    # Around the nearest image each angle is wrapped on its own, the others staying: windings of
    # two at a time have no weight where a component is narrower than half a turn.
    # In whitened coordinates a winding is a constant shift, whose squared distance is quadratic.
    whitening = torch.linalg.inv(mixture.spreads)
    white = torch.einsum("nkj,kij->nki", gaps, whitening)
    square = white.square().sum(-1)
    along = 2 * math.pi * torch.einsum("nki,kij->nkj", white, whitening)
    lengths = (2 * math.pi * whitening).square().sum(1)
    wound = [square[..., None] + 2 * w * along + lengths for w in _WINDINGS if w]
    squares = torch.cat([square[..., None], *wound], -1)
    log_det = mixture.spreads.diagonal(dim1=1, dim2=2).log().sum(1)
    dim = x.shape[1]
    return (-squares / 2).logsumexp(-1) - log_det - dim / 2 * math.log(2 * math.pi)


def _turned(angles: Tensor) -> Tensor:
    return torch.remainder(angles + math.pi, 2 * math.pi) - math.pi
