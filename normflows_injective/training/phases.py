r"""The phases of a training, each with the module of its loss and a held-out score.

A free-form injective flow takes three. *Reconstruction* trains encoder and decoder alone, to the
held-out floor :math:`r` of the squared error. *Latent density* trains the layers before the
injection on the codes, which are computed once. *Joint* trains everything with the training term,
under the weight of the reconstruction that maximum likelihood gives a Gaussian tube of the
manifold's residual variance :math:`\sigma^2 = r / (D - d)`,

.. math:: -\log q(\hat x) + \frac{\lVert x - \hat x \rVert^2}{2 \sigma^2}
          + \frac{D - d}{2} \log 2 \pi \sigma^2, \qquad
          \beta_{ML} = \frac{1}{2 \sigma^2} = \frac{D - d}{2 r},

three times over, so that the manifold is held while the density improves. With :math:`\sigma` at
its optimum the tube's score is :math:`\tfrac{D - d}{2} \log r - \log q` up to a constant, which
judges the joint phase. All other models take one phase with their own loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..flows.layer import LayerWithLoss
from ..flows.stack import Stack, joint_encode
from ..host.bases import base_log_prob
from ..host.first_meeting import give_first_data
from ..models.assignment import AssignmentFlow
from ..models.injective import InjectiveNormalizingFlow
from ..models.loss_module import ForwardKLD
from ..models.parts import stack_of
from ..models.surrogate_likelihood import SurrogateLikelihood
from ..modules.precision import as_factored
from ..modules.random_numbers import OwnRandomNumbers
from .codes import scale_codes
from .losses import MeanLoss, errors_of, nll_of
from .rows import Rows

# Of beta_ML, so that the manifold is held while the density improves.
_TIGHTNESS = 3.0
# How much worse than its floor the reconstruction may become in the joint phase.
_TOLERANCE = 1.03
_CHUNK = 1024
# Rows by which the floor of the reconstruction is measured.
_HELD_OUT = 2048


class Score(NamedTuple):
    """Held-out numbers of a phase.

    Attributes:
        value: The number to minimise.
        reconstruction: Mean squared reconstruction error, NaN if it was not measured.
        nll: Mean negative log-density in nats, NaN if it was not measured.
        rows: Numbers (N,) of the held-out rows whose mean differs between two states of a model
            as the value does, to first order; empty where rows have none.
    """

    value: float
    reconstruction: float = math.nan
    nll: float = math.nan
    rows: Tensor = torch.zeros(0)


class Phase(ABC):
    """A part of a training.

    Attributes:
        share: Part of the time that the phase gets.
        cost: Time of a step in units of a reconstruction step, for budgets in steps.
        rate: Peak learning rate.
        num_checks: Number of looks at the held-out score.
        patience: Part of its budget without a better score after which the rate is halved.
        num_rows: Number of held-out rows for each look, where the time allows so many.
        num_rows_at_ends: Number of them at its ends, where it is decided what is kept.
        num_epochs: Passes through the rows after which the held-out score is taken in any case, so
            that weights of few rows are not over-fitted before the first look.
        margin: Standard errors by which rows must be better at the end than at the beginning.
    """

    name: ClassVar[str]
    share: ClassVar[float] = 1.0
    cost: ClassVar[float] = 1.0
    rate: ClassVar[float] = 1e-3
    num_checks: ClassVar[int] = 25
    patience: ClassVar[float] = 0.15
    num_rows: ClassVar[int] = _HELD_OUT
    num_rows_at_ends: ClassVar[int] = _HELD_OUT
    num_epochs: ClassVar[float] = math.inf
    margin: ClassVar[float] = -math.inf
    module: Any

    def __init__(self, model: Any, rows: Rows, held_out: Rows) -> None:
        self.model, self.rows, self.held_out = model, rows, held_out
        self.floor, self.floor_rows = math.inf, torch.zeros(0)
        self.wrapped: nn.Module | None = None

    @property
    def stack(self) -> Stack:
        """The layers of an injective flow without its units, split at the first injection."""
        return stack_of(self.model).inner

    def take_beta(self, held_out: Rows) -> None:
        """Give the training term the beta of the floor, if there is one and it is a number."""
        if math.isfinite(self.floor) and not callable(self.model.likelihood.beta):
            self.model.likelihood.beta = beta_of(self.stack, held_out, self.floor)

    @abstractmethod
    def begin(self) -> None:
        """Prepare the model, and build the module of the loss, whose parameters are trained."""

    def loss(self, rows: Rows) -> Tensor:
        """Training loss of a batch, 0-dimensional, by the wrapped module if there is one."""
        module = self.module if self.wrapped is None else self.wrapped
        loss: Tensor = module(*rows.arguments)
        return loss

    @abstractmethod
    def score(self, max_rows: int) -> Score:
        """Held-out score over at most so many rows."""

    def end(self) -> None:  # noqa: B027
        """Leave the model as the next phase expects it."""


class Density(Phase):
    """Training by a model's own loss, for every model but free-form injective flows."""

    name = "density"

    def begin(self) -> None:
        """An assignment flow is the module of its loss."""
        is_module = isinstance(self.model, AssignmentFlow)
        self.module = self.model if is_module else ForwardKLD(self.model)

    def score(self, max_rows: int) -> Score:
        """The model's loss in evaluation mode, with the same random numbers every time."""
        rows, total = self.held_out.take(slice(max_rows)), 0.0
        with OwnRandomNumbers():
            for part in rows.split(_CHUNK):
                total += float(self.module(*part.arguments)) * part.mass
        return Score(total / rows.mass)


