"""Invertible linear maps of vectors: dense, by reflections, and by a permutation."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ..layer import Layer
from ..orthogonal import reflected

# With more coordinates than a batch has rows, both factors one by one are less work than their
# product. The size of the batch cannot decide: exported programs have no branch that asks for it.
_MOST_IN_A_PRODUCT = 128


@final
class LULinear(Layer):
    r"""Dense linear map, kept as its LU decomposition.

    .. math:: z = W x, \qquad W = P L (U + \mathrm{diag}(e^{\ell})), \qquad
              \log\det = \sum_i \ell_i

    where :math:`L` is unit lower triangular, :math:`U` strictly upper triangular, and :math:`P` a
    fixed permutation. :math:`L`, :math:`U` and :math:`\ell` share one matrix: :math:`D^2`
    parameters. It starts at :math:`W = P`, drawn at random. A dense rotation would mix coordinates
    and so hide structure that couplings can see in a single one.

    Args:
        dim: Number of coordinates :math:`D`.

    Raises:
        OptionError: If ``dim`` is not a positive integer.

    References:
        Kingma and Dhariwal, Glow, arXiv 1807.03039, section 3.2.

    Examples:
        >>> linear = LULinear(3)
        >>> x = torch.randn(2, 3)
        >>> bool(torch.allclose(linear(linear.inverse(x)[0])[0], x, atol=1e-5))
        True
    """

    takes_context = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.shape = dim, (dim,)
        self.packed = nn.Parameter(torch.zeros(dim, dim))
        # P v picks the elements of v in this order.
        self.order = nn.Buffer(torch.randperm(dim))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), with the log-det (B,) in nats."""
        lower, upper = self._factors()
        z = z.index_select(1, self.order.argsort()).mT
        x = torch.linalg.solve_triangular(lower, z, upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper, x, upper=True)
        return x.mT, -self._log_det(x.mT)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with the log-det (B,) in nats."""
        if self.dim <= _MOST_IN_A_PRODUCT:
            return x @ self.matrix().mT, self._log_det(x)
        lower, upper = self._factors()
        return (x @ upper.mT @ lower.mT).index_select(1, self.order), self._log_det(x)

    def matrix(self) -> Tensor:
        """:math:`W` of shape (D, D), from data to latents."""
        lower, upper = self._factors()
        return (lower @ upper).index_select(0, self.order)

    def _factors(self) -> tuple[Tensor, Tensor]:
        diagonal = self.packed.diagonal().exp()
        lower = self.packed.tril(-1) + torch.ones_like(diagonal).diag()
        return lower, self.packed.triu(1) + diagonal.diag()

    def _log_det(self, value: Tensor) -> Tensor:
        return self.packed.diagonal().sum() + value.new_zeros(value.shape[0])


@final
class Householder(Layer):
    r"""Rotation by a product of reflections, at a cost of :math:`O(DK)` instead of :math:`O(D^2)`.

    .. math:: z = H_K \cdots H_1 x, \qquad H_k = I - 2 v_k v_k^\top / |v_k|^2, \qquad
              \log\det = 0

    Args:
        dim: Number of coordinates :math:`D`.
        num_reflections: :math:`K`; with :math:`K = D` they reach every orthogonal matrix of
            determinant :math:`(-1)^D`.

    Raises:
        OptionError: If an option is not a positive integer.

    References:
        Tomczak and Welling, arXiv 1611.09630.

    Examples:
        >>> x = torch.randn(2, 5)
        >>> z, log_det = Householder(5, 2).inverse(x)
        >>> bool(torch.allclose(z.norm(dim=1), x.norm(dim=1))), log_det
        (True, tensor([0., 0.]))
    """

    takes_context = False

    def __init__(self, dim: int, num_reflections: int = 8) -> None:
        super().__init__()
        self.dim, self.shape = dim, (dim,)
        self.num_reflections = num_reflections
        self.vectors = nn.Parameter(torch.randn(num_reflections, dim))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), with log-det zero."""
        return reflected(z, self.vectors, back=True), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with log-det zero."""
        return reflected(x, self.vectors), x.new_zeros(x.shape[0])


@final
class Permutation(Layer):
    """Fixed random order of the coordinates.

    ``Permute`` of normflows returns log-dets of the default dtype, whatever the dtype of the
    input.

    Args:
        dim: Number of coordinates D.

    Raises:
        OptionError: If ``dim`` is not a positive integer.

    Examples:
        >>> permutation = Permutation(4)
        >>> x = torch.arange(4.0).unsqueeze(0)
        >>> bool(torch.equal(permutation(permutation.inverse(x)[0])[0], x))
        True
    """

    takes_context = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.shape = dim, (dim,)
        self.order = nn.Buffer(torch.randperm(dim))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), with log-det zero."""
        return z.index_select(1, self.order.argsort()), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with log-det zero."""
        return x.index_select(1, self.order), x.new_zeros(x.shape[0])
