"""The estimators' formulas, with dense Jacobians."""

import torch
from torch import Tensor

from normflows_injective.volume import Conditional, ConjugateGradient
from normflows_injective.volume.estimators import (
    DecoderSurrogate,
    EncoderSurrogate,
    OnManifoldSurrogate,
)
from support.dense import dense_jacobian

EXACT = {
    "encoder": EncoderSurrogate(),
    "on_manifold": OnManifoldSurrogate(),
    "decoder": DecoderSurrogate(),
    "conditional": Conditional(),
    "conditional_opposite": Conditional(opposite=True),
    "conjugate_gradient": ConjugateGradient(tolerance=1e-12),
}


def dense_surrogate(name: str, x: Tensor, encode, decode, v: Tensor) -> Tensor:
    """The formula of an estimator, per sample, with dense Jacobians; v has shape (K, B, d)."""
    z = encode(x)
    at = decode(z) if name == "on_manifold" else x
    f, g, v = dense_jacobian(encode, at), dense_jacobian(decode, z), v.flatten(2)

    def trace(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("kbi,bij,bjl,kbl->kb", v, left, right, v)

    if name == "conjugate_gradient":
        gram = g.mT @ g
        solved = torch.einsum("bij,kbj->kbi", gram.detach().inverse(), v)
        return 0.5 * torch.einsum("kbi,bij,kbj->kb", solved, gram, v).mean(0)
    encoder_form, decoder_form = -trace(f, g.detach()), trace(f.detach(), g)
    if name in ("encoder", "on_manifold"):
        return encoder_form.mean(0)
    if name == "decoder":
        return decoder_form.mean(0)
    below = trace(f, g).detach() - v.square().sum(2) < 0
    use_encoder = ~below if name == "conditional_opposite" else below
    return torch.where(use_encoder, encoder_form, decoder_form).mean(0)
