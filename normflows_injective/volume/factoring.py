"""Factorisation of Jacobians, with what it refuses and when it warns.

Log-volumes without gradients come from Gram matrices wherever these are measured to be right, and
from QR elsewhere.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.transforms import in_forward_mode
from ..checks import is_readable, level_of_caller
from ..errors import NotInjectiveError, NumericalWarning
from ..modules.precision import as_factored, factored_dtype
from .gram import gram_volume

# Measured errors of log-volumes, in nats, up to which a Gram matrix is good enough.
_TOLERANCE, _TOLERANCE_OF_FLOAT64 = 1e-6, 1e-11
# Roundings that a factoring adds to the least diagonal entry of a matrix that lacks rank.
_ROUNDING = 8.0


def refuse_lower_dimension(latent_dim: int, data_dim: int) -> None:
    """Raise if a decoding map lowers the dimension."""
    if data_dim < latent_dim:
        raise NotInjectiveError(
            f"The decoding map takes {latent_dim} dimensions to {data_dim}: it cannot "
            "be injective. A decoder must not lower the dimension."
        )


def warn_if_deficient(deficient: Tensor) -> None:
    """Warn if Jacobians are rank deficient (B,), in the name of the line that called us."""
    if is_readable(deficient) and bool(deficient.any()):
        first = int(deficient.nonzero()[0])
        warnings.warn(
            f"{int(deficient.sum())} of {len(deficient)} decoder Jacobians are rank deficient to "
            f"machine precision (first at index {first}): their log-volumes have no correct "
            "digit. Check nfi.diagnostics.injectivity_report; use a smaller latent dimension, "
            "smooth activations, or float64.",
            NumericalWarning,
            stacklevel=level_of_caller(),
        )


class Factors(NamedTuple):
    """Log-volumes (B,), which matrices are deficient (B,), and Q and R of the matrices."""

    log_volume: Tensor
    deficient: Tensor
    q: Tensor
    r: Tensor


def factor(matrix: Tensor, with_q: bool = False) -> Factors:
    r"""Factor tall matrices :math:`J = Q R`, (B, D, d); without ``with_q`` Q may be empty."""
    refuse_lower_dimension(matrix.shape[2], matrix.shape[1])
    lifted = as_factored(matrix)
    # Derivatives of R need Q.
    with_q = with_q or lifted.requires_grad or in_forward_mode()
    q, r = torch.linalg.qr(lifted, mode="reduced" if with_q else "r")
    diagonal = r.diagonal(dim1=1, dim2=2).abs()
    return Factors(diagonal.log().sum(1), _is_deficient(diagonal.detach(), matrix.dtype), q, r)


class Volumes(NamedTuple):
    """Log-volumes (B,), and which matrices are rank deficient (B,)."""

    log_volume: Tensor
    deficient: Tensor


def volumes_of(matrix: Tensor) -> Volumes:
    r"""Log-volumes :math:`\tfrac12 \log\det J^\top J` of tall matrices (B, D, d)."""
    has_gram = factored_dtype(matrix.device) == torch.float64 and matrix.numel() > 0
    has_derivatives = (torch.is_grad_enabled() and matrix.requires_grad) or in_forward_mode()
    if not has_gram or has_derivatives or not is_readable(matrix):
        return Volumes(*factor(matrix)[:2])
    refuse_lower_dimension(matrix.shape[2], matrix.shape[1])
    log_volume, error, diagonal = gram_volume(matrix)
    is_double = matrix.dtype == torch.float64
    # An error that is no number is none that was measured.
    unsure = ~(error <= (_TOLERANCE_OF_FLOAT64 if is_double else _TOLERANCE))
    deficient = _is_deficient(diagonal, matrix.dtype)
    if bool(unsure.any()):
        log_volume[unsure], deficient[unsure] = factor(matrix[unsure])[:2]
    return Volumes(log_volume, deficient)


def _is_deficient(diagonal: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether factors with a diagonal (B, d) are of matrices that lack rank in a dtype.

    :math:`|R_{ii}|` brackets the singular values, so the ratio is a lower bound on the condition
    number. Where matrices are factored in their own dtype, the factoring itself rounds.
    """
    rounding = _ROUNDING if dtype == diagonal.dtype else 1.0
    return diagonal.amin(1) <= rounding * torch.finfo(dtype).eps * diagonal.amax(1)
