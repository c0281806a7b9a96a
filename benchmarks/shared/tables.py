"""Tables in Markdown, and their places in the pages of results."""

from __future__ import annotations

import math
import platform
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from tabulate import tabulate

__all__ = ["TABLE", "publish", "report", "table", "with_error", "wrapped"]

TABLE = re.compile(r"^\|.*\n\|[-:| ]+\|(?:\n\|.*)*", re.MULTILINE)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table whose first columns hold words and stand left, and whose others stand right."""
    align = ["left"] * words + ["right"] * (len(head) - words)
    # Without rows, tabulate 0.9 cannot align.
    return tabulate(rows, head, "pipe", colalign=align if rows else None, disable_numparse=True)


def with_error(values: Sequence[float], digits: int) -> str:
    """Mean over seeds with its standard error, which a single seed does not have."""
    if len(values) < 2:
        return f"{mean(values):.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values) / math.sqrt(len(values)):.{digits}f}"


def report(tables: Mapping[str, str], page: Path | None) -> None:
    """Print tables under their titles; put them into a page in place of its tables, in order.

    The text of the page is written by hand, and speaks of numbers: read it again afterwards.
    """
    print(f"torch {torch.__version__}, {platform.machine()}")
    for title, text in tables.items():
        print(f"\n{title}\n\n{text}")
    if page is not None:
        page.write_text(_filled(page.read_text(), tables))
        print(f"\nwrote the tables of {page}: see whether its text still holds")


def publish(text: str, page: Path | None) -> None:
    """Print a page whose whole text comes from the script, and write it."""
    print(text)
    if page is not None:
        page.write_text(text)


def wrapped(text: str) -> str:
    """A paragraph in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _filled(page: str, tables: Mapping[str, str]) -> str:
    places = TABLE.findall(page)
    complete = [text for text in tables.values() if TABLE.fullmatch(text)]
    if len(places) != len(complete):
        raise SystemExit(
            f"The page has {len(places)} tables, the runs give {len(complete)}: nothing "
            "is written."
        )
    remaining = iter(complete)
    return TABLE.sub(lambda _: next(remaining), page)
