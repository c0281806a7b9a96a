"""Layers that mix an image within its patches, and across them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import final

import normflows as nf
import torch
from einops import rearrange
from torch import Tensor, nn

from ...errors import OptionError, ShapeError
from ...host.calls import summed_forward, summed_inverse
from ...host.context import expect_context, needs_context, takes_context
from ..layer import Layer
from ..stacking import check_invertible
from .patches import Patchify


class Mixing(Layer):
    r"""Flows of vectors applied to every row of an image, read as a table; a base class.

    The :math:`M` rows share their parameters, and the log-det of an image is the sum of the
    log-dets of its rows. A term that does not depend on data, such as the log-det of a linear map,
    therefore counts :math:`M` times.

    Args:
        image_shape: Channels, height and width.
        patch_size: Size of the square patches.
        layers: Flows of vectors, of this package or of normflows, from latent to data.
        context_dim: Number of context features that the caller gives; 0 for none.
        embedding_dim: Number of learned features that tell the layers which row they transform; 0
            for none. They reach the layers as context, after the caller's.

    Raises:
        ShapeError: If the image does not divide into such patches.
        OptionError: If there are context features and no layer reads them, or if a layer needs
            some and there are none.
        UnsupportedLayerError: If a layer is no invertible flow.

    References:
        English, Kirchler, Lippert, MixerFlow, arXiv 2310.16777.

    Examples:
        See :class:`ChannelMixing` and :class:`PatchMixing`.
    """

    # From a table to rows and back, and the axis that counts the rows of an image.
    to_rows: str
    to_table: str
    row_axis: str

    def __init__(
        self,
        image_shape: Sequence[int],
        patch_size: int,
        layers: Iterable[nf.flows.Flow],
        context_dim: int = 0,
        embedding_dim: int = 0,
    ) -> None:
        super().__init__()
        self.patchify = Patchify(image_shape, patch_size)
        self.shape, self.context_dim = self.patchify.data_shape, context_dim
        self.image_shape, self.patch_size = self.shape, patch_size
        self.embedding_dim = embedding_dim
        name = type(self).__name__
        if isinstance(layers, nf.flows.Flow):
            raise OptionError(
                f"{name} takes a list of layers, got one {type(layers).__name__}. Put it into "
                "a list."
            )
        if layers is None or isinstance(layers, str | bytes):
            raise OptionError(f"layers must be a list of layers, got {layers!r}. Give a list.")
        self.layers = nn.ModuleList(layers)
        self.num_rows = self.count_rows(*self.patchify.latent_shape)
        width = math.prod(self.patchify.latent_shape) // self.num_rows
        for layer in self.layers:
            check_invertible(layer)
            shape = tuple(getattr(layer, "shape", (width,)))
            if shape != (width,):
                raise ShapeError(
                    f"{name} needs layers of vectors of {width} values, got a "
                    f"{type(layer).__name__} of shape {shape}."
                )
        self._check_readers(context_dim + embedding_dim)
        self.embedding = None
        if embedding_dim:
            self.embedding = nn.Parameter(torch.randn(self.num_rows, embedding_dim))
        self.takes_context = self.needs_context = context_dim > 0

    @staticmethod
    @abstractmethod
    def count_rows(num_patches: int, patch_dim: int) -> int:
        """Number of rows that share their parameters."""

    def _check_readers(self, features: int) -> None:
        """Raise unless there are context features if and only if a layer reads them."""
        name = type(self).__name__
        if features and not any(takes_context(layer) for layer in self.layers):
            raise OptionError(
                f"None of the layers of {name} takes a context, so that context_dim and "
                f"embedding_dim would be ignored. Build one with {features} context features, or "
                "leave both at 0."
            )
        if not features and any(needs_context(layer) for layer in self.layers):
            raise OptionError(
                f"A layer of {name} was built with a context, but none would come. Set "
                "context_dim, or embedding_dim for one that is learned."
            )

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent images (B, channels, H, W) to images of data, with the log-det (B,) in nats."""
        return self._through(z, context, inverse=False)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images of data (B, channels, H, W) to latent ones, with the log-det (B,) in nats."""
        return self._through(x, context, inverse=True)

    def _through(
        self, image: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        row_context = self._row_context(context, image.shape[0])
        rows = rearrange(self.patchify.inverse(image)[0], self.to_rows)
        through = summed_inverse if inverse else summed_forward
        rows, log_dets = through(list(self.layers), rows, row_context)
        log_det = log_dets.reshape(image.shape[0], self.num_rows).sum(1)
        table = rearrange(rows, self.to_table, **{self.row_axis: self.num_rows})
        return self.patchify(table)[0], log_det

    def _row_context(self, context: Tensor | None, length: int) -> Tensor | None:
        """Context of every row: the caller's, and the learned features of the row."""
        context = context if self.context_dim else None
        expect_context(context, length, self.context_dim, type(self).__name__)
        parts = []
        if context is not None:
            parts.append(context.repeat_interleave(self.num_rows, 0))
        if self.embedding is not None:
            parts.append(self.embedding.repeat(length, 1))
        return torch.cat(parts, dim=1) if parts else None


