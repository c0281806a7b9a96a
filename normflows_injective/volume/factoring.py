"""Factorisation of Jacobians, with what it refuses and when it warns."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.transforms import in_forward_mode
from ..checks import is_readable, level_of_caller
from ..errors import NotInjectiveError, NumericalWarning
from ..modules.precision import as_factored


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
    # |R_ii| brackets the singular values, so the ratio is a lower bound on the condition number.
    bracket = diagonal.detach()
    eps = torch.finfo(matrix.dtype).eps
    deficient = bracket.amin(1) <= eps * bracket.amax(1)
    return Factors(diagonal.log().sum(1), deficient, q, r)
