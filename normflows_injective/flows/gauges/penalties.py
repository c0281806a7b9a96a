"""Gauges of penalties for sparse regression: elastic net, group lasso, SLOPE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ...checks import as_floating, check_counts, check_not_negative, describe, is_readable
from ...errors import OptionError, ShapeError
from ...modules.precision import as_factored
from .gauge import ConstantSlopeGauge, Gauge, RadiusAndSecant, unit_rows, with_random_signs


@final
class ElasticNetGauge(Gauge):
    r"""Level sets of the elastic net, whose shape changes with the level.

    .. math:: \lambda_1 \lVert x \rVert_1 + \lambda_2 \lVert x \rVert_2^2 = t, \qquad
              r = \frac{2 t}{b + \sqrt{b^2 + 4 \lambda_2 t}}, \quad b = \lambda_1 \lVert u \rVert_1

    Args:
        l1: :math:`\lambda_1 \ge 0`.
        l2: :math:`\lambda_2 \ge 0`, not both zero.

    Raises:
        OptionError: If a weight is negative, or both are zero.

    References:
        Zou and Hastie, 2005; radius and secant from the quadratic equation along a ray.

    Examples:
        >>> gauge = ElasticNetGauge(1.0, 2.0)
        >>> gauge.log_radius(torch.tensor([[1.0, 0.0]]), torch.tensor(3.0)).exp()  # r + 2 r^2 = 3
        tensor([1.])
    """

    def __init__(self, l1: float, l2: float) -> None:
        super().__init__()
        l1, l2 = check_not_negative(l1, "l1"), check_not_negative(l2, "l2")
        if not 0 < l1 + l2 < math.inf:
            raise OptionError(
                f"l1 and l2 must be finite, not negative and not both zero, got {l1!r}, {l2!r}."
            )
        self.l1, self.l2 = float(l1), float(l2)

    def log_radius(self, u: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Log of the positive root along each ray."""
        slope = self.l1 * u.abs().sum(1)
        # This form of the root does not cancel.
        root = (slope.square() + 4 * self.l2 * level).sqrt()
        return math.log(2) + torch.as_tensor(level).log() - (slope + root).log()

    def radius_and_secant(
        self, u: Tensor, level: Tensor, context: Tensor | None = None
    ) -> RadiusAndSecant:
        r"""Log-radius and log-secant in closed form, without a gradient.

        The normal is :math:`\lambda_1 \operatorname{sgn} u + 2 \lambda_2 r u`.
        """
        log_radius = self.log_radius(u, level, context)
        curved = 2 * self.l2 * log_radius.exp().unsqueeze(1)
        normal = self.l1 * u.sign() + curved * u
        along = self.l1 * u.abs().sum(1) + curved.squeeze(1)
        return RadiusAndSecant(
            log_radius, torch.linalg.vector_norm(normal, dim=1).log() - along.log()
        )

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"l1={self.l1:g}, l2={self.l2:g}"


