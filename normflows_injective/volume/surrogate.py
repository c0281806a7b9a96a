"""What an estimator of the log-volume's gradient is, and the parts they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import NotInjectiveError, ShapeError
from .modules import modules_of, refuse_unsupported, warm_up
from .products import Map, jvp

__all__ = [
    "Estimator",
    "Surrogate",
    "decode_checked",
    "decode_with_tangents",
    "inner",
    "mean_inner",
    "push_tangents",
]

DrawProbes = Callable[[Tensor], Tensor]


class Surrogate(NamedTuple):
    """Latents (B, *), reconstruction (B, *), and the surrogate per sample (B,)."""

    z: Tensor
    reconstruction: Tensor
    volume: Tensor


class Estimator(ABC):
    """How the gradient of the log-volume is estimated from an encoder and a decoder."""

    def __call__(self, x: Tensor, encode: Map, decode: Map, draw_probes: DrawProbes) -> Surrogate:
        r"""Encode, decode and form the surrogate.

        Works under ``torch.no_grad()`` and ``torch.inference_mode()``, where it gives the value.
        ``x`` is neither mutated nor marked as requiring gradients.

        Args:
            x: Data of shape :math:`(B, *)`.
            encode: :math:`f`, taking :math:`(B, *)` data to :math:`(B, *)` latents.
            decode: :math:`g`, the other way.
            draw_probes: Gives probes :math:`(K, B, *)` for a latent batch :math:`(B, *)`.

        Returns:
            :class:`Surrogate` ``(z, reconstruction, volume)``.

        Raises:
            ShapeError: If the decoder does not return the shape of the data.
            NotInjectiveError: If the latents are wider than the data.
            UnsupportedLayerError: If a layer makes the products silently wrong.
        """
        refuse_unsupported(modules_of(encode, decode))
        recorded = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if x.is_inference():
                x = x.clone()
            # A view of the caller's storage that may require gradients without marking theirs.
            point = x if x.requires_grad else x.detach().requires_grad_()
            # A copy goes in, because some of the host's layers shift their input in place.
            z = encode(point.clone())
            _check_latent(z, x)
            warm_up(decode, z)
            surrogate = self._surrogate(point, z, encode, decode, draw_probes(z))
        if recorded:
            return surrogate
        return Surrogate(*(term.detach() for term in surrogate))

    @abstractmethod
    def _surrogate(
        self, x: Tensor, z: Tensor, encode: Map, decode: Map, probes: Tensor
    ) -> Surrogate:
        """The estimator's formula; ``z`` is on a graph that reaches ``x``."""


def decode_with_tangents(
    decode: Map, z: Tensor, probes: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Decode z, checked, with the detached products g'(z) v_k (K, B, *) of the same pass."""
    reconstruction, pushed = jvp(decode, z, probes)
    _check_reconstruction(reconstruction, x)
    return reconstruction, pushed.detach()


def decode_checked(decode: Map, z: Tensor, x: Tensor) -> Tensor:
    """Decode z (B, *), and raise unless the result has the shape of x and hangs on the graph."""
    reconstruction = decode(z)
    _check_reconstruction(reconstruction, x)
    return reconstruction


def push_tangents(decode: Map, z: Tensor, tangents: Tensor) -> Tensor:
    """Decoder products g'(z) v_k, shape (K, B, *), without a graph."""
    with torch.no_grad():
        return jvp(decode, z, tangents)[1].detach()


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (K, B) of tensors (K, B, *)."""
    return (a * b).flatten(2).sum(2)


def mean_inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products averaged over the probes, (B,), of tensors (K, B, *)."""
    return inner(a, b).mean(0)


def _check_latent(z: Tensor, x: Tensor) -> None:
    if len(z) != len(x):
        raise ShapeError(
            f"The encoder took a batch of {len(x)} samples to {len(z)}: it must keep the batch."
        )
    if z[0].numel() > x[0].numel():
        raise NotInjectiveError(
            f"The latent space has {z[0].numel()} dimensions and the data {x[0].numel()}: a map "
            "from latents to data cannot be injective. Use fewer latent dimensions."
        )


def _check_reconstruction(reconstruction: Tensor, x: Tensor) -> None:
    if not reconstruction.requires_grad:
        raise NotInjectiveError(
            "The reconstruction is not connected to the latents: the decoder runs under no_grad() "
            "or detaches its result, and could not learn. Remove that from the network."
        )
    if reconstruction.shape != x.shape:
        raise ShapeError(
            f"The decoder must return the shape of the data {tuple(x.shape)}, got "
            f"{tuple(reconstruction.shape)}."
        )
