"""Files of data that a reader has to bring."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["add_data_option", "read_arrays"]


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Let the parser, or the environment variable NFI_DATA, name the folder of the files."""
    parser.add_argument("--data", default=os.environ.get("NFI_DATA"), help="folder of the files")


def read_arrays(folder: str | None, file: str, *names: str) -> list[Any]:
    """Arrays of a file by their names, read without unpickling; SystemExit if it is missing."""
    path = Path(folder or "") / file
    if folder is None or not path.is_file():
        raise SystemExit(
            f"{path} was not found. Give the folder that holds {file} by --data or the "
            "environment variable NFI_DATA."
        )
    with np.load(path, allow_pickle=False) as arrays:
        return [arrays[name] for name in names]
