"""Reconstruction error against the number of coordinates, from one autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional

from .spectrum import PrincipalComponents

_LARGEST = 64
_WIDTH = 128
_BATCH = 256
_HELD_OUT = 0.2
_MOST_HELD_OUT = 2000
_RATE = 3e-3
# Later components than these have to be reconstructed by nothing.
_INPUTS = 256
# A further coordinate pays as long as the error per missing dimension is this far above its floor.
_FLOOR = 2.0
# Errors below this share of the variance need no further coordinate.
_ENOUGH = 0.01
_NEARLY = 0.05


class CodeErrors(NamedTuple):
    """Held-out reconstruction errors of one autoencoder with codes of every length.

    Attributes:
        dims: Lengths k of the code, ascending.
        errors: Mean squared errors, as shares of the variance; those of components or of shorter
            codes where these are lower, because a code can be theirs.
        standard_errors: Their standard errors.
        linear_errors: Those of as many principal components, on the same rows.
        low: The least k at which the error falls below 5 % of the variance.
        high: The least k at which it falls below 1 %, or at which the error per missing
            dimension has come to within a factor 2 of its floor. At least ``low``.
        at_floor: Whether it was such a floor that decided.
    """

    dims: tuple[int, ...]
    errors: tuple[float, ...]
    standard_errors: tuple[float, ...]
    linear_errors: tuple[float, ...]
    low: int
    high: int
    at_floor: bool

    @property
    def is_open(self) -> bool:
        """Whether even the longest code leaves more than 5 % of the variance."""
        return self.errors[-1] >= _NEARLY


class _Network(NamedTuple):
    """Weights of a linear map and of a perceptron with two hidden layers beside it."""

    linear: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    def __call__(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Values at inputs (B, F) for codes of the lengths that masks (B, K) say."""
        hidden = torch.cat([inputs, mask], dim=1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = functional.silu(hidden @ weight + bias)
        return inputs @ self.linear + hidden @ self.weights[-1] + self.biases[-1]

    def parameters(self) -> list[Tensor]:
        """Everything that is trained."""
        return [self.linear, *self.weights, *self.biases]


def code_errors(
    rows: Tensor, components: PrincipalComponents, num_steps: int, generator: Generator
) -> CodeErrors:
    r"""Train an autoencoder for all lengths of its code at once, and read off its errors.

    Code and reconstruction are :math:`c = m_k \odot (W x + f(x, m_k))` and
    :math:`\hat x = V c + h(c, m_k)`, with masks :math:`m_k` of k ones. Every row of a batch has a
    k of its own, so that one training serves all. W and V start at the principal components and
    f, h at zero: training starts at the errors of a linear map. Unlike nested dropout both
    networks are told k, so a short code need not be the beginning of a long one.

    References:
        Nested dropout: Rippel et al., arXiv 1402.0915.
    """
    width = min(components.rank, _INPUTS)
    longest = min(width, _LARGEST)
    dims = _lengths(longest)
    total = components.variances.sum()
    inside = (rows @ components.basis[:, :width]).float()
    outside = float(components.variances[width:].sum() / total)
    inside = inside / total.sqrt().float()
    num_held_out = min(int(_HELD_OUT * len(rows)), _MOST_HELD_OUT)
    held_out, train = inside[:num_held_out], inside[num_held_out:]
    with torch.inference_mode(False), torch.enable_grad():
        encoder, decoder = _trained(train.clone(), longest, dims, num_steps, generator)
    scale = held_out.square().sum(1).mean() + outside
    errors: list[float] = []
    spreads, linear = [], []
    with torch.no_grad():
        for k in dims:
            mask = (torch.arange(longest, device=rows.device) < k).to(inside)
            decoded = _decoded(encoder, decoder, held_out, mask.expand(len(held_out), -1))
            squares = (decoded - held_out).square().sum(1)
            trailing = held_out[:, k:].square().sum(1)
            linear.append(float((trailing.mean() + outside) / scale))
            squares = trailing if trailing.mean() < squares.mean() else squares
            error = float((squares.mean() + outside) / scale)
            errors.append(min([error, *errors[-1:]]))
            spreads.append(float(squares.std() / len(squares) ** 0.5 / scale))
    low, high, at_floor = _read(dims, errors, components.rank)
    return CodeErrors(dims, tuple(errors), tuple(spreads), tuple(linear), low, high, at_floor)


def _lengths(longest: int) -> tuple[int, ...]:
    """All lengths up to 16, then every sixth part more, and the longest."""
    lengths = list(range(1, min(longest, 16) + 1))
    while lengths[-1] < longest:
        lengths.append(min(longest, lengths[-1] + max(1, lengths[-1] // 6)))
    return tuple(lengths)


def _read(dims: Sequence[int], errors: Sequence[float], rank: int) -> tuple[int, int, bool]:
    """The range of lengths that suffice, and whether a floor decided its end."""
    longest = dims[-1]
    low = next((k for k, error in zip(dims, errors, strict=True) if error < _NEARLY), longest)
    for index, (k, error) in enumerate(zip(dims, errors, strict=True)):
        if k < low:
            continue
        if error < _ENOUGH:
            return low, k, False
        # A floor shows only where longer codes are still too short for a linear map.
        longer = zip(dims[index + 1 :], errors[index + 1 :], strict=True)
        floors = [e / (rank - longer_k) for longer_k, e in longer if longer_k < rank]
        if floors and error / (rank - k) <= _FLOOR * min(floors):
            return low, k, True
    return low, longest, False


def _decoded(encoder: _Network, decoder: _Network, x: Tensor, mask: Tensor) -> Tensor:
    return decoder(mask * encoder(x, mask), mask)


def _trained(
    x: Tensor, longest: int, dims: Sequence[int], num_steps: int, generator: Generator
) -> tuple[_Network, _Network]:
    width = x.shape[1]
    identity = torch.eye(width, longest, dtype=x.dtype, device=x.device)
    encoder = _network(identity, longest, generator)
    decoder = _network(identity.mT.clone(), longest, generator)
    parameters = encoder.parameters() + decoder.parameters()
    optimizer = torch.optim.Adam(parameters, _RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=num_steps + 1)
    lengths = torch.tensor(dims, device=x.device)
    positions = torch.arange(longest, device=x.device)
    size = min(_BATCH, len(x))
    for _ in range(num_steps):
        drawn = torch.randint(len(x), (size,), generator=generator, device=generator.device)
        chosen = torch.randint(len(dims), (size,), generator=generator, device=generator.device)
        batch = x[drawn.to(x.device)]
        lengths_of_rows = lengths[chosen.to(x.device)]
        mask = (positions < lengths_of_rows[:, None]).to(x)
        squares = (_decoded(encoder, decoder, batch, mask) - batch).square().sum(1)
        # Roots, so that the long codes with their small errors count as well.
        loss = (squares + 1e-4).sqrt().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return encoder, decoder


def _network(linear: Tensor, longest: int, generator: Generator) -> _Network:
    """A network that starts at its linear map."""
    widths = [linear.shape[0] + longest, _WIDTH, _WIDTH]
    weights = []
    for shape in zip(widths[:-1], widths[1:], strict=True):
        drawn = torch.randn(
            shape, generator=generator, device=generator.device, dtype=linear.dtype
        )
        weights.append(drawn.to(linear.device) / shape[0] ** 0.5)
    weights.append(linear.new_zeros(_WIDTH, linear.shape[1]))
    biases = [linear.new_zeros(weight.shape[1]) for weight in weights]
    start, *rest = [tensor.requires_grad_() for tensor in (linear.clone(), *weights, *biases)]
    return _Network(start, tuple(rest[:3]), tuple(rest[3:]))