class Reconstruction(Phase):
    """Encoder and decoder as an autoencoder."""

    name = "reconstruction"
    share = 0.5
    rate = 8e-3
    num_epochs = 5.0
    # Networks may start as principal components, which few rows do not improve.
    margin = 1.5

    def begin(self) -> None:
        """Let layers after the injection take their first data."""
        self.rows, self.held_out = (
            standardised(self.model, rows) for rows in (self.rows, self.held_out)
        )
        composite, first = self.stack.composite, self.rows.take(slice(_CHUNK))
        give_first_data(partial(joint_encode, composite, context=first.context), first.x)
        self.module = MeanLoss(partial(errors_of, composite), composite)

    def score(self, max_rows: int) -> Score:
        """Mean squared error of held-out rows."""
        rows = self.held_out.take(slice(max_rows))
        errors = _per_row(self.module.function, rows)
        error = float(errors.mean())
        return Score(error, error, rows=errors)

    def end(self) -> None:
        """Bring the codes to unit scale."""
        scale_codes(self.stack, self.rows.take(slice(10 * _CHUNK)))


class LatentDensity(Phase):
    """The layers before the injection and the base, on codes that are computed once."""

    name = "latent density"
    share = 0.35
    cost = 3.0
    rate = 6e-3

    def begin(self) -> None:
        """Compute the codes, and let the layers take them as their first data."""
        self.take_beta(standardised(self.model, self.held_out))
        self.rows, self.held_out = self._codes(self.rows), self._codes(self.held_out)
        if _has_own_loss(self.model):
            # Its noise and times are drawn, and many of them make the mean steady.
            count = self.held_out.count
            self.held_out = self.held_out.take(torch.arange(max(_HELD_OUT, count)) % count)
        layers, first = self.stack.latent_block, self.rows.take(slice(_CHUNK))
        give_first_data(partial(joint_encode, layers, context=first.context), first.x)
        self.module = MeanLoss(partial(nll_of, self.model.q0, layers), [self.model.q0, *layers])

    def score(self, max_rows: int) -> Score:
        """Mean negative log-density of held-out codes, or the loss of a layer with its own."""
        rows = self.held_out.take(slice(max_rows))
        with OwnRandomNumbers():
            losses = _per_row(self.module.function, rows)
        mean = float(losses.mean())
        return Score(mean, nll=math.nan if _has_own_loss(self.model) else mean, rows=losses)

    @torch.no_grad()
    def _codes(self, rows: Rows) -> Rows:
        rows = standardised(self.model, rows)
        codes = [self.stack.encode(part.x, part.context) for part in rows.split(_CHUNK)]
        return replace(rows, x=torch.cat(codes))


