"""The gauge of the simplex."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ...checks import as_floating, is_readable
from ...errors import OptionError, ShapeError
from ...modules.precision import as_factored
from .gauge import ConstantSlopeGauge, unit_rows


@final
class HyperplaneGauge(ConstantSlopeGauge):
    r"""The simplex :math:`\{w \cdot x = t,\ x > 0\}`, on the positive orthant of directions.

    .. math:: \log r = \log t - \log(w \cdot u), \qquad
              \log\sec\psi = \log\lVert w \rVert - \log(w \cdot u)

    Args:
        weights: :math:`w > 0` of shape :math:`(D,)`; ones give the standard simplex.

    Raises:
        ShapeError: If the weights are no vector.
        OptionError: If a weight is not positive.

    References:
        arXiv 2406.09116.

    Examples:
        >>> gauge = HyperplaneGauge(torch.ones(2))
        >>> gauge.log_area(2, torch.tensor(1.0)).exp()  # the length of the segment, sqrt(2)
        tensor(1.4142, dtype=torch.float64)
    """

    domain = "orthant"

    def __init__(self, weights: Tensor | Sequence[float]) -> None:
        super().__init__()
        weights = as_floating(weights, "weights")
        if weights.dim() != 1 or len(weights) < 2:
            raise ShapeError(f"weights must be of shape (D,), got {tuple(weights.shape)}.")
        if is_readable(weights) and not bool((weights > 0).all()):
            raise OptionError("weights must be positive, so that every positive ray is met.")
        self.dim = len(weights)
        self.weights = nn.Buffer(weights)

    def value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The weighted sum (B,) of points (B, D)."""
        return x @ self.weights.to(x)

    def unit_cone_mass(self, dim: int) -> Tensor | None:
        r""":math:`-\log\Gamma(D) - \sum_k \log w_k`."""
        return -as_factored(self.weights).log().sum() - math.lgamma(dim)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"dim={self.dim}"

    def sample_cone(self, num_samples: int, dim: int, like: Tensor) -> Tensor | None:
        """Directions of exponential variables divided by the weights."""
        draws = torch.rand(num_samples, dim, dtype=like.dtype, device=like.device)
        points = -draws.neg().log1p() / self.weights.to(like)
        return unit_rows(points.clamp_min(torch.finfo(like.dtype).tiny))
