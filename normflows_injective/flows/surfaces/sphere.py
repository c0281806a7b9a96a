"""Layers of the unit sphere: its charts, its linear automorphisms, and flows seen in a chart."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_count, lookup
from ...errors import UnsupportedLayerError
from ..layer import Layer
from ..orthogonal import reflected
from .off_manifold import check_policy, unit_vectors
from .sphere_coordinates import COORDINATES
from .surface import Chart, SurfaceMap


@final
class SphereChart(Chart):
    r"""Coordinates of the unit sphere :math:`S^{D-1}`, from :math:`\mathbb R^{D-1}`.

    ``"cot"``, the default, takes :math:`z_i = \sqrt{n_i} \cot\theta_i`, :math:`n_i = D - i`, for
    the polar angles and the azimuth :math:`\varphi \in (-\pi, \pi]` as the last coordinate:

    .. math:: \log \frac{d\omega}{dz\, d\varphi} = \sum_{i=1}^{D-2} \Big[-\tfrac12 \log n_i
              - \tfrac{n_i + 1}{2} \log(1 + z_i^2 / n_i)\Big]

    Under the uniform law the :math:`z_i` are independent Student-:math:`t_{n_i}` variables, nearly
    standard normal, and :math:`\varphi` is uniform; raw angles would crowd at the equator.
    ``"stereographic"`` projects from the last axis, scaled by :math:`1/\sqrt{D-1}` so that a
    standard normal is nearly uniform, and has no angles. ``"angles"`` takes the polar angles in
    :math:`(0, \pi)` and the azimuth themselves. ``"orthant"`` takes :math:`\log z_i` of all
    :math:`D - 1` angles and leads to the part of the sphere with positive coordinates.

    A chart of the whole sphere misses a set of measure zero. ``ind_circ`` lists the coordinates
    that are angles of period :math:`2\pi`, in the form that circular splines of normflows take.

    Args:
        dim: :math:`D \ge 2`, the dimension of the ambient space.
        kind: ``"cot"``, ``"stereographic"``, ``"angles"`` or ``"orthant"``.
        off_manifold: Treatment by :meth:`inverse` of points whose norm is not one: ``"reject"``
            raises, ``"project"`` divides by the norm.

    Raises:
        OptionError: If an option is unknown.

    References:
        Polar coordinates and their volume: arXiv 2406.09116. The scaled cotangents are derived in
        ``sphere_coordinates.py``.

    Examples:
        >>> chart = SphereChart(3)
        >>> x, log_det = chart(torch.zeros(1, 2))
        >>> x, log_det  # the density of z is sin(theta) / sqrt(2)
        (tensor([[0., 1., 0.]]), tensor([-0.3466]))
    """

    def __init__(self, dim: int, kind: str = "cot", off_manifold: str = "reject") -> None:
        super().__init__()
        check_dim(dim)
        check_policy(off_manifold)
        self._coordinates = lookup(kind, COORDINATES, "kind")
        self.dim, self.kind, self.off_manifold = dim, kind, off_manifold
        self.latent_shape, self.data_shape = (dim - 1,), (dim,)
        self.codomain = self._coordinates.codomain
        self.ind_circ = [dim - 2] if self._coordinates.has_azimuth else []

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, D - 1) to points (B, D), with the log-volume (B,) in nats."""
        return self._coordinates.to_sphere(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, D) to coordinates (B, D - 1), with minus the log-volume (B,) in nats."""
        return self._coordinates.from_sphere(unit_vectors(x, self.off_manifold, "x"))

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"{self.dim}, kind={self.kind!r}, off_manifold={self.off_manifold!r}"


@final
class SphereLinear(SurfaceMap):
    r"""A linear map followed by normalisation, a bijection of the sphere without poles.

    .. math:: u \mapsto \frac{A u}{\lVert A u \rVert}, \qquad
              \log\Big|\frac{d\omega'}{d\omega}\Big| = \log|\det A| - D \log \lVert A u \rVert

    where :math:`A = Q L U` has a fixed orthogonal :math:`Q`, a product of random reflections, and
    trained triangular factors, which start at the identity. It sends the uniform law to an angular
    central Gaussian. In a chart, see :class:`InChart`, it mixes coordinates and moves the poles.

    Args:
        dim: :math:`D \ge 2`.
        rotate: Whether :math:`Q` is drawn at random, once, rather than the identity.
        off_manifold: Treatment of points whose norm is not one: ``"reject"`` raises, ``"project"``
            divides by the norm.

    Raises:
        OptionError: If an option is unknown.

    References:
        Tyler, Statistical analysis for the angular central Gaussian distribution, 1987.

    Examples:
        >>> layer = SphereLinear(3)
        >>> layer(torch.eye(3))[1]  # the identity, at first
        tensor([0., 0., 0.], grad_fn=<SubBackward0>)
    """

    codomain = "sphere"
    keeps_surface = True
    reflections: Tensor | None

    def __init__(self, dim: int, rotate: bool = False, off_manifold: str = "reject") -> None:
        super().__init__()
        check_dim(dim)
        check_policy(off_manifold)
        self.dim, self.off_manifold = dim, off_manifold
        self.latent_shape = self.data_shape = (dim,)
        self.register_buffer("reflections", torch.randn(dim, dim) if rotate else None)
        # The strict triangles of L (below) and U (above) share one matrix.
        self.triangles = nn.Parameter(torch.zeros(dim, dim))
        self.log_diagonal = nn.Parameter(torch.zeros(dim))

    @property
    def rotate(self) -> bool:
        """Whether there is a random rotation."""
        return self.reflections is not None

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, D) of the sphere to the sphere, with the log-factor (B,) in nats."""
        lower, upper = self._factors()
        mapped = self._rotate(unit_vectors(z, self.off_manifold, "z") @ upper.T @ lower.T)
        norms = torch.linalg.vector_norm(mapped, dim=1)
        return mapped / norms.unsqueeze(1), self.log_diagonal.sum() - self.dim * norms.log()

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points (B, D) of the sphere back to it, with minus the log-factor (B,) in nats."""
        lower, upper = self._factors()
        columns = self._rotate(unit_vectors(x, self.off_manifold, "x"), back=True).T
        solve = torch.linalg.solve_triangular
        columns = solve(lower, columns, upper=False, unitriangular=True)
        mapped = solve(upper, columns, upper=True).T
        norms = torch.linalg.vector_norm(mapped, dim=1)
        # For z = A^-1 x / |A^-1 x| the length |A z| of the formula is 1 / |A^-1 x|.
        return mapped / norms.unsqueeze(1), -self.log_diagonal.sum() - self.dim * norms.log()

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"{self.dim}, rotate={self.reflections is not None}"

    def _rotate(self, rows: Tensor, back: bool = False) -> Tensor:
        if self.reflections is None:
            return rows
        return reflected(rows, self.reflections.T, back=not back)

    def _factors(self) -> tuple[Tensor, Tensor]:
        ones = torch.eye(self.dim, dtype=self.triangles.dtype, device=self.triangles.device)
        upper = self.triangles.triu(1) + torch.diag(self.log_diagonal.exp())
        return self.triangles.tril(-1) + ones, upper


@final
class InChart(Layer):
    r"""A flow of a surface seen in a chart, as a flow of the coordinates.

    .. math:: z \mapsto \varphi^{-1}(a(\varphi(z))), \qquad
              \log|\det| = \log|\varphi|(z) + \log|a| - \log|\varphi|(z')

    ``InChart(SphereLinear(D, rotate=True), SphereChart(D))`` between splines of the coordinates
    mixes these as ``LULinearPermute`` of normflows does, and lets each spline see the sphere with
    other poles and another seam.

    Args:
        flow: Map :math:`a` from the chart's surface to itself.
        chart: :math:`\varphi`.

    Raises:
        UnsupportedLayerError: If the map leads to another surface.

    References:
        Change of variables; derived above.

    Examples:
        >>> flow = InChart(SphereLinear(3), SphereChart(3))
        >>> z, log_det = flow(torch.zeros(1, 2))
        >>> z.shape, log_det.shape
        (torch.Size([1, 2]), torch.Size([1]))
    """

    def __init__(self, flow: SurfaceMap, chart: Chart) -> None:
        super().__init__()
        ends = (chart.codomain, flow.domain, flow.codomain)
        if len(set(ends)) > 1:
            raise UnsupportedLayerError(
                f"The chart leads to the {ends[0]}, and {type(flow).__name__} from the {ends[1]} "
                f"to the {ends[2]}. All three must be the same."
            )
        self.flow, self.chart = flow, chart
        self.takes_context = flow.takes_context or chart.takes_context
        self.needs_context = flow.needs_context or chart.needs_context

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, d) to coordinates (B, d), with the log-det (B,)."""
        u, log_volume = self.chart(z, context)
        u, log_stretch = self.flow(u, context)
        z, log_back = self.chart.inverse(u, context)
        return z, log_volume + log_stretch + log_back

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coordinates (B, d) back to coordinates (B, d), with the log-det (B,)."""
        u, log_volume = self.chart(z, context)
        u, log_stretch = self.flow.inverse(u, context)
        z, log_back = self.chart.inverse(u, context)
        return z, log_volume + log_stretch + log_back


def check_dim(dim: int) -> None:
    """Raise unless there is a sphere in a space of this dimension."""
    check_count(dim, "dim", least=2, advice="A sphere needs a space of two dimensions or more.")