@final
class GroupLassoGauge(ConstantSlopeGauge):
    r"""Level sets of the group lasso, :math:`\sum_g w_g \lVert x_g \rVert_2 = t`.

    .. math:: \log r = \log t - \log F(u), \qquad
              \log\sec\psi = \tfrac12\log\sum_g w_g^2 - \log F(u)

    The surface has kinks where a whole group vanishes, as the :math:`\ell_1` sphere has where a
    coordinate vanishes. Gradients are bounded.

    Args:
        groups: A partition of the indices :math:`0, \dots, D - 1`, as a list of lists.
        weights: :math:`w_g > 0`, one per group; by default the square roots of their sizes.

    Raises:
        ShapeError: If the groups are no partition, or the weights are not one per group.
        OptionError: If a weight is not positive.

    References:
        Yuan and Lin, 2006; the gradient has norm :math:`(\sum_g w_g^2)^{1/2}` everywhere.

    Examples:
        >>> gauge = GroupLassoGauge([[0, 1], [2]], [1.0, 2.0])
        >>> gauge.value(torch.tensor([[3.0, 4.0, 1.0]]))
        tensor([7.])
    """

    def __init__(
        self, groups: Sequence[Sequence[int]], weights: Sequence[float] | Tensor | None = None
    ) -> None:
        super().__init__()
        groups = _checked_groups(groups)
        indices = sorted(index for group in groups for index in group)
        if indices != list(range(len(indices))) or len(indices) < 2 or not all(groups):
            raise ShapeError(
                "groups must hold every index from 0 to D - 1 exactly once, and none be empty, "
                f"got {groups}."
            )
        sizes = torch.tensor([float(len(group)) for group in groups])
        weights = sizes.sqrt() if weights is None else as_floating(weights, "weights")
        if weights.shape != (len(groups),):
            raise ShapeError(
                f"weights must be one per group, shape ({len(groups)},), got "
                f"{tuple(weights.shape)}."
            )
        if is_readable(weights) and not bool((weights > 0).all()):
            raise OptionError(f"weights must be positive, got {weights.tolist()}.")
        self.groups = tuple(tuple(sorted(group)) for group in groups)
        self.dim = len(indices)
        membership = torch.empty(self.dim, dtype=torch.long)
        for number, group in enumerate(groups):
            membership[group] = number
        self.membership = nn.Buffer(membership)
        self.weights = nn.Buffer(weights)

    def value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The weighted sum (B,) of group norms of points (B, D)."""
        squares = x.new_zeros(x.shape[0], len(self.weights)).index_add(
            1, self.membership, x.square()
        )
        # Below the clamp, where a group vanishes, the root would have an infinite derivative.
        return squares.clamp_min(torch.finfo(x.dtype).tiny).sqrt() @ self.weights

    def unit_cone_mass(self, dim: int) -> Tensor | None:
        r"""From :math:`D!\,\mathrm{Vol} = \int e^{-F}`, a product of masses of the groups."""
        # In a group, int exp(-w |x|) dx = A_{d-1} Gamma(d) / w^d.
        sizes = as_factored(torch.bincount(self.membership))
        log_areas = math.log(2) + 0.5 * sizes * math.log(math.pi) - (0.5 * sizes).lgamma()
        log_masses = log_areas + sizes.lgamma() - sizes * as_factored(self.weights).log()
        return log_masses.sum() - math.lgamma(self.dim or dim)

    def sample_cone(self, num_samples: int, dim: int, like: Tensor) -> Tensor | None:
        r"""Directions of variables of density :math:`\propto e^{-F}`: Gamma norms of groups."""
        sizes = torch.bincount(self.membership).to(like)
        norms = torch.distributions.Gamma(sizes.expand(num_samples, -1), 1.0).sample()
        norms = norms / self.weights.to(like)
        points = torch.randn(num_samples, self.dim or dim, dtype=like.dtype, device=like.device)
        squares = torch.zeros_like(norms).index_add(1, self.membership, points.square())
        return unit_rows(points * (norms / squares.sqrt())[:, self.membership])


@final
class SlopeGauge(ConstantSlopeGauge):
    r"""Level sets of SLOPE, :math:`\sum_i w_i |x|_{(i)} = t` with sizes in descending order.

    .. math:: \log r = \log t - \log F(u), \qquad
              \log\sec\psi = \tfrac12\log\sum_i w_i^2 - \log F(u)

    Equal weights give :math:`\ell_1`, and one weight followed by zeros gives the cube. The surface
    has the kinks of :math:`\ell_1` and more where two sizes are equal. Gradients are bounded.

    Args:
        weights: :math:`w_1 \ge w_2 \ge \dots \ge w_D \ge 0`, :math:`w_1 > 0`.

    Raises:
        ShapeError: If the weights are no vector.
        OptionError: If they are not in descending order, or negative, or all zero.

    References:
        Bogdan et al., SLOPE, 2015.

    Examples:
        >>> gauge = SlopeGauge(torch.tensor([2.0, 1.0]))
        >>> gauge.value(torch.tensor([[1.0, -3.0]]))
        tensor([7.])
    """

    def __init__(self, weights: Sequence[float] | Tensor) -> None:
        super().__init__()
        weights = as_floating(weights, "weights")
        if weights.dim() != 1 or len(weights) < 2:
            raise ShapeError(f"weights must be of shape (D,), got {tuple(weights.shape)}.")
        falls = (weights.diff() <= 0).all() & (weights[-1] >= 0) & (weights[0] > 0)
        if is_readable(falls) and not bool(falls):
            raise OptionError(
                "weights must be in descending order, not negative and not all zero, or the "
                f"level sets are no norm's. Got {weights.tolist()}."
            )
        self.dim = len(weights)
        self.weights = nn.Buffer(weights)

    def value(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The weighted sum (B,) of the ordered sizes of points (B, D)."""
        return x.abs().sort(1, descending=True).values @ self.weights

    def unit_cone_mass(self, dim: int) -> Tensor | None:
        r""":math:`\log(D\, 2^D / \prod_i W_i)` with :math:`W_i = w_1 + \dots + w_i`.

        By the gaps of the ordered sizes, :math:`\int e^{-F} = D!\, 2^D / \prod_i W_i`, which is
        also :math:`D!\,\mathrm{Vol}`.
        """
        sums = as_factored(self.weights).cumsum(0)
        return math.log(len(sums)) + len(sums) * math.log(2) - sums.log().sum()

    def sample_cone(self, num_samples: int, dim: int, like: Tensor) -> Tensor | None:
        r"""Directions of variables of density :math:`\propto e^{-F}`: exponential gaps."""
        sums = self.weights.to(like).cumsum(0)
        gaps = -torch.rand(num_samples, len(sums), dtype=like.dtype, device=like.device)
        gaps = -gaps.log1p() / sums
        sizes = gaps.flip(1).cumsum(1).flip(1)
        order = torch.rand_like(sizes).argsort(1)
        return unit_rows(with_random_signs(sizes.gather(1, order)))


def _checked_groups(groups: object) -> list[list[int]]:
    """The groups as lists of plain indices."""
    if not isinstance(groups, list | tuple):
        raise OptionError(
            f"groups must be a list of groups of indices, got {describe(groups)}. Give for "
            "instance [[0, 1], [2]]."
        )
    return [
        list(check_counts(group, f"groups[{number}]", least=0, empty=True, example="[0, 1]"))
        for number, group in enumerate(groups)
    ]
