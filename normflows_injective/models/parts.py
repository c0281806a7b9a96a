"""The check of a whole stack at construction: a trial pass of two samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

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
from ..flows.injection import Injection
from ..flows.joint import joint_decode, joint_encode
from ..flows.shapes import check_raises_dimension
from ..flows.stacking import check_composite, check_invertible, check_surfaces
from ..host.bases import base_log_prob, sample_base
from ..host.calls import Flows
from ..host.context import needs_context
from ..host.copies import on_trial
from ..modules.behind import Behind, look_behind, modules_of
from ..modules.random_numbers import OwnRandomNumbers
from .exact_likelihood import ExactLikelihood
from .surrogate_likelihood import SurrogateLikelihood

__all__ = [
    "Likelihood",
    "Parts",
    "StackShapes",
    "check_parts",
    "dtype_of",
    "first_pass",
    "look_into",
    "model_dtype",
    "trial_pass",
]

Likelihood = SurrogateLikelihood | ExactLikelihood
LEARNED_BETA = 100.0


class StackShapes(NamedTuple):
    """Event shapes of a stack: of the base, at the first injection, and of the data."""

    base: tuple[int, ...]
    latent: tuple[int, ...]
    data: tuple[int, ...]


def model_dtype(q0: nn.Module, flows: nn.Module) -> torch.dtype:
    """Dtype in which a stack computes: that of most numbers in its flows, or else in its base.

    A majority, because some of the host's layers keep a float64 scalar in a float32 model; the
    flows first, because some of the host's bases are float64 altogether.

    Examples:
        >>> import normflows as nf
        >>> model_dtype(nf.distributions.DiagGaussian(2), nn.Linear(2, 2).double())
        torch.float64
    """
    return dtype_of(modules_of(flows), modules_of(q0))


def dtype_of(flows: Sequence[nn.Module], base: Sequence[nn.Module]) -> torch.dtype:
    """As :func:`model_dtype`, of all modules in the flows and in the base.

    Examples:
        >>> dtype_of([nn.Linear(2, 2).double()], [])
        torch.float64
    """
    # By the modules: parameters() puts together names that nobody reads, at every call.
    for modules in (flows, base):
        for held in (
            [module._parameters for module in modules if module._parameters],
            [module._buffers for module in modules if module._buffers],
        ):
            count: dict[torch.dtype, int] = {}
            for tensors in held:
                for tensor in tensors.values():
                    if tensor is not None and tensor.is_floating_point():
                        count[tensor.dtype] = count.get(tensor.dtype, 0) + tensor.numel()
            if count:
                return max(count, key=lambda dtype: count[dtype])
    return torch.get_default_dtype()


class InjectiveModel(Protocol):
    """The parts of an injective flow, and its two answers, that its losses are made of."""

    q0: Any
    p: Any
    flows: Any
    likelihood: Any

    @property
    def latent_block(self) -> list[nf.flows.Flow]:
        """The layers before the first injection."""

    @property
    def composite(self) -> list[nf.flows.Flow]:
        """Those from it on."""

    def sample(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Draws (n, *) and their log-densities (n,) in nats."""

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Log-densities (B,) in nats of the projections of data (B, *)."""


class Parts(NamedTuple):
    """The modules of a model at one call, each found once.

    Attributes:
        latent_block: The layers before the first injection.
        composite: Those from it on.
        behind: The modules in the composite.
        flows: Those in all layers.
        base: Those in the base and in no layer.
        every: All of the model, itself included.
    """

    latent_block: list[nf.flows.Flow]
    composite: list[nf.flows.Flow]
    behind: Behind
    flows: list[nn.Module]
    base: list[nn.Module]
    every: list[nn.Module]


def look_into(model: Any) -> Parts:
    """Look once at all modules of a model, an injective flow."""
    seen: set[int] = set()
    latent_block, composite = model.latent_block, model.composite
    behind = look_behind(composite, seen)
    flows = behind.modules + look_behind(latent_block, seen).modules
    base = look_behind([model.q0], seen).modules
    every = flows + base + look_behind([model], seen).modules
    return Parts(latent_block, composite, behind, flows, base, every)


def check_parts(q0: object, flows: object, likelihood: object) -> tuple[int, Likelihood]:
    """Check the parts of a model one by one, before they are put together.

    Args:
        q0: Base distribution.
        flows: Layers from latent to data.
        likelihood: Training term, or None for that of the layers.

    Returns:
        The number of layers before the first injection, and the training term.

    Raises:
        OptionError: If a part is of the wrong kind.
        UnsupportedLayerError: If a layer is no invertible flow, or cannot stand where it does.
        NotInjectiveError: If no layer raises the dimension.
    """
    if not (isinstance(q0, nn.Module) and hasattr(q0, "log_prob")):
        raise OptionError(
            f"q0 must be a base distribution of normflows, got {type(q0).__name__}. Use "
            "nf.distributions.DiagGaussian or another class with forward and log_prob."
        )
    if not isinstance(flows, list | tuple | nn.ModuleList):
        raise OptionError(f"flows must be a list of layers, got {type(flows).__name__}.")
    if not isinstance(likelihood, Likelihood | None):
        raise OptionError(
            "likelihood must be a SurrogateLikelihood or an ExactLikelihood, got "
            f"{type(likelihood).__name__}. A target density goes by keyword, p=."
        )
    for flow in flows:
        check_invertible(flow)
        if getattr(flow, "likelihood", None) is not None:
            raise OptionError(
                "An InjectiveComposite with a likelihood of its own is for the host's containers. "
                "Give the likelihood to InjectiveNormalizingFlow instead."
            )
    injections = [i for i, flow in enumerate(flows) if isinstance(flow, Injection)]
    if not injections:
        raise NotInjectiveError(
            "flows contains no injection, so this model has no manifold. Add "
            "nfi.flows.FreeFormInjection, or use nf.NormalizingFlow."
        )
    check_surfaces(flows)
    composite = list(flows)[injections[0] :]
    check_composite(composite)
    return injections[0], _fitting_likelihood(likelihood, composite)


def _fitting_likelihood(
    likelihood: Likelihood | None, composite: Sequence[nf.flows.Flow]
) -> Likelihood:
    inverts = getattr(composite[0], "is_exact", False)
    if likelihood is None:
        moves = any(
            parameter.requires_grad
            for flow in composite
            if not getattr(flow, "keeps_surface", False)
            for parameter in flow.parameters()
        )
        # A surface that is learned needs something that keeps it at the data.
        return ExactLikelihood(LEARNED_BETA * moves) if inverts else SurrogateLikelihood()
    if inverts and isinstance(likelihood, SurrogateLikelihood):
        raise OptionError(
            "The inverse of a chart is no pseudo-inverse, so the surrogate's gradient would be "
            "biased. Leave likelihood out, or use nfi.ExactLikelihood."
        )
    if not inverts and isinstance(likelihood, ExactLikelihood):
        raise OptionError(
            "ExactLikelihood is for a chart of a known surface and what stands behind it. A "
            "manifold that is learned with encoder and decoder collapses under it: use "
            "nfi.SurrogateLikelihood."
        )
    return likelihood


def trial_pass(
    q0: nn.Module, flows: Flows, num_latent: int, context: Tensor | None = None
) -> StackShapes | None:
    """Send two base samples to the data and back, and read off the shapes.

    Copies are sent through, so that nothing of the modules is changed, and no random numbers of
    the caller are drawn.

    Args:
        q0: Base distribution.
        flows: Layers from latent to data.
        num_latent: Number of layers before the first injection.
        context: Context with two rows, if there is one.

    Returns:
        The shapes, or None where a pass is not possible: a part needs a context and there is none,
        or it needs gradients, the parameters are on the meta device, or the layers still differ in
        dtype.

    Raises:
        ShapeError: If a layer cannot take what the one before it returns.
        NotInjectiveError: If the latents are at least as wide as the data.
        UnsupportedLayerError: If a layer lacks a direction.
    """
    parts = [q0, *flows]
    tensors = [t for part in parts for t in [*part.parameters(), *part.buffers()]]
    # Scalars do not count: the host's residual flow keeps two in float64.
    dtypes = {p.dtype for flow in flows for p in flow.parameters() if p.dim() > 0}
    if (
        (context is None and any(needs_context(part) for part in parts))
        or any(isinstance(flow, nf.flows.HamiltonianMonteCarlo) for flow in flows)
        or any(t.is_meta for t in tensors)
        or len(dtypes) > 1
    ):
        return None
    dtype = model_dtype(q0, nn.ModuleList(flows))
    q0, *flows = on_trial(parts)
    with torch.no_grad(), OwnRandomNumbers():
        base, _ = sample_base(q0, 2, context, dtype)
        latent = _through(flows, range(num_latent), base.clone(), context, forward=True)
        behind = range(num_latent, len(flows))
        data = _through(flows, behind, latent.clone(), context, forward=True)
        shapes = StackShapes(*(tuple(t.shape[1:]) for t in (base, latent, data)))
        check_raises_dimension(shapes.latent, shapes.data, "The stack from injection to data")
        back = _through(flows, reversed(range(len(flows))), data.clone(), context, forward=False)
    if back.shape != base.shape:
        raise ShapeError(
            f"The layers send the base's shape {shapes.base} to data of shape {shapes.data}, but "
            f"these back to {tuple(back.shape[1:])}. Encoder and decoder must have opposite "
            "shapes."
        )
    return shapes


def _swapped(flow: nf.flows.Flow, value: Tensor) -> str:
    """A question, where the encoder takes what the decoder refuses."""
    if not isinstance(flow, FreeFormInjection):
        return ""
    with suppress(Exception):
        if flow.encoder(value)[0].numel() > value[0].numel():
            return " Are the two networks swapped? FreeFormInjection takes (encoder, decoder)."
    return ""


def _through(
    flows: Flows,
    order: Iterator[int] | range,
    value: Tensor,
    context: Tensor | None,
    forward: bool,
) -> Tensor:
    step = joint_decode if forward else joint_encode
    for index in order:
        where = f"flows[{index}] ({type(flows[index]).__name__})"
        direction = "generative" if forward else "encoding"
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else "a list"
        given = f"{where}, given event shape {shape} in the {direction} direction, failed:"
        advice = "Check the shape of the base and of the layers around it."
        try:
            value = step([flows[index]], value, context)
        except (ShapeError, NotInjectiveError) as error:
            swapped = _swapped(flows[index], value)
            raise type(error)(f"{given} {error} {advice}{swapped}") from error
        except InjectiveFlowError:
            raise
        except NotImplementedError as error:
            raise UnsupportedLayerError(
                f"{where} lacks the {direction} direction: {error} Use a layer with both forward "
                "and inverse."
            ) from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            swapped = _swapped(flows[index], value)
            raise ShapeError(f"{given} {error} {advice}{swapped}") from error
    return value


def first_pass(batch: Tensor, space: str, context: Tensor | None, model: Any) -> Tensor:
    """What a batch leads to in a model, which must be finite before its layers take it over.

    For data it is the reconstruction error and the density of the latents.

    Args:
        batch: Data, base variables or latents (B, *).
        space: ``"data"``, ``"base"`` or ``"latent"``.
        context: Context with B rows, or None.
        model: An injective flow.
    """
    if space != "data":
        return joint_decode(
            model.flows if space == "base" else model.composite, batch.clone(), context
        )
    z = joint_encode(model.flows, batch.clone(), context)
    log_prob = base_log_prob(model.q0, z, context)
    error = batch - joint_decode(model.flows, z.clone(), context)
    return error.flatten(1).square().sum(1) - log_prob
