"""The gauge of ellipsoids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ...checks import as_floating, is_readable
from ...errors import OptionError, ShapeError
from ...modules.precision import as_factored
from .gauge import HomogeneousGauge, RadiusAndSecant, unit_rows


@final
class EllipsoidGauge(HomogeneousGauge):
    r"""Ellipsoids :math:`\lVert A^{-1}x \rVert = t`, images of the unit sphere under :math:`t A`.

    .. math:: \log r = \log t - \log\lVert A^{-1} u \rVert, \qquad
              \log\sec\psi = \log \lVert A^{-\top} A^{-1} u \rVert - 2 \log\lVert A^{-1} u \rVert

    Args:
        axes: Semi-axes of shape :math:`(D,)`, or an invertible matrix :math:`A` of shape
            :math:`(D, D)`; for the surface :math:`x^\top M x = 1` take
            :math:`A = \mathrm{chol}(M)^{-\top}`.
        trainable: Whether the axes are a parameter.

    Raises:
        ShapeError: If the axes have neither shape.
        OptionError: If the map is not invertible.

    References:
        arXiv 2406.09116.

    Examples:
        >>> gauge = EllipsoidGauge(torch.tensor([2.0, 1.0]))
        >>> gauge.log_radius(torch.tensor([[1.0, 0.0]]), torch.tensor(1.0)).exp()
        tensor([2.])
    """

    def __init__(self, axes: Tensor | Sequence[Any], trainable: bool = False) -> None:
        super().__init__()
        axes = as_floating(axes, "axes")
        if axes.dim() not in (1, 2) or axes.shape[0] != axes.shape[-1] or len(axes) < 2:
            raise ShapeError(
                "axes must be of shape (D,) or (D, D) with D of at least 2, got "
                f"{tuple(axes.shape)}."
            )
        singular = axes if axes.dim() == 1 else torch.linalg.svdvals(axes)
        if is_readable(singular) and not bool((singular > 0).all()):
            raise OptionError("axes must be positive, or an invertible matrix.")
        self.dim = len(axes)
        self.axes = nn.Parameter(axes) if trainable else nn.Buffer(axes)

    @property
    def trainable(self) -> bool:
        """Whether the axes are a parameter."""
        return isinstance(self.axes, nn.Parameter)

    def value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The norm (B,) of points (B, D) after the map back to the unit sphere."""
        return torch.linalg.vector_norm(self._pull(x), dim=1)

    def radius_and_secant(
        self, u: Tensor, level: Tensor, context: Tensor | None = None
    ) -> RadiusAndSecant:
        r"""Log-radius and log-secant in closed form, without a gradient."""
        pulled = self._pull(u)
        log_value = torch.linalg.vector_norm(pulled, dim=1).log()
        normal = self._pull(pulled, adjoint=True)
        log_secant = torch.linalg.vector_norm(normal, dim=1).log() - 2 * log_value
        return RadiusAndSecant(torch.as_tensor(level).log() - log_value, log_secant)

    def unit_cone_mass(self, dim: int) -> Tensor | None:
        r""":math:`\log A_{D-1} + \log|\det A|`, with :math:`A_{D-1}` the area of the sphere."""
        matrix = as_factored(self.axes)
        log_det = (
            matrix.abs().log().sum() if matrix.dim() == 1 else torch.linalg.slogdet(matrix)[1]
        )
        return log_det + math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)

    def log_slope_bounds(self, dim: int) -> tuple[float, float] | None:
        """Logarithms of the inverses of the longest and of the shortest semi-axis."""
        matrix = self.axes.detach()
        lengths = matrix.abs() if matrix.dim() == 1 else torch.linalg.svdvals(matrix)
        return -math.log(float(lengths.max())), -math.log(float(lengths.min()))

    def sample_cone(self, num_samples: int, dim: int, like: Tensor) -> Tensor | None:
        """Directions of the images of uniform points of the sphere."""
        points = torch.randn(num_samples, dim, dtype=like.dtype, device=like.device)
        axes = self.axes.detach().to(like)
        return unit_rows(points * axes if axes.dim() == 1 else points @ axes.T)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"dim={self.dim}"

    def _pull(self, x: Tensor, adjoint: bool = False) -> Tensor:
        if self.axes.dim() == 1:
            return x / self.axes
        matrix = self.axes.T if adjoint else self.axes
        return torch.linalg.solve(matrix, x.T).T
