"""Functions that are expanded in kernel sections at auxiliary points."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from ...checks import (
    RenamedAttribute,
    check_count,
    check_event_shape,
    check_finite,
    lookup,
    renamed,
)
from ...errors import ShapeError
from ...host.first_data import FIRST_STATISTICS, expect_first_data, mark_initialised, spread_of
from ...modules.precision import as_factored
from ...nets.joining import ContextNetwork
from .kernels import KERNELS, squared_distances

# Below it the kernel matrix of standardised data is the identity and nothing is shared.
LENGTH_SCALE_FLOOR = 1e-2
# A row that serves as a second point is moved by this many standard deviations.
JITTER = 0.1
# Added to the eigenvalues of K(Z, Z), because those of rough functions are near zero.
RIDGE = 1e-3
# Length-scales in typical distances. On held-out rows of real tables a half was far worse, one
# was worse more often than better, and four no better.
DISTANCES = 2.0
# Rows whose pairwise distances give the length-scales.
MEDIAN_ROWS = 256


@final
class KernelExpansion(ContextNetwork):
    r"""A function of inputs and context in the span of kernel sections; it starts at zero.

    .. math:: f_o(u) = \sum_{i=1}^N k\big(r_{o}(u, z_i)\big) A_{io}, \qquad
              r_o^2(u, z) = \sum_j (u_j - z_j)^2 / l_{oj}^2

    Kernels are at most one, so :math:`|f_o| \le \sum_i |A_{io}|`, and far from all points
    :math:`f` is zero.

    The sections of near points are nearly equal, and gradient descent on :math:`A` is slow where
    only their differences matter. The weights :math:`W` that are trained are therefore those of a
    basis that was orthonormal in the Hilbert space of the kernel when the points were placed,
    :math:`A = (K(Z, Z) + \epsilon I)^{-1/2} W`. The set of functions is the same.

    Args:
        in_features: Width of :math:`u`.
        out_features: Number of functions.
        num_auxiliary: Number of auxiliary points :math:`N`.
        kernel: ``"rbf"``, ``"matern12"``, ``"matern32"`` or ``"matern52"``.
        num_scales: Number of sets of length-scales; function :math:`o` uses the set of index
            :math:`o` modulo ``num_scales``.
        ard: Whether every input has its own length-scale.
        learn_auxiliary: Whether the auxiliary points are trained; if not they are a buffer.
        context_dim: Number of context features, inputs of the kernel like any other; 0 for none.
        precondition: Whether :math:`W` is trained; if not, :math:`A` itself.

    Raises:
        OptionError: If the kernel is unknown or a number is not a positive integer.
        ContextError: When called, if a context is missing, superfluous, or of another width.

    References:
        English, Kirchler and Lippert, Kernelised normalising flows, arXiv 2307.14839, section 3;
        the basis is that of whitened Gaussian processes, Murray and Adams, arXiv 1006.0868.

    Examples:
        >>> expansion = KernelExpansion(2, 1, num_auxiliary=3)
        >>> expansion(torch.randn(4, 2)).shape
        torch.Size([4, 1])
    """

    basis: Tensor | None
    n_auxiliary = RenamedAttribute("num_auxiliary")

    @renamed(n_auxiliary="num_auxiliary")
    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_auxiliary: int = 150,
        kernel: str = "rbf",
        num_scales: int = 1,
        ard: bool = True,
        learn_auxiliary: bool = True,
        context_dim: int = 0,
        precondition: bool = True,
    ) -> None:
        super().__init__((in_features,), context_dim)
        width = in_features + context_dim
        check_count(width, "in_features")
        self.in_features, self.out_features = in_features, out_features
        self.num_auxiliary, self.num_scales = num_auxiliary, num_scales
        self.kernel, self._kernel, self.ard = kernel, lookup(kernel, KERNELS, "kernel"), ard
        self.precondition = precondition
        # Until there are data: points and typical distances of standard normal inputs.
        points = torch.randn(num_auxiliary, width)
        scales = torch.full((num_scales, width if ard else 1), DISTANCES * math.sqrt(2.0 * width))
        self.points = nn.Parameter(points) if learn_auxiliary else nn.Buffer(points)
        self.raw_length_scales = nn.Parameter(_inverse_softplus(scales - LENGTH_SCALE_FLOOR))
        self.weights = nn.Parameter(torch.zeros(num_auxiliary, out_features))
        self.register_buffer("basis", self._orthonormal() if precondition else None)
        expect_first_data(self)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Inputs (B, in_features), with an optional context (B, C), to values (B, O)."""
        sections = self.kernel_matrix(self.join(x, context), self.points)
        num_scales, coefficients = len(sections), self.coefficients()
        if num_scales == 1:
            return sections[0] @ coefficients
        values = [sections[g] @ coefficients[:, g::num_scales] for g in range(num_scales)]
        return torch.stack(values, dim=2).flatten(1)

    @property
    def learn_auxiliary(self) -> bool:
        """Whether the auxiliary points are trained."""
        return isinstance(self.points, nn.Parameter)

    @property
    def length_scales(self) -> Tensor:
        """Length-scales (num_scales, in_features + context_dim), or (num_scales, 1)."""
        return nn.functional.softplus(self.raw_length_scales) + LENGTH_SCALE_FLOOR

    def coefficients(self) -> Tensor:
        """Coefficients :math:`A` of the kernel sections, of shape (N, out_features)."""
        return self.weights if self.basis is None else self.basis @ self.weights

    def kernel_matrix(self, first: Tensor, second: Tensor) -> Tensor:
        """Kernel values (num_scales, B, N) between joined inputs (B, F) and (N, F)."""
        for name, rows in (("first", first), ("second", second)):
            check_event_shape(rows, self.points.shape[1:], name)
        scales = self.length_scales.unsqueeze(1)
        return self._kernel(squared_distances(first / scales, second / scales))

    def penalty(self) -> Tensor:
        r"""Sum of the squared norms of the functions in their reproducing-kernel Hilbert space.

        .. math:: \sum_o |f_o|^2 = \mathrm{tr}(A^\top K(Z, Z) A)

        Returns:
            A number without unit, 0-dimensional, to be added to a loss times a weight.

        References:
            Schoelkopf and Smola, Learning with kernels, section 4.2.

        Examples:
            >>> KernelExpansion(2, 1).penalty().item()
            0.0
        """
        grams, coefficients = self.kernel_matrix(self.points, self.points), self.coefficients()
        total = coefficients.new_zeros(())
        for index, gram in enumerate(grams):
            own = coefficients[:, index :: len(grams)]
            total = total + (own * (gram @ own)).sum()
        return total

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        r"""Take points and length-scales from data, unless the weights are trained or loaded.

        The points are rows drawn without replacement. If there are fewer rows than points, all of
        them are taken, and some are repeated, moved by a tenth of a standard deviation. With
        :math:`\sigma_j` the standard deviation of input :math:`j`, and the median over pairs,

        .. math:: l_j = 2 \sigma_j \, \mathrm{median} \, \big| (u - u') / \sigma \big|

        (all :math:`\sigma_j = 1` without ``ard``), so that half of the pairs are nearer than half
        a length-scale. A constant input gets the mean of the other :math:`\sigma_j`. Weights that
        are zero stay so: the function does not change.

        Args:
            x: Inputs (B, in_features).
            context: Context (B, C), or None.

        Raises:
            ShapeError: If there is one row, which has no distances.
            NonFiniteError: If a row holds NaN or infinity.
        """
        rows = self.join(x, context)
        if len(rows) < 2:
            raise ShapeError(
                f"Auxiliary points and length-scales need at least two rows, got {len(rows)}. "
                "Start with a larger batch."
            )
        check_finite(rows, "the data that place the auxiliary points")
        if not self.weights.any():
            self._place(rows.to(self.points.dtype))
        mark_initialised(self)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        sizes = ("in_features", "out_features", "num_auxiliary", "kernel", "num_scales")
        names = (*sizes, "ard", "learn_auxiliary", "context_dim", "precondition")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _place(self, rows: Tensor) -> None:
        rows = rows[torch.randperm(len(rows), device=rows.device)]
        spread = spread_of(rows)
        missing = len(self.points) - len(rows)
        points = rows[: len(self.points)]
        if missing > 0:
            again = rows[torch.randint(len(rows), (missing,), device=rows.device)]
            points = torch.cat([points, again + JITTER * spread * torch.randn_like(again)])
        scale = spread if self.ard else torch.ones_like(spread[:1])
        scale = DISTANCES * scale * _median_distance(rows[:MEDIAN_ROWS] / scale)
        scale = scale.clamp_min(2 * LENGTH_SCALE_FLOOR)
        check_finite(torch.cat([points.flatten(), scale]), *FIRST_STATISTICS)
        self.points.copy_(points)
        self.raw_length_scales.copy_(_inverse_softplus(scale - LENGTH_SCALE_FLOOR))
        if self.basis is not None:
            self.basis.copy_(self._orthonormal())

    @torch.no_grad()
    def _orthonormal(self) -> Tensor:
        # All sets of length-scales are equal when this is called, so the first serves for all.
        gram = as_factored(self.kernel_matrix(self.points, self.points)[0])
        values, vectors = torch.linalg.eigh(gram)
        roots = (values.clamp_min(0) + RIDGE).rsqrt()
        return ((vectors * roots) @ vectors.mT).to(self.points.dtype)


def _median_distance(rows: Tensor) -> Tensor:
    """Median distance between rows, leaving out rows that coincide, and one if all do."""
    distances = nn.functional.pdist(rows)
    distances = distances[distances > 0]
    return distances.median() if len(distances) else rows.new_ones(())


def _inverse_softplus(value: Tensor) -> Tensor:
    # log(e^v - 1), which would overflow, is v + log(1 - e^-v).
    return value + (-(-value).expm1()).log()
