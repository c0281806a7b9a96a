"""The free-form injection: any encoder with any decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, nn

from ..checks import check_event_shape, check_module, check_shape
from ..host.context import context_arguments, needs_context, takes_context
from .injection import Injection
from .shapes import check_raises_dimension

Pair = tuple[nn.Module, nn.Module]
_PAIR = (
    "Give two networks, FreeFormInjection(encoder, decoder), or a pair of them as the builders of "
    "nfi.nets return it."
)
_SWAPPED = " Are the two networks swapped? FreeFormInjection takes (encoder, decoder)."


@final
class FreeFormInjection(Injection):
    r"""Injection made of an unconstrained encoder and an unconstrained decoder.

    .. math:: x = g_\phi(z), \qquad z = f_\theta(x), \qquad f_\theta \circ g_\phi \approx
              \mathrm{id} \text{ by training}

    Use smooth activations (SiLU, GELU, softplus, tanh): the surrogate learns curvature through
    second derivatives, which vanish for ReLU. Use group or layer normalisation, not batch
    normalisation.

    Args:
        encoder: Module taking data :math:`(B, *)` to latents :math:`(B, *)`. With a context it is
            called ``encoder(x, context=context)`` if it has that keyword. A pair of encoder and
            decoder, as the builders of ``nfi.nets`` return it, may be given for both.
        decoder: Module taking latents to data, likewise.
        latent_shape: Event shape of the latents; by default the decoder's ``input_shape``, if it
            has one (networks of ``nfi.nets`` do).
        data_shape: Event shape of the data; by default the encoder's ``input_shape``.

    Raises:
        OptionError: If encoder or decoder is no network.
        NotInjectiveError: If the latents are known to be at least as wide as the data.

    References:
        Sorrenson et al., Lifting architectural constraints of injective flows, arXiv 2306.01843.

    Examples:
        >>> import torch
        >>> injection = FreeFormInjection(nn.Linear(3, 2), nn.Linear(2, 3))
        >>> x, log_volume = injection(torch.zeros(4, 2))
        >>> x.shape, log_volume.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """

    def __init__(
        self,
        encoder: nn.Module | Pair,
        decoder: nn.Module | None = None,
        latent_shape: Sequence[int] | None = None,
        data_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        first: Any = encoder
        second: Any = decoder
        if isinstance(encoder, tuple | list) and len(encoder) == 2 and decoder is None:
            first, second = encoder
        self.encoder = check_module(first, "encoder", _PAIR)
        self.decoder = check_module(second, "decoder", _PAIR)
        self.latent_shape = _event_shape(latent_shape, self.decoder, "latent_shape")
        self.data_shape = _event_shape(data_shape, self.encoder, "data_shape")
        if self.latent_shape is not None and self.data_shape is not None:
            check_raises_dimension(
                self.latent_shape, self.data_shape, "FreeFormInjection", _SWAPPED
            )
        self.takes_context = takes_context(self.encoder) or takes_context(self.decoder)
        self.needs_context = needs_context(self.encoder) or needs_context(self.decoder)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Apply the encoder.

        Args:
            x: Data of shape :math:`(B, *)`.
            context: Optional context of shape :math:`(B, *)`.

        Returns:
            Latents of shape :math:`(B, *)`.

        Raises:
            ShapeError: If the data or the encoder's result have another shape than declared.
        """
        z: Tensor = self.encoder(x, **context_arguments(self.encoder, context))
        check_event_shape(z, self.latent_shape, "the encoder's output")
        return z

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Apply the decoder.

        Args:
            z: Latents of shape :math:`(B, *)`.
            context: Optional context of shape :math:`(B, *)`.

        Returns:
            Data of shape :math:`(B, *)`.

        Raises:
            ShapeError: If the latents or the decoder's result have another shape than declared.
        """
        x: Tensor = self.decoder(z, **context_arguments(self.decoder, context))
        check_event_shape(x, self.data_shape, "the decoder's output")
        return x


def _event_shape(shape: Any, net: nn.Module, name: str) -> Sequence[int] | None:
    """A shape, or where it is None that of the input which a network declares, or None."""
    if shape is not None:
        return check_shape(shape, name)
    return getattr(net, "input_shape", None)
