r"""The matrix Fisher law of rotations, which is the Bingham law of unit quaternions.

**One family.** :math:`\operatorname{tr}(F^\top R(q)) = q^\top S(F)\, q`, with a symmetric matrix
:math:`S(F)` of trace zero that is linear in the nine numbers of :math:`F`; symmetric matrices of
trace zero have nine too, and a multiple of the identity adds a constant. So the densities
:math:`\exp \operatorname{tr}(F^\top R) / c` of rotations and :math:`\exp(q^\top A q) / c` of pairs
:math:`\pm q` are the same.

**Normaliser.** Let :math:`\lambda_1 \ge \dots \ge \lambda_4` be the eigenvalues of :math:`A`. In
coordinates :math:`q = (\sqrt{1-h}\, e^{ia}, \sqrt h\, e^{ib})` along its eigenvectors Haar measure
is :math:`dh\, da\, db / 4\pi^2`, and the integrals over :math:`a` and :math:`b` are Bessel
functions:

.. math:: c\, e^{-\lambda_1} = \int_0^1 e^{-h (\lambda_1 - \lambda_3)}\,
          \tilde I_0\big(\tfrac{1 - h}2 (\lambda_1 - \lambda_2)\big)\,
          \tilde I_0\big(\tfrac h2 (\lambda_3 - \lambda_4)\big)\, dh, \qquad
          \tilde I_0(x) = e^{-x} I_0(x)

All factors are positive and at most one. They vary on the scales of the inverse differences next
to both ends, which may be many orders apart. With :math:`h = 1 / (1 + e^{-2s})`, :math:`s =
\tfrac\pi2 \sinh t`, every scale takes a similar part of the axis of :math:`t`, the integrand is
analytic around that axis and falls doubly exponentially, so the trapezoid rule converges
exponentially.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ..checks import as_floating
from ..errors import OptionError, ShapeError
from ..flows.surfaces.quaternions import from_quaternions, symmetric_form
from ..modules.precision import factored_dtype
from .uniform_rotation import RotationLaw

# The ends of the trapezoid rule, where h is below 1e-33, and its number of nodes.
REACH, NODES = 3.9, 513


@final
class MatrixFisher(RotationLaw):
    r"""The matrix Fisher law of rotations, in other words the Bingham law of unit quaternions.

    .. math:: \log p(R) = \operatorname{tr}(F^\top R) - \log c(F), \qquad
              \log p(q) = q^\top A q - \log c(A)

    against Haar measure. Both are one family, and the shape of the matrix tells which of them is
    meant. The normaliser has a relative error below 1e-12 in float64 for differences of
    eigenvalues up to 1e6. Densities are computed in float64 and rounded to the dtype of the
    matrix. Samples are exact, by rejection, and carry no gradient; their log-densities do.

    Args:
        matrix: :math:`F` of shape (3, 3), any matrix, whose nearest rotation is the mode; or
            :math:`A` of shape (4, 4), symmetric, whose first eigenvector is the mode.
        trainable: Whether it is a parameter. Of :math:`A` the symmetric part counts.
        form: ``"quaternion"`` for samples (n, 4) with :math:`w \ge 0`, or ``"matrix"`` for
            (n, 3, 3).
        off_manifold: Treatment by ``log_prob`` of other points: ``"reject"`` raises where a
            norm or an entry is off by more than 1e-4, ``"project"`` takes the nearest one.

    Raises:
        ShapeError: If the matrix has another shape.
        OptionError: If a matrix (4, 4) is not symmetric, or an option is unknown.
        NonFiniteError: If it holds NaN or infinity.

    References:
        Mardia and Jupp, *Directional Statistics*, Wiley 2000, chapter 13; Prentice, Orientation
        statistics without parametric assumptions, 1986. Sampling: Kent, Ganeiber and Mardia, A new
        method to simulate the Bingham and related distributions, arXiv 1310.8110.

    Examples:
        >>> law = MatrixFisher(5 * torch.eye(3))
        >>> law.log_prob(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])).exp()
        tensor([1.5219e+02, 3.1369e-07])
    """

    def __init__(
        self,
        matrix: Tensor | Sequence[Sequence[float]],
        trainable: bool = False,
        form: str = "quaternion",
        *,
        off_manifold: str = "reject",
    ) -> None:
        given = as_floating(matrix, "matrix")
        if given.shape not in ((3, 3), (4, 4)):
            raise ShapeError(
                "matrix must have shape (3, 3), as F of the matrix Fisher law, or (4, 4), as A of "
                f"Bingham's, got {tuple(given.shape)}."
            )
        if len(given) == 4 and not torch.allclose(given, given.T, rtol=1e-5, atol=1e-6):
            raise OptionError(
                "matrix of shape (4, 4) must be symmetric, as a quadratic form is, but differs "
                f"from its transpose by up to {float((given - given.T).abs().max()):.3g}. Give "
                "(matrix + matrix.T) / 2, which is the same form."
            )
        super().__init__(form, off_manifold)
        self.matrix = nn.Parameter(given) if trainable else nn.Buffer(given)

    @property
    def trainable(self) -> bool:
        """Whether the matrix is a parameter."""
        return isinstance(self.matrix, nn.Parameter)

    def forward(self, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        """Draw rotations without a gradient, with log-densities (num_samples,) that carry one.

        Args:
            num_samples: Number of samples.

        Returns:
            Samples (num_samples, 4) or (num_samples, 3, 3), and their log-densities in nats.

        Raises:
            NonFiniteError: If the matrix has become NaN or infinite.
        """
        self.refuse_diverged("matrix")
        with torch.no_grad():
            q = _sample(self._lifted(), num_samples)
        x = from_quaternions(q.to(self.matrix.dtype), self.form)
        return x, self._log_density(q)

    def _log_density(self, q: Tensor) -> Tensor:
        quadratic = self._lifted()
        values = torch.linalg.eigvalsh(quadratic)
        top = values[-1]
        # The difference of two large numbers, so it is rounded last.
        height = ((q @ quadratic) * q).sum(1) - top
        return (height - log_normaliser(values)).to(self.matrix.dtype)

    def _lifted(self) -> Tensor:
        """The matrix A (4, 4) of the quadratic form."""
        matrix = self.matrix.to(factored_dtype(self.matrix.device))
        return symmetric_form(matrix) if len(matrix) == 3 else (matrix + matrix.T) / 2


def log_normaliser(values: Tensor) -> Tensor:
    r"""Logarithm of :math:`c\, e^{-\lambda_1}` for eigenvalues (4,) in ascending order."""
    fourth, third, second, first = values.unbind()
    t = torch.linspace(-REACH, REACH, NODES, dtype=values.dtype, device=values.device)
    s = math.pi / 2 * t.sinh()
    h, rest = (2 * s).sigmoid(), (-2 * s).sigmoid()
    # dh / ds = 2 h (1 - h) and ds / dt = (pi / 2) cosh t.
    log_weights = (math.pi * t.cosh() * (2 * REACH / (NODES - 1))).log() + h.log() + rest.log()
    log_bessel = [
        torch.special.i0e(part).log()
        for part in (rest * (first - second) / 2, h * (third - fourth) / 2)
    ]
    return torch.logsumexp(log_weights - h * (first - third) + sum(log_bessel), dim=0)


def _sample(quadratic: Tensor, count: int) -> Tensor:
    r"""Draw quaternions (n, 4) of Bingham's law, by rejection from an angular Gaussian.

    With :math:`B = \lambda_1 I - A \ge 0` and :math:`\Omega = I + 2 B / b` both densities are
    functions of :math:`s = x^\top B x`: :math:`e^{-s}` and :math:`(1 + 2 s / b)^{-2}`. Their
    quotient is largest at :math:`s = (4 - b) / 2`, where it is :math:`M = e^{-(4-b)/2} (4/b)^2`;
    the share of proposals that are taken is largest for the root :math:`b \in [1, 4]` of
    :math:`\sum_i (b + 2 B_i)^{-1} = 1`.
    """
    values, vectors = torch.linalg.eigh(quadratic)
    gaps = values[-1] - values
    low, high = gaps.new_tensor(1.0), gaps.new_tensor(4.0)
    for _ in range(60):
        middle = (low + high) / 2
        is_low = (1 / (middle + 2 * gaps)).sum() > 1
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    b = (low + high) / 2
    precision = 1 + 2 * gaps / b
    log_bound = 2 * (4 / b).log() - (4 - b) / 2
    found = [vectors.new_empty(0, 4)]
    missing = count
    while missing > 0:
        normal = torch.randn(2 * missing + 16, 4, dtype=gaps.dtype, device=gaps.device)
        x = nn.functional.normalize(normal / precision.sqrt())
        squares = x.square()
        log_share = 2 * (squares @ precision).log() - squares @ gaps - log_bound
        found.append(x[torch.rand_like(log_share).log() <= log_share])
        missing -= len(found[-1])
    return torch.cat(found)[:count] @ vectors.T
