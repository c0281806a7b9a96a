r"""The phases of a training, each with the parameters, the loss and the held-out score of its own.

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

from ..flows.stack import Stack, joint_decode, joint_encode
from ..host.bases import base_log_prob
from ..host.calls import summed_inverse
from ..host.first_meeting import give_first_data
from ..models.assignment import AssignmentFlow
from ..models.injective import InjectiveNormalizingFlow
from ..models.loss_module import ForwardKLD
from ..models.loss_terms import mean_loss
from ..models.parts import stack_of
from ..models.surrogate_likelihood import SurrogateLikelihood
from ..modules.random_numbers import OwnRandomNumbers
from ..volume.reconstruction import squared_error
from .codes import scale_codes
from .rows import Rows

# Of beta_ML, so that the manifold is held while the density improves.
_TIGHTNESS = 3.0
# How much worse than its floor the reconstruction may become in the joint phase.
_TOLERANCE = 1.03
_CHUNK = 1024


class Score(NamedTuple):
    """Held-out numbers of a phase: the one to minimise, reconstruction error, and NLL in nats."""

    value: float
    reconstruction: float = math.nan
    nll: float = math.nan


class Phase(ABC):
    """A part of a training.

    Attributes:
        share: Part of the time that the phase gets.
        cost: Time of a step in units of a reconstruction step, for budgets in steps.
        rate: Peak learning rate.
        num_checks: Number of looks at the held-out score.
        patience: Part of its budget without a better score after which the rate is halved.
        max_held_out: Number of held-out rows for each look.
        max_at_ends: Number of them at the ends of the phase, where it is decided what is kept.
    """

    name: ClassVar[str]
    share: ClassVar[float] = 1.0
    cost: ClassVar[float] = 1.0
    rate: ClassVar[float] = 1e-3
    num_checks: ClassVar[int] = 25
    patience: ClassVar[float] = 0.15
    max_held_out: ClassVar[int] = 2048
    max_at_ends: ClassVar[int] = 2048

    def __init__(self, model: Any, rows: Rows, held_out: Rows) -> None:
        self.model, self.rows, self.held_out = model, rows, held_out

    def begin(self, floor: float | None) -> None:  # noqa: B027
        """Prepare the model, given the reconstruction floor of an earlier phase."""

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @abstractmethod
    def loss(self, rows: Rows) -> Tensor:
        """Training loss of a batch, 0-dimensional."""

    @abstractmethod
    def score(self, max_rows: int) -> Score:
        """Held-out score over at most so many rows."""

    def end(self) -> None:  # noqa: B027
        """Leave the model as the next phase expects it."""


class Density(Phase):
    """Training by a model's own loss, for every model but free-form injective flows."""

    name = "density"

    def __init__(self, model: Any, rows: Rows, held_out: Rows, module: nn.Module) -> None:
        super().__init__(model, rows, held_out)
        self.module = module

    def loss(self, rows: Rows) -> Tensor:
        """The model's loss of a batch."""
        return _loss_by(self.module, rows)

    def score(self, max_rows: int) -> Score:
        """The model's loss in evaluation mode, with the same random numbers every time."""
        rows = self.held_out.take(slice(max_rows))
        with OwnRandomNumbers():
            total = sum(float(self.loss(part)) * part.count for part in rows.split(_CHUNK))
        return Score(total / rows.count)


class _OfInjection(Phase):
    """A phase of a free-form injective flow, in the coordinates before its units."""

    @property
    def stack(self) -> Stack:
        """The layers without units, split at the first injection."""
        return stack_of(self.model).inner

    def errors(self, rows: Rows) -> Tensor:
        """Squared reconstruction errors (B,), as the training term measures them."""
        z = joint_encode(self.stack.composite, rows.x, rows.context)
        return squared_error(rows.x, joint_decode(self.stack.composite, z, rows.context))

    def standardised(self, rows: Rows) -> Rows:
        """Rows of data in the coordinates of the stack."""
        stack = stack_of(self.model)
        parts = [stack.standardise(part.x) for part in rows.split(_CHUNK)]
        return replace(rows, x=torch.cat(parts))


class Reconstruction(_OfInjection):
    """Encoder and decoder as an autoencoder."""

    name = "reconstruction"
    share = 0.5
    rate = 8e-3

    def begin(self, floor: float | None) -> None:
        """Let layers after the injection take their first data."""
        self.rows, self.held_out = map(self.standardised, (self.rows, self.held_out))
        first = self.rows.take(slice(_CHUNK))
        encode = partial(joint_encode, self.stack.composite, context=first.context)
        give_first_data(encode, first.x)

    def parameters(self) -> list[nn.Parameter]:
        """Parameters from the injection on."""
        return _parameters(self.stack.composite)

    def loss(self, rows: Rows) -> Tensor:
        """Mean squared error of a batch."""
        return mean_loss(self.errors(rows), rows.weights)

    def score(self, max_rows: int) -> Score:
        """Mean squared error of held-out rows."""
        error = _mean(self.errors, self.held_out.take(slice(max_rows)))
        return Score(error, error)

    def end(self) -> None:
        """Bring the codes to unit scale."""
        scale_codes(self.stack, self.rows.take(slice(10 * _CHUNK)))


