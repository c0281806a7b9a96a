"""Runs of a benchmark as lines of JSON, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["Record", "read", "run_once", "with_error"]

Record = dict[str, Any]


def read(path: Path) -> dict[str, Record]:
    """All runs of a file by their keys."""
    if not path.is_file():
        return {}
    records = (json.loads(line) for line in path.read_text().splitlines())
    return {record["key"]: record for record in records}


def run_once(path: Path, key: str, run: Callable[[], Record]) -> Record:
    """A run from the file, or a new one, which is appended to it."""
    known = read(path)
    if key not in known:
        known[key] = {"key": key, **run()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(known[key]) + "\n")
    return known[key]


def with_error(values: Sequence[float], digits: int) -> str:
    """Mean over seeds with its standard error, which a single seed does not have."""
    if len(values) < 2:
        return f"{mean(values):.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / math.sqrt(len(values)):.{digits}f}"
