"""Normalisation by a first batch of data."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_event_shape, check_finite
from ...errors import ShapeError
from ...host.first_data import (
    FIRST_STATISTICS,
    expect_first_data,
    mark_initialised,
    must_initialise,
    spread_of,
)
from ..layer import Layer


@final
class ActNorm(Layer):
    r"""Shift and scale of every coordinate, set by the first batch of data.

    .. math:: z = (x + b) \odot e^{a}, \qquad \log\det = \sum_i a_i

    The first call of :meth:`inverse` gives every latent coordinate mean zero and standard
    deviation one. Initialisation happens once, and only while both parameters are zero. A layer
    that has been trained, loaded or frozen (objectives with path gradients freeze parameters for a
    while) is left alone. Pass data through a model before sampling from it. The layer of normflows
    initialises itself on samples too, keeps its flag on the CPU, and returns one log-det for the
    batch.

    Args:
        dim: Number of coordinates :math:`D`.

    Raises:
        OptionError: If ``dim`` is not a positive integer.

    References:
        Kingma and Dhariwal, Glow, arXiv 1807.03039, section 3.1.

    Examples:
        >>> norm = ActNorm(2)
        >>> z, _ = norm.inverse(torch.tensor([[0.0, 1.0], [4.0, 5.0]]))
        >>> bool(z.mean(0).abs().max() < 1e-6), z.std(0).round(decimals=3).tolist()
        (True, [1.0, 1.0])
    """

    takes_context = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.shape = dim, (dim,)
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))
        expect_first_data(self)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents (B, D) to data (B, D), with the log-det (B,) in nats."""
        return z * (-self.log_scale).exp() - self.shift, -self._log_det(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (B, D) to latents (B, D), with the log-det (B,) in nats."""
        if self.log_scale.requires_grad and x.shape[0] and must_initialise(self):
            self.initialise(x)
        return (x + self.shift) * self.log_scale.exp(), self._log_det(x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set shift and scale by data (B, D), unless they have been trained or loaded.

        Raises:
            ShapeError: If there is one sample, which has no standard deviation.
            NonFiniteError: If a value, a mean or a deviation is NaN or infinite. Nothing is
                changed then.
        """
        check_event_shape(x, self.shape, "x")
        if not (self.log_scale.any() or self.shift.any()):
            if x.shape[0] == 1:
                raise ShapeError(
                    "The first batch of ActNorm has one sample, which has no standard deviation. "
                    "Start with a larger batch."
                )
            check_finite(x, "the first batch of ActNorm")
            shift, log_scale = -x.mean(0), -spread_of(x).log()
            check_finite(torch.cat([shift, log_scale]), *FIRST_STATISTICS)
            self.shift.copy_(shift)
            self.log_scale.copy_(log_scale)
        mark_initialised(self)

    def _log_det(self, value: Tensor) -> Tensor:
        return self.log_scale.sum() + value.new_zeros(value.shape[0])
