"""Decoders of the auxiliary variable of a guide, rows (B, r) to rows (B, D), with Jacobians."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ... import volume
from ...errors import UnsupportedLayerError


class Linearisation(NamedTuple):
    """Values (B, D) of a decoder and its transposed Jacobians (B, r, D)."""

    value: Tensor
    tangents: Tensor


class Decoder(nn.Module, ABC):
    """A map h of rows (B, r) to rows (B, D) that gives its Jacobians."""

    @property
    def slope(self) -> nn.Parameter | None:
        """The matrix (r, D) of a linear part that may be set, None where there is none."""
        return None

    @abstractmethod
    def forward(self, u: Tensor) -> Tensor:
        """Values (B, D) at rows (B, r)."""

    @abstractmethod
    def linearise(self, u: Tensor) -> Linearisation:
        """Values and transposed Jacobians at rows (B, r), both differentiable."""


@final
class LinearDecoder(Decoder):
    r"""The linear map :math:`h(u) = A u`, which starts with a variance of about one."""

    def __init__(self, rank: int, latent_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rank, latent_dim) / math.sqrt(rank))

    @property
    def slope(self) -> nn.Parameter:
        """The matrix A (r, D)."""
        return self.weight

    def forward(self, u: Tensor) -> Tensor:
        """Values (B, D) at rows (B, r)."""
        return u @ self.weight

    def linearise(self, u: Tensor) -> Linearisation:
        """Values and transposed Jacobians at rows (B, r)."""
        return Linearisation(self(u), self.weight.expand(len(u), -1, -1))


@final
class CurvedDecoder(Decoder):
    r"""A linear map plus a small smooth network, which starts close to the linear map.

    .. math:: h(u) = A u + W_2\, \sigma(W_1\, \sigma(W_0 u + b_0) + b_1) + b_2, \quad
              \sigma(a) = a / (1 + e^{-a})
    """

    def __init__(self, rank: int, latent_dim: int, width: int = 64) -> None:
        super().__init__()
        self.linear = LinearDecoder(rank, latent_dim)
        self.first = nn.Linear(rank, width)
        self.second = nn.Linear(width, width)
        self.output = nn.Linear(width, latent_dim)
        nn.init.normal_(self.output.weight, std=0.01 / math.sqrt(width))
        nn.init.zeros_(self.output.bias)

    @property
    def slope(self) -> nn.Parameter:
        """The matrix A (r, D)."""
        return self.linear.weight

    def forward(self, u: Tensor) -> Tensor:
        """Values (B, D) at rows (B, r)."""
        y = u
        for layer in (self.first, self.second):
            y = nn.functional.silu(layer(y))
        return self.linear(u) + self.output(y)

    def linearise(self, u: Tensor) -> Linearisation:
        """Values and transposed Jacobians at rows (B, r)."""
        # In closed form, with p = 1 / (1 + e^-a) and sigma' = p + a p (1 - p): a few products of
        # matrices that can be differentiated and traced like any other function.
        y = u
        tangents = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        for layer in (self.first, self.second):
            a = layer(y)
            p = a.sigmoid()
            y = a * p
            slope = p + y * (1 - p)
            tangents = (tangents @ layer.weight.mT) * slope.unsqueeze(-2)
        value = self.linear(u) + self.output(y)
        return Linearisation(value, self.linear.weight + tangents @ self.output.weight.mT)


@final
class DifferentiatedDecoder(Decoder):
    """Any module, after any flows of normflows, differentiated by forward-mode products."""

    # No log-determinants of the flows are needed: u before the flows stays the variable of the
    # standard normal law and of the reverse model, so no density is ever transported.

    def __init__(self, module: nn.Module, flows: Sequence[Any] = ()) -> None:
        super().__init__()
        self.flows = nn.ModuleList(flows)
        self.module = module

    def forward(self, u: Tensor) -> Tensor:
        """Values (B, D) at rows (B, r)."""
        for flow in self.flows:
            u, _ = flow(u)
        return self.module(u)

    def linearise(self, u: Tensor) -> Linearisation:
        """Values and transposed Jacobians at rows (B, r)."""
        if torch._C._get_tracing_state() is not None:
            raise UnsupportedLayerError(
                "A decoder module or latent flows are differentiated by torch's functional "
                "transforms, which torch.jit cannot trace. Use Trace_ELBO in place of "
                "JitTrace_ELBO, or the decoders of the house, None or 'linear', without flows."
            )
        value, jacobian = volume.jacobian(self, u)
        return Linearisation(value, jacobian.mT)
