r"""Log-volume :math:`\tfrac12 \log\det J^\top J` of a decoding map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..autodiff.recording import Map
from ..autodiff.settings import as_written
from ..checks import check_choice, checks_arguments, renamed
from ..errors import OptionError, ShapeError
from .exact import exact_volume
from .factoring import volumes_of, warn_if_deficient
from .lanczos import EstimatedVolume, lanczos_log_volume

METHODS = ("exact", "lanczos")


class DecodedVolume(NamedTuple):
    """A decoded batch (B, *) and the log-volume of the decoding map there, (B,) in nats."""

    x: Tensor
    log_volume: Tensor


@overload
def log_volume(
    decode: Map, z: Tensor, chunk_size: int | None = None, *, method: Literal["exact"] = "exact"
) -> Tensor: ...


@overload
def log_volume(
    decode: Map,
    z: Tensor,
    chunk_size: int | None = None,
    *,
    method: Literal["lanczos"],
    num_probes: int | None = None,
    num_steps: int | None = None,
) -> EstimatedVolume: ...


@renamed(n_probes="num_probes")
def log_volume(
    decode: Map,
    z: Tensor,
    chunk_size: int | None = None,
    *,
    method: str = "exact",
    num_probes: int | None = None,
    num_steps: int | None = None,
) -> Tensor | EstimatedVolume:
    r"""Log-volume of a decoding map at a batch of latents, exact or estimated with its error.

    .. math:: \tfrac12 \log\det\big(g'(z)^\top g'(z)\big) = \sum_i \log |R_{ii}|, \quad g'(z) = QR

    With ``"exact"`` the Jacobian comes from :math:`d` Jacobian-vector products of the batch.
    Without gradients :math:`R^\top` is the Cholesky factor of the Gram matrix :math:`J^\top J` in
    float64, whose condition number is squared. Its error is measured, and matrices for which it
    exceeds :math:`10^{-6}` nats, :math:`10^{-11}` for Jacobians in float64, are factored by QR, as
    all are with gradients. The derivation stands in ``volume/gram.py``. The result is
    differentiable where gradients are enabled; evaluate under ``torch.no_grad()``, where the
    memory is bounded for every size of batch. Register a network of TorchScript as a module. If it
    hides in a list, a dictionary or an object, forward mode, which is used without gradients, may
    lose its tangents in silence.

    With ``"lanczos"`` the Jacobian is not formed either. The value is estimated by stochastic
    Lanczos quadrature from ``2 * num_probes * num_steps`` products. Its standard error covers the
    draw of the probes and the truncation of the quadrature, but not rounding, nor a rank
    deficiency that the steps do not reach. Use it where the Jacobian does not fit into memory, and
    for values only: train with a surrogate.

    Args:
        decode: Map :math:`g` of :math:`(B, *)` to :math:`(B, *)`, acting on each sample alone.
        z: Latents of shape :math:`(B, *)` with :math:`d` elements per sample.
        chunk_size: Number of tangents per pass. None bounds the memory without gradients, and
            takes all with gradients or probes.
        method: ``"exact"`` or ``"lanczos"``.
        num_probes: Number of random directions of ``"lanczos"``, 2 or more; None takes 8. With
            :math:`d` or more there is no statistical error.
        num_steps: Number of steps of ``"lanczos"`` per direction, 4 or more; None takes 64. With
            :math:`d` or more there is no truncation error.

    Returns:
        Log-volumes of shape :math:`(B,)` in nats, in the dtype of ``z`` but at least float32. With
        ``"lanczos"`` an :class:`EstimatedVolume` ``(log_volume, standard_error)`` of two such
        tensors, without a graph.

    Raises:
        NotInjectiveError: If the map lowers the dimension.
        UnsupportedLayerError: If a layer of ``decode`` has no per-sample Jacobian.
        OptionError: If the method is unknown, or an option out of range or of another method.

    Warns:
        NumericalWarning: If a Jacobian is rank deficient to the precision it was computed in.

    References:
        Free-form injective flows, arXiv 2306.01843, eq. for the change of variables across
        dimensions; Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature, 2017.

    Examples:
        >>> circle = lambda z: 2.0 * torch.cat([z.cos(), z.sin()], dim=1)
        >>> log_volume(circle, torch.zeros(1, 1))  # log of the radius
        tensor([0.6931])
        >>> torus = lambda z: 2.0 * torch.cat([z.cos(), z.sin()], dim=1)
        >>> log_volume(torus, torch.zeros(1, 500), method="lanczos").log_volume.round()
        tensor([347.])
    """
    check_choice(method, METHODS, "method")
    if method == "lanczos":
        return lanczos_log_volume(decode, z, chunk_size, num_probes, num_steps)
    if num_probes is not None or num_steps is not None:
        raise OptionError(
            "num_probes and num_steps are options of method='lanczos', but the method is 'exact', "
            "which needs neither. Leave them out, or pass method='lanczos'."
        )
    return decode_and_log_volume(decode, z, chunk_size).log_volume


@as_written
@checks_arguments
def decode_and_log_volume(
    decode: Callable[..., Tensor],
    z: Tensor,
    chunk_size: int | None = None,
    context: Tensor | None = None,
) -> DecodedVolume:
    r"""Decode a batch and give the exact log-volume from the same pass.

    Without gradients a pass holds the Jacobians of as many samples as fit into 128 MiB in the
    dtype of the factorisation, and further passes take the others.

    With gradients :math:`\partial V = \partial \langle J^\top \mathrm{SG}[J^{+\top}], I
    \rangle` is used where a function of the map is not proved to have right derivatives beyond
    the second. Only first derivatives exist then.

    Args:
        decode: As in :func:`log_volume`; with a context, called ``decode(z, context=context)``.
        z: As in :func:`log_volume`.
        chunk_size: As in :func:`log_volume`.
        context: One row per sample, or None.

    Returns:
        :class:`DecodedVolume` ``(x, log_volume)``. Forward-mode derivatives by z are right.

    Raises:
        NotInjectiveError: If the map lowers the dimension.
        UnsupportedLayerError: If a layer of ``decode`` has no per-sample Jacobian.
        ForwardModeError: If a tangent enters other than through z.

    Examples:
        >>> x, volume = decode_and_log_volume(lambda z: torch.cat([z, z], 1), torch.ones(1, 1))
        >>> x, volume
        (tensor([[1., 1.]]), tensor([0.3466]))
    """
    x, volume, deficient = exact_volume(decode, z, chunk_size, context)
    if x.shape[0] != z.shape[0]:
        raise ShapeError(
            f"decode must give one row for each of {z.shape[0]} latents, got {x.shape[0]}. "
            "It must act on each sample alone."
        )
    warn_if_deficient(deficient)
    return DecodedVolume(x, volume.to(torch.promote_types(x.dtype, torch.float32)))


def matrix_log_volume(matrix: Tensor) -> Tensor:
    r"""Log-volumes :math:`\tfrac12 \log\det J^\top J`, (B,), of tall matrices (B, D, d)."""
    volumes = volumes_of(matrix)
    warn_if_deficient(volumes.deficient)
    return volumes.log_volume
