"""Files of data that a reader has to bring."""

from __future__ import annotations

from pathlib import Path

__all__ = ["find"]


def find(folder: Path | str | None, file: str) -> Path:
    """Path of a file in a folder; SystemExit, which says where to give the folder, without it."""
    path = Path(folder or "") / file
    if folder is None or not path.is_file():
        where = "" if folder is None else f" in {folder}"
        raise SystemExit(
            f"{file} was not found{where}. Give the folder that holds it by --data or the "
            "environment variable NFI_DATA."
        )
    return path
