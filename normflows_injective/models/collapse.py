r"""Signs that the likelihood is bought with the manifold, while a model is trained.

At a consistent pair :math:`f' g' = I`, so a probe of length :math:`\sqrt d` gives the surrogate
:math:`v^\top f' g' v = d` for every sample. Where training has given up a direction of the
manifold the round trip does not return from it, and the surrogate falls short; where encoder and
decoder are no inverse pair it scatters. Early in every training it does both. So the watch warns
only if the reconstruction is poor, too, and no longer improves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, final

import normflows as nf
import torch
from torch import Tensor, nn

from ..checks import is_readable
from ..errors import CollapseWarning, ScaleWarning, SmoothnessWarning

_WINDOW = 50
# About what the loss of one direction of three gives, or as wide a scatter.
_DEVIATION = 0.45
# Of the variance of the data.
_POOR = 0.05
# Improvement of the reconstruction within a window, in units of the average one.
_STALLED = 0.15
# Ratio of squared deviations two windows apart: 0.96 and more where a direction is lost; trainings
# that are slow, or pass a plateau with flexible latent flows, had 0.84 or less.
_STEADY = 0.93
_RATIO = 1000.0

_PIECEWISE_LINEAR = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Threshold,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardshrink,
    nn.Softshrink,
)
# Nodes of a graph by which the same functions are differentiated when no module calls them.
_KINKED_NODES = (
    "Relu",
    "LeakyRelu",
    "PreluKernel",
    "RreluWithNoise",
    "Threshold",
    "Hardtanh",
    "Hardsigmoid",
    "Hardshrink",
    "Softshrink",
)


class _Means(NamedTuple):
    """Means over a window: reconstruction error, and squared deviation of the round trip."""

    error: float
    deviation: float


@final
class CollapseWatch:
    """Watches the terms of a training loss, and warns once.

    A few numbers per step stay on the device, and are read once in 50 steps.
    """

    def __init__(self, has_warned: bool = False, has_begun: bool = False) -> None:
        self.has_warned, self._has_begun = has_warned, has_begun
        # Three numbers of every step.
        self._steps: list[Tensor] = []
        self._windows: list[_Means] = []

    def begin(self, module: nn.Module, x: Tensor, error: Tensor) -> None:
        """Look once at the first data (B, *) of a training, and at the networks that it trains.

        The reconstruction errors come with the graph that leads to the networks.
        """
        if self._has_begun:
            return
        self._has_begun = True
        warn_of_scales(x)
        for part in module.modules():
            # Of the injections alone those of free form have networks by these names.
            networks = {name: getattr(part, name, None) for name in ("encoder", "decoder")}
            if isinstance(part, nf.flows.Flow):
                modules = {k: v for k, v in networks.items() if isinstance(v, nn.Module)}
                warn_of_kinks(modules, error)

    @torch.no_grad()
    def look(self, x: Tensor, error: Tensor, surrogate: Tensor, latent_dim: int) -> None:
        """Take into account the data, errors (B,) and surrogates (B,) of one step.

        The surrogates belong to probes of length sqrt(d), and carry a negative sign.
        """
        if self.has_warned or not is_readable(x, error, surrogate):
            return
        # The mean square of a deviation is the variance and the square of the mean.
        scatter, mean = torch.var_mean(surrogate, correction=0)
        self._steps += (error.mean(), scatter, mean)
        if len(self._steps) < 3 * _WINDOW:
            return
        errors, scatters, means = torch.stack(self._steps).view(-1, 3).unbind(1)
        deviation = scatters / latent_dim**2 + (means / latent_dim + 1).square()
        spread = x.flatten(1).var(0).sum().to(errors)
        numbers = torch.stack((errors.mean(), deviation.mean(), spread))
        error_mean, deviation_mean, variance = numbers.tolist()
        self._steps = []
        self._windows.append(_Means(error_mean, deviation_mean))
        if self._is_lost(variance):
            self.has_warned = True
            _warn_of_collapse(error_mean / variance, math.sqrt(deviation_mean))

    def _is_lost(self, variance: float) -> bool:
        last, before = self._windows[-1], self._windows[:-1]
        is_poor = last.error > _POOR * variance and last.deviation > _DEVIATION**2
        if not is_poor or len(before) < 3:
            return False
        worst = max(window.error for window in before)
        best = min(window.error for window in before)
        # Nothing may have been learned yet; such a plateau is none of the likelihood's.
        has_learned = last.error < 0.6 * worst
        average = (before[0].error - last.error) / len(before)
        has_stalled = before[-1].error - last.error < _STALLED * average
        is_steady = last.deviation > _STEADY * before[-2].deviation
        gets_worse = min(last.error, before[-1].error) > 1.5 * best
        return (has_learned and has_stalled and is_steady) or gets_worse

    def __reduce__(self) -> tuple[type[CollapseWatch], tuple[bool, bool]]:
        return CollapseWatch, (self.has_warned, self._has_begun)


def _warn_of_collapse(share: float, deviation: float) -> None:
    warnings.warn(
        "Training buys likelihood with the manifold, so its NLL is spuriously low. The "
        f"reconstruction error should fall below {_POOR} of the variance of the data, and stays "
        f"at {share:.2g}. The surrogate should be -d for d latent dimensions, and misses that by "
        f"{deviation:.2g} d, because decoder and encoder are no inverse pair. Raise beta of "
        "SurrogateLikelihood (flexible latent flows need 30 to 100), start with reconstruction "
        "alone (warmup_steps), or use fewer latent dimensions.",
        CollapseWarning,
        stacklevel=2,
    )


@torch.no_grad()
def warn_of_scales(x: Tensor) -> None:
    """Warn if one column of data (B, *) has more than a thousand times the scale of another.

    The scale of a column is the distance of its 10 % and 90 % quantiles, so that columns which are
    nearly constant, such as the margins of images, have none.
    """
    rows = x.flatten(1)
    if not is_readable(x) or rows.shape[0] < 10 or rows.shape[1] < 2:
        return
    ordered = rows[:1024].sort(0).values
    tenth = ordered.shape[0] // 10
    scales = (ordered[-1 - tenth] - ordered[tenth]).to(torch.float64)
    smallest, largest = torch.stack(
        (torch.where(scales > 0, scales, torch.inf).min(), scales.max())
    ).tolist()
    if largest > _RATIO * smallest:
        warnings.warn(
            f"The columns of x should have scales within a factor of {_RATIO:.0f}, got scales "
            f"from {smallest:.2g} to {largest:.2g}. The squared reconstruction error sees the "
            "largest alone. Standardise the columns: put nfi.flows.Standardise.fit(x), of the "
            "training data, last in flows.",
            ScaleWarning,
            stacklevel=2,
        )


def warn_of_kinks(networks: dict[str, nn.Module], result: Tensor | None = None) -> None:
    """Warn of the first piecewise linear activation in named networks.

    The graph of a result shows the functions that they call without a module, such as
    ``torch.nn.functional.relu``.
    """
    for name, network in networks.items():
        for path, module in network.named_modules():
            if isinstance(module, _PIECEWISE_LINEAR):
                _warn_of_kink(name, f"{type(module).__name__}{f' ({path})' if path else ''}")
                return
    owners = {id(p): name for name, network in networks.items() for p in network.parameters()}
    for kind, parameter in _kinked_functions(result):
        if id(parameter) in owners:
            _warn_of_kink(owners[id(parameter)], f"function ({kind})")
            return


def _warn_of_kink(name: str, kind: str) -> None:
    warnings.warn(
        f"The {name} should be smooth, got a piecewise linear {kind}. The surrogate learns "
        "curvature by second derivatives, which vanish for it, and the density of the manifold "
        "jumps at its kinks. Use a smooth activation, such as nn.SiLU in place of nn.ReLU.",
        SmoothnessWarning,
        stacklevel=2,
    )


def _kinked_functions(result: Tensor | None) -> Iterator[tuple[str, Any]]:
    """Piecewise linear functions in a graph, each with a parameter of the layer in front of it."""
    seen, open_nodes = set(), [getattr(result, "grad_fn", None)]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = node.name().partition("Backward")[0]
        if kind in _KINKED_NODES:
            yield kind, _nearest_parameter(node)
        open_nodes += [before for before, _ in node.next_functions]


def _nearest_parameter(node: Any) -> Any:
    """The first leaf on the way back from a node, in order of distance, or None."""
    seen, level = {node}, [node]
    while level:
        for leaf in level:
            if hasattr(leaf, "variable"):
                return leaf.variable
        level = [before for n in level for before, _ in n.next_functions if before is not None]
        level = [before for before in dict.fromkeys(level) if before not in seen]
        seen.update(level)
    return None
