"""How far an encoder is aligned with the tangent spaces of a decoder's manifold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autodiff.jacobians import jacobian, jacobian_by_rows
from ..autodiff.recording import Map
from ..checks import check_batch, check_finite, checks_arguments
from ..errors import ShapeError
from ..host.context import check_context, context_arguments
from ..host.copies import in_evaluation
from ..host.refusals import refuse_unsupported
from ..modules.contents import modules_of
from ..modules.precision import as_factored
from ..volume.factoring import factor, refuse_lower_dimension


class Alignment(NamedTuple):
    r"""Result of :func:`alignment`, one row for each of the data.

    Attributes:
        principal_angles: Angles between the tangent space :math:`\operatorname{range} g'(z)` and
            the row space :math:`\operatorname{range} f'(\hat x)^\top`, ascending, in radians,
            shape :math:`(B, d)`; NaN where a Jacobian is rank deficient.
        left_inverse_error: :math:`\lVert f'(\hat x) g'(z) - I \rVert_F / \sqrt d`, shape
            :math:`(B,)`; 0 where encoder and decoder are locally inverse.
        pseudo_inverse_error: :math:`\lVert g'(z) - f'(\hat x)^\dagger \rVert_F /
            \lVert g'(z) \rVert_F`, shape :math:`(B,)`; 0 where the surrogate is unbiased.
        gradient_cosine: Cosine between :math:`g'(z)` and :math:`f'(\hat x)^\dagger`, shape
            :math:`(B,)`. These are, up to a sign and a transposition, the gradients by
            :math:`f'` of the surrogate :math:`-\operatorname{tr} f'\,\mathrm{SG}[g']` and of
            :math:`-\tfrac12 \log\det f' f'^\top`, for which it stands.

    Examples:
        See :func:`alignment`.
    """

    principal_angles: Tensor
    left_inverse_error: Tensor
    pseudo_inverse_error: Tensor
    gradient_cosine: Tensor


class JacobiansOfPair(NamedTuple):
    """Points (B, *) of the manifold, and the Jacobians there of decoder and encoder.

    These are matrices (B, D, d) and (B, d, D) in the dtype to factor in.
    """

    projection: Tensor
    decoder: Tensor
    encoder: Tensor

    def left_inverse_error(self) -> Tensor:
        r"""Errors :math:`\lVert f' g' - I \rVert_F / \sqrt d`, (B,)."""
        product = self.encoder @ self.decoder
        identity = torch.eye(product.shape[1], dtype=product.dtype, device=product.device)
        return torch.linalg.matrix_norm(product - identity) / product.shape[1] ** 0.5

    def pseudo_inverse_error(self) -> Tensor:
        r"""Errors :math:`\lVert g' - f'^\dagger \rVert_F / \lVert g' \rVert_F`, (B,)."""
        mismatch = self.decoder - torch.linalg.pinv(self.encoder)
        norm = torch.linalg.matrix_norm
        return norm(mismatch) / norm(self.decoder)

    def gradient_cosine(self) -> Tensor:
        r"""Cosines between :math:`g'` and :math:`f'^\dagger`, (B,)."""
        pseudo_inverse = torch.linalg.pinv(self.encoder).flatten(1)
        return torch.cosine_similarity(self.decoder.flatten(1), pseudo_inverse, dim=1)

    def principal_angles(self) -> Tensor:
        r"""Angles (B, d) between the ranges of :math:`g'` and :math:`f'^\top`, ascending.

        For orthonormal bases :math:`Q, P` the singular values of :math:`Q^\top P` are the
        cosines, those of :math:`P - Q Q^\top P` the sines. A cosine tells no angle below
        :math:`\sqrt\epsilon`, a sine none near :math:`\pi / 2`, so both are taken.
        """
        tangents, rows = factor(self.decoder, with_q=True), factor(self.encoder.mT, with_q=True)
        cosines = torch.linalg.svdvals(overlap := tangents.q.mT @ rows.q)
        sines = torch.linalg.svdvals(rows.q - tangents.q @ overlap).flip(1)
        angles = torch.atan2(sines, cosines)
        deficient = tangents.deficient | rows.deficient
        return angles.masked_fill(deficient.unsqueeze(1), torch.nan)


def jacobians_of_pair(
    encode: Map, decode: Map, z: Tensor, shape: Sequence[int]
) -> JacobiansOfPair:
    """Jacobians of a decoder at latents (B, *), and of an encoder at the points they lead to.

    These must have the shape of the data.
    """
    with torch.no_grad():
        projection, decoder = jacobian(decode, z)
    if projection.shape != shape:
        raise ShapeError(
            f"decoder must lead back to data of shape {tuple(shape)}, got "
            f"{tuple(projection.shape)}. Give the two networks as (encoder, decoder)."
        )
    check_finite(decoder, "the decoder Jacobian", "Has the training diverged?")
    with torch.enable_grad():
        encoder = jacobian_by_rows(encode, projection, create_graph=False).jacobian
    return JacobiansOfPair(projection, as_factored(decoder), as_factored(encoder.detach()))


@checks_arguments
def alignment(
    encoder: Callable[..., Tensor],
    decoder: Callable[..., Tensor],
    x: Tensor,
    context: Tensor | None = None,
) -> Alignment:
    r"""Measure how far an encoder is aligned with a decoder's tangent spaces, row by row.

    An encoder that inverts its decoder on the manifold may still look at the data along slanted
    directions: :math:`f' g' = I` holds for every :math:`f' = g'^\dagger + N` with :math:`N g' =
    0`. Then the codes of data off the manifold are not those of the nearest points, and the
    encoder surrogate is biased. The principal angles between the row space of :math:`f'` and the
    tangent space see it: they all vanish if and only if the two spaces are one, and then a left
    inverse is the pseudo-inverse.

    It takes any pair, trained by whatever loss: two networks, or ``model.encode`` and
    ``model.decode``. Networks are evaluated in evaluation mode, and nothing of them is changed.

    Args:
        encoder: Network, or function, of data :math:`(B, *)` to latents with :math:`d` numbers
            per row. With a context it is called with ``context=``.
        decoder: Network, or function, of latents to data, likewise.
        x: Data of shape :math:`(B, *)` with :math:`D \ge d` numbers per row. The Jacobians are
            those at their projections :math:`\hat x = g(z)`, :math:`z = f(x)`.
        context: Optional context, one row per sample.

    Returns:
        :class:`Alignment`, in float64 where the device has it. Angles of Jacobians that were
        computed in float32 are exact to about :math:`10^{-7}` times their condition number.

    Raises:
        NonFiniteError: If data or the decoder's Jacobian are not finite.
        NotInjectiveError: If the decoder lowers the dimension.
        ShapeError: If the decoder does not lead back to the shape of x.
        UnsupportedLayerError: If a layer has no per-sample Jacobian.

    References:
        Björck and Golub, Numerical methods for computing angles between linear subspaces, 1973.

    Examples:
        >>> encoder, decoder = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
        >>> _ = decoder.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
        >>> _ = encoder.weight.data.copy_(torch.tensor([[1.0, 1.0]]))  # slanted by 45 degrees
        >>> found = alignment(encoder, decoder, torch.randn(3, 2))
        >>> found.principal_angles[0].rad2deg().round(), found.left_inverse_error[0]
        (tensor([45.], dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    check_batch(x, "x")
    check_context([encoder, decoder], context, len(x))
    encode, decode = _in_context(encoder, context), _in_context(decoder, context)
    refuse_unsupported(modules_of(encode))
    with torch.inference_mode(False):
        # Autograd refuses tensors of inference mode; a clone outside of it is an ordinary one.
        x = x.clone()
        with torch.no_grad():
            z = encode(x)
        refuse_lower_dimension(z[0].numel(), x[0].numel())
        pair = jacobians_of_pair(encode, decode, z, x.shape)
        return Alignment(
            principal_angles=pair.principal_angles(),
            left_inverse_error=pair.left_inverse_error(),
            pseudo_inverse_error=pair.pseudo_inverse_error(),
            gradient_cosine=pair.gradient_cosine(),
        )


def _in_context(function: Callable[..., Any], context: Tensor | None) -> Map:
    """A network in evaluation mode, or a function, as a map of batches alone."""
    function = in_evaluation(function) if isinstance(function, nn.Module) else function
    given = None if context is None else context.clone()
    options = context_arguments(function, given)
    return partial(function, **options) if options else function
