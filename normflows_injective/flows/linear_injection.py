"""Injections whose log-volume is known in closed form: references for tests and baselines."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from ..volume.log_volumes import DecodedVolume, matrix_log_volume
from .injection import Injection
from .shapes import check_raises_dimension


@final
class LinearInjection(Injection):
    r"""Affine embedding with the orthogonal projection as its encoder.

    .. math:: g(z) = A z + b, \qquad f(x) = A^\dagger (x - b), \qquad
              \tfrac12 \log\det g'^\top g' = \tfrac12 \log\det A^\top A

    Args:
        latent_dim: :math:`d`.
        data_dim: :math:`D > d`.

    Raises:
        NotInjectiveError: If :math:`d \ge D`.

    References:
        Derived here: :math:`f' = A^\dagger = g'^\dagger`, so the encoder surrogate's gradient is
        exact for it.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> injection = LinearInjection(2, 5)
        >>> z = torch.randn(3, 2)
        >>> bool(torch.allclose(injection.encode(injection.decode(z)), z, atol=1e-5))
        True
    """

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__()
        check_raises_dimension((latent_dim,), (data_dim,), "LinearInjection")
        self.latent_dim, self.data_dim = latent_dim, data_dim
        self.latent_shape, self.data_shape = (latent_dim,), (data_dim,)
        self.weight = nn.Parameter(torch.randn(data_dim, latent_dim) / data_dim**0.5)
        self.bias = nn.Parameter(torch.zeros(data_dim))

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Project orthogonally, :math:`A^\dagger (x - b)`; x of shape (B, D), result (B, d)."""
        # A = QR gives A^+ = R^{-1} Q^T without squaring the condition number.
        q, r = torch.linalg.qr(self.weight)
        return torch.linalg.solve_triangular(r, ((x - self.bias) @ q).T, upper=True).T

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Embed, :math:`A z + b`; z of shape (B, d), result (B, D)."""
        return z @ self.weight.T + self.bias

    def decode_and_log_volume(self, z: Tensor, context: Tensor | None = None) -> DecodedVolume:
        r"""Embed, with :math:`\tfrac12 \log\det A^\top A` for every sample."""
        log_volume = matrix_log_volume(self.weight.unsqueeze(0)).to(z.dtype)
        return DecodedVolume(self.decode(z, context), log_volume.expand(z.shape[0]))


@final
class Pad(Injection):
    r"""Isometric embedding by appended zeros, of log-volume zero.

    .. math:: g(z) = (z, 0), \qquad f(x) = x_{1:d}

    Followed by bijective flows inside an :class:`~normflows_injective.InjectiveNormalizingFlow`,
    it is the architecture of rectangular flows, arXiv 2106.01413.

    Args:
        latent_dim: :math:`d`.
        data_dim: :math:`D > d`.

    Raises:
        NotInjectiveError: If :math:`d \ge D`.

    Examples:
        >>> Pad(1, 3)(torch.ones(1, 1))
        (tensor([[1., 0., 0.]]), tensor([0.]))
    """

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__()
        check_raises_dimension((latent_dim,), (data_dim,), "Pad")
        self.latent_dim, self.data_dim = latent_dim, data_dim
        self.latent_shape, self.data_shape = (latent_dim,), (data_dim,)
        self._extra_dim = data_dim - latent_dim

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Keep the first d coordinates; x of shape (B, D), result (B, d)."""
        return x[:, : self.latent_dim]

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Append zeros; z of shape (B, d), result (B, D)."""
        return nn.functional.pad(z, (0, self._extra_dim))

    def decode_and_log_volume(self, z: Tensor, context: Tensor | None = None) -> DecodedVolume:
        """Append zeros, with log-volume zero."""
        return DecodedVolume(self.decode(z, context), z.new_zeros(z.shape[0]))
