"""Fixed rotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ...checks import as_floating, check_count, checks_arguments, is_number, is_readable
from ...errors import OptionError, ShapeError
from ...modules.precision import factored_dtype
from ..layer import Layer
from ..orthogonal import RememberedFactor, orthogonal_factor


@checks_arguments
def random_rotation(dim: int, generator: torch.Generator | None = None) -> Tensor:
    r"""An orthogonal matrix from the uniform (Haar) law.

    Args:
        dim: :math:`D`.
        generator: Source of randomness; torch's own if None.

    Returns:
        Matrix of shape :math:`(D, D)` on the generator's device.

    Raises:
        OptionError: If ``dim`` is not a positive integer.

    References:
        Mezzadri, How to generate random matrices from the classical compact groups, 2007: the
        signs of the diagonal of R make the QR factorisation unique, and Q uniform.

    Examples:
        >>> q = random_rotation(3, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(q @ q.T, torch.eye(3, dtype=torch.float64)))
        True
    """
    device = torch.get_default_device() if generator is None else generator.device
    noise = torch.randn(dim, dim, dtype=factored_dtype(device), generator=generator, device=device)
    return orthogonal_factor(noise)


@final
class Rotation(Layer):
    r"""A fixed orthogonal map, of log-det zero.

    .. math:: z = Q x, \qquad x = Q^\top z

    Args:
        matrix: :math:`Q` of shape :math:`(D, D)`; or :math:`D`, for a matrix from the uniform law.

    Raises:
        ShapeError: If the matrix is not square.
        OptionError: If it is not orthogonal.
        NonFiniteError: If it holds NaN or infinity.

    Examples:
        >>> turn = Rotation(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        >>> turn.inverse(torch.tensor([[1.0, 2.0]]))
        (tensor([[ 2., -1.]]), tensor([0.]))
    """

    takes_context = False

    def __init__(self, matrix: Tensor | Sequence[Sequence[float]] | int) -> None:
        super().__init__()
        if is_number(matrix):
            dim = check_count(matrix, "the number in place of a matrix")
            matrix = random_rotation(dim).to(torch.get_default_dtype())
        matrix = as_floating(matrix, "the matrix of a Rotation")
        if matrix.dim() != 2 or len(matrix) == 0 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(
                f"Rotation needs a square matrix (D, D), got shape {tuple(matrix.shape)}."
            )
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        errors = (matrix @ matrix.T - identity).abs().max()
        error = float(errors) if is_readable(errors) else 0.0
        if error > 1e3 * len(matrix) * torch.finfo(matrix.dtype).eps:
            raise OptionError(
                f"Rotation needs an orthogonal matrix, but Q Q^T differs from the identity by "
                f"{error:.1e}. Take the Q of torch.linalg.qr, or LULinear for any matrix."
            )
        self.shape = (len(matrix),)
        self.matrix = nn.Buffer(matrix.detach().clone())
        # A matrix rounded to float32 is no longer orthogonal to the digits of float64, should the
        # layer be converted; its factor is, whatever the dtype.
        self._factor = RememberedFactor()

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), with log_det zero."""
        return z @ self._factor.of(self.matrix), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with log_det zero."""
        return x @ self._factor.of(self.matrix).T, x.new_zeros(x.shape[0])

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"dim={self.shape[0]}"
