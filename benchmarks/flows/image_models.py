"""MixerFlow and Glow for images, of nearly the same number of parameters."""

from __future__ import annotations

import warnings

import normflows as nf
from torch import Tensor, nn

from normflows_injective.flows.mixer import mixer_flow

__all__ = ["count", "glow", "glow_width", "log_prob", "mixer"]

Shape = tuple[int, int, int]


def count(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def mixer(shape: Shape, patch_size: int, layers: int, width: int, **options: object) -> nn.Module:
    """A MixerFlow on the host's diagonal normal."""
    flows = mixer_flow(shape, patch_size, layers, (width, width), **options)
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(shape), flows)


def glow(shape: Shape, width: int, blocks: int = 6, levels: int = 2) -> nn.Module:
    """Glow of the host: squeezed by two at every level, half of the channels left at each."""
    channels, height, size = shape
    bases, merges, flows = [], [], []
    for level in range(levels):
        seen = channels * 2 ** (levels + 1 - level)
        steps = [_glow_block(seen, width) for _ in range(blocks)]
        flows.append([*steps, nf.flows.Squeeze()])
        side = 2 ** (levels - level)
        left = seen if level == 0 else channels * side
        bases.append(nf.distributions.DiagGaussian((left, height // side, size // side)))
        if level > 0:
            merges.append(nf.flows.Merge())
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


def log_prob(model: nn.Module, x: Tensor) -> Tensor:
    """Log-densities (B,) in nats of either model, whose calls differ in the host."""
    return model.log_prob(x, None) if isinstance(model, nf.MultiscaleFlow) else model.log_prob(x)


def glow_width(shape: Shape, parameters: int) -> int:
    """Width of Glow's networks that comes nearest to a number of parameters."""
    widths = range(8, 512)
    low, high = widths[0], widths[-1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(glow(shape, middle)) < parameters else (low, middle)
    return min((low, high), key=lambda width: abs(count(glow(shape, width)) - parameters))


def _glow_block(channels: int, width: int) -> nf.flows.Flow:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.lu is deprecated")
        return nf.flows.GlowBlock(channels, width, split_mode="channel", scale=True)
