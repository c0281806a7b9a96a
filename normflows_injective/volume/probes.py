r"""Hutchinson probes: random directions :math:`v` with :math:`\mathbb E[v v^\top] = I`.

Variance of the one-sample trace estimate :math:`\frac1K \sum_k v_k^\top M v_k` of a
:math:`d \times d` matrix with symmetric part :math:`S`:

* orthonormal: :math:`\frac{2d(d-K)}{K(d-1)(d+2)}
  (\lVert S\rVert_F^2 - (\operatorname{tr} S)^2/d)`, zero at :math:`K = d`;
* sphere: :math:`\frac{2d}{K(d+2)} (\lVert S\rVert_F^2 - (\operatorname{tr} S)^2/d)`;
* Rademacher: :math:`\frac2K (\lVert S\rVert_F^2 - \sum_i S_{ii}^2)`;
* Gaussian: :math:`\frac2K \lVert S\rVert_F^2`.

The first three vanish at :math:`M = I`, where a consistent encoder-decoder pair is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..autodiff.products import event_rows
from ..checks import check_choice, check_rows, renamed
from ..errors import OptionError


def _gaussian(num_probes: int, z: Tensor) -> Tensor:
    # At least in float32, where norms and factorisations exist and keep E[v v^T] = I.
    drawn = torch.promote_types(z.dtype, torch.float32)
    return torch.randn(num_probes, *z.shape, dtype=drawn, device=z.device)


def _rademacher(num_probes: int, z: Tensor) -> Tensor:
    return (
        torch.empty(num_probes, *z.shape, dtype=z.dtype, device=z.device).bernoulli_(0.5) * 2 - 1
    )


def _sphere(num_probes: int, z: Tensor) -> Tensor:
    v = event_rows(_gaussian(num_probes, z))
    norm = torch.linalg.vector_norm(v, dim=2, keepdim=True)
    return (v * (v.shape[2] ** 0.5 / norm)).view(num_probes, *z.shape)


def _orthonormal(num_probes: int, z: Tensor) -> Tensor:
    if num_probes == 1:
        return _sphere(1, z)
    # (B, d, K) -> Q with orthonormal columns.
    v = event_rows(_gaussian(num_probes, z)).permute(1, 2, 0)
    q, r = torch.linalg.qr(v)
    # LAPACK's signs are not random; with those of R the columns are uniformly distributed.
    q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1) * v.shape[1] ** 0.5
    return q.permute(2, 0, 1).reshape(num_probes, *z.shape)


PROBES: dict[str, Callable[[int, Tensor], Tensor]] = {
    "orthonormal": _orthonormal,
    "sphere": _sphere,
    "gaussian": _gaussian,
    "rademacher": _rademacher,
}


@renamed(n_probes="num_probes")
def draw_probes(kind: str, num_probes: int, z: Tensor) -> Tensor:
    r"""Draw :math:`K` probes for every sample of a latent batch.

    Args:
        kind: ``"orthonormal"`` (columns of :math:`\sqrt d\,Q`), ``"sphere"`` (independent on the
            sphere of radius :math:`\sqrt d`), ``"gaussian"`` or ``"rademacher"``.
        num_probes: Number of probes :math:`K`, between 1 and :math:`d`.
        z: Latent batch of shape :math:`(B, *)` with :math:`d` elements per sample; gives shape,
            dtype and device.

    Returns:
        Probes of shape :math:`(K, B, *)`.

    Raises:
        OptionError: If the kind is unknown or :math:`K` is not between 1 and :math:`d`.

    References:
        Free-form injective flows, arXiv 2306.01843, section on trace estimation.

    Examples:
        >>> v = draw_probes("orthonormal", 2, torch.zeros(5, 3))
        >>> v.shape, bool(torch.allclose((v[0] * v[1]).sum(1), torch.zeros(5), atol=1e-6))
        (torch.Size([2, 5, 3]), True)
    """
    check_choice(kind, PROBES, "probes")
    check_rows(z.unsqueeze(-1) if z.dim() == 1 else z, "z")
    dimension = z.shape[1:].numel()
    if not 1 <= num_probes <= dimension:
        raise OptionError(
            f"num_probes must be between 1 and the latent dimension {dimension}, got "
            f"{num_probes}. With {dimension} orthonormal probes the trace is already exact."
        )
    return PROBES[kind](num_probes, z.detach()).to(z.dtype)
