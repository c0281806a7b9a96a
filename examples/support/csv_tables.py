"""Tables of numbers in files of separated values."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Table", "read_table"]

GAPS = {"", "-", "?", "n/a", "na", "nan", "none", "null"}
SEPARATORS = ",;\t|"
MIN_ROWS = 20


class Table(NamedTuple):
    """The columns of numbers of a file.

    Attributes:
        names: Their names.
        rows: Complete rows (N, D).
        lines: Numbers of the lines (N,) of the file in which these rows stand, from 1.
        remarks: Columns and rows that were left out, in words.
    """

    names: list[str]
    rows: Tensor
    lines: Tensor
    remarks: list[str]


def read_table(path: Path) -> Table:
    """Read the columns of numbers; SystemExit if there are too few.

    Values are separated by commas, semicolons, tabs or bars, whichever the first line has most of.
    Numbers may have a decimal comma where it separates nothing.
    """
    numbered = _lines(path)
    width = max(len(line) for _, line in numbered)
    places = [place for place, _ in numbered]
    lines = [line + [""] * (width - len(line)) for _, line in numbered]
    rows = [[_value(cell) for cell in line] for line in lines]
    # A word above numbers is a name, also where other names are numbers, such as years.
    has_names = any(
        rows[0][index] is None and all(row[index] is not None for row in rows[1:])
        for index in range(width)
    )
    heads = lines[0] if has_names else [f"column {index}" for index in range(width)]
    rows, places = rows[has_names:], places[has_names:]
    numeric = [
        index
        for index in range(width)
        if all(row[index] is not None for row in rows)
        and any(not math.isnan(row[index] or 0.0) for row in rows)
    ]
    remarks = []
    if len(numeric) < width:
        left_out = [heads[index] for index in range(width) if index not in numeric]
        remarks.append(f"Left out, because they hold no numbers: {', '.join(left_out)}.")
    numbers = [[row[index] or 0.0 for index in numeric] for row in rows]
    whole = [all(map(math.isfinite, row)) for row in numbers]
    complete = [row for row, is_whole in zip(numbers, whole, strict=True) if is_whole]
    kept = [place for place, is_whole in zip(places, whole, strict=True) if is_whole]
    if len(complete) < len(rows):
        remarks.append(f"Left out, because they have gaps: {len(rows) - len(complete)} rows.")
    if len(numeric) < 2 or len(complete) < MIN_ROWS:
        raise SystemExit(
            f"{path} has {len(numeric)} columns of numbers and {len(complete)} complete rows. An "
            "injective flow needs two columns and twenty rows at least."
        )
    names = _different([heads[index].strip() or f"column {index}" for index in numeric])
    return Table(names, torch.tensor(complete, dtype=torch.float64), torch.tensor(kept), remarks)


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """Numbers and cells of the lines that are not empty."""
    if not path.is_file():
        raise SystemExit(f"There is no file {path}.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Spreadsheets on Windows write this encoding.
        text = content.decode("cp1252", errors="replace")
    first = text.partition("\n")[0]
    separator = max(SEPARATORS, key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=separator)
    lines = [(reader.line_num, line) for line in reader if any(line)]
    if not lines:
        raise SystemExit(f"{path} is empty.")
    return lines


def _value(cell: str) -> float | None:
    """A number, NaN for a gap, or None for a word."""
    cell = cell.strip()
    if cell.lower() in GAPS:
        return math.nan
    try:
        return float(cell if "." in cell else cell.replace(",", "."))
    except ValueError:
        return None


def _different(names: list[str]) -> list[str]:
    """Names with a number after those that came before."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result
