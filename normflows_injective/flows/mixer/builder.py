"""A whole MixerFlow, as a list of layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import normflows as nf

from ...checks import check_choice, checks_arguments, lookup
from ...errors import OptionError
from ..coupling import (
    ActNorm,
    Affine,
    Autoregressive,
    ElementTransform,
    Householder,
    LULinear,
    NetworkCoupling,
    Permutation,
    Spline,
)
from .mixing import ChannelMixing, PatchMixing
from .patches import patch_counts
from .shift import SHIFTS, PatchShift

# Builds a flow from the number of values, that of context features, and whether it is reversed.
Element = Callable[[int, int, bool], nf.flows.Flow]

# Above this number of values a dense map costs more than all the rest of a step.
DENSE_LIMIT = 256


@checks_arguments
def mixer_flow(
    image_shape: Sequence[int],
    patch_size: int,
    layers: int = 8,
    hidden: Sequence[int] = (128, 128),
    element: str | Element = "affine",
    linear: str = "auto",
    shift: str = "none",
    num_steps: int = 1,
    context_dim: int = 0,
    embedding_dim: int = 0,
) -> list[nf.flows.Flow]:
    r"""Layers of a MixerFlow, from latent images to images.

    An image is read as a table of :math:`S` patches with :math:`C` values each. A layer transforms
    all patches by one flow of :math:`\mathbb R^C`, then all places within a patch by one flow of
    :math:`\mathbb R^S`, both made of :class:`~normflows_injective.flows.coupling.ActNorm`, an
    invertible linear map and an element transform, and then shifts the patches. The model knows no
    neighbourhood but that of a patch. Without a shift, the linear maps next to the data absorb any
    permutation of the patches, and any permutation within patches that is the same in all of them.
    The class of densities is closed under such permutations if the linear maps are permutations or
    any matrices, and nearly so if they are LU decompositions of fixed pivots or a few reflections.

    Latents have the shape of images, so the list fits before, after and between other layers of
    images.

    Args:
        image_shape: Channels, height and width.
        patch_size: :math:`p`, a divisor of height and width.
        layers: Number of layers.
        hidden: Widths of the networks of a coupling. An ``"autoregressive"`` network has the first
            width, or the number of values if that is larger, and one residual block for every
            further width, at least one.
        element: ``"affine"``, ``"spline"`` (rational-quadratic), ``"autoregressive"`` (masked
            affine), or a function from the number of values, the number of context features and a
            flag that alternates, to a flow of vectors. It is called for a single value only if
            there are context features.
        linear: ``"lu"`` (dense), ``"householder"`` (eight reflections), ``"permutation"``
            (fixed), or ``"auto"``: dense up to 256 values, and reflections beyond.
        shift: ``"none"``, ``"roll"`` or ``"interior"``; see :class:`PatchShift`.
        num_steps: Number of steps within each mixing.
        context_dim: Number of context features; 0 for none.
        embedding_dim: Number of learned features that tell the networks which patch, or which
            place within a patch, they see; 0 for none.

    Returns:
        A list of flows for ``nf.NormalizingFlow`` and other models of normflows.

    Raises:
        ShapeError: If the image does not divide into such patches.
        OptionError: If an option is unknown or out of range.

    References:
        English, Kirchler, Lippert, MixerFlow, arXiv 2310.16777; the details are ours.

    Examples:
        >>> import torch
        >>> flows = mixer_flow((1, 8, 8), 4, layers=2, hidden=(16,))
        >>> model = nf.NormalizingFlow(nf.distributions.DiagGaussian((1, 8, 8)), flows)
        >>> model.log_prob(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3])
    """
    build = _element(element, hidden)
    build_linear = lookup(linear, _LINEAR, "linear")
    check_choice(shift, SHIFTS, "shift")
    features = context_dim + embedding_dim

    def steps(dim: int, reverse: bool) -> list[nf.flows.Flow]:
        step: list[nf.flows.Flow] = []
        for k in range(num_steps):
            # A single value has nothing to mix with, and without a context no condition.
            if dim > 1 or features:
                step.append(build(dim, features, reverse != bool(k % 2)))
            if dim > 1:
                step.append(build_linear(dim))
            step.append(ActNorm(dim))
        return step

    def mixing(shape: Sequence[int], reverse: bool) -> list[nf.flows.Flow]:
        num_patches, patch_dim = patch_counts(shape, patch_size)
        return [
            PatchMixing(
                shape, patch_size, steps(num_patches, reverse), context_dim, embedding_dim
            ),
            ChannelMixing(
                shape, patch_size, steps(patch_dim, reverse), context_dim, embedding_dim
            ),
        ]

    flows: list[nf.flows.Flow] = []
    for index in range(layers):
        reverse = index % 2 == 1
        if shift == "interior":
            inner = functools.partial(mixing, reverse=reverse)
            flows.append(PatchShift(shift, image_shape, patch_size, inner))
        elif shift != "none":
            flows.append(PatchShift(shift, image_shape, patch_size, back=reverse))
        flows += mixing(image_shape, reverse)
    return flows


def _element(element: str | Element, hidden: Sequence[int]) -> Element:
    if callable(element):
        return element
    if not hidden:
        raise OptionError("hidden must hold at least one width, got none.")

    def coupling(transform: ElementTransform) -> Element:
        return lambda dim, features, reverse: NetworkCoupling(
            dim, transform, hidden, features, reverse
        )

    def autoregressive(dim: int, features: int, reverse: bool) -> nf.flows.Flow:
        num_blocks = max(1, len(hidden) - 1)
        width = max(hidden[0], dim)
        return Autoregressive(dim, Affine(), width, num_blocks, features, reverse)

    known: dict[str, Element] = {
        "affine": coupling(Affine()),
        "spline": coupling(Spline()),
        "autoregressive": autoregressive,
    }
    return lookup(element, known, "element", "one of {} or a function")


_LINEAR: dict[str, Callable[[int], nf.flows.Flow]] = {
    "auto": lambda dim: LULinear(dim) if dim <= DENSE_LIMIT else Householder(dim),
    "lu": LULinear,
    "householder": Householder,
    "permutation": Permutation,
}