class LatentDensity(_OfInjection):
    """The layers before the injection and the base, on codes that are computed once."""

    name = "latent density"
    share = 0.35
    cost = 1.5
    rate = 6e-3

    def begin(self, floor: float | None) -> None:
        """Compute the codes, and let the layers take them as their first data."""
        self.rows, self.held_out = self._codes(self.rows), self._codes(self.held_out)
        first = self.rows.take(slice(_CHUNK))
        latent_block = self.stack.latent_block
        give_first_data(partial(joint_encode, latent_block, context=first.context), first.x)

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the base and the layers before the injection."""
        return _parameters([self.model.q0, *self.stack.latent_block])

    def loss(self, rows: Rows) -> Tensor:
        """Mean negative log-density of codes, in nats."""
        return mean_loss(self._nll(rows), rows.weights)

    def score(self, max_rows: int) -> Score:
        """Mean negative log-density of held-out codes."""
        nll = _mean(self._nll, self.held_out.take(slice(max_rows)))
        return Score(nll, nll=nll)

    def _nll(self, codes: Rows) -> Tensor:
        z, log_det = summed_inverse(self.stack.latent_block, codes.x, codes.context)
        return -base_log_prob(self.model.q0, z, codes.context) - log_det

    @torch.no_grad()
    def _codes(self, rows: Rows) -> Rows:
        parts = [self.stack.encode(p.x, p.context) for p in self.standardised(rows).split(_CHUNK)]
        return replace(rows, x=torch.cat(parts))


class Joint(_OfInjection):
    """Everything by the training term, from a converged manifold and density."""

    name = "joint"
    share = 0.15
    cost = 4.0
    rate = 1e-3
    # Weights that leave a converged state are worse before they are better.
    patience = 1.0
    num_checks = 8
    max_held_out = 512
    max_at_ends = 1024

    def __init__(self, model: Any, rows: Rows, held_out: Rows, module: nn.Module) -> None:
        super().__init__(model, rows, held_out)
        self.module, self.floor = module, math.inf

    def begin(self, floor: float | None) -> None:
        """Take beta from the floor, and count the steps of a warm-up as done."""
        self.held_out = self.standardised(self.held_out)
        self.floor = math.inf if floor is None else floor
        likelihood = self.model.likelihood
        if floor is not None and not callable(likelihood.beta):
            likelihood.beta = beta_of(self.stack, self.held_out, floor)
        if likelihood.warmup_steps is not None:
            likelihood.step.fill_(likelihood.warmup_steps[1] + 1)

    def loss(self, rows: Rows) -> Tensor:
        """The training loss of the model."""
        return _loss_by(self.module, rows)

    def score(self, max_rows: int) -> Score:
        """The tube's score of held-out rows, infinite where the reconstruction is given up."""
        rows = self.held_out.take(slice(max_rows))
        error, nll = _mean(self.errors, rows), _mean(self._nll, rows)
        lost = (
            _mean(self.errors, self.held_out.take(slice(Phase.max_held_out)))
            > _TOLERANCE * self.floor
        )
        tube = nll + codimension(self.stack, rows) / 2 * math.log(max(error, 1e-300))
        return Score(math.inf if lost else tube, error, nll)

    def _nll(self, rows: Rows) -> Tensor:
        z, _, log_volume = self.stack.project_with_log_volume(rows.x, rows.context)
        return log_volume - base_log_prob(self.model.q0, z, rows.context)


def phases_of(
    model: Any, rows: Rows, held_out: Rows, wrap: Callable[[nn.Module], nn.Module] | None
) -> list[Phase]:
    """The phases of a model, the module of whose loss may be wrapped."""
    data = (model, rows, held_out)
    module: nn.Module = model if isinstance(model, AssignmentFlow) else ForwardKLD(model)
    module = module if wrap is None else wrap(module)
    is_injective = isinstance(model, InjectiveNormalizingFlow)
    if not (is_injective and isinstance(model.likelihood, SurrogateLikelihood)):
        return [Density(*data, module)]
    phases: list[Phase] = [Reconstruction(*data)]
    if _parameters([model.q0, *model.latent_block]):
        phases.append(LatentDensity(*data))
    return [*phases, Joint(*data, module)]


def beta_of(stack: Stack, rows: Rows, floor: float) -> float:
    r"""Weight :math:`3 (D - d) / 2r` of the reconstruction, from its floor :math:`r`."""
    # A manifold that holds the data exactly would make the weight infinite.
    variance = float(rows.x.flatten(1).var(0).sum())
    least = 1e-6 * variance if variance > 0 else 1.0
    return _TIGHTNESS * codimension(stack, rows) / (2 * max(floor, least))


def codimension(stack: Stack, rows: Rows) -> int:
    r"""Number of dimensions :math:`D - d` that the manifold lacks."""
    with torch.no_grad():
        first = rows.take(slice(2))
        z = stack.encode(first.x, first.context)
    return first.x[0].numel() - z[0].numel()


def _loss_by(module: nn.Module, rows: Rows) -> Tensor:
    """Training loss of a batch by a module, which may take no weights."""
    weights = {} if rows.weights is None else {"weights": rows.weights}
    loss: Tensor = module(rows.x, rows.context, **weights)
    return loss


def _mean(function: Any, rows: Rows) -> float:
    with torch.no_grad():
        total = sum(float(function(part).double().sum()) for part in rows.split(_CHUNK))
    return total / rows.count


def _parameters(modules: Any) -> list[nn.Parameter]:
    return [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]
