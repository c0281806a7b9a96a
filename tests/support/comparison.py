"""Comparisons of tensors within one tolerance, absolute and relative."""

from __future__ import annotations

import torch


def close(actual, expected, tolerance=1e-10, absolute=None):
    """Compare with a tensor or array of the same shape, or with one number for all elements.

    The comparison takes the dtype and the device of the first.
    """
    expected = torch.as_tensor(expected, dtype=actual.dtype, device=actual.device).detach()
    if expected.dim() == 0:
        expected = expected.expand(actual.shape)
    absolute = tolerance if absolute is None else absolute
    torch.testing.assert_close(actual.detach(), expected, atol=absolute, rtol=tolerance)


def agree(actual, expected, tolerance):
    """Compare tensors of one shape, dtype and device."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
