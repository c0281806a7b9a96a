"""Couplings of coordinates some of which are angles."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_not_negative, check_positive
from ...errors import OptionError
from ...nets.mlp import ResidualMLP
from ..coupling.transforms import ElementTransform, check_transform
from ..layer import Layer
from ..splines import bounded_spline


@final
class AngularSpline(Layer):
    r"""Rational-quadratic spline coupling in which some coordinates are angles.

    Half of the coordinates are transformed by monotone splines, whose parameters a network finds
    from the other half. Angles have splines of the circle. Linear coordinates have splines with
    linear tails, followed by a scale and a shift, without which the base would fix the tails. The
    network sees an angle as sines and cosines of its multiples. It sees a linear coordinate
    :math:`z` as :math:`b = z / \sqrt{1 + z^2/9}`, which stays bounded towards the poles of a
    chart, with sines and cosines of multiples of :math:`\pi b / 6` if ``num_frequencies`` exceeds
    one. The layer starts as the identity.

    The circular couplings of normflows send linear coordinates beyond the bound to zero, and show
    an angle to the network as one number, which does not tell it from its reflection.

    Args:
        num_coordinates: Number of coordinates :math:`d`.
        ind_circ: Indices of the coordinates that are angles, within :math:`[-\pi, \pi]`.
        width: Width of the network.
        num_blocks: Number of its residual blocks.
        num_bins: Number of bins of a spline.
        bound: Bound beyond which linear coordinates see the linear tails.
        num_frequencies: Number of multiples. One serves smooth densities; many, such as 12, serve
            data with fine structure, which a network of few inputs is slow to see.
        context_dim: Number of context features; 0 for none.
        reverse_mask: Whether the odd rather than the even coordinates are transformed.
        max_log_scale: Bound of the logarithm of the scale; 0 removes scale and shift, so that
            large learning rates cannot drive the tails away.
        gain: Factor of the output of the network. Below 1, a step of an optimiser moves the
            splines less, which allows large learning rates.
        circle: Map of an angle; None for splines, whose densities are continuous.
            :class:`~normflows_injective.flows.coupling.MobiusMixture` has smooth ones.
        transformed: Indices of the coordinates that are transformed, in place of ``reverse_mask``.

    Raises:
        OptionError: If an index is none of the coordinates, none or all of several coordinates
            are transformed, a bound or gain is not positive, or a limit is negative.

    References:
        Durkan et al., Neural spline flows, arXiv 1906.04032; on circles, arXiv 2002.02428.

    Examples:
        >>> spline = AngularSpline(3, [2])
        >>> z = torch.tensor([[0.5, -9.0, 3.0]])
        >>> [bool(torch.allclose(a, b, atol=1e-6)) for a, b in zip(spline(z), (z, torch.zeros(1)))]
        [True, True]
    """

    def __init__(
        self,
        num_coordinates: int,
        ind_circ: Collection[int] = (),
        width: int = 64,
        num_blocks: int = 2,
        num_bins: int = 8,
        bound: float = 4.0,
        num_frequencies: int = 1,
        context_dim: int = 0,
        reverse_mask: bool = False,
        max_log_scale: float = 3.0,
        gain: float = 1.0,
        circle: ElementTransform | None = None,
        transformed: Collection[int] | None = None,
    ) -> None:
        super().__init__()
        coordinates, angles = set(range(num_coordinates)), set(ind_circ)
        if not angles <= coordinates:
            raise OptionError(
                f"ind_circ must hold indices from 0 to {num_coordinates - 1}, those of the angles "
                f"among {num_coordinates} coordinates, got {ind_circ!r}. Leave it out for none."
            )
        check_positive(bound, "bound")
        check_not_negative(max_log_scale, "max_log_scale")
        check_positive(gain, "gain")
        moved = _moved(num_coordinates, reverse_mask, transformed)
        passed = coordinates - moved
        groups = (moved - angles, moved & angles, passed - angles, passed & angles)
        self.num_coordinates, self.ind_circ = num_coordinates, tuple(sorted(angles))
        self.width, self.num_blocks, self.context_dim = width, num_blocks, context_dim
        self.reverse_mask = reverse_mask
        self.shape, self.num_bins, self.bound = (num_coordinates,), num_bins, bound
        # Coordinates are sorted into these groups and, at the end, back.
        order = torch.tensor([index for group in groups for index in sorted(group)])
        self._order = nn.Buffer(order, persistent=False)
        self._back = nn.Buffer(order.argsort(), persistent=False)
        self._counts = [len(group) for group in groups]
        num_linear, num_circular, passed_linear, passed_circular = self._counts
        self.transformed = tuple(sorted(moved))
        self.circle = _CircleSpline(num_bins) if circle is None else check_transform(circle)
        self._sizes = (
            num_linear * (3 * num_bins + 1),
            num_circular * self.circle.num_parameters,
        )
        self.num_frequencies = num_frequencies
        features = self._features(torch.ones(1, passed_linear), torch.ones(1, passed_circular))
        self.max_log_scale, self.gain = max_log_scale, gain
        self.net: nn.Module = _Constant(sum(self._sizes))
        if num_coordinates > 1 or context_dim > 0:
            net = ResidualMLP(features.shape[1], sum(self._sizes), width, num_blocks, context_dim)
            nn.init.zeros_(net.output.weight)
            nn.init.zeros_(net.output.bias)
            self.net = net
        self.takes_context = self.needs_context = context_dim > 0

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform coordinates (B, d), with the log-det (B,)."""
        return self._transform(z, context, inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform coordinates (B, d) back, with the log-det (B,)."""
        return self._transform(z, context, inverse=True)

    def _transform(
        self, z: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        linear, circular, *passed = z.index_select(1, self._order).split(self._counts, dim=1)
        output = self.gain * self.net(self._features(*passed), context)
        parameters = output.split(self._sizes, dim=1)
        log_det = z.new_zeros(z.shape[0])
        transformed: list[Tensor] = []
        for group, rows, transform in (
            (linear, parameters[0], self._stretch),
            (circular, parameters[1], self._turn),
        ):
            if group.shape[1]:
                group, log_derivative = transform(group, rows.view(*group.shape, -1), inverse)
                log_det = log_det + log_derivative
            transformed.append(group)
        return torch.cat([*transformed, *passed], dim=1).index_select(1, self._back), log_det

    def _features(self, linear: Tensor, angles: Tensor) -> Tensor:
        """The input of the network: bounded coordinates, sines and cosines."""
        bounded = linear / (1 + linear.square() / 9).sqrt()
        waves = angles
        if self.num_frequencies > 1:
            waves = torch.cat([angles, bounded * (math.pi / 6)], dim=1)
        phases = torch.cat([waves * k for k in range(1, self.num_frequencies + 1)], dim=1)
        features = torch.cat([bounded, phases.sin(), phases.cos()], dim=1)
        # With a context alone the network still needs an input, and torch warns of empty ones.
        return features if features.shape[1] else linear.new_ones(linear.shape[0], 1)

    def _turn(self, angles: Tensor, rows: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        transform = self.circle.inverse if inverse else self.circle.forward
        return transform(angles, rows)

    def _stretch(self, z: Tensor, rows: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        rows, affine = rows.split([3 * self.num_bins - 1, 2], dim=2)
        at_ends = torch.zeros_like(z)
        if self.max_log_scale == 0:
            bent, log_derivative = bounded_spline(z, rows, at_ends, self.bound, inverse)
            return bent, log_derivative.sum(1)
        log_scale, shift = affine.unbind(2)
        log_scale = self.max_log_scale * (log_scale / self.max_log_scale).tanh()
        if inverse:
            z = (z - shift) * (-log_scale).exp()
            latent, log_derivative = bounded_spline(z, rows, at_ends, self.bound, inverse)
            return latent, (log_derivative - log_scale).sum(1)
        bent, log_derivative = bounded_spline(z, rows, at_ends, self.bound, inverse)
        return bent * log_scale.exp() + shift, (log_derivative + log_scale).sum(1)


class _CircleSpline(ElementTransform):
    """A spline of the circle, whose two ends are one place."""

    def __init__(self, num_bins: int) -> None:
        self.num_bins = num_bins

    @property
    def num_parameters(self) -> int:  # type: ignore[override]
        """Widths, heights, and derivatives at all knots."""
        return 3 * self.num_bins

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the spline."""
        return self._spline(z, parameters, inverse=False)

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Invert the spline."""
        return self._spline(x, parameters, inverse=True)

    def _spline(self, angles: Tensor, rows: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        # The derivative at the ends comes before those of the inner knots.
        sizes, at_ends, inner = rows.split([2 * self.num_bins, 1, self.num_bins - 1], dim=2)
        rows = torch.cat([sizes, inner], dim=2)
        image, log_derivative = bounded_spline(angles, rows, at_ends.squeeze(2), math.pi, inverse)
        return image, log_derivative.sum(1)


class _Constant(nn.Module):
    """The parameters of a spline that sees no other coordinate."""

    # A network of a constant input would multiply every step of an optimiser by its width.

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(size))

    def forward(self, features: Tensor, context: Tensor | None) -> Tensor:
        return self.values.expand(features.shape[0], -1)


def _moved(
    num_coordinates: int, reverse_mask: bool, transformed: Collection[int] | None
) -> set[int]:
    """The coordinates that are transformed."""
    coordinates = set(range(num_coordinates))
    if transformed is None:
        every_other = {i for i in coordinates if i % 2 == int(reverse_mask)}
        return every_other if num_coordinates > 1 else coordinates
    moved = set(transformed)
    is_part = bool(moved) and (moved < coordinates or moved == coordinates and len(moved) == 1)
    if not is_part:
        raise OptionError(
            f"transformed must hold some but not all of the indices from 0 to "
            f"{num_coordinates - 1}, got {transformed!r}. The network sees the others."
        )
    return moved