@final
class ChannelMixing(Mixing):
    r"""The same flows of vectors for every patch of an image.

    .. math:: T_{k\cdot} \leftarrow h(T_{k\cdot}), \quad k = 1, \dots, S, \qquad
              \log\det = \sum_k \log|\det h'(T_{k\cdot})|

    It commutes with every permutation of the patches.

    Args:
        image_shape: Channels, height and width.
        patch_size: Size of the square patches.
        layers: Flows of vectors of the :math:`C` values of a patch, of this package or of
            normflows, from latent to data.
        context_dim: Number of context features that the caller gives; 0 for none.
        embedding_dim: Number of learned features that tell the layers which patch they transform,
            as context after the caller's; 0 for none.

    Raises:
        ShapeError: If the image does not divide into such patches.
        OptionError: If there are context features and no layer reads them, or if a layer needs
            some and there are none.
        UnsupportedLayerError: If a layer is no invertible flow.

    References:
        English, Kirchler, Lippert, MixerFlow, arXiv 2310.16777.

    Examples:
        >>> layer = ChannelMixing((1, 4, 6), 2, [nf.flows.LULinearPermute(4)])
        >>> x, log_det = layer(torch.randn(5, 1, 4, 6))
        >>> x.shape, log_det.shape
        (torch.Size([5, 1, 4, 6]), torch.Size([5]))
    """

    to_rows = "b s c -> (b s) c"
    to_table = "(b s) c -> b s c"
    row_axis = "s"

    @staticmethod
    def count_rows(num_patches: int, patch_dim: int) -> int:
        """Number of patches."""
        return num_patches


@final
class PatchMixing(Mixing):
    r"""The same flows of vectors for every place within a patch, across the patches.

    .. math:: T_{\cdot j} \leftarrow h(T_{\cdot j}), \quad j = 1, \dots, C, \qquad
              \log\det = \sum_j \log|\det h'(T_{\cdot j})|

    It commutes with every permutation of the places within a patch, the same in all patches.

    Args:
        image_shape: Channels, height and width.
        patch_size: Size of the square patches.
        layers: Flows of vectors of the :math:`S` patches, of this package or of normflows, from
            latent to data.
        context_dim: Number of context features that the caller gives; 0 for none.
        embedding_dim: Number of learned features that tell the layers which place they transform,
            as context after the caller's; 0 for none.

    Raises:
        ShapeError: If the image does not divide into such patches.
        OptionError: If there are context features and no layer reads them, or if a layer needs
            some and there are none.
        UnsupportedLayerError: If a layer is no invertible flow.

    References:
        English, Kirchler, Lippert, MixerFlow, arXiv 2310.16777.

    Examples:
        >>> layer = PatchMixing((1, 4, 6), 2, [nf.flows.LULinearPermute(6)])
        >>> x, log_det = layer(torch.randn(5, 1, 4, 6))
        >>> x.shape, log_det.shape
        (torch.Size([5, 1, 4, 6]), torch.Size([5]))
    """

    to_rows = "b s c -> (b c) s"
    to_table = "(b c) s -> b s c"
    row_axis = "c"

    @staticmethod
    def count_rows(num_patches: int, patch_dim: int) -> int:
        """Number of places within a patch."""
        return patch_dim
