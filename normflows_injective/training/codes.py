r"""Codes of an autoencoder brought to unit scale inside the layers next to them.

A ``Standardise`` before the injection takes the scales. Without one the networks do: with means
:math:`m` and deviations :math:`s` of the codes, the last linear map of the encoder becomes
:math:`(W h + b - m) / s`, and the first one of the decoder takes :math:`s z + m` in. The
reconstruction stays, and the layers that model the density of the codes meet numbers of unit
scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..flows.free_form import FreeFormInjection
from ..flows.stack import Stack
from ..flows.standardise import Standardise
from .rows import Rows


@torch.no_grad()
def scale_codes(stack: Stack, rows: Rows) -> bool:
    """Bring the codes of rows to mean zero and deviation one, where the networks allow it.

    A ``Standardise`` next to the injection takes the scales; else the networks do. It returns
    whether anything was changed; other encoders and decoders are left alone.
    """
    codes = stack.encode(rows.x, rows.context)
    if stack.latent_block and isinstance(stack.latent_block[-1], Standardise):
        stack.latent_block[-1].load_state_dict(Standardise.fit(codes).state_dict())
        return True
    injection: Any = stack.composite[0]
    if not isinstance(injection, FreeFormInjection) or codes.dim() != 2:
        return False
    last, first = _edges(injection, codes.shape[1:].numel())
    if last is None or first is None:
        return False
    before = [tensor.clone() for tensor in _tensors(last, first)]
    projection = stack.project(rows.x, rows.context)
    mean, scale = codes.mean(0), codes.std(0).clamp(min=1e-6 * float(codes.std() + 1e-30))
    _fold(last, first, mean, scale)
    # The edges were taken by their shapes. The networks say if these were the right ones.
    expected = (codes - mean) / scale
    same = _agree(stack.encode(rows.x, rows.context), expected)
    if same and _agree(stack.project(rows.x, rows.context), projection):
        return True
    for tensor, value in zip(_tensors(last, first), before, strict=True):
        tensor.copy_(value)
    return False


def _edges(
    injection: FreeFormInjection, latent_dim: int
) -> tuple[nn.Linear | None, nn.Linear | None]:
    """The last linear map of the encoder and the first one of the decoder."""
    ends = [m for m in injection.encoder.modules() if isinstance(m, nn.Linear)]
    starts = [m for m in injection.decoder.modules() if isinstance(m, nn.Linear)]
    last = next((m for m in reversed(ends) if m.out_features == latent_dim), None)
    first = next((m for m in starts if m.in_features >= latent_dim), None)
    has_biases = last is not None and first is not None and not (last.bias is None is first.bias)
    return (last, first) if has_biases else (None, None)


def _fold(last: nn.Linear, first: nn.Linear, mean: Tensor, scale: Tensor) -> None:
    last.weight.div_(scale.unsqueeze(1))
    last.bias.sub_(mean).div_(scale)
    # A context comes after the codes.
    columns = first.weight[:, : len(mean)]
    first.bias.add_(columns @ mean)
    columns.mul_(scale)


def _tensors(last: nn.Linear, first: nn.Linear) -> list[Any]:
    return [last.weight, last.bias, first.weight, first.bias]


def _agree(actual: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(actual, expected, rtol=1e-2, atol=1e-3 * float(expected.std())))
