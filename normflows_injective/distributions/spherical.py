r"""Closed-form densities on the unit sphere :math:`S^{D-1}`, against its surface measure.

All are in nats against the :math:`(D-1)`-dimensional Hausdorff measure, the sphere's own area. A
density is that of the direction of its argument: norms that are off by rounding do not enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ..checks import as_floating, check_count, check_event_shape
from ..errors import OptionError, ShapeError
from ..flows.surfaces.on_sphere import check_policy, unit_vectors
from ..modules.precision import factored_dtype
from .law import Law

__all__ = ["AngularCentralGaussian", "UniformSphere", "directions", "log_sphere_area"]


@final
class UniformSphere(Law):
    r"""Uniform distribution on the unit sphere.

    .. math:: \log p(x) = -\log A, \quad A = 2 \pi^{D/2} / \Gamma(D/2)

    Args:
        dim: Dimension :math:`D \ge 2` of the space around the sphere.
        off_manifold: What ``log_prob`` does with points off the sphere: ``"reject"`` raises where
            a norm is more than 1e-4 from one, ``"project"`` takes their directions.

    Raises:
        OptionError: If the dimension is below 2 or the policy unknown.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 9.

    Examples:
        >>> base = UniformSphere(3)
        >>> x, log_p = base(2)
        >>> x.norm(dim=1).round(decimals=4)
        tensor([1., 1.])
        >>> log_p.neg().exp()  # the area
        tensor([12.5664, 12.5664])
    """

    on_manifold = True
    measure = "hausdorff"

    def __init__(self, dim: int, *, off_manifold: str = "reject") -> None:
        super().__init__()
        check_policy(off_manifold)
        check_sphere_dim(dim)
        self.dim, self.shape = dim, (dim,)
        self.off_manifold = off_manifold
        # Only says the dtype and the device: a number kept in it would lose digits.
        self._like = nn.Buffer(torch.empty(0), persistent=False)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw samples (num_samples, D) with their log-density (num_samples,) in nats."""
        like = self._like
        normal = torch.randn(num_samples, *self.shape, dtype=like.dtype, device=like.device)
        return nn.functional.normalize(normal), self._log_density(num_samples)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats of points (B, D) of the sphere.

        Args:
            x: Points of shape (B, D).

        Returns:
            Log-density of shape (B,) in nats against the area of the sphere.

        Raises:
            ShapeError: If the points have another width.
            OffManifoldError: If points are off the sphere and are to be rejected.
        """
        directions(x, self.shape, self.off_manifold)
        return self._log_density(x.shape[0])

    def _log_density(self, count: int) -> Tensor:
        return self._like.new_full((count,), -log_sphere_area(*self.shape))


@final
class AngularCentralGaussian(Law):
    r"""Law of the direction of a centred normal vector, which is symmetric and may be elongated.

    With :math:`\Lambda = A A^\top` it is the law of :math:`A g / |A g|`, :math:`g \sim N(0, I)`,

    .. math::

        \log p(x) = \log\frac{\Gamma(D/2)}{2 \pi^{D/2}} - \tfrac12 \log\det\Lambda
            - \tfrac D2 \log\big(x^\top \Lambda^{-1} x\big),
        \quad x^\top \Lambda^{-1} x = |A^{-1} x|^2 .

    Neither :math:`\Lambda` nor its inverse is formed; :math:`A` is factored in float64. Samples
    are reparameterised. A multiple of :math:`A` gives the same law.

    Args:
        scale: Invertible matrix :math:`A` of shape (D, D), :math:`D \ge 2`; it is copied.
        trainable: Whether it is a parameter.
        off_manifold: What ``log_prob`` does with points off the sphere: ``"reject"`` raises where
            a norm is more than 1e-4 from one, ``"project"`` takes their directions.

    Raises:
        ShapeError: If the matrix is not square.
        OptionError: If it is singular, or the dimension below 2, or the policy unknown.
        NonFiniteError: If it holds NaN or infinity.

    References:
        Tyler, *Statistical analysis for the angular central Gaussian distribution on the sphere*,
        Biometrika 74 (1987); Mardia and Jupp (2000), chapter 9.

    Examples:
        >>> base = AngularCentralGaussian(torch.diag(torch.tensor([3.0, 1.0, 1.0])))
        >>> base.log_prob(torch.eye(3)).exp()  # at the ends of the axes
        tensor([0.7162, 0.0265, 0.0265])
    """

    on_manifold = True
    measure = "hausdorff"

    def __init__(
        self,
        scale: Tensor | Sequence[Sequence[float]],
        trainable: bool = False,
        *,
        off_manifold: str = "reject",
    ) -> None:
        super().__init__()
        check_policy(off_manifold)
        matrix = as_floating(scale, "scale")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"scale must have shape (D, D), got {tuple(matrix.shape)}.")
        check_sphere_dim(len(matrix))
        _check_invertible(matrix)
        self.shape = (len(matrix),)
        self.off_manifold = off_manifold
        self.scale = nn.Parameter(matrix) if trainable else nn.Buffer(matrix)

    @property
    def trainable(self) -> bool:
        """Whether the matrix is a parameter."""
        return isinstance(self.scale, nn.Parameter)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw samples (num_samples, D), reparameterised, with log-densities (num_samples,)."""
        scale = self.scale.to(factored_dtype(self.scale.device))
        normal = torch.randn(num_samples, *self.shape, dtype=scale.dtype, device=scale.device)
        uniform = nn.functional.normalize(normal)
        y = uniform @ scale.T
        length = torch.linalg.vector_norm(y, dim=1)
        # |A^{-1} x| = 1 / |A u| at x = A u / |A u|, so that nothing is solved.
        log_det = torch.linalg.slogdet(scale).logabsdet
        log_p = len(scale) * length.log() - log_det - log_sphere_area(len(scale))
        return (y / length[:, None]).to(self.scale.dtype), log_p.to(self.scale.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density (B,) in nats of points (B, D) of the sphere.

        Args:
            x: Points of shape (B, D).

        Returns:
            Log-density of shape (B,) in nats against the area of the sphere.

        Raises:
            ShapeError: If the points have another width.
            OffManifoldError: If points are off the sphere and are to be rejected.
        """
        u = directions(x, self.shape, self.off_manifold)
        factors, pivots = torch.linalg.lu_factor(self.scale.to(u.dtype))
        log_det = factors.diagonal().abs().log().sum()
        whitened = torch.linalg.lu_solve(factors, pivots, u.T)
        log_length = torch.linalg.vector_norm(whitened, dim=0).log()
        log_p = -log_sphere_area(len(whitened)) - log_det - len(whitened) * log_length
        return log_p.to(self.scale.dtype)


def log_sphere_area(dim: int) -> float:
    r"""Log of the area of the unit sphere.

    .. math:: \log A = \log 2 + \tfrac D2 \log \pi - \log \Gamma(D/2)

    Args:
        dim: Dimension :math:`D \ge 1` of the space around the sphere; in one dimension the sphere
            is two points, counted.

    Returns:
        The logarithm.

    Raises:
        OptionError: If the dimension is no positive integer.

    Examples:
        >>> round(math.exp(log_sphere_area(2)), 6)  # a circle
        6.283185
    """
    check_count(dim, "dim")
    return math.log(2.0) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)


def directions(x: Tensor, shape: Sequence[int], off_manifold: str) -> Tensor:
    """Directions of a batch that must lie on the sphere, in the dtype to compute densities in.

    Args:
        x: Points of shape (B, D).
        shape: The event shape (D,) that they must have.
        off_manifold: Policy, as in :func:`unit_vectors`.

    Returns:
        Unit vectors of shape (B, D), in float64 where the device has it.

    Raises:
        ShapeError: If the points have another width.
        OffManifoldError: If points are off the sphere and are to be rejected.

    Examples:
        >>> directions(torch.tensor([[3.0, 4.0]]), (2,), "project")
        tensor([[0.6000, 0.8000]], dtype=torch.float64)
    """
    check_event_shape(x, shape, "x")
    # The density may be large and its logarithm steep: a norm of 1 + 6e-8 would be seen in it.
    return unit_vectors(x.to(factored_dtype(x.device)), off_manifold, "x")


def check_sphere_dim(dim: int) -> None:
    """Raise unless there is a connected sphere in a space of this dimension.

    Args:
        dim: Candidate.

    Raises:
        OptionError: If it is no integer of 2 or more.

    Examples:
        >>> check_sphere_dim(2)
    """
    if dim < 2:
        raise OptionError(
            f"The space around a sphere must have an integer dimension of 2 or more, got {dim!r}."
        )


def _check_invertible(matrix: Tensor) -> None:
    lifted = matrix.to(factored_dtype(matrix.device))
    pivots = torch.linalg.lu_factor_ex(lifted).LU.diagonal().abs()
    smallest, largest = float(pivots.min()), float(pivots.max())
    if smallest <= len(matrix) * torch.finfo(lifted.dtype).eps * largest:
        raise OptionError(
            "scale must be invertible, got a matrix that is singular to rounding, with pivots "
            f"from {smallest:.3g} to {largest:.3g}. Add a small multiple of the identity."
        )
