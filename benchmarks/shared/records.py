"""Runs of a benchmark as lines of JSON, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Record", "read", "run_once"]

Record = dict[str, Any]


def read(path: Path) -> dict[str, Record]:
    """All runs of a file by their keys; none if there is no file."""
    if not path.is_file():
        return {}
    records = (json.loads(line) for line in path.read_text().splitlines())
    return {record["key"]: record for record in records}


def run_once(path: Path, key: str, run: Callable[[], Record]) -> Record:
    """A run from the file, or a new one, which is appended to it."""
    records = read(path)
    if key not in records:
        records[key] = {"key": key, **run()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(records[key]) + "\n")
    return records[key]
