"""The layer that lets information cross the borders of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import final

import normflows as nf
import torch
from torch import Tensor, nn

from ...checks import lookup
from ...errors import OptionError
from ...host.calls import summed_forward, summed_inverse
from ...host.context import needs_context, takes_context
from ..layer import Layer
from .patches import patch_counts

BuildLayers = Callable[[tuple[int, int, int]], Iterable[nf.flows.Flow]]
Mapped = tuple[Tensor, Tensor]
Through = Callable[[Tensor], Mapped]


def interior_shape(image_shape: Sequence[int], patch_size: int) -> tuple[int, int, int]:
    """Shape of an image without a frame whose opposite sides together are one patch wide."""
    patch_counts(image_shape, patch_size)
    channels, height, width = image_shape
    if patch_size < 2 or min(height, width) <= patch_size:
        raise OptionError(
            "A shift by half a patch needs patches of at least 2x2 values and at least two of "
            f"them in every direction, got patch_size={patch_size} for {height}x{width}. Use "
            "smaller patches, or no shift ('none')."
        )
    return channels, height - patch_size, width - patch_size


@final
class PatchShift(Layer):
    r"""Move the borders of the patches by half a patch.

    * ``"roll"`` moves the image, :math:`z_{c,i,j} = x_{c,\,i+\lfloor p/2 \rfloor,\,
      j+\lfloor p/2 \rfloor}` with indices that go round, so that the layers before and after it
      cut it differently. Opposite borders meet.
    * ``"interior"`` leaves a frame half a patch wide as it is, and sends the rest of the image
      through layers of its own, whose patches straddle the borders of the others.
    * ``"none"`` does nothing.

    Args:
        kind: ``"interior"``, ``"roll"`` or ``"none"``.
        image_shape: Channels, height and width.
        patch_size: :math:`p`, at least 2 unless ``kind`` is ``"none"``.
        layers: For ``"interior"``, a function from the shape of the interior image to flows of
            such images, which are ordered from latent to data.
        back: For ``"roll"``, whether the image is moved the other way.

    Raises:
        OptionError: If the kind is unknown, half a patch is less than a pixel, or layers are
            missing or superfluous.
        ShapeError: If the image does not divide into such patches.

    References:
        English, Kirchler, Lippert, MixerFlow, arXiv 2310.16777, names a shift layer; its exact
        form is ours.

    Examples:
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> PatchShift("roll", (1, 4, 4), 2).inverse(x)[0][0, 0, 0]
        tensor([5., 6., 7., 4.])
    """

    def __init__(
        self,
        kind: str,
        image_shape: Sequence[int],
        patch_size: int,
        layers: BuildLayers | None = None,
        back: bool = False,
    ) -> None:
        super().__init__()
        shift = lookup(kind, SHIFTS, "kind")
        if (kind == "interior") != (layers is not None):
            raise OptionError(
                f"layers go with kind='interior' and with it alone, got kind={kind!r}. Pass a "
                "function from the shape of the interior image to a list of flows."
            )
        patch_counts(image_shape, patch_size)
        inside = None if kind == "none" else interior_shape(image_shape, patch_size)
        self.kind, self.shape = kind, tuple(image_shape)
        self.image_shape, self.patch_size, self.back = self.shape, patch_size, back
        self.layers = nn.ModuleList(layers(inside) if layers and inside else [])
        self.takes_context = any(takes_context(flow) for flow in self.layers)
        self.needs_context = any(needs_context(flow) for flow in self.layers)
        self._move = partial(shift, patch_size, back)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent images (B, channels, H, W) to images of data, with the log-det (B,) in nats."""
        through = partial(summed_forward, list(self.layers), context=context)
        return self._move(z, through, inverse=False)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images of data (B, channels, H, W) to latent ones, with the log-det (B,) in nats."""
        through = partial(summed_inverse, list(self.layers), context=context)
        return self._move(x, through, inverse=True)

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return f"kind={self.kind!r}, image_shape={self.shape}"


def _keep(patch_size: int, back: bool, image: Tensor, through: Through, inverse: bool) -> Mapped:
    """The identity."""
    return image, image.new_zeros(image.shape[0])


def _roll(patch_size: int, back: bool, image: Tensor, through: Through, inverse: bool) -> Mapped:
    """Both axes are rolled by half a patch."""
    half = patch_size // 2
    offset = half if inverse == back else -half
    return image.roll((offset, offset), (2, 3)), image.new_zeros(image.shape[0])


def _act_inside(
    patch_size: int, back: bool, image: Tensor, through: Through, inverse: bool
) -> Mapped:
    """Layers act within a frame half a patch wide."""
    low, high = patch_size // 2, patch_size - patch_size // 2
    height, width = image.shape[2:]
    inside = image[:, :, low : height - high, low : width - high]
    frame = [low, high, low, high]
    is_inside = nn.functional.pad(torch.ones_like(inside[:1, :1]), frame).bool()
    inside, log_det = through(inside)
    return torch.where(is_inside, nn.functional.pad(inside, frame), image), log_det


# Maps of images (B, channels, H, W), with log-dets (B,), or their inverses, given the size of a
# patch and whether to move back; ``through`` sends images through the layers likewise.
SHIFTS = {"none": _keep, "roll": _roll, "interior": _act_inside}
