"""The flag of layers that initialise themselves on their first data.

They take the data in ``first_meeting.py``.
Every one has a buffer ``data_dep_init_done``, as the ActNorm of normflows.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import is_readable
from ..errors import ShapeError, UnsupportedLayerError

_FLAG = "data_dep_init_done"
# Flags that were read and found set, with their versions.
_INITIALISED: WeakKeyDictionary[nn.Module, tuple[Tensor, int]] = WeakKeyDictionary()

# Name and advice for check_finite.
FIRST_STATISTICS = (
    "what a layer takes from its first data (means, deviations, distances)",
    "A value overflows when it is squared: clean the data, fill values above all, or standardise "
    "them; no parameter was changed.",
)


def awaits_first_data(module: nn.Module) -> bool:
    """Whether a module has yet to initialise itself, False where values cannot be read.

    Once it has, its flag is not read again until it is written: reading it would wait for a GPU at
    every step.
    """
    if _FLAG not in module._buffers or torch.compiler.is_compiling():
        return False
    flag = module._buffers[_FLAG]
    if flag is None:
        return False
    version = None if flag.is_inference() else flag._version
    known = _INITIALISED.get(module)
    if known is not None and known[0] is flag and known[1] == version:
        return False
    if not is_readable(flag):
        return False
    is_set = bool(flag > 0)
    if is_set and version is not None:
        _INITIALISED[module] = flag, version
    return not is_set


def refuse_single_sample(modules: Iterable[nn.Module], batch: Tensor) -> None:
    """Raise if a layer of normflows would initialise itself on a batch (B, *) of one sample.

    One sample has no standard deviation, and the layer would fill its parameters with NaN.
    """
    if batch.shape[0] != 1:
        return
    # Our own layers initialise themselves on data alone, not on samples, and check them.
    if any(awaits_first_data(part) and not hasattr(part, "initialise") for part in modules):
        raise ShapeError(
            "A layer that initialises itself on its first batch (ActNorm) got a batch of one "
            "sample, which has no standard deviation. Start with a larger batch."
        )


def expect_first_data(module: nn.Module) -> None:
    """Register the flag of a module of our own, which has a method ``initialise``."""
    module.register_buffer(_FLAG, torch.tensor(0.0))
    module.register_load_state_dict_post_hook(_read_flag)


def must_initialise(module: nn.Module) -> bool:
    """Whether a module of our own has to initialise itself now; an error while compiling."""
    is_initialised = bool(getattr(module, "_has_met_data", False))
    if torch.compiler.is_compiling():
        # A plain attribute is what a compiler can watch.
        if not is_initialised:
            raise UnsupportedLayerError(
                f"{type(module).__name__} initialises itself on its first batch, which no "
                "exported or compiled program can do. Call the model on data once before, or "
                "load its weights."
            )
        return False
    awaits = awaits_first_data(module)
    if awaits == is_initialised:
        module._has_met_data = not awaits  # type: ignore[assignment]
    return awaits


def mark_initialised(module: nn.Module) -> None:
    """Note that a module of our own has been initialised."""
    module.data_dep_init_done.fill_(1.0)  # type: ignore[operator]
    module._has_met_data = True  # type: ignore[assignment]


def spread_of(rows: Tensor) -> Tensor:
    """Standard deviations (F,) of columns (B, F), those of constant ones replaced by the mean.

    A pixel that is always black would else be blown up until only rounding is left of it.
    """
    spread = rows.std(0)
    # A constant column may keep a deviation of some ulps.
    varies = spread > 1e-6 * rows.abs().amax(0)
    if not bool(varies.any()):
        return torch.ones_like(spread)
    return torch.where(varies, spread, spread[varies].mean())


def _read_flag(module: nn.Module, _: object) -> None:
    module._has_met_data = not awaits_first_data(module)  # type: ignore[assignment]
