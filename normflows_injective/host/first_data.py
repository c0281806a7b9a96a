"""Modules that take parameters from the first batch of data."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import is_readable
from ..errors import ShapeError, UnsupportedLayerError

__all__ = [
    "FIRST_STATISTICS",
    "awaits_first_data",
    "expect_first_data",
    "has_met_data",
    "is_cold",
    "refuse_single_sample",
    "spread_of",
]

# Name and advice for check_finite.
FIRST_STATISTICS = (
    "what a layer takes from its first data (means, deviations, distances)",
    "A value overflows when it is squared: clean the data, fill values above all, or standardise "
    "them; no parameter was changed.",
)


def expect_first_data(module: nn.Module) -> None:
    """Register the flag that says whether a module has met data, at its construction.

    The buffer has the host's name for it, under which every part of the package knows such layers.

    Args:
        module: A module with a method ``initialise``, which fills the flag with one.
    """
    module.register_buffer("data_dep_init_done", torch.tensor(0.0))
    module.register_load_state_dict_post_hook(_read_again)


def awaits_first_data(module: nn.Module) -> bool:
    """Whether a module has still to be initialised by data.

    Args:
        module: A module that :func:`expect_first_data` has seen.

    Raises:
        UnsupportedLayerError: If it is compiled or exported before it has met data.

    Examples:
        >>> module = nn.Linear(1, 1)
        >>> expect_first_data(module)
        >>> awaits_first_data(module)
        True
    """
    met = bool(getattr(module, "_has_met_data", False))
    if torch.compiler.is_compiling():
        # A plain attribute is what a compiler can watch.
        if not met:
            raise UnsupportedLayerError(
                f"{type(module).__name__} initialises itself on its first batch, which no "
                "exported or compiled program can do. Call the model on data once before, or "
                "load its weights."
            )
        return False
    cold = is_cold(module)
    if cold == met:
        module._has_met_data = not cold  # type: ignore[assignment]
    return cold


def has_met_data(module: nn.Module) -> None:
    """Note that a module has been initialised, in its state and for :func:`awaits_first_data`.

    Args:
        module: A module that :func:`expect_first_data` has seen.
    """
    module.data_dep_init_done.fill_(1.0)  # type: ignore[operator]
    module._has_met_data = True  # type: ignore[assignment]


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


def _read_again(module: nn.Module, _: object) -> None:
    module._has_met_data = not is_cold(module)  # type: ignore[assignment]


_FLAG = "data_dep_init_done"


# Flags that were read and found set, with their versions.
_WARM: WeakKeyDictionary[nn.Module, tuple[Tensor, int]] = WeakKeyDictionary()


def is_cold(module: nn.Module) -> bool:
    """Whether a module has yet to initialise itself on data, as normflows' ActNorm does.

    Once it has, its flag is not read again until it is written: reading it would wait for a GPU at
    every step.

    Args:
        module: Any module.

    Returns:
        True until its first call; False where values cannot be read, as while exporting.

    Examples:
        >>> import normflows as nf
        >>> is_cold(nf.flows.ActNorm((2,)))
        True
    """
    if _FLAG not in module._buffers or torch.compiler.is_compiling():
        return False
    done = module._buffers[_FLAG]
    if done is None:
        return False
    version = None if done.is_inference() else done._version
    known = _WARM.get(module)
    if known is not None and known[0] is done and known[1] == version:
        return False
    if not is_readable(done):
        return False
    warm = bool(done > 0)
    if warm and version is not None:
        _WARM[module] = done, version
    return not warm


def refuse_single_sample(modules: Iterable[nn.Module], batch: Tensor) -> None:
    """Raise if a layer would initialise itself on a batch of one sample.

    Args:
        modules: Modules that the batch will pass.
        batch: Batch of shape (B, *).

    Raises:
        ShapeError: If B is one and a module has yet to be initialised: one sample has no standard
            deviation, and the host's layers would fill their parameters with NaN.

    Examples:
        >>> import normflows as nf
        >>> refuse_single_sample([nf.flows.ActNorm((2,))], torch.zeros(2, 2))
    """
    if batch.shape[0] != 1:
        return
    # Our own layers initialise themselves on data alone, not on samples, and check them.
    if any(is_cold(module) and not hasattr(module, "initialise") for module in modules):
        raise ShapeError(
            "A layer that initialises itself on its first batch (ActNorm) got a batch of one "
            "sample, which has no standard deviation. Start with a larger batch."
        )
