"""Checks of what a caller hands in, each raising a named error.

``numbers`` and ``options`` take the arguments of constructors and give them back in plain form;
``batches`` looks at tensors, and ``attached`` puts such a look in front of every
method of layers, laws and networks.
"""

from __future__ import annotations

from .attached import checks_arguments, checks_arguments_of, looks_first
from .batches import (
    as_floating,
    check_batch,
    check_event_shape,
    check_finite,
    check_loss,
    check_rows,
    check_same_rows,
    is_readable,
)
from .numbers import (
    check_count,
    check_interval,
    check_not_negative,
    check_number,
    check_positive,
    check_probability,
    check_real,
    is_number,
)
from .options import (
    check_callable,
    check_choice,
    check_counts,
    check_flag,
    check_module,
    check_modules,
    check_shape,
    lookup,
)
from .renamed import RenamedAttribute, level_of_caller, renamed
from .wording import describe

__all__ = [
    "RenamedAttribute",
    "as_floating",
    "check_batch",
    "check_callable",
    "check_choice",
    "check_count",
    "check_counts",
    "check_event_shape",
    "check_finite",
    "check_flag",
    "check_interval",
    "check_loss",
    "check_module",
    "check_modules",
    "check_not_negative",
    "check_number",
    "check_positive",
    "check_probability",
    "check_real",
    "check_rows",
    "check_same_rows",
    "check_shape",
    "checks_arguments",
    "checks_arguments_of",
    "describe",
    "is_number",
    "is_readable",
    "level_of_caller",
    "looks_first",
    "lookup",
    "renamed",
]
