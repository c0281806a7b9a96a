"""Models of normflows as laws of Pyro: their shapes, contexts, and memory of draws."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import normflows as nf
import pyro
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ...checks import check_count, checks_arguments
from ...checks.tensors import check_kind, check_type
from ...distributions.sample_cache import SampleCache, State, state_of
from ...errors import (
    ContextError,
    DtypeError,
    InjectiveFlowError,
    NonFiniteError,
    OptionError,
    ShapeError,
)
from ...flows.layer_stack import LayerStack
from ...host.bases import sample_base
from ...host.context import (
    check_context,
    context_rows,
    context_shape,
    takes_context,
)
from ...host.copies import on_trial
from ...host.first_data import awaits_first_data
from ...models.parts import model_dtype
from ...modules.random_numbers import OwnRandomNumbers
from ..memory.buffers import make_contiguous, watch_buffers
from ..supports.support import known_surface, refuse_off_support
from .law import PyroLaw, Shape

Law = TypeVar("Law", bound="ModelDistribution")


class _Anatomy(NamedTuple):
    """The parts of a model, found once for each."""

    stack: LayerStack
    event_shape: tuple[int, ...]
    latent_dim: int
    surface: constraints.Constraint | None
    # Parameters of the base through which its draws pass no gradient.
    unreached: list[nn.Parameter]
    # Marks of everything that the anatomy depends on.
    marks: tuple[Any, ...]


_KNOWN: WeakKeyDictionary[nn.Module, _Anatomy] = WeakKeyDictionary()


class ModelDistribution(PyroLaw, ABC):
    """A model as a law; a subclass draws and scores flat batches."""

    def __init__(
        self,
        model: Any,
        event_dim: int | None = 1,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(model, nf.NormalizingFlow | nf.ClassCondFlow):
            raise OptionError(
                "model must be nf.NormalizingFlow, nf.ConditionalNormalizingFlow, "
                f"nf.ClassCondFlow or nfi.InjectiveNormalizingFlow, got {type(model).__name__}. "
                "Layers alone go into FlowTransform; a multiscale model has no single density of "
                "a plain tensor to offer."
            )
        if event_dim is not None:
            event_dim = check_count(event_dim, "event_dim", least=0)
        if context is not None:
            check_type(context, "context")
            check_kind(context, "context")
            if context.dim() == 0:
                raise ContextError(
                    "context must have the shape (*batch_shape, C), or (*batch_shape) for class "
                    "labels, got a tensor without dimensions. Add one with context.reshape(1)."
                )
        self.model = model
        self.context = context
        parts: list[Any] = [self.model.q0, *self.model.flows]
        self._conditional = [part for part in parts if takes_context(part)]
        batch_shape = context_shape(context)
        check_context(
            self._conditional, context_rows(context, batch_shape), math.prod(batch_shape)
        )
        self.stack, shape, self.latent_dim, self._surface = _anatomy(self.model, context)[:4]
        self._model_shape = shape
        self._cache = SampleCache()
        watch_buffers(self.model)
        super().__init__(batch_shape, _event_shape(shape, event_dim), validate_args)

    @abstractmethod
    def draw(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Any]:
        """Draw values (n, *), with variables that help to score them."""

    @abstractmethod
    def score(self, x: Tensor, context: Tensor | None, drawn: Any) -> Tensor:
        """Log-density (B,) in nats of values (B, *); ``drawn`` is from :meth:`draw`, or None."""

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether gradients pass through draws to every parameter."""
        unreached = _anatomy(self.model, self.context).unreached
        return not any(parameter.requires_grad for parameter in unreached)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw values (*sample_shape, *batch_shape, *event_shape), with gradients."""
        shape = self._drawn_shape(sample_shape)
        if math.prod(shape) == 1:
            self._warm_up()
        x, drawn = self.draw(math.prod(shape), context_rows(self.context, shape))
        x = x.reshape(shape + self.event_shape)
        self._cache.store(x, drawn, self._state())
        return x

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw values (*sample_shape, *batch_shape, *event_shape), without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @checks_arguments
    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, of the batch shape of the value and the distribution together.

        Raises:
            ShapeError: If the values are no events of this shape, and would be broadcast.
        """
        batch = self._batch_of(value, self)
        dtype = model_dtype(self.model.q0, self.model.flows)
        if value.dtype != dtype:
            raise DtypeError(
                f"{self} computes in {dtype}, got values in {value.dtype}. Convert one of them: "
                f"value.to({dtype}), or model.to({value.dtype})."
            )
        drawn = self._cache.find(value, self._state, self._trains())
        if self._validate_args and drawn is None:
            self._validate_sample(value)
        shape = self._broadcast(batch)
        # Without a context the rows of a batch are alike, so that each value is scored once.
        scored = batch if self.context is None else shape
        if math.prod(scored) == 0:
            return value.new_zeros(shape)
        rows = value.expand(scored + self.event_shape)
        rows = rows.reshape(math.prod(scored), *self._model_shape)
        scores = self.score(rows, context_rows(self.context, scored), drawn)
        if self._validate_args and drawn is None:
            self._refuse_nan(scores)
        return scores.reshape(scored).expand(shape)

    def rsample_and_log_prob(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """Draw values and score them, without an inverse."""
        x = self.rsample(sample_shape)
        return x, self.log_prob(x)

    def expand(self: Law, batch_shape: Shape, _instance: Any = None) -> Law:
        """The same law over a larger batch."""
        expanded = super().expand(batch_shape)
        if self.context is not None:
            row = self.context.shape[len(context_shape(self.context)) :]
            expanded.context = self.context.expand(expanded.batch_shape + row)
        expanded._cache = SampleCache()
        return expanded

    def __repr__(self) -> str:
        batch, event = tuple(self.batch_shape), tuple(self.event_shape)
        return (
            f"{type(self).__name__}({type(self.model).__name__}, batch_shape={batch}, "
            f"event_shape={event}, measure={self.measure!r})"
        )

    @property
    def measure(self) -> str:
        """The measure of its density: ``"lebesgue"``, or a measure of a surface."""
        if not self.stack.raises_dimension:
            return "lebesgue"
        return getattr(self.stack.flows[-1], "measure", "hausdorff")

    def base_draws(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draws (n, *) of the base, with their log-density (n,) in nats."""
        dtype = model_dtype(self.model.q0, self.model.flows)
        return sample_base(self.model.q0, num_samples, context, dtype)

    def _warm_up(self) -> None:
        # One sample has no standard deviation for a layer that starts by it.
        if any(awaits_first_data(module) for module in self.stack.modules()):
            first = context_rows(self.context, self.batch_shape)
            rows = None if first is None else first[:1].expand(64, *first.shape[1:])
            with torch.no_grad():
                self.stack.push(self.base_draws(64, rows)[0], rows)

    def _validate_sample(self, value: Tensor) -> None:
        refuse_off_support(self, value)

    def _broadcast(self, shape: Size) -> Size:
        try:
            return torch.broadcast_shapes(shape, self.batch_shape)
        except RuntimeError as error:
            raise ShapeError(
                f"Values of batch shape {tuple(shape)} do not broadcast with the batch shape "
                f"{tuple(self.batch_shape)} of {self}. Give one value for each context."
            ) from error

    def _refuse_nan(self, scores: Tensor) -> None:
        bad = scores.isnan()
        if torch._C._get_tracing_state() is None and bool(bad.any()):
            raise NonFiniteError(
                f"{int(bad.sum())} of {bad.numel()} densities of {self} are NaN. Either its "
                "parameters have diverged: check them with torch.isfinite. Or these values lie "
                "where the layers cannot lead: then say so by FlowDistribution(..., support=...)."
            )

    def _state(self) -> State:
        return state_of([self.model], self.context)

    def _trains(self) -> bool:
        of_context = self.context is not None and self.context.requires_grad
        return of_context or any(p.requires_grad for p in self.model.parameters())


def _event_shape(shape: tuple[int, ...], event_dim: int | None) -> Size:
    if event_dim == 0 and shape == (1,):
        return Size()
    if event_dim is not None and len(shape) != event_dim:
        raise ShapeError(
            f"The model's events have shape {shape}, {len(shape)} dimensions, got "
            f"event_dim={event_dim}. Pass event_dim={len(shape)}"
            f"{', or 0 for scalars' if shape == (1,) else ''}."
        )
    return Size(shape)


def _anatomy(model: Any, context: Tensor | None) -> _Anatomy:
    # A Pyro model builds its distributions at every call, but not its modules.
    marks: list[Any] = [id(model.q0), *(id(flow) for flow in model.flows)]
    if context is not None:
        # A context of another width or kind is tried again.
        marks += [tuple(context.shape[len(context_shape(context)) :]), context.dtype]
    for parameter in model.q0.parameters():
        marks += (id(parameter), parameter.requires_grad)
    known = _KNOWN.get(model)
    if known is None or known.marks != tuple(marks):
        known = _KNOWN[model] = _dissect(model, context, tuple(marks))
    return known


def _dissect(model: Any, context: Tensor | None, marks: tuple[Any, ...]) -> _Anatomy:
    _mend_store(make_contiguous(model))
    stack = LayerStack(list(model.flows))
    rows = context_rows(context, context_shape(context))
    two = None if rows is None else torch.cat([rows[:1], rows[:1]])
    if two is None:
        check_context([model.q0, *model.flows], None, 0)
    parameters = [p for p in model.q0.parameters() if p.requires_grad]
    with (
        _named_context(context),
        OwnRandomNumbers(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        q0, trial = on_trial([model.q0, stack])
        z, _ = sample_base(q0, 2, two, model_dtype(model.q0, model.flows))
        gradients: Any = [None] * len(parameters)
        if parameters and z.requires_grad:
            gradients = torch.autograd.grad(z.sum(), parameters, allow_unused=True)
        x, _ = trial.push(z.detach(), two)
    unreached = [p for p, g in zip(parameters, gradients, strict=True) if g is None]
    surface = known_surface(stack)
    return _Anatomy(stack, tuple(x.shape[1:]), z[0].numel(), surface, unreached, marks)


@contextmanager
def _named_context(context: Tensor | None) -> Iterator[None]:
    """Blame a context, if there is one, for errors of shape in the trial of a model."""
    try:
        yield
    except InjectiveFlowError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        if context is None:
            raise
        raise ContextError(
            f"A context of shape {tuple(context.shape)} and {context.dtype} does not fit the "
            f"model, which fails on it: {error}. Its last dimension must hold the features that "
            "the model was built for, in the dtype of the model; class labels are integers."
        ) from error


def _mend_store(parameters: list[nn.Parameter]) -> None:
    """Replace the copies that Pyro's store made of parameters by the parameters."""
    store: Any = pyro.get_param_store()
    for parameter in parameters:
        for name, copied in list(store.items()):
            if copied.shape == parameter.shape and torch.equal(copied, parameter):
                store[name] = parameter
