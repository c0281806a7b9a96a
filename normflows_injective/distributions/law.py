"""The base class of the laws of the package: distributions of normflows that check arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import normflows as nf

from ..checks import check_event_shape, check_finite, checks_arguments_of, looks_first


class Law(nf.distributions.BaseDistribution):
    """A distribution whose methods refuse everything but dense tensors of its width by name.

    Where ``has_rsample`` is true, ``rsample(num_samples)`` draws samples that carry the gradient
    of a reparameterisation to every parameter, with their log-densities. So does ``forward``, as
    in normflows, but in ``VonMisesFisher``.
    """

    has_rsample = False
    shape: Sequence[int]

    def __init_subclass__(cls) -> None:
        """Attach the check."""
        super().__init_subclass__()
        checks_arguments_of(cls)
        looks_first(cls, ["log_prob"], _check_width)

    def refuse_diverged(self, *names: str) -> None:
        """Raise NonFiniteError if one of the named parameters has become NaN or infinite."""
        for name in names:
            check_finite(getattr(self, name), name, "Load an earlier state; lower the step size.")


def _check_width(law: Law, *args: Any, **kwargs: Any) -> None:
    """Refuse points of another shape than the law's own before their density is taken."""
    points: Any = [*args, *kwargs.values()][0]
    check_event_shape(points, getattr(law, "shape", None), "x")
