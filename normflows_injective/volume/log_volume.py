r"""Exact log-volume :math:`\tfrac12 \log\det J^\top J` of a decoding map."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NotInjectiveError, NumericalWarning
from .products import Map, jacobian

__all__ = ["DecodedVolume", "decode_and_log_volume", "log_volume", "matrix_log_volume"]


class DecodedVolume(NamedTuple):
    """A decoded batch (B, *) and the log-volume of the decoding map there, (B,) in nats."""

    x: Tensor
    log_volume: Tensor


def log_volume(decode: Map, z: Tensor, chunk_size: int | None = None) -> Tensor:
    r"""Exact log-volume of a decoding map at a batch of latents.

    .. math:: \tfrac12 \log\det\big(g'(z)^\top g'(z)\big) = \sum_i \log |R_{ii}|, \quad g'(z) = QR

    The Jacobian comes from :math:`d` Jacobian-vector products of the whole batch and is factored
    by QR in float64. The Gram matrix :math:`J^\top J`, whose condition number is squared, is never
    formed. Differentiable where gradients are enabled; evaluate under ``torch.no_grad()`` to keep
    the memory of one decode.

    Args:
        decode: Map :math:`g` of :math:`(B, *)` to :math:`(B, *)`, acting on each sample alone.
        z: Latents of shape :math:`(B, *)` with :math:`d` elements per sample.
        chunk_size: Number of tangents per pass, which bounds the memory; None takes all :math:`d`.

    Returns:
        Log-volumes of shape :math:`(B,)` in nats, in the dtype of ``z`` but at least float32.

    Raises:
        NotInjectiveError: If the map lowers the dimension.
        UnsupportedLayerError: If a layer behind ``decode`` has no per-sample Jacobian.

    Warns:
        NumericalWarning: If a Jacobian is rank deficient to the precision it was computed in.

    References:
        Free-form injective flows, arXiv 2306.01843, eq. for the change of variables across
        dimensions.

    Examples:
        >>> circle = lambda z: 2.0 * torch.cat([z.cos(), z.sin()], dim=1)
        >>> log_volume(circle, torch.zeros(1, 1))  # log of the radius
        tensor([0.6931])
    """
    return decode_and_log_volume(decode, z, chunk_size).log_volume


def decode_and_log_volume(decode: Map, z: Tensor, chunk_size: int | None = None) -> DecodedVolume:
    r"""Decode a batch and give the exact log-volume from the same pass.

    Args:
        decode: As in :func:`log_volume`.
        z: As in :func:`log_volume`.
        chunk_size: As in :func:`log_volume`.

    Returns:
        :class:`DecodedVolume` ``(x, log_volume)``.

    Raises:
        NotInjectiveError: If the map lowers the dimension.
        UnsupportedLayerError: If a layer behind ``decode`` has no per-sample Jacobian.

    Examples:
        >>> x, volume = decode_and_log_volume(lambda z: torch.cat([z, z], 1), torch.ones(1, 1))
        >>> x, volume
        (tensor([[1., 1.]]), tensor([0.3466]))
    """
    x, matrix = jacobian(decode, z, chunk_size)
    kept = torch.promote_types(matrix.dtype, torch.float32)
    return DecodedVolume(x, matrix_log_volume(matrix).to(kept))


def matrix_log_volume(matrix: Tensor) -> Tensor:
    r"""Half the log-determinant of the Gram matrix of tall matrices, by QR.

    Args:
        matrix: :math:`J` of shape :math:`(B, D, d)`, :math:`D \ge d`.

    Returns:
        :math:`\tfrac12 \log\det J^\top J` of shape :math:`(B,)` in nats, in float64 where the
        device has it, else in float32.

    Raises:
        NotInjectiveError: If :math:`D < d`.

    Warns:
        NumericalWarning: If a matrix is rank deficient to the precision of its dtype.

    Examples:
        >>> matrix_log_volume(torch.tensor([[[3.0], [4.0]]])).exp()
        tensor([5.0000], dtype=torch.float64)
    """
    if matrix.shape[1] < matrix.shape[2]:
        raise NotInjectiveError(
            f"The decoding map takes {matrix.shape[2]} dimensions to {matrix.shape[1]}: it cannot "
            "be injective. A decoder must not lower the dimension."
        )
    factored = torch.float32 if matrix.device.type == "mps" else torch.float64
    lifted = matrix.to(factored)
    mode = "reduced" if lifted.requires_grad else "r"
    diagonal = torch.linalg.qr(lifted, mode=mode).R.diagonal(dim1=1, dim2=2).abs()
    _warn_if_deficient(diagonal.detach(), torch.finfo(matrix.dtype).eps)
    return diagonal.log().sum(1)


def _warn_if_deficient(diagonal: Tensor, eps: float) -> None:
    # |R_ii| brackets the singular values, so the ratio is a lower bound on the condition number.
    deficient = diagonal.amin(1) <= eps * diagonal.amax(1)
    if bool(deficient.any()):
        first = int(deficient.nonzero()[0])
        warnings.warn(
            f"{int(deficient.sum())} of {len(deficient)} decoder Jacobians are rank deficient to "
            f"machine precision (first at index {first}): their log-volumes have no correct "
            "digit. Check nfi.diagnostics.injectivity_report; use a smaller latent dimension, "
            "smooth activations, or float64.",
            NumericalWarning,
            stacklevel=4,
        )
