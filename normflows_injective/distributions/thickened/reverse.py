"""Reverse models: laws of the auxiliary variable that led to a value of a guide."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from ...errors import ShapeError
from .decoders import Decoder
from .noise import Noise


class ReverseLaw(NamedTuple):
    r"""Laws :math:`N(m, (R R^\top)^{-1})`, m (B, r), R (B, r, r), of the auxiliary variable."""

    mean: Tensor
    root: Tensor

    def rsample(self, count: int) -> Tensor:
        """Draw (count, B, r) that carry gradients."""
        normal = torch.randn_like(self.mean.expand(count, *self.mean.shape))
        # The covariance is R^-T R^-1.
        spread = torch.linalg.solve_triangular(self.root.mT, normal.unsqueeze(-1), upper=True)
        return self.mean + spread.squeeze(-1)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log-density (*, B) of auxiliary variables (*, B, r), in nats."""
        whitened = ((u - self.mean).unsqueeze(-2) @ self.root).squeeze(-2)
        log_det = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * u.shape[-1] * math.log(2 * math.pi)
        return log_det - 0.5 * whitened.square().sum(-1) - constant


class Reverse(nn.Module, ABC):
    """A law of the auxiliary variable for every standardised value e."""

    def follow(self, decoder: Decoder, noise: Noise) -> None:  # noqa: B027
        """Start anew from a decoder and noise that were set; a network stays as it is."""

    @abstractmethod
    def forward(self, e: Tensor, decoder: Decoder, noise: Noise) -> ReverseLaw:
        """The laws for standardised values (B, D), by the present decoder and noise."""


@final
class LaplaceReverse(Reverse):
    r"""The exact law of the decoder linearised near the auxiliary variable, by one step.

    .. math::

        J = h'(u_0), \quad P = I + J^\top \Psi^{-1} J, \quad
        m = u_0 + P^{-1}\big(J^\top \Psi^{-1} (e - h(u_0)) - u_0\big), \quad
        r(u \mid e) = N(m, P^{-1})
    """

    # The start u_0 = B e + b is learned, and begins with the same step from zero. For a linear h
    # this is the law of u given e from any start, as then P m = J^T Psi^-1 e.

    def __init__(self, decoder: Decoder, noise: Noise, like: Tensor, rank: int) -> None:
        super().__init__()
        self.start = nn.Parameter(like.new_zeros(rank, len(like)))
        self.offset = nn.Parameter(like.new_zeros(rank))
        self.follow(decoder, noise)

    @torch.no_grad()
    def follow(self, decoder: Decoder, noise: Noise) -> None:
        """Begin with the same step from zero, by the present decoder and noise."""
        value, tangents = decoder.linearise(self.offset.new_zeros(1, len(self.offset)))
        weighed = noise.times_precision(tangents[0])
        precision = weighed @ tangents[0].mT + torch.ones_like(self.offset).diag()
        weight = torch.linalg.solve(precision, weighed)
        self.start.copy_(weight)
        self.offset.copy_(-(weight @ value[0]))

    def forward(self, e: Tensor, decoder: Decoder, noise: Noise) -> ReverseLaw:
        """The laws for standardised values (B, D)."""
        rank = len(self.start)
        start = e @ self.start.mT + self.offset
        value, tangents = decoder.linearise(start)
        products = noise.gram(torch.cat([tangents, (e - value).unsqueeze(-2)], dim=-2))
        precision = products[:, :rank, :rank] + torch.ones_like(self.offset).diag()
        root = torch.linalg.cholesky(precision)
        slope = products[:, :rank, rank] - start
        step = torch.cholesky_solve(slope.unsqueeze(-1), root).squeeze(-1)
        return ReverseLaw(start + step, root)


@final
class LearnedReverse(Reverse):
    """A network from standardised values (B, D) to (B, 2 r), mean and log-scale of normals."""

    def __init__(self, network: nn.Module, rank: int) -> None:
        super().__init__()
        self.network = network
        self.rank = rank

    def forward(self, e: Tensor, decoder: Decoder, noise: Noise) -> ReverseLaw:
        """The laws for standardised values (B, D)."""
        parts: Tensor = self.network(e)
        if parts.shape != (len(e), 2 * self.rank):
            raise ShapeError(
                f"reverse must map {tuple(e.shape)} to {(len(e), 2 * self.rank)}, mean and "
                f"log-scale, got {tuple(parts.shape)}. Change its last layer."
            )
        mean, log_scale = parts.chunk(2, dim=-1)
        return ReverseLaw(mean, (-log_scale).exp().diag_embed())
