r"""Closed-form densities on the unit sphere :math:`S^{D-1}`, against its surface measure.

All are in nats against the :math:`(D-1)`-dimensional Hausdorff measure, the sphere's own area.
Densities are functions of directions, so that rounding of norms does not enter.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ..checks import as_floating, check_count
from ..errors import OptionError, ShapeError
from ..flows.surfaces.off_manifold import check_policy, unit_vectors
from ..modules.precision import factored_dtype
from .law import Law


class SphericalLaw(Law):
    """A law on the unit sphere, of which a subclass gives the density at directions."""

    on_manifold = True
    measure = "hausdorff"

    def __init__(self, dim: int, off_manifold: str) -> None:
        super().__init__()
        check_policy(off_manifold)
        check_sphere_dim(dim)
        self.shape = (dim,)
        self.off_manifold = off_manifold

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
        # The density may be large and its logarithm steep: a norm of 1 + 6e-8 would be seen in it.
        x = x.to(factored_dtype(x.device))
        return self._log_density(unit_vectors(x, self.off_manifold, "x"))

    @abstractmethod
    def _log_density(self, u: Tensor) -> Tensor:
        """Log-density (B,) in nats at directions (B, D) in float64, where the device has it."""


@final
class UniformSphere(SphericalLaw):
    r"""Uniform distribution on the unit sphere.

    .. math:: \log p(x) = -\log A, \quad A = 2 \pi^{D/2} / \Gamma(D/2)

    Args:
        dim: Dimension :math:`D \ge 2` of the space around the sphere.
        off_manifold: Treatment by ``log_prob`` of points off the sphere: ``"reject"`` raises where
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

    has_rsample = True

    def __init__(self, dim: int, *, off_manifold: str = "reject") -> None:
        super().__init__(dim, off_manifold)
        self.dim = dim
        # Holds no number, which would lose digits, but the dtype and the device.
        self._like = nn.Buffer(torch.empty(0), persistent=False)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw samples (num_samples, D) with their log-density (num_samples,) in nats."""
        like = self._like
        normal = torch.randn(num_samples, *self.shape, dtype=like.dtype, device=like.device)
        return nn.functional.normalize(normal), self._log_density(normal)

    def rsample(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw as ``forward`` does: there are no parameters."""
        return self.forward(num_samples)

    def entropy(self) -> Tensor:
        """Entropy, of shape (), in nats: the logarithm of the area."""
        return self._like.new_tensor(log_sphere_area(*self.shape))

    def _log_density(self, u: Tensor) -> Tensor:
        return self._like.new_full((u.shape[0],), -log_sphere_area(*self.shape))


@final
class AngularCentralGaussian(SphericalLaw):
    r"""Law of the direction of a centred normal vector, which is symmetric and may be elongated.

    With :math:`\Lambda = A A^\top`, it is the law of :math:`A g / |A g|`, :math:`g \sim N(0, I)`,

    .. math::

        \log p(x) = \log\frac{\Gamma(D/2)}{2 \pi^{D/2}} - \tfrac12 \log\det\Lambda
            - \tfrac D2 \log\big(x^\top \Lambda^{-1} x\big),
        \quad x^\top \Lambda^{-1} x = |A^{-1} x|^2 .

    Neither :math:`\Lambda` nor its inverse is formed; :math:`A` is factored in float64. Samples
    are reparameterised. A multiple of :math:`A` gives the same law.

    Args:
        scale: Invertible matrix :math:`A` of shape (D, D), :math:`D \ge 2`; it is copied.
        trainable: Whether it is a parameter.
        off_manifold: Treatment by ``log_prob`` of points off the sphere: ``"reject"`` raises where
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

    has_rsample = True

    def __init__(
        self,
        scale: Tensor | Sequence[Sequence[float]],
        trainable: bool = False,
        *,
        off_manifold: str = "reject",
    ) -> None:
        matrix = as_floating(scale, "scale")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"scale must have shape (D, D), got {tuple(matrix.shape)}.")
        super().__init__(len(matrix), off_manifold)
        _check_invertible(matrix)
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

    def rsample(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw as ``forward`` does, reparameterised."""
        return self.forward(num_samples)

    def _log_density(self, u: Tensor) -> Tensor:
        factors, pivots = torch.linalg.lu_factor(self.scale.to(u.dtype))
        log_det = factors.diagonal().abs().log().sum()
        whitened = torch.linalg.lu_solve(factors, pivots, u.T)
        log_length = torch.linalg.vector_norm(whitened, dim=0).log()
        log_p = -log_sphere_area(len(whitened)) - log_det - len(whitened) * log_length
        return log_p.to(self.scale.dtype)


def log_sphere_area(dim: int) -> float:
    r"""Log-area of the sphere in D dimensions, :math:`\log (2 \pi^{D/2} / \Gamma(D/2))`."""
    check_count(dim, "dim")
    return math.log(2.0) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)


def check_sphere_dim(dim: int) -> None:
    """Raise unless there is a connected sphere in a space of this dimension."""
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
