r"""One map from an injection to the data, with one log-volume.

Behind an injection log-dets do not add: for :math:`G = a \circ g` the volume is
:math:`\tfrac12 \log\det(g'^\top a'^\top a' g')`, and a uniform scaling :math:`a(x) = c x` adds
:math:`d \log c` to it, not :math:`D \log c`. So everything from the first injection to the data is
differentiated as one map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, final

import normflows as nf
import torch
from torch import Tensor, nn

from ..context import (
    built_for_context,
    check_context,
    context_keyword,
    needs_context,
    takes_context,
    with_context,
)
from ..errors import NotInjectiveError, OptionError, ShapeError, UnsupportedLayerError
from ..volume.log_volume import DecodedVolume, decode_and_log_volume
from ..volume.modules import is_cold, refuse_single_sample, refuse_unsupported
from .injection import Injection
from .sphere import InChart
from .surface import SurfaceMap, check_surfaces, is_exact

__all__ = [
    "Flows",
    "InjectiveComposite",
    "check_composite",
    "check_invertible",
    "joint_decode",
    "joint_decode_and_log_volume",
    "joint_encode",
    "joint_encode_and_log_volume",
    "summed_forward",
    "summed_inverse",
]


Flows = Sequence[nf.flows.Flow] | nn.ModuleList


def joint_decode(flows: Flows, z: Tensor, context: Tensor | None = None) -> Tensor:
    """Send latents (B, *) through flows from the first to the last, without log-dets."""
    for flow in flows:
        if isinstance(flow, (Injection, SurfaceMap)):
            z = flow.decode(z, context=context)
        else:
            z, _ = _call(flow, "forward", z, context)
    return z


def joint_encode(flows: Flows, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Send data (B, *) through flows from the last to the first, without log-dets."""
    for flow in reversed(list(flows)):
        if isinstance(flow, (Injection, SurfaceMap)):
            x = flow.encode(x, context=context)
        else:
            x, _ = _call(flow, "inverse", x, context)
    return x


def joint_decode_and_log_volume(
    flows: Flows, z: Tensor, context: Tensor | None = None
) -> DecodedVolume:
    """Send latents through flows, with the joint log-volume (B,) of the whole map.

    It is a sum for charts of known surfaces, and else by the Jacobian of the whole map.
    """
    if is_exact(flows):
        return DecodedVolume(*summed_forward(flows, z, context))
    if len(flows) == 1 and isinstance(flows[0], Injection):
        return flows[0].decode_and_log_volume(z, context=context)
    return decode_and_log_volume(partial(joint_decode, flows), z, context=context)


