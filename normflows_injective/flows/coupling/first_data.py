"""Modules that take parameters from the first batch of data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...volume.modules import is_cold

__all__ = ["awaits_first_data", "expect_first_data", "spread_of"]


def expect_first_data(module: nn.Module) -> None:
    """Register the flag that says whether a module has met data, at its construction.

    The buffer has the host's name for it, under which every part of the package knows such layers.

    Args:
        module: A module with a method ``initialise``, which fills the flag with one.
    """
    module.register_buffer("data_dep_init_done", torch.tensor(0.0))
    module.register_load_state_dict_post_hook(_forget)


def awaits_first_data(module: nn.Module) -> bool:
    """Whether a module has still to be initialised by data.

    Once it has, the flag is not read again until a state is loaded: reading it would wait for a
    GPU at every step, and stop a compiler.

    Args:
        module: A module that :func:`expect_first_data` has seen.

    Examples:
        >>> module = nn.Linear(1, 1)
        >>> expect_first_data(module)
        >>> awaits_first_data(module)
        True
    """
    if getattr(module, "_has_met_data", False):
        return False
    cold = is_cold(module)
    module._has_met_data = not cold  # type: ignore[assignment]
    return cold


def spread_of(rows: Tensor) -> Tensor:
    """Standard deviations (F,) of columns, those of constant ones replaced by the others' mean.

    A pixel that is always black would else be blown up until rounding is all that is seen of it.

    Args:
        rows: Data of shape (B, F), B at least two.

    Examples:
        >>> spread_of(torch.tensor([[0.0, 7.0], [2.0, 7.0]]))
        tensor([1.4142, 1.4142])
    """
    spread = rows.std(0)
    # A constant column may keep a deviation of some ulps.
    varies = spread > 1e-6 * rows.abs().amax(0)
    if not bool(varies.any()):
        return torch.ones_like(spread)
    return torch.where(varies, spread, spread[varies].mean())


def _forget(module: nn.Module, _: object) -> None:
    module._has_met_data = False  # type: ignore[assignment]
