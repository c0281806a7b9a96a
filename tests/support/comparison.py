"""Comparisons of tensors within one tolerance, absolute and relative."""

from __future__ import annotations

import torch


def close(actual, expected, tolerance=1e-10, absolute=None):
    """Compare with a tensor, an array or a number, in the dtype and on the device of the first.

    Whatever has fewer axes is expanded to the shape of the first.
    """
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device).detach()
    if expected.dim() < actual.dim():
        expected = expected.expand(actual.shape)
    absolute = tolerance if absolute is None else absolute
    torch.testing.assert_close(actual.detach(), expected, atol=absolute, rtol=tolerance)


def agree(actual, expected, tolerance):
    """Compare tensors of one shape, dtype and device."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