def joint_encode_and_log_volume(
    flows: Flows, x: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Send data through flows to latents (B, *), with the joint log-volume (B,) there."""
    if is_exact(flows):
        z, log_det = summed_inverse(flows, x, context)
        return z, -log_det
    z = joint_encode(flows, x, context)
    return z, joint_decode_and_log_volume(flows, z, context).log_volume


def summed_forward(
    flows: Flows, z: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Send latents (B, *) through bijective flows, with the sum (B,) of their log-dets.

    The host's sums are float32 even in double models, and not every flow returns a (B,) tensor.
    """
    z, log_det = z.clone(), z.new_zeros(z.shape[0])
    for flow in flows:
        z, flow_log_det = _call(flow, "forward", z, context)
        log_det = log_det + _one_each(flow_log_det, log_det, flow)
    return z, log_det


def summed_inverse(
    flows: Flows, z: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Send latents (B, *) back through bijective flows, with the sum (B,) of their log-dets."""
    z, log_det = z.clone(), z.new_zeros(z.shape[0])
    for flow in reversed(list(flows)):
        z, flow_log_det = _call(flow, "inverse", z, context)
        log_det = log_det + _one_each(flow_log_det, log_det, flow)
    return z, log_det


def _call(flow: nf.flows.Flow, method: str, value: Tensor, context: Tensor | None) -> Any:
    """What a layer makes of a batch, with the log-det."""
    if type(flow) is nf.flows.ActNorm and _is_known_warm(flow):
        # Its own methods read its flag at every call, which waits for a GPU, and then do this.
        return getattr(nf.flows.AffineConstFlow, method)(flow, value)
    options = with_context(flow, context, method)
    # The call of the module itself, for the sake of its hooks.
    return flow(value, **options) if method == "forward" else flow.inverse(value, **options)


def _is_known_warm(flow: nf.flows.Flow) -> bool:
    hooked = flow._forward_hooks or flow._forward_pre_hooks
    return not (hooked or torch.compiler.is_compiling() or is_cold(flow))


def _one_each(flow_log_det: Any, log_det: Tensor, flow: nf.flows.Flow) -> Tensor:
    """A flow's log-det, which may be a number, as a tensor of shape () or (B,)."""
    # Not by as_tensor alone: a tracer would take a tensor that passes it for a constant.
    is_tensor = isinstance(flow_log_det, Tensor)
    value = (flow_log_det if is_tensor else torch.as_tensor(flow_log_det)).to(log_det)
    if value.dim() > 0 and value.shape != log_det.shape:
        raise ShapeError(
            f"{type(flow).__name__} must return a log_det of shape {tuple(log_det.shape)}, one "
            f"per sample, got {tuple(value.shape)}."
        )
    return value


@final
class InjectiveComposite(Injection):
    r"""Injections and bijective flows as one layer, with their joint log-volume.

    For containers of the host that sum per-layer log-dets (``nf.ClassCondFlow``,
    ``nf.ConditionalNormalizingFlow``, ``nf.NormalizingFlow``): put everything from the first
    injection to the data in here, as their last layer. In an
    :class:`~normflows_injective.InjectiveNormalizingFlow` it is not needed.

    Args:
        flows: Layers from latent to data; the first must be an :class:`Injection`.
        likelihood: A :class:`~normflows_injective.SurrogateLikelihood` without warm-up. With it,
            ``inverse`` returns as ``log_det``, in training mode and with gradients enabled,
            :math:`-(\text{volume} + \beta\,\text{reconstruction error})`, so that the container's
            own ``forward_kld`` is the training loss; everywhere else, and without it, ``log_det``
            is exact. Training a container without it has no reconstruction term and collapses.

    Raises:
        NotInjectiveError: If the first layer is no injection.
        UnsupportedLayerError: If a layer cannot stand behind an injection.
        OptionError: If the likelihood has a warm-up, whose weight the container cannot apply, or
            if the layers are of known surfaces and need none.

    References:
        Derived above.

    Examples:
        >>> from normflows_injective.flows import LinearInjection
        >>> scale = nf.flows.AffineConstFlow((3,))
        >>> _ = nn.init.constant_(scale.s, 0.5)
        >>> x = torch.zeros(1, 3)
        >>> injection = LinearInjection(2, 3)
        >>> _, volume = injection.inverse(x)
        >>> _, joint = InjectiveComposite([injection, scale]).inverse(x)
        >>> round((volume - joint).item(), 4)  # d log c = 2 * 0.5, where the host says 3 * 0.5
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
        self.is_exact = is_exact(self.flows)
        if self.is_exact and likelihood is not None:
            raise OptionError(
                "The log-volume of these layers is a closed form, so the container's own "
                "forward_kld is the negative log-likelihood. Leave likelihood out."
            )
        self.codomain = last.codomain if self.is_exact else None
        self.measure = last.measure if self.is_exact else "hausdorff"
        self.takes_context = any(takes_context(flow) for flow in self.flows)
        self.needs_context = any(needs_context(flow) for flow in self.flows)

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Encode through all layers; x of shape (B, *), result (B, *)."""
        self._check(x, context)
        # Some of the host's layers shift their input in place.
        return joint_encode(self.flows, x.clone(), context)

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
        with self.likelihood.training_loss(self):
            terms = self.likelihood(
                x, partial(self.encode, context=context), partial(self.decode, context=context)
            )
            self.likelihood.watch(self, x, terms)
            return terms.z, -self.likelihood.loss(terms, torch.zeros_like(terms.volume))

    def _check(self, batch: Tensor, context: Tensor | None) -> None:
        # A host container may hand on a context that no layer in here takes.
        check_context([self], context if self.takes_context else None, batch.shape[0])
        refuse_single_sample(self.modules(), batch)


def check_composite(flows: Flows) -> None:
    """Raise unless the layers can be one injective map.

    Args:
        flows: Layers from the first injection to the data.

    Raises:
        NotInjectiveError: If there are none, or the first is no injection.
        UnsupportedLayerError: If a layer has no inverse, is stochastic, couples the batch, hides
            an injection, drops its gradient, or acts on a surface that it is not given.
    """
    if not flows or not isinstance(flows[0], Injection):
        raise NotInjectiveError(
            "The first layer of an injective map must be an Injection, got "
            f"{type(flows[0]).__name__ if flows else 'no layer'}. Put nfi.flows.FreeFormInjection "
            "first; bijective flows alone belong into nf.NormalizingFlow."
        )
    check_surfaces(flows)
    measures = {getattr(flow, "measure", "hausdorff") for flow in flows}
    if measures != {"hausdorff"} and not is_exact(flows):
        raise UnsupportedLayerError(
            "These layers are differentiated as one map, which answers in the surface's own "
            f"measure, but one of them declares another: {', '.join(sorted(measures))}. Use "
            "measure='hausdorff', or a chart followed by maps between surfaces alone."
        )
    for flow in flows:
        check_invertible(flow)
        if not isinstance(flow, Injection):
            refuse_unsupported(flow.modules())


def check_invertible(flow: nn.Module) -> None:
    """Raise if a layer has no inverse or hides an injection in a container that sums log-dets.

    Args:
        flow: Layer of a model.

    Raises:
        UnsupportedLayerError: Naming the layer and what to use.

    Examples:
        >>> check_invertible(nf.flows.Radial((2,)))
        Traceback (most recent call last):
            ...
        normflows_injective.errors.UnsupportedLayerError: Radial has no inverse, so no data can \
be encoded through it. Use an invertible layer such as nf.flows.AffineCouplingBlock.
    """
    if not isinstance(flow, nf.flows.Flow):
        raise UnsupportedLayerError(
            f"{type(flow).__name__} is no flow: it lacks forward and inverse with log-dets. "
            "Layers derive from nf.flows.Flow; an encoder and a decoder go together into "
            "nfi.flows.FreeFormInjection(encoder, decoder)."
        )
    holds = any(isinstance(module, Injection) for module in flow.modules())
    if holds and not isinstance(flow, (Injection, InChart)):
        raise UnsupportedLayerError(
            f"{type(flow).__name__} holds an injection, and would reverse it or add its "
            "log-volume to other log-dets, which is wrong. List the layers in flows= directly, "
            "or use nfi.flows.InjectiveComposite."
        )
    if context_keyword(flow) is None and built_for_context(flow):
        raise UnsupportedLayerError(
            f"{type(flow).__name__} has no keyword context, but holds a layer that was built for "
            "one: it would answer as if there were none. List that layer in flows= directly."
        )
    for module in flow.modules():
        one_way_planar = isinstance(module, nf.flows.Planar) and module.act != "leaky_relu"
        inherits = isinstance(module, nf.flows.Flow) and (
            type(module).inverse is nf.flows.base.Flow.inverse
        )
        if one_way_planar or inherits:
            raise UnsupportedLayerError(
                f"{type(module).__name__} has no inverse, so no data can be encoded through it. "
                "Use an invertible layer such as nf.flows.AffineCouplingBlock."
            )
