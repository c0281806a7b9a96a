"""The rules of stacking: which layers may stand where."""

from __future__ import annotations

from collections.abc import Sequence

import normflows as nf
from torch import nn

from ..errors import NotInjectiveError, UnsupportedLayerError
from ..host.calls import Flows
from ..host.context import built_for_context
from ..host.keywords import context_keyword
from ..host.refusals import refuse_one_way, refuse_unsupported
from .injection import Injection
from .on_coordinates import OnCoordinates
from .surfaces.sphere import InChart
from .surfaces.surface import SurfaceMap, is_closed_form

# A codomain with the domains that it may serve as: the orthant is a part of the sphere.
_PARTS = {"sphere": ("sphere",), "orthant": ("orthant", "sphere"), "surface": ("surface",)}
_ORTHANT = " with kind='orthant'"


def check_composite(flows: Flows) -> None:
    """Raise unless layers from the first injection to the data can be one injective map."""
    if not flows or not isinstance(flows[0], Injection):
        raise NotInjectiveError(
            "The first layer of an injective map must be an Injection, got "
            f"{type(flows[0]).__name__ if flows else 'no layer'}. Put nfi.flows.FreeFormInjection "
            "first; bijective flows alone belong into nf.NormalizingFlow."
        )
    check_surfaces(flows)
    measures = {getattr(flow, "measure", "hausdorff") for flow in flows}
    if measures != {"hausdorff"} and not is_closed_form(flows):
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
    """Raise if a layer has no inverse, or hides an injection in a container that sums log-dets."""
    if not isinstance(flow, nf.flows.Flow):
        raise UnsupportedLayerError(
            f"{type(flow).__name__} is no flow: it lacks forward and inverse with log-dets. "
            "Layers derive from nf.flows.Flow; an encoder and a decoder go together into "
            "nfi.flows.FreeFormInjection(encoder, decoder)."
        )
    if isinstance(flow, OnCoordinates):
        check_invertible(flow.layer)
        return
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
    refuse_one_way(flow)


def check_surfaces(flows: Sequence[nf.flows.Flow] | nn.ModuleList) -> None:
    """Raise unless every map between surfaces is given points of its domain, in their measure."""
    codomain, measure, previous = "space", "hausdorff", "the base"
    for flow in flows:
        name = type(flow).__name__
        if measure != "hausdorff":
            raise UnsupportedLayerError(
                f"{name} stands behind {previous} with measure={measure!r}, but log-volumes "
                "compose in the surface's own measure only. Use measure='hausdorff' there, or "
                f"make {previous} the last layer."
            )
        if isinstance(flow, SurfaceMap) and flow.domain not in _PARTS.get(codomain, ()):
            raise UnsupportedLayerError(
                f"{name} acts on the {flow.domain} of unit vectors, but {previous} leads to the "
                f"{codomain}. Put nfi.flows.SphereChart"
                f"{_ORTHANT if flow.domain == 'orthant' else ''} before it."
            )
        codomain = getattr(flow, "codomain", None) or "space"
        measure = getattr(flow, "measure", "hausdorff")
        previous = name
