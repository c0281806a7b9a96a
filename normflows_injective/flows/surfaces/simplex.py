"""Layers that lead to the simplex: its charts, and maps from the orthant of the sphere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from ...checks import check_choice, check_positive, is_readable, lookup
from ...errors import OffManifoldError
from ..gauges.gauge import unit_rows
from ..gauges.hyperplane import HyperplaneGauge
from .off_manifold import check_policy, closed_parts, refuse_off_orthant, unit_vectors
from .simplex_coordinates import COORDINATES
from .sphere import check_dim
from .surface import Chart, Surface, SurfaceLayer, SurfaceMap


class _ToSimplex(SurfaceLayer):
    """A layer that leads to the simplex of a given sum, by one of several kinds of maps."""

    _kinds: ClassVar[Mapping[str, Any]]

    def __init__(self, dim: int, kind: str, measure: str, total: float, off_manifold: str) -> None:
        super().__init__()
        check_dim(dim)
        self._map: Any = lookup(kind, self._kinds, "kind")
        check_positive(total, "total")
        check_policy(off_manifold)
        self.measure = check_choice(measure, ("lebesgue", "hausdorff"), "measure")
        self.dim, self.kind, self.total, self.off_manifold = dim, kind, total, off_manifold
        self.data_shape = (dim,)
        # The total and the area add this to the log-volume on the first K - 1 parts.
        area = 0.5 * math.log(dim) if measure == "hausdorff" else 0.0
        self._log_factor = (dim - 1) * math.log(total) + area

    def surface(self, before: Surface | None = None) -> Surface:
        """The simplex, with the gauge whose level is the sum."""
        gauge = HyperplaneGauge(torch.ones(self.dim))
        return Surface("simplex", gauge, float(self.total), self.dim, self.measure)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return (
            f"{self.dim}, kind={self.kind!r}, measure={self.measure!r}, total={self.total:g}, "
            f"off_manifold={self.off_manifold!r}"
        )


@final
class SimplexStickBreaking(_ToSimplex, Chart):
    r"""Coordinates of the simplex :math:`\{x > 0, \sum_k x_k = s\}`, from :math:`\mathbb R^{K-1}`.

    Stick-breaking cuts :math:`x_i = v_i (s - x_1 - \dots - x_{i-1})`, with :math:`e_i = K - i`:

    ============= ================================================= ===============================
    kind          map, for :math:`s = 1`                            :math:`\log|dx_{1:K-1} / dz|`
    ============= ================================================= ===============================
    normal        :math:`\log(1 - v_i) = \log\Phi(-z_i) / e_i`      :math:`\sum_i \log\phi(z_i)
                                                                    - \log\Gamma(K)`
    logit         :math:`v_i = \sigma(z_i - \log e_i)`              :math:`\sum_k \log x_k`
    ilr           softmax :math:`(z H)`, :math:`H H^\top = I`       :math:`\sum_k \log x_k +
                                                                    \tfrac12 \log K`
    alr           softmax :math:`(z, 0)`                            :math:`\sum_k \log x_k`
    uniform_box   :math:`1 - v_i = (1 - z_i)^{1/e_i}`,              :math:`-\log\Gamma(K)`
                  :math:`z \in (0, 1)^{K-1}`
    ============= ================================================= ===============================

    ``"normal"``, the default, sends the standard normal to the flat Dirichlet law, exactly. With
    ``"logit"`` it is torch's ``StickBreakingTransform``. Another total :math:`s` adds
    :math:`(K - 1) \log s`.

    The default measure, ``"lebesgue"``, is the Lebesgue measure of the first :math:`K - 1` parts,
    as for the ``Dirichlet`` of torch and Pyro; ``"hausdorff"`` is the area, which adds
    :math:`\tfrac12 \log K`. Never mix the two: gradients would stay right, but evidences would be
    wrong.

    Args:
        dim: :math:`K \ge 2`, the number of parts.
        kind: One of the above.
        measure: ``"lebesgue"`` or ``"hausdorff"``.
        total: :math:`s > 0`, the sum of the parts.
        off_manifold: Treatment by :meth:`inverse` of rows whose sum is not :math:`s` within a
            relative 1e-4: ``"reject"`` raises, ``"project"`` divides by the sum. Parts that are
            not positive raise in both cases.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Isometric log-ratios: Egozcue et al., Mathematical Geology 35, 2003. The normal and the
        uniform kinds are derived in ``simplex_coordinates.py``.

    Examples:
        >>> chart = SimplexStickBreaking(3)
        >>> z = torch.tensor([[0.5, -1.0]])
        >>> x, log_det = chart(z)
        >>> x
        tensor([[0.4445, 0.0881, 0.4673]])
        >>> base = torch.distributions.Normal(0.0, 1.0)
        >>> base.log_prob(z).sum(1) - log_det  # the flat law, of density Gamma(3) = 2
        tensor([0.6931])
    """

    _kinds = COORDINATES

    def __init__(
        self,
        dim: int,
        kind: str = "normal",
        measure: str = "lebesgue",
        total: float = 1.0,
        off_manifold: str = "reject",
    ) -> None:
        super().__init__(dim, kind, measure, total, off_manifold)
        self.latent_shape = (dim - 1,)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, K - 1) to parts (B, K), with the log-volume (B,) in nats."""
        log_parts = self._map.to_log_parts(z)
        log_volume = self._map.log_volume(z, log_parts) + self._log_factor
        return self.total * log_parts.exp(), log_volume

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Parts (B, K) to coordinates (B, K - 1), with minus the log-volume (B,) in nats."""
        parts = closed_parts(x, self.total, self.off_manifold, "x")
        z = self._map.from_parts(parts)
        log_volume = self._map.log_volume(z, parts.log()) + self._log_factor
        return z, -log_volume


class _OrthantMap(NamedTuple):
    """One kind of map from positive unit vectors (B, K) to parts (B, K) of sum one."""

    to_parts: Callable[[Tensor], Tensor]
    from_parts: Callable[[Tensor], Tensor]
    # From the measure of the sphere to that of the first K - 1 parts.
    log_stretch: Callable[[Tensor], Tensor]


# Radial: a star-like surface of radius r = 1 / sum(u), whose normal is (1, ..., 1) / sqrt(K), so
# that dH = r^K sqrt(K) domega. Square: x = u^2 stretches space by A = 2 diag(u), and a surface of
# unit normal u by |det A| |A^{-T} u| = 2^K prod(u) sqrt(K) / 2. The lebesgue measure of the first
# K - 1 parts is dH / sqrt(K) in both.


def _over_sum(u: Tensor) -> Tensor:
    return u / u.sum(1, keepdim=True)


def _radial_stretch(u: Tensor) -> Tensor:
    return -u.shape[1] * u.sum(1).log()


def _square_stretch(u: Tensor) -> Tensor:
    # A part of zero would have an infinite density.
    refuse_off_orthant(u, "z")
    return (u.shape[1] - 1) * math.log(2) + u.log().sum(1)


_ORTHANT_MAPS = {
    "radial": _OrthantMap(_over_sum, unit_rows, _radial_stretch),
    "square": _OrthantMap(torch.square, torch.sqrt, _square_stretch),
}


@final
class SimplexFromOrthant(_ToSimplex, SurfaceMap):
    r"""A map of the positive orthant of the unit sphere to the simplex of sum :math:`s`.

    .. math:: \text{radial:}\quad x = \frac{s\,u}{\sum_k u_k}, \quad
              \log\frac{dx_{1:K-1}}{d\omega} = K \log r + (K - 1) \log s, \quad
              r = \frac{\lVert x \rVert}{s} = \frac{1}{\sum_k u_k}

    .. math:: \text{square:}\quad x = s\,u^2, \quad
              \log\frac{dx_{1:K-1}}{d\omega} = (K - 1) \log 2 s + \sum_k \log u_k

    The radial map follows the ray; the square sends the uniform law to
    :math:`\mathrm{Dirichlet}(\tfrac12, \dots, \tfrac12)`. The measure ``"hausdorff"`` adds
    :math:`\tfrac12 \log K`. Put it after a chart of the orthant.

    Args:
        dim: :math:`K \ge 2`, the number of parts.
        kind: ``"radial"`` or ``"square"``.
        measure: ``"lebesgue"``, of the first :math:`K - 1` parts, or ``"hausdorff"``.
        total: :math:`s > 0`, the sum of the parts.
        off_manifold: Treatment of vectors whose norm is not one and of rows whose sum is not
            :math:`s`, within a relative 1e-4: ``"reject"`` raises, ``"project"`` divides by the
            norm or the sum.

    Raises:
        OptionError: If an option is unknown or out of range.

    References:
        Radial: arXiv 2406.09116. The factor of the square is derived in ``simplex.py``.

    Examples:
        >>> layer = SimplexFromOrthant(2, kind="square")
        >>> layer(torch.tensor([[0.6, 0.8]]))
        (tensor([[0.3600, 0.6400]]), tensor([-0.0408]))
    """

    domain = "orthant"
    _kinds = _ORTHANT_MAPS

    def __init__(
        self,
        dim: int,
        kind: str = "radial",
        measure: str = "lebesgue",
        total: float = 1.0,
        off_manifold: str = "reject",
    ) -> None:
        super().__init__(dim, kind, measure, total, off_manifold)
        self.latent_shape = (dim,)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Points (B, K) of the orthant to parts (B, K)."""
        return self.total * self._map.to_parts(self._directions(z))

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Parts (B, K) to points (B, K) of the orthant."""
        return self._map.from_parts(closed_parts(x, self.total, self.off_manifold, "x"))

    def log_stretch(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-factor (B,) in nats by which measure is stretched at points (B, K)."""
        return self._map.log_stretch(self._directions(z)) + self._log_factor

    def _directions(self, z: Tensor) -> Tensor:
        _refuse_negative(z.detach())
        return unit_vectors(z, self.off_manifold, "z")


def _refuse_negative(u: Tensor) -> None:
    if not is_readable(u):
        return
    rows = (u < 0).any(1)
    if bool(rows.any()):
        raise OffManifoldError(
            f"z has {int(rows.sum())} of {len(u)} rows with negative coordinates, the first at "
            f"index {int(rows.nonzero()[0])}, outside the positive orthant. Put "
            "nfi.flows.SphereChart with kind='orthant' before this layer."
        )
