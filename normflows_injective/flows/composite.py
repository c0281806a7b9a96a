"""Injections and the layers that follow them as one layer."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, final

import normflows as nf
import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..host.calls import Flows
from ..host.context import check_context, needs_context, takes_context
from ..host.first_data import refuse_single_sample
from ..volume.log_volumes import DecodedVolume
from .injection import Injection
from .stack import (
    Passes,
    joint_decode,
    joint_decode_and_log_volume,
    joint_encode,
    without_units,
)
from .stacking import check_composite
from .surfaces.surface import Surface, is_closed_form, surface_of


@final
class InjectiveComposite(Injection):
    r"""Injections and bijective flows as one layer, with their joint log-volume.

    Containers of normflows (``nf.ClassCondFlow``, ``nf.ConditionalNormalizingFlow``,
    ``nf.NormalizingFlow``) sum per-layer log-dets. Give them everything from the first injection
    to the data as one such layer, their last. An
    :class:`~normflows_injective.InjectiveNormalizingFlow` does not need it.

    Args:
        flows: Layers from latent to data; the first must be an :class:`Injection`.
        likelihood: A :class:`~normflows_injective.SurrogateLikelihood` without warm-up. In
            training mode with gradients enabled, ``inverse`` then returns
            :math:`-(\text{volume} + \beta\,\text{reconstruction error})` as ``log_det``, so that
            the container's own ``forward_kld`` is the training loss, in standardised coordinates
            if the last layer is a :class:`~normflows_injective.flows.Standardise`. Everywhere
            else, and without a likelihood, ``log_det`` is exact. A container trained without a
            likelihood has no reconstruction term and collapses.

    Raises:
        NotInjectiveError: If the first layer is no injection.
        UnsupportedLayerError: If a layer cannot follow an injection.
        OptionError: If the likelihood has a warm-up, whose weight the container cannot apply, or
            if the layers are of known surfaces, which need no likelihood.

    References:
        Derived in ``flows/stack.py``.

    Examples:
        >>> from normflows_injective.flows import LinearInjection
        >>> scale = nf.flows.AffineConstFlow((3,))
        >>> _ = nn.init.constant_(scale.s, 0.5)
        >>> x = torch.zeros(1, 3)
        >>> injection = LinearInjection(2, 3)
        >>> _, volume = injection.inverse(x)
        >>> _, joint = InjectiveComposite([injection, scale]).inverse(x)
        >>> round((volume - joint).item(), 4)  # d log c = 2 * 0.5, where normflows says 3 * 0.5
        1.0
    """

    may_differ = frozenset({"likelihood"})

    def __init__(
        self, flows: Iterable[nf.flows.Flow], likelihood: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.flows = nn.ModuleList(flows)
        check_composite(self.flows)
        if getattr(likelihood, "warmup_steps", None) is not None:
            raise OptionError(
                "InjectiveComposite cannot ramp the likelihood, because the container adds the "
                "latent density itself. Use warmup_steps=None, or InjectiveNormalizingFlow."
            )
        self.likelihood: Any = likelihood
        first: Any = self.flows[0]
        self.latent_shape = first.latent_shape
        last: Any = self.flows[-1]
        self.is_closed_form = is_closed_form(self.flows)
        if self.is_closed_form and likelihood is not None:
            raise OptionError(
                "The log-volume of these layers is a closed form, so the container's own "
                "forward_kld is the negative log-likelihood. Leave likelihood out."
            )
        self.codomain = last.codomain if self.is_closed_form else None
        self.measure = last.measure if self.is_closed_form else "hausdorff"
        self.takes_context = any(takes_context(flow) for flow in self.flows)
        self.needs_context = any(needs_context(flow) for flow in self.flows)

    def surface(self, before: Surface | None = None) -> Surface:
        """The surface that the last layer leads to, or an image where none is known."""
        return surface_of(self.flows)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Encode through all layers; x of shape (B, *), result (B, *)."""
        self._check(x, context)
        return _encode_copy(self.flows, x, context)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Decode through all layers; z of shape (B, *), result (B, *)."""
        self._check(z, context)
        return joint_decode(self.flows, z, context)

    def decode_and_log_volume(self, z: Tensor, context: Tensor | None = None) -> DecodedVolume:
        r"""Decode through all layers, with the joint log-volume (B,) in nats."""
        self._check(z, context)
        return joint_decode_and_log_volume(self.flows, z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Encode, with minus the joint log-volume or, in training, minus the training term.

        Args:
            x: Data of shape :math:`(B, *)`.
            context: Optional context of shape :math:`(B, *)`.

        Returns:
            Latents of shape :math:`(B, *)` and ``log_det`` of shape :math:`(B,)` in nats.
        """
        if self.likelihood is None or not (self.training and torch.is_grad_enabled()):
            return super().inverse(x, context)
        self._check(x, context)
        inner, units = without_units(self.flows)
        x = joint_encode(units, x, context)
        passes = Passes(
            partial(_encode_copy, inner, context=context),
            partial(joint_decode, inner, context=context),
            partial(joint_decode_and_log_volume, inner, context=context),
        )
        with self.likelihood.training_loss(self):
            terms = self.likelihood.terms(x, passes)
            self.likelihood.watch(self, x, terms)
            return terms.z, -self.likelihood.loss(terms, torch.zeros_like(terms.volume))

    def _check(self, batch: Tensor, context: Tensor | None) -> None:
        # A container of normflows may hand on a context that no layer in here takes.
        check_context([self], context if self.takes_context else None, batch.shape[0])
        refuse_single_sample(self.modules(), batch)


def _encode_copy(flows: Flows, x: Tensor, context: Tensor | None = None) -> Tensor:
    # Some layers of normflows shift their input in place.
    return joint_encode(flows, x.clone(), context)
