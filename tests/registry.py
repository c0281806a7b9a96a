"""Name -> constructor of every layer. Adding a layer is adding one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import normflows as nf
from torch import nn

import normflows_injective as nfi


@dataclass(frozen=True)
class Case:
    """A layer, the event shape of its latents, and what holds for it."""

    build: Callable[[], nf.flows.Flow]
    latent_shape: tuple[int, ...]
    data_shape: tuple[int, ...]
    exact_inverse: bool = True
    context_dim: int = 0


def _free_form() -> nf.flows.Flow:
    return nfi.flows.FreeFormInjection(*nfi.nets.mlp_autoencoder(5, 2, (8, 8)))


def _free_form_context() -> nf.flows.Flow:
    return nfi.flows.FreeFormInjection(*nfi.nets.residual_autoencoder(5, 2, 8, 1, context_dim=3))


def _free_form_images() -> nf.flows.Flow:
    return nfi.flows.FreeFormInjection(*nfi.nets.conv_autoencoder((1, 6, 6), 3, (8, 8)))


def _composite() -> nf.flows.Flow:
    coupling = nf.flows.AffineCouplingBlock(nf.nets.MLP([3, 8, 4], leaky=0.3))
    return nfi.flows.InjectiveComposite(
        [nfi.flows.LinearInjection(2, 5), coupling, nf.flows.LULinearPermute(5)]
    )


def _composite_images() -> nf.flows.Flow:
    return nfi.flows.InjectiveComposite(
        [
            nfi.flows.LinearInjection(3, 16),
            nfi.flows.Reshape((16,), (4, 2, 2)),
            nf.flows.Invertible1x1Conv(4),
            nf.flows.Squeeze(),
        ]
    )


def _composite_two() -> nf.flows.Flow:
    return nfi.flows.InjectiveComposite(
        [nfi.flows.LinearInjection(2, 3), nf.flows.LULinearPermute(3), nfi.flows.Pad(3, 5)]
    )


LAYERS: dict[str, Case] = {
    "linear": Case(lambda: nfi.flows.LinearInjection(2, 5), (2,), (5,)),
    "pad": Case(lambda: nfi.flows.Pad(2, 5), (2,), (5,)),
    "reshape": Case(lambda: nfi.flows.Reshape((4,), (1, 2, 2)), (4,), (1, 2, 2)),
    "free_form": Case(_free_form, (2,), (5,), exact_inverse=False),
    "free_form_context": Case(_free_form_context, (2,), (5,), exact_inverse=False, context_dim=3),
    "free_form_images": Case(_free_form_images, (3,), (1, 6, 6), exact_inverse=False),
    "composite": Case(_composite, (2,), (5,)),
    "composite_images": Case(_composite_images, (3,), (1, 4, 4)),
    "composite_two_injections": Case(_composite_two, (2,), (5,)),
}


def perturb(layer: nn.Module) -> nn.Module:
    """Move every parameter a little, so that no layer is tested at a special initial value."""
    for parameter in layer.parameters():
        parameter.data += 0.05 * parameter.data.new_ones(()).expand_as(parameter).bernoulli(0.5)
    return layer
