"""The contract of a layer that raises the dimension."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks.renamed import RenamedAttribute
from ..errors import StackingWarning, UnsupportedLayerError
from ..host.keywords import context_keyword
from ..volume.log_volumes import DecodedVolume, decode_and_log_volume
from .layer import Layer


class Injection(Layer, ABC):
    r"""A map :math:`g: \mathbb R^d \to \mathbb R^D`, :math:`d < D`, with an encoder :math:`f`.

    ``forward`` goes from latent to data and returns the log-volume :math:`\tfrac12 \log\det
    g'^\top g'` as ``log_det``; ``inverse`` encodes and returns minus the log-volume at the encoded
    point. A model of normflows with an injection as its *last* layer therefore scores the
    projection of its data exactly.

    A subclass gives :meth:`encode` and :meth:`decode`. Where the log-volume has a closed form it
    also replaces :meth:`decode_and_log_volume`, which by default differentiates :meth:`decode`.
    ``latent_shape`` and ``data_shape`` are event shapes, or None where they are not known. Models
    check their stack at construction where they are known. ``takes_context`` and ``needs_context``
    tell whether a context can, and whether it must, be given.

    References:
        Formulas and signs: arXiv 2306.01843 and the convention of normflows for ``log_det``.

    Examples:
        >>> class Parabola(Injection):
        ...     def encode(self, x, context=None):
        ...         return x[:, :1]
        ...     def decode(self, z, context=None):
        ...         return torch.cat([z, z**2], dim=1)
        >>> Parabola()(torch.ones(1, 1))  # the log-volume is log sqrt(1 + 4 z^2)
        (tensor([[1., 1.]]), tensor([0.8047]))
    """

    latent_shape: Sequence[int] | None = None
    data_shape: Sequence[int] | None = None
    takes_context: bool = False
    needs_context: bool = False
    # Whether the log-volume is a closed form to which those of maps between surfaces add.
    is_closed_form: bool = False
    is_exact = RenamedAttribute("is_closed_form")
    _has_warned: bool = False

    def __init_subclass__(cls) -> None:
        """Check a subclass at definition, before it fails far away in a model."""
        super().__init_subclass__()
        for method in (cls.encode, cls.decode):
            if context_keyword(method) != "context":
                raise UnsupportedLayerError(
                    f"{cls.__name__}.{method.__name__} must accept a keyword context=None, "
                    "also if it does not use it."
                )

    @abstractmethod
    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map data (B, *) to latents (B, *)."""

    @abstractmethod
    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Map latents (B, *) to data (B, *)."""

    def decode_and_log_volume(self, z: Tensor, context: Tensor | None = None) -> DecodedVolume:
        """Map latents (B, *) to data (B, *) and give the log-volume (B,) there, in nats."""
        return decode_and_log_volume(self.decode, z, context=context)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Decode, with the log-volume.

        Args:
            z: Latents of shape :math:`(B, *)`.
            context: Optional context of shape :math:`(B, *)`.

        Returns:
            Data of shape :math:`(B, *)` and the log-volume of shape :math:`(B,)` in nats.
        """
        x, log_volume = self.decode_and_log_volume(z, context=context)
        return x, log_volume

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Encode, with minus the log-volume at the encoded point.

        Args:
            x: Data of shape :math:`(B, *)`.
            context: Optional context of shape :math:`(B, *)`.

        Returns:
            Latents of shape :math:`(B, *)` and minus the log-volume, shape :math:`(B,)` in nats.

        Warns:
            StackingWarning: If the data come from a trainable layer. A container that sums
                per-layer log-dets is wrong after an injection. It also comes once for every layer
                in training mode with gradients, because a container has no reconstruction term.
        """
        if torch.is_grad_enabled() and x.grad_fn is None:
            self._warn_without_reconstruction()
        elif torch.is_grad_enabled():
            warnings.warn(
                f"{type(self).__name__}.inverse expects data of the caller, got data that depend "
                "on trainable parameters. A flow seems to follow this injection in a plain "
                "normflows model, where the sum of per-layer log-dets is wrong. Use "
                "nfi.InjectiveNormalizingFlow, or wrap the injection and all that follows it in "
                "nfi.flows.InjectiveComposite.",
                StackingWarning,
                stacklevel=2,
            )
        z = self.encode(x, context=context)
        _, log_volume = self.decode_and_log_volume(z, context=context)
        return z, -log_volume

    def _warn_without_reconstruction(self) -> None:
        """Warn once if a trained manifold is scored as only containers of normflows do."""
        is_trained = self.training and any(p.requires_grad for p in self.parameters())
        if not is_trained or self.is_closed_form or self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            f"{type(self).__name__}.inverse is for evaluation, but was called in training mode "
            "and with gradients, as a container of normflows calls it in forward_kld and "
            "log_prob. Such a training loss has no reconstruction term, so it falls for ever "
            "while the manifold collapses. Use "
            "nfi.InjectiveNormalizingFlow, or nfi.flows.InjectiveComposite([injection], "
            "nfi.SurrogateLikelihood()) as the container's last layer. For evaluation call "
            "model.eval() or use torch.no_grad().",
            StackingWarning,
            stacklevel=3,
        )
