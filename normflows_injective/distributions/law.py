"""What every law of the package is: a distribution of normflows that checks what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import normflows as nf
from torch import Tensor

from ..checks import check_event_shape, checks_tensors_of

__all__ = ["Law"]

LogProb = Callable[..., Tensor]


class Law(nf.distributions.BaseDistribution):
    """A distribution whose methods refuse by name what is no dense tensor of its own width."""

    shape: Sequence[int]

    def __init_subclass__(cls) -> None:
        """Attach the check."""
        super().__init_subclass__()
        checks_tensors_of(cls)
        if "log_prob" in vars(cls):
            cls.log_prob = _of_known_width(vars(cls)["log_prob"])


def _of_known_width(log_prob: LogProb) -> LogProb:
    """Refuse points of another shape than the law's own before their density is taken."""

    @wraps(log_prob)
    def checked(law: Law, *args: Any, **kwargs: Any) -> Tensor:
        points: Any = args[0] if args else next(iter(kwargs.values()), None)
        check_event_shape(points, getattr(law, "shape", None), "x")
        return log_prob(law, *args, **kwargs)

    return checked
