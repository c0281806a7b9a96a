"""All methods of the benchmark of assignment flows, by name, with networks of one size."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Protocol

import torch
from torch import Tensor, nn

from normflows_injective import AssignmentFlow
from normflows_injective.flows.assignment import FiniteHorizon, InfiniteHorizon, Simplices
from normflows_injective.flows.integration import integrate
from normflows_injective.nets.fields import DenseField, LeaveOneOutField

from .targets import Target

__all__ = ["COMBINATIONS", "DEFAULT", "METHODS", "Model", "draw", "effective_parameters", "late"]

HIDDEN, STEPS, SOLVER, ROWS = (128, 128, 128), 75, "midpoint", 2000
# With nine binary variables the masks let through as many weights as the dense network has.
WIDTHS, HEAD = (14, 13), 14
DEFAULT = "infinite, classifier, posterior"
COMBINATIONS = tuple(
    product(
        ("infinite", "finite"),
        ("classifier", "velocity"),
        ("posterior", "scaled_logits", "weights"),
    )
)


class Model(Protocol):
    """A model that is trained by a loss of labels, and sampled."""

    def flow_matching_loss(self, labels: Tensor) -> Tensor:
        """Loss of labels (B, n), 0-dimensional."""

    def sample(self, num_samples: int, steps: int, solver: str) -> Tensor:
        """Labels (num_samples, n) by some steps of a solver."""


class LinearFlow(nn.Module):
    r"""Flow matching on simplices by straight lines of weights.

    .. math:: W_t = (1 - t) W_0 + t e_\beta, \qquad W_0 \sim \mathrm{Dirichlet}(1, \dots, 1)

    The network sees :math:`\sqrt c \, \Pi W / \sqrt{1 - 1/c}`, the weights on the scale of the
    features of assignment flows, and the time. It gives the velocity, fitted by squared errors,
    or the classes :math:`P`, fitted by cross-entropy, with velocity :math:`(P - W) / (1 - t)`.
    """

    def __init__(self, net: nn.Module, variables: int, classes: int, classifier: bool) -> None:
        super().__init__()
        self.net, self.classifier = net, classifier
        self.simplices = Simplices(variables, classes)

    def flow_matching_loss(self, labels: Tensor) -> Tensor:
        """Cross-entropy or squared error of labels (B, n), at random weights and times."""
        start, t = self._draw_start(len(labels)), torch.rand(len(labels))
        corner = nn.functional.one_hot(labels, self.simplices.max_classes).to(start)
        spread = t.view(-1, 1, 1)
        output = self._output((1 - spread) * start + spread * corner, t)
        if self.classifier:
            return -(corner * output.log_softmax(-1)).sum((1, 2)).mean()
        return (output - (corner - start)).square().sum((1, 2)).mean()

    @torch.no_grad()
    def sample(self, num_samples: int, steps: int, solver: str) -> Tensor:
        """Labels (num_samples, n), the largest weights at time one."""

        def rate(w: Tensor, time: float) -> Tensor:
            output = self._output(w, w.new_full((len(w),), time))
            return (output.softmax(-1) - w) / (1 - time) if self.classifier else output

        start = self._draw_start(num_samples)
        return integrate(rate, start, [k / steps for k in range(steps + 1)], solver).argmax(-1)

    def _draw_start(self, num: int) -> Tensor:
        shape = (num, self.simplices.num_variables, self.simplices.max_classes)
        noise = torch.empty(shape).exponential_()
        return noise / noise.sum(-1, keepdim=True)

    def _output(self, w: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.net(self.simplices.mean_corner(w) * w.shape[-1] ** 0.5, t)
        return output


def _dense(target: Target) -> nn.Module:
    return DenseField(target.variables, target.classes, HIDDEN)


def _assignment(target: Target, **options: object) -> nn.Module:
    return AssignmentFlow(_dense(target), target.variables, target.classes, **options)


def _combination(horizon: str, parametrisation: str, features: str) -> Build:
    def build(target: Target) -> nn.Module:
        return _assignment(
            target, horizon=horizon, parametrisation=parametrisation, features=features
        )

    return build


def _published(target: Target) -> nn.Module:
    horizon = InfiniteHorizon(time_shape=1.0, time_rate=0.25)
    return _assignment(target, horizon=horizon, parametrisation="velocity", features="weights")


def _leave_one_out(target: Target) -> nn.Module:
    net = LeaveOneOutField(target.variables, target.classes, WIDTHS, HEAD)
    return AssignmentFlow(net, target.variables, target.classes)


def _linear(classifier: bool) -> Build:
    def build(target: Target) -> nn.Module:
        return LinearFlow(_dense(target), target.variables, target.classes, classifier)

    return build


Build = Callable[[Target], nn.Module]
METHODS: dict[str, Build] = {
    DEFAULT: _combination(*DEFAULT.split(", ")),
    "as published": _published,
    "finite, velocity, weights": _combination("finite", "velocity", "weights"),
    "linear, classifier": _linear(True),
    "linear, velocity": _linear(False),
    "leave-one-out": _leave_one_out,
}
METHODS |= {
    ", ".join(options): _combination(*options)
    for options in COMBINATIONS
    if ", ".join(options) not in METHODS
}


def late(model: nn.Module) -> AssignmentFlow:
    """The network of a finite-horizon model, to be sampled to nearly time one."""
    assert isinstance(model, AssignmentFlow)
    field = model.field
    return AssignmentFlow(
        field.net,
        model.simplices.num_variables,
        model.simplices.max_classes,
        FiniteHorizon(end=0.99),
        type(field.parametrisation).__name__.lower(),
        field.features,
    )


def draw(model: Model, num: int) -> Tensor:
    """Labels (num, n), in parts that stay in the cache, by as many evaluations of any model."""
    parts = [min(ROWS, num - done) for done in range(0, num, ROWS)]
    return torch.cat([model.sample(part, steps=STEPS, solver=SOLVER) for part in parts])


def effective_parameters(model: nn.Module) -> int:
    """Number of parameters, without the masked ones."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if hasattr(module, "mask") and hasattr(module, "sizes"):
            _, fan_out, _, fan_in = module.sizes
            total -= int((~module.mask).sum()) * fan_out * fan_in
    return total
