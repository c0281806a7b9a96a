"""The checks of a model at its construction: its parts one by one, then a trial pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import normflows as nf
import torch
from torch import Tensor, nn

from ..errors import (
    InjectiveFlowError,
    NotInjectiveError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)
from ..flows.free_form import FreeFormInjection
from ..flows.shapes import check_raises_dimension
from ..flows.stack import joint_decode, joint_encode, split
from ..flows.stacking import check_composite, check_invertible, check_surfaces
from ..flows.surfaces.surface import is_closed_form
from ..host.bases import sample_base
from ..host.calls import Flows
from ..host.context import needs_context
from ..host.copies import on_trial
from ..modules.random_numbers import OwnRandomNumbers
from .exact_likelihood import ExactLikelihood
from .parts import model_dtype
from .surrogate_likelihood import SurrogateLikelihood
from .training_term import TrainingTerm

LEARNED_BETA = 100.0


class StackShapes(NamedTuple):
    """Event shapes of a stack: of the base, at the first injection, and of the data."""

    base: tuple[int, ...]
    latent: tuple[int, ...]
    data: tuple[int, ...]


def check_parts(q0: object, flows: object, likelihood: object) -> tuple[int, TrainingTerm]:
    """Check the parts, and return the number of layers before the injection and the term."""
    if not (isinstance(q0, nn.Module) and hasattr(q0, "log_prob")):
        raise OptionError(
            f"q0 must be a base distribution of normflows, got {type(q0).__name__}. Use "
            "nf.distributions.DiagGaussian or another class with forward and log_prob."
        )
    if not isinstance(flows, list | tuple | nn.ModuleList):
        raise OptionError(f"flows must be a list of layers, got {type(flows).__name__}.")
    if not isinstance(likelihood, TrainingTerm | None):
        raise OptionError(
            "likelihood must be a SurrogateLikelihood or an ExactLikelihood, got "
            f"{type(likelihood).__name__}. A target density goes by keyword, p=."
        )
    for flow in flows:
        check_invertible(flow)
        if getattr(flow, "likelihood", None) is not None:
            raise OptionError(
                "An InjectiveComposite with a likelihood of its own is for the containers of "
                "normflows. Give the likelihood to InjectiveNormalizingFlow instead."
            )
    stack = split(flows)
    if not stack.composite:
        raise NotInjectiveError(
            "flows contains no injection, so this model has no manifold. Add "
            "nfi.flows.FreeFormInjection, or use nf.NormalizingFlow."
        )
    check_surfaces(flows)
    check_composite(stack.composite)
    if likelihood is None:
        return len(stack.latent_block), _default_term(stack.composite)
    likelihood.check_stack(_starts_with_chart(stack.composite))
    return len(stack.latent_block), likelihood


def _starts_with_chart(composite: Sequence[nf.flows.Flow]) -> bool:
    return getattr(composite[0], "is_closed_form", False)


def _default_term(composite: Sequence[nf.flows.Flow]) -> TrainingTerm:
    if not _starts_with_chart(composite):
        return SurrogateLikelihood()
    is_learned = any(
        parameter.requires_grad
        for flow in composite
        if not getattr(flow, "keeps_surface", False)
        for parameter in flow.parameters()
    )
    # A surface that is learned needs something that keeps it at the data.
    return ExactLikelihood(LEARNED_BETA) if is_learned else ExactLikelihood()


def trial_pass(
    q0: nn.Module, flows: Flows, num_latent: int, context: Tensor | None = None
) -> StackShapes | None:
    """Shapes found by sending two base samples to the data and back, or None where that fails.

    Copies are sent through, so that nothing of the modules is changed, and no random numbers of
    the caller are drawn.
    """
    if not _can_be_tried([q0, *flows], context):
        return None
    dtype = model_dtype(q0, nn.ModuleList(flows))
    q0, *layers = on_trial([q0, *flows])
    with torch.no_grad(), OwnRandomNumbers():
        base, _ = sample_base(q0, 2, context, dtype)
        latent = _through(layers, range(num_latent), base, context, forward=True)
        after = range(num_latent, len(layers))
        data = _through(layers, after, latent, context, forward=True)
        shapes = StackShapes(*(tuple(t.shape[1:]) for t in (base, latent, data)))
        # Known surfaces include circles by their angle and plain columns, of equal dimensions.
        if not is_closed_form(layers[num_latent:]):
            check_raises_dimension(shapes.latent, shapes.data, "The stack from injection to data")
        back = _through(layers, reversed(range(len(layers))), data, context, forward=False)
    if back.shape != base.shape:
        raise ShapeError(
            f"The layers send the base's shape {shapes.base} to data of shape {shapes.data}, but "
            f"these back to {tuple(back.shape[1:])}. Encoder and decoder must have opposite "
            "shapes."
        )
    return shapes


def _can_be_tried(parts: Sequence[nn.Module], context: Tensor | None) -> bool:
    tensors = [t for part in parts for t in [*part.parameters(), *part.buffers()]]
    # Scalars do not count: the residual flow of normflows keeps two in float64.
    dtypes = {p.dtype for flow in parts[1:] for p in flow.parameters() if p.dim() > 0}
    lacks_context = context is None and any(needs_context(part) for part in parts)
    # It differentiates its target, also where gradients are switched off.
    takes_gradients = any(isinstance(part, nf.flows.HamiltonianMonteCarlo) for part in parts)
    return not (
        lacks_context or takes_gradients or any(t.is_meta for t in tensors) or len(dtypes) > 1
    )


def _through(
    flows: Sequence[nf.flows.Flow],
    order: Iterable[int],
    batch: Tensor,
    context: Tensor | None,
    forward: bool,
) -> Tensor:
    step = joint_decode if forward else joint_encode
    # Some layers of normflows shift their input in place.
    batch = batch.clone()
    for index in order:
        flow = flows[index]
        where = f"flows[{index}] ({type(flow).__name__})"
        direction = "generative" if forward else "encoding"
        shape = tuple(batch.shape[1:]) if isinstance(batch, Tensor) else "a list"
        failure = f"{where}, given event shape {shape} in the {direction} direction, failed:"
        advice = "Check the shape of the base and of the layers around it."
        try:
            batch = step([flow], batch, context)
        except (ShapeError, NotInjectiveError) as error:
            raise type(error)(f"{failure} {error} {advice}{_swapped(flow, batch)}") from error
        except InjectiveFlowError:
            raise
        except NotImplementedError as error:
            raise UnsupportedLayerError(
                f"{where} lacks the {direction} direction: {error} Use a layer with both forward "
                "and inverse."
            ) from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ShapeError(f"{failure} {error} {advice}{_swapped(flow, batch)}") from error
    return batch


def _swapped(flow: nf.flows.Flow, batch: Tensor) -> str:
    """A question, where the encoder takes a batch that the decoder refuses."""
    if not isinstance(flow, FreeFormInjection):
        return ""
    with suppress(Exception):
        if flow.encoder(batch)[0].numel() > batch[0].numel():
            return " Are the two networks swapped? FreeFormInjection takes (encoder, decoder)."
    return ""
