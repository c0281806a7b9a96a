"""Estimators of the gradient of a log-volume, and the parts that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..autodiff.products import jvp, out_of_inference
from ..autodiff.recording import Map, Recorded, inner, point_at, record
from ..autodiff.settings import as_written, differentiable_attention
from ..autodiff.transforms import in_forward_mode, refuse_tangents
from ..checks import checks_arguments, checks_arguments_of
from ..errors import NotInjectiveError, ShapeError
from ..host.first_data import awaits_first_data
from ..host.first_meeting import give_first_data
from ..host.refusals import refuse_unsupported
from ..modules.contents import modules_of
from .reconstruction import squared_error

DrawProbes = Callable[[Tensor], Tensor]


class Surrogate(NamedTuple):
    """Latents (B, *), reconstruction (B, *), and the surrogate per sample (B,)."""

    z: Tensor
    reconstruction: Tensor
    volume: Tensor


class SurrogateAndErrors(NamedTuple):
    """A surrogate with the squared errors (B,) of reconstruction and, or None, latent cycle."""

    surrogate: Surrogate
    reconstruction_error: Tensor
    latent_cycle_error: Tensor | None


class Estimator(ABC):
    """A rule that estimates the gradient of the log-volume from an encoder and a decoder."""

    @as_written
    @checks_arguments
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
            ForwardModeError: If a caller takes a forward-mode derivative.
        """
        modules = modules_of(encode, decode)
        refuse_unsupported(modules)
        _refuse_forward_mode(x, encode, decode)
        recording = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad(), differentiable_attention():
            x = out_of_inference(x)
            encoded = self._encode(encode, x)
            _check_latent(encoded.value, x)
            if any(map(awaits_first_data, modules)):
                give_first_data(decode, encoded.value)
            surrogate = self._surrogate(encoded, encode, decode, draw_probes(encoded.value))
        surrogate = Surrogate(lifted(surrogate.z, x), *surrogate[1:])
        return surrogate if recording else Surrogate(*(term.detach() for term in surrogate))

    def __init_subclass__(cls) -> None:
        """Attach the check of arguments to the methods of a subclass."""
        super().__init_subclass__()
        checks_arguments_of(cls)

    def _encode(self, encode: Map, x: Tensor) -> Recorded:
        """Encode so that the estimator can take its products."""
        return record(encode, point_at(x))

    @abstractmethod
    def _surrogate(self, encoded: Recorded, encode: Map, decode: Map, probes: Tensor) -> Surrogate:
        """The estimator's formula, from the recorded pass of the encoder at the data."""


def decode_and_jvp(decode: Map, z: Tensor, probes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Decode z, checked, with the detached products g'(z) v_k (K, B, *) of the same pass."""
    reconstruction, products = jvp(decode, z, probes)
    return checked(reconstruction, x), products


def with_errors(
    surrogate: Surrogate, x: Tensor, encode: Map, decode: Map, prior: Tensor | None
) -> SurrogateAndErrors:
    """Add the errors of the reconstruction of x and, if there is a prior, of its cycle."""
    return SurrogateAndErrors(
        surrogate,
        squared_error(x, surrogate.reconstruction),
        None if prior is None else squared_error(prior, encode(decode(prior.clone()))),
    )


def mean_inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner products averaged over the probes, (B,), of tensors (K, B, *)."""
    return mean_over_probes(inner(a, b))


def mean_over_probes(values: Tensor) -> Tensor:
    """Means (B,) of values (K, B)."""
    return values.mean(0) if values.shape[0] > 1 else values.squeeze(0)


def lifted(z: Tensor, x: Tensor) -> Tensor:
    """Latents in the precision of the data, at least."""
    # Under autocast a network ends in half precision, too coarse for a log-density.
    return z.to(torch.promote_types(z.dtype, x.dtype))


def _refuse_forward_mode(x: Tensor, encode: Map, decode: Map) -> None:
    """Raise if a caller differentiates x, or tensors of the networks, in forward mode."""
    if in_forward_mode():
        subject = "The surrogate, which has stop-gradients,"
        refuse_tangents(subject, x)
        z = encode(x.clone())
        refuse_tangents(subject, z, decode(z.clone()))


def _check_latent(z: Tensor, x: Tensor) -> None:
    if len(z) != len(x):
        raise ShapeError(
            f"The encoder took a batch of {len(x)} samples to {len(z)}: it must keep the batch."
        )
    latent, data = z.shape[1:].numel(), x.shape[1:].numel()
    if latent > data:
        raise NotInjectiveError(
            f"The latent space has {latent} dimensions and the data {data}: a map from latents to "
            "data cannot be injective. Use fewer latent dimensions."
        )


def checked(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Return a reconstruction, or raise unless it has the shape of x and hangs on the graph."""
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
    return reconstruction
