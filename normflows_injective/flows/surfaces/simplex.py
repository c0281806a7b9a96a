"""Layers that lead to the simplex: its charts, and maps from the orthant of the sphere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from ...checks import check_choice, check_event_shape, check_positive, is_readable
from ...errors import OffManifoldError
from ..gauges.hyperplane import HyperplaneGauge
from .on_simplex import closed_parts
from .on_sphere import check_policy, refuse_off_orthant, unit_vectors
from .simplex_coordinates import COORDINATES
from .sphere import check_dim
from .surface import Chart, Surface, SurfaceMap, check_measure

__all__ = ["SimplexFromOrthant", "SimplexStickBreaking"]

MEASURES = ("lebesgue", "hausdorff")


@final
class SimplexStickBreaking(Chart):
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

    The default measure, ``"lebesgue"``, is that of the first :math:`K - 1` parts, as torch's and
    Pyro's ``Dirichlet`` have it; ``"hausdorff"`` is the area, which adds
    :math:`\tfrac12 \log K`. Never mix the two: gradients would stay right, evidences not.

    Args:
        dim: :math:`K \ge 2`, the number of parts.
        kind: One of the above.
        measure: ``"lebesgue"`` or ``"hausdorff"``.
        total: :math:`s > 0`, the sum of the parts.
        off_manifold: What :meth:`inverse` does with rows whose sum is not :math:`s` within a
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

    def __init__(
        self,
        dim: int,
        kind: str = "normal",
        measure: str = "lebesgue",
        total: float = 1.0,
        off_manifold: str = "reject",
    ) -> None:
        super().__init__()
        _check_options(dim, kind, tuple(COORDINATES), total, off_manifold)
        self.measure = check_measure(measure, MEASURES)
        self.dim, self.kind, self.total, self.off_manifold = dim, kind, total, off_manifold
        self.latent_shape, self.data_shape = (dim - 1,), (dim,)
        self._coordinates = COORDINATES[kind]
        self._log_factor = _log_factor(dim, measure, total)

    def surface(self, before: Surface | None = None) -> Surface:
        """The simplex of its total."""
        return _simplex(self)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, K - 1) to parts (B, K), with the log-volume (B,) in nats."""
        check_event_shape(z, self.latent_shape, "z")
        log_parts = self._coordinates.to_log_parts(z)
        log_volume = self._coordinates.log_volume(z, log_parts) + self._log_factor
        return self.total * log_parts.exp(), log_volume

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Parts (B, K) to coordinates (B, K - 1), with minus the log-volume (B,) in nats."""
        check_event_shape(x, self.data_shape, "x")
        parts = closed_parts(x, self.total, self.off_manifold, "x")
        z = self._coordinates.from_parts(parts)
        log_volume = self._coordinates.log_volume(z, parts.log()) + self._log_factor
        return z, -log_volume

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return _options(self)


class _OrthantMap(NamedTuple):
    """One kind of map from the orthant of unit vectors (B, K) to parts (B, K) of sum one.

    ``log_stretch`` is relative to the sphere's measure, against that of the first K - 1 parts.
    """

    to_parts: Callable[[Tensor], Tensor]
    from_parts: Callable[[Tensor], Tensor]
    log_stretch: Callable[[Tensor], Tensor]


# Radial: a star-like surface of radius r = 1 / sum(u), whose normal is (1, ..., 1) / sqrt(K), so
# that dH = r^K sqrt(K) domega. Square: x = u^2 stretches space by A = 2 diag(u), and a surface of
# unit normal u by |det A| |A^{-T} u| = 2^K prod(u) sqrt(K) / 2. The lebesgue measure of the first
# K - 1 parts is dH / sqrt(K) in both.


def _over_sum(u: Tensor) -> Tensor:
    return u / u.sum(1, keepdim=True)


def _over_norm(parts: Tensor) -> Tensor:
    return parts / torch.linalg.vector_norm(parts, dim=1, keepdim=True)


def _radial_stretch(u: Tensor) -> Tensor:
    return -u.shape[1] * u.sum(1).log()


def _square_stretch(u: Tensor) -> Tensor:
    # A part of zero would have an infinite density.
    refuse_off_orthant(u, "z")
    return (u.shape[1] - 1) * math.log(2) + u.log().sum(1)


_ORTHANT_MAPS = {
    "radial": _OrthantMap(_over_sum, _over_norm, _radial_stretch),
    "square": _OrthantMap(torch.square, torch.sqrt, _square_stretch),
}


@final
class SimplexFromOrthant(SurfaceMap):
    r"""A map of the positive orthant of the unit sphere to the simplex of sum :math:`s`.

    .. math:: \text{radial:}\quad x = \frac{s\,u}{\sum_k u_k}, \quad
              \log\frac{dx_{1:K-1}}{d\omega} = K \log r + (K - 1) \log s, \quad
              r = \frac{\lVert x \rVert}{s} = \frac{1}{\sum_k u_k}

    .. math:: \text{square:}\quad x = s\,u^2, \quad
              \log\frac{dx_{1:K-1}}{d\omega} = (K - 1) \log 2 s + \sum_k \log u_k

    The radial map follows the ray; the square sends the uniform law to
    :math:`\mathrm{Dirichlet}(\tfrac12, \dots, \tfrac12)`. The measure ``"hausdorff"`` adds
    :math:`\tfrac12 \log K`. Put it behind a chart of the orthant.

    Args:
        dim: :math:`K \ge 2`, the number of parts.
        kind: ``"radial"`` or ``"square"``.
        measure: ``"lebesgue"``, of the first :math:`K - 1` parts, or ``"hausdorff"``.
        total: :math:`s > 0`, the sum of the parts.
        off_manifold: What is done with vectors whose norm is not one and with rows whose sum is
            not :math:`s`, within a relative 1e-4: ``"reject"`` raises, ``"project"`` divides by
            the norm or the sum.

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

    def __init__(
        self,
        dim: int,
        kind: str = "radial",
        measure: str = "lebesgue",
        total: float = 1.0,
        off_manifold: str = "reject",
    ) -> None:
        super().__init__()
        _check_options(dim, kind, tuple(_ORTHANT_MAPS), total, off_manifold)
        self.measure = check_measure(measure, MEASURES)
        self.dim, self.kind, self.total, self.off_manifold = dim, kind, total, off_manifold
        self.latent_shape = self.data_shape = (dim,)
        self._map = _ORTHANT_MAPS[kind]
        self._log_factor = _log_factor(dim, measure, total)

    def surface(self, before: Surface | None = None) -> Surface:
        """The simplex of its total."""
        return _simplex(self)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Points (B, K) of the orthant to parts (B, K)."""
        return self.total * self._map.to_parts(self._directions(z))

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Parts (B, K) to points (B, K) of the orthant."""
        check_event_shape(x, self.data_shape, "x")
        return self._map.from_parts(closed_parts(x, self.total, self.off_manifold, "x"))

    def log_stretch(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-factor (B,) in nats by which measure is stretched at points (B, K)."""
        return self._map.log_stretch(self._directions(z)) + self._log_factor

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return _options(self)

    def _directions(self, z: Tensor) -> Tensor:
        check_event_shape(z, self.latent_shape, "z")
        _refuse_negative(z.detach())
        return unit_vectors(z, self.off_manifold, "z")


def _check_options(
    dim: int, kind: str, known: Sequence[str], total: float, off_manifold: str
) -> None:
    check_dim(dim)
    check_choice(kind, known, "kind")
    check_positive(total, "total")
    check_policy(off_manifold)


def _log_factor(dim: int, measure: str, total: float) -> float:
    """What the total and the measure add to the log-volume on the first K - 1 parts."""
    area = 0.5 * math.log(dim) if measure == "hausdorff" else 0.0
    return (dim - 1) * math.log(total) + area


def _simplex(layer: SimplexStickBreaking | SimplexFromOrthant) -> Surface:
    gauge = HyperplaneGauge(torch.ones(layer.dim))
    return Surface("simplex", gauge, float(layer.total), layer.dim, layer.measure)


def _options(layer: SimplexStickBreaking | SimplexFromOrthant) -> str:
    return (
        f"{layer.dim}, kind={layer.kind!r}, measure={layer.measure!r}, total={layer.total:g}, "
        f"off_manifold={layer.off_manifold!r}"
    )


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
