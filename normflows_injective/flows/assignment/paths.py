r"""Paths from noise to the corners of simplices: straight lines of logits, in a Gaussian channel.

Noise :math:`V_0 = \Pi \varepsilon` of a variable moves towards the corner of its class,

.. math:: V_t = (1 - \sigma t) V_0 + t \rho\, u_\beta, \qquad
          \dot V_t = \rho\, u_\beta - \sigma V_0, \qquad
          u_\beta = \Pi e_\beta / \lVert \Pi e_\beta \rVert,

with :math:`\sigma = 0` for the infinite horizon and :math:`1` for the finite one. Given the class,
:math:`V_t` is normal around :math:`t \rho u_\beta` with deviation :math:`s = 1 - \sigma t`. Up to
a constant, its *evidence* for the class is

.. math:: \log p(V_t \mid \beta = k) = \frac{t \rho}{s^2} \langle V_t, u_k \rangle.

With the posterior mean :math:`\bar u = \sum_k P(\beta = k \mid V_t)\, u_k` the
marginal field follows by eliminating :math:`V_0 = (V_t - t \rho u_\beta) / s`:

.. math:: F = \mathbb E[\dot V_t \mid V_t]
            = \rho \bar u - \sigma \frac{V_t - t \rho \bar u}{s}
            = \frac{\rho \bar u - \sigma V_t}{1 - \sigma t}.

So a network has to know only the posterior of every variable, for either horizon.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from ...checks import check_positive, check_probability, checks_arguments_of
from ...errors import ShapeError
from ..integration import Times, time_grid
from .simplices import Simplices, check_shapes

# Steps of half a deviation of rk4 leave an error of about .002 in the logarithm of a probability.
_LONGEST_STEP, _FEWEST_STEPS = 0.5, 50


class Horizon(ABC):
    r"""The time of a path: its speed, its end and the law of the training times.

    Attributes:
        end: Time at which sampling ends.
        contraction: :math:`\sigma`, the rate at which the noise shrinks.

    Examples:
        >>> [horizon.contraction for horizon in (InfiniteHorizon(), FiniteHorizon())]
        [0.0, 1.0]
    """

    end: float
    contraction: float

    def __init_subclass__(cls) -> None:
        """Attach the check of arguments to the methods of a subclass."""
        super().__init_subclass__()
        checks_arguments_of(cls)

    @property
    @abstractmethod
    def checkpoint_options(self) -> dict[str, str | float]:
        """Options on which weights depend, as files of version 0.1.0 record them."""

    @abstractmethod
    def speeds(self, counts: Tensor) -> Tensor:
        r"""Speeds :math:`\rho` towards the corners of simplices with counts (*,) of classes."""

    @abstractmethod
    def draw_times(self, num: int, like: Tensor) -> Tensor:
        """Draw training times (num,)."""

    @abstractmethod
    def scaled(self, v: Tensor, t: Tensor) -> Tensor:
        """Bring logits (B, n, c) at times (B, 1, 1) to a scale that hardly depends on time."""


@final
@dataclass(frozen=True)
class InfiniteHorizon(Horizon):
    r"""Constant velocity of norm :math:`\kappa` for every variable, unit noise, no end.

    Args:
        scale: :math:`\kappa`.
        end: Time at which sampling stops; :func:`choose_horizon` finds one for an error.
        time_shape: Shape of the Gamma law of the training times.
        time_rate: Rate of that law, by default :math:`\kappa`, so that the law of
            :math:`\kappa t` does not depend on the unit of time. The paper has shape 1 and, at
            :math:`\kappa = .5`, rate .25; the default spends fewer steps on times at which all
            classes are undecided or decided.

    Raises:
        OptionError: If a number is not positive.

    References:
        Boll et al., arXiv 2406.04527, section 4.

    Examples:
        >>> InfiniteHorizon(end=10.0)
        InfiniteHorizon(scale=0.5, end=10.0, time_shape=2.0, time_rate=None)
    """

    scale: float = 0.5
    end: float = 15.0
    time_shape: float = 2.0
    time_rate: float | None = None
    contraction = 0.0
    may_differ = frozenset({"end", "time_shape", "time_rate"})

    def __post_init__(self) -> None:
        for name in ("scale", "end", "time_shape", "time_rate"):
            value = getattr(self, name)
            if value is None and name == "time_rate":
                continue
            object.__setattr__(self, name, check_positive(value, name))

    @property
    def checkpoint_options(self) -> dict[str, str | float]:
        """The scale."""
        return {"horizon": "infinite", "scale": self.scale}

    def speeds(self, counts: Tensor) -> Tensor:
        r""":math:`\kappa` for every simplex."""
        # Counts may be integers, into which a speed would be rounded.
        floating = counts.dtype if counts.is_floating_point() else torch.get_default_dtype()
        return torch.full_like(counts, self.scale, dtype=floating)

    def draw_times(self, num: int, like: Tensor) -> Tensor:
        """Draw Gamma-distributed times (num,)."""
        rate = self.scale if self.time_rate is None else self.time_rate
        # No dtype shorter than float32 has a Gamma law.
        shape = torch.full((num,), self.time_shape, dtype=torch.float32, device=like.device)
        law = torch.distributions.Gamma(shape, rate, validate_args=False)
        return law.sample().to(like.dtype)

    def scaled(self, v: Tensor, t: Tensor) -> Tensor:
        """Divide logits (B, n, c) by 1 + t, at times (B, 1, 1)."""
        _check_spread(v, t)
        return v / (1 + t)


@final
@dataclass(frozen=True)
class FiniteHorizon(Horizon):
    r"""Straight lines that reach the logits of a smoothed corner at time one.

    .. math:: V_1 = \Pi \log w_\beta, \qquad w_\beta = (1 - \alpha) e_\beta + \alpha / c, \qquad
              \rho = \log\Big(1 + \frac{(1 - \alpha) c}{\alpha}\Big) \sqrt{1 - 1/c}

    Args:
        smoothing: :math:`\alpha` in (0, 1).
        end: Time in (0, 1) at which sampling stops. At time one there is no noise and so no
            density; at .9 the next class is more than 25 deviations away.

    Raises:
        OptionError: If a number is out of range.

    References:
        Boll, Gonzalez-Alvarado, Schnörr, arXiv 2402.07846.

    Examples:
        >>> FiniteHorizon().speeds(torch.tensor([2.0]))
        tensor([3.7429])
    """

    smoothing: float = 0.01
    end: float = 0.9
    contraction = 1.0
    may_differ = frozenset({"end"})

    def __post_init__(self) -> None:
        for name in ("smoothing", "end"):
            object.__setattr__(self, name, check_probability(getattr(self, name), name))

    @property
    def checkpoint_options(self) -> dict[str, str | float]:
        """The smoothing."""
        return {"horizon": "finite", "smoothing": self.smoothing}

    def speeds(self, counts: Tensor) -> Tensor:
        """Norms of the logits of the smoothed corners."""
        gap = torch.log1p((1 - self.smoothing) / self.smoothing * counts)
        return gap * (1 - 1 / counts).sqrt()

    def draw_times(self, num: int, like: Tensor) -> Tensor:
        """Draw times uniformly up to the end of sampling, (num,)."""
        return self.end * torch.rand(num, dtype=like.dtype, device=like.device)

    def scaled(self, v: Tensor, t: Tensor) -> Tensor:
        """Return logits (B, n, c) unchanged, because they are never large."""
        _check_spread(v, t)
        return v


HORIZONS: dict[str, type[InfiniteHorizon] | type[FiniteHorizon]] = {
    "infinite": InfiniteHorizon,
    "finite": FiniteHorizon,
}


@checks_arguments_of
@final
class AssignmentPath(nn.Module):
    """The path of all variables of a product of simplices, and its evidence for the classes.

    Args:
        simplices: The product of n simplices with up to c classes.
        horizon: The time of the path.

    References:
        Boll et al., arXiv 2406.04527, section 4; the evidence is derived in ``paths.py``.

    Examples:
        >>> path = AssignmentPath(Simplices(3, 2), InfiniteHorizon())
        >>> start = path.draw_start(4, torch.zeros(()))
        >>> path.logits(torch.zeros(4, 3, dtype=torch.long), start, torch.ones(4)).shape
        torch.Size([4, 3, 2])
    """

    def __init__(self, simplices: Simplices, horizon: Horizon) -> None:
        super().__init__()
        self.simplices, self.horizon = simplices, horizon

    def draw_start(self, num: int, like: Tensor) -> Tensor:
        r"""Noise :math:`V_0 = \Pi \varepsilon`, (num, n, c)."""
        shape = (num, self.simplices.num_variables, self.simplices.max_classes)
        return self.simplices.mean_free(torch.randn(shape, dtype=like.dtype, device=like.device))

    def logits(self, labels: Tensor, start: Tensor, t: Tensor) -> Tensor:
        """Logits (B, n, c) at times (B,) of paths from noise (B, n, c) to labels (B, n)."""
        check_shapes(self.simplices, start=start, labels=labels, t=t)
        t = t.view(-1, 1, 1)
        corners = self.simplices.corners(labels, start)
        return (1 - self.horizon.contraction * t) * start + t * self.speeds(start) * corners

    def velocity(self, labels: Tensor, start: Tensor) -> Tensor:
        """The constant velocities (B, n, c) of these paths."""
        check_shapes(self.simplices, start=start, labels=labels)
        corners = self.simplices.corners(labels, start)
        return self.speeds(start) * corners - self.horizon.contraction * start

    def evidence(self, v: Tensor, t: Tensor) -> Tensor:
        """Evidence (B, n, c) of logits (B, n, c) at times (B,) for their own class."""
        return self.evidence_scale(v, t) * v / self.simplices.corner_norms(v)

    def evidence_scale(self, v: Tensor, t: Tensor) -> Tensor:
        r"""The factor :math:`t \rho / s^2`, (B, n, 1)."""
        check_shapes(self.simplices, v=v, t=t)
        t = t.view(-1, 1, 1)
        return t * self.speeds(v) / (1 - self.horizon.contraction * t).square()

    def marginal_field(self, posterior: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The field (B, n, c) that belongs to posteriors (B, n, c) of the classes."""
        check_shapes(self.simplices, v=v, posterior=posterior, t=t)
        contraction = self.horizon.contraction
        towards = self.speeds(v) * self.simplices.mean_corner(posterior)
        return (towards - contraction * v) / (1 - contraction * t.view(-1, 1, 1))

    def speeds(self, like: Tensor) -> Tensor:
        r"""Speeds :math:`\rho`, (n, 1)."""
        return self.horizon.speeds(self.simplices.counts.to(like))

    def times(self, steps: Times | None = None) -> list[float]:
        r"""Times of the steps of a solver, from zero to the end of the horizon.

        By default the steps follow the horizon. They are equal, and at least 50. No step moves
        a corner by more than half a deviation of the noise, nor shrinks the remaining noise by
        more than a third:

        .. math:: N \ge 2 T \max\Big(\max_i \rho_i \sqrt{\frac{c_i}{2 (c_i - 1)}},\
                  \frac{\sigma}{1 - \sigma T}\Big).

        Args:
            steps: Number of equal steps, or their times; None for the default.

        Raises:
            OptionError: If the number is not positive, or the times do not increase from zero to
                the end.

        Examples:
            >>> len(AssignmentPath(Simplices(3, 2), InfiniteHorizon(scale=10.0)).times()) - 1
            300
        """
        return time_grid(self._default_steps() if steps is None else steps, self.horizon.end)

    def _default_steps(self) -> int:
        end, contraction = self.horizon.end, self.horizon.contraction
        counts = torch.tensor(sorted(set(self.simplices.class_counts)), dtype=torch.float64)
        apart = self.horizon.speeds(counts) * (counts / (2 * (counts - 1))).sqrt()
        fastest = max(float(apart.max()), contraction / (1 - contraction * end))
        return max(_FEWEST_STEPS, math.ceil(end * fastest / _LONGEST_STEP))

    def extra_repr(self) -> str:
        """Options as shown by ``print(model)``."""
        return str(self.horizon)


def _check_spread(v: Tensor, t: Tensor) -> None:
    if t.shape != (*v.shape[:1], *[1] * (v.dim() - 1)) or not v.dim():
        raise ShapeError(
            f"t must have one row for every row of v {tuple(v.shape)} and one column, as "
            f"t.view(-1, 1, 1), got {tuple(t.shape)}."
        )
