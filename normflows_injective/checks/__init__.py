"""Checks of arguments, each of which raises a named error.

``numbers`` and ``options`` return the arguments of constructors in plain form, ``tensors`` and
``batches`` look at tensors, ``attached`` puts such a look before every method of layers, laws and
networks, and ``renamed`` keeps old names alive.
"""

from __future__ import annotations

from .attached import checks_arguments, checks_arguments_of, looks_first, names_of
from .batches import (
    as_floating,
    check_batch,
    check_event_shape,
    check_finite,
    check_loss,
    check_rows,
    check_same_rows,
    is_readable,
    numbers_of,
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
from .renamed import RenamedAttribute, renamed
from .wording import describe, level_of_caller

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
    "names_of",
    "numbers_of",
    "lookup",
    "renamed",
]