class Joint(Phase):
    """Everything by the training term, from a converged manifold and density."""

    name = "joint"
    share = 0.15
    cost = 5.5
    rate = 1e-3
    # Weights that leave a converged state are worse before they are better.
    patience = 1.0
    num_checks = 8
    num_rows = 512
    num_rows_at_ends = 1024
    margin = 2.0

    def begin(self) -> None:
        """Take beta from the floor, and count the steps of a warm-up as done."""
        self.held_out = standardised(self.model, self.held_out)
        self.take_beta(self.held_out)
        self.module, likelihood = ForwardKLD(self.model), self.model.likelihood
        if likelihood.warmup_steps is not None:
            likelihood.step.fill_(likelihood.warmup_steps[1] + 1)

    def score(self, max_rows: int) -> Score:
        """The tube's score of held-out rows, infinite where the reconstruction is given up."""
        rows = self.held_out.take(slice(max_rows))
        errors = _per_row(partial(errors_of, self.stack.composite), rows)
        nlls = _per_row(self._nll, rows)
        error, nll = max(float(errors.mean()), 1e-300), float(nlls.mean())
        half = codimension(self.stack, rows) / 2
        # The floor of the same rows, where it is known of so many.
        known = self.floor_rows[:max_rows]
        floor = float(known.mean()) if len(known) == len(errors) else self.floor
        is_lost = error > _TOLERANCE * floor
        tube = nll + half * math.log(error)
        return Score(math.inf if is_lost else tube, error, nll, nlls + half / error * errors)

    def _nll(self, x: Tensor, context: Tensor | None) -> Tensor:
        z, _, log_volume = self.stack.project_with_log_volume(x, context)
        return log_volume - base_log_prob(self.model.q0, z, context)


def phases_of(model: Any, rows: Rows, held_out: Rows) -> list[Phase]:
    """The phases of a model."""
    if isinstance(model, AssignmentFlow) and rows.weights is not None:
        raise OptionError("The loss of AssignmentFlow takes no weights. Leave weights out.")
    data = (model, rows, held_out)
    is_injective = isinstance(model, InjectiveNormalizingFlow)
    if not (is_injective and isinstance(model.likelihood, SurrogateLikelihood)):
        return [Density(*data)]
    if _has_own_loss(model):
        # The joint phase is judged by exact densities, which such layers have at a high price.
        return [Reconstruction(*data), LatentDensity(*data)]
    latent = nn.ModuleList([model.q0, *model.latent_block])
    has_density = any(p.requires_grad for p in latent.parameters())
    return [Reconstruction(*data), *[LatentDensity(*data)] * has_density, Joint(*data)]


def _has_own_loss(model: Any) -> bool:
    return any(isinstance(layer, LayerWithLoss) for layer in model.latent_block)


def beta_of(stack: Stack, rows: Rows, floor: float) -> float:
    r"""Weight :math:`3 (D - d) / 2r` of the reconstruction, from its floor :math:`r`."""
    # A manifold that holds the data exactly would make the weight infinite.
    variance = float(rows.x.flatten(1).var(0, correction=0).sum())
    least = 1e-6 * variance if variance > 0 else 1.0
    return _TIGHTNESS * codimension(stack, rows) / (2 * max(floor, least))


@torch.no_grad()
def codimension(stack: Stack, rows: Rows) -> int:
    r"""Number of dimensions :math:`D - d` that the manifold lacks."""
    first = rows.take(slice(2))
    z = stack.encode(first.x, first.context)
    return first.x[0].numel() - z[0].numel()


def standardised(model: Any, rows: Rows) -> Rows:
    """Rows in the coordinates in which an injective flow is trained, before its units."""
    stack = stack_of(model)
    return replace(rows, x=torch.cat([stack.standardise(p.x) for p in rows.split(_CHUNK)]))


@torch.no_grad()
def _per_row(function: Callable[[Tensor, Tensor | None], Tensor], rows: Rows) -> Tensor:
    """Numbers (N,) of rows, times their weights, which have a mean of one over all held out."""
    values = torch.cat([function(part.x, part.context) for part in rows.split(_CHUNK)])
    values = as_factored(values)
    return values if rows.weights is None else values * rows.weights
