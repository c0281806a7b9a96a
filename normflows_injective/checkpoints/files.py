"""Files that are read in one piece and replaced in one piece.

A writer fills ``NAME.xxxxxxxx.part`` beside the file and renames it. Until then it holds a lock on
that part, which the system releases when the process ends, however it ends. So a part whose lock
is free was left by a writer that was killed.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from ..checks.wording import describe
from ..errors import CheckpointError, OptionError

fcntl: Any = None
with suppress(ImportError):  # on Windows, where a file that is open cannot be removed anyhow
    fcntl = importlib.import_module("fcntl")


# A pipe would else block until somebody writes to it.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def name_of(path: str | os.PathLike[str]) -> str:
    """Return a path as a string, or raise OptionError if it is none."""
    try:
        name = os.fsdecode(path)
    except TypeError as error:
        raise OptionError(
            f"path must be a string or a path, got {describe(path)}. Name the file, for instance "
            '"model.safetensors".'
        ) from error
    if not name:
        raise CheckpointError('The path is empty. Name a file, for instance "model.safetensors".')
    return name


def read_file(path: str | os.PathLike[str]) -> bytearray:
    """Return the bytes of a regular file, or raise CheckpointError.

    The file is read at once: a mapped one kills the process when somebody cuts it short meanwhile.
    """
    name = name_of(path)
    try:
        with open(name, "rb", opener=lambda n, flags: os.open(n, flags | _READ)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(_not_a_file(name))
            content = bytearray(status.st_size)
            if file.readinto(content) < len(content) or file.read(1):
                raise CheckpointError(
                    f"{name} changed its length while it was read: another process is writing to "
                    "it. Read it when that is done; save() replaces a file in one step."
                )
    except FileNotFoundError as error:
        raise CheckpointError(f"{name} does not exist.") from error
    except OSError as error:
        if os.path.isdir(name):
            raise CheckpointError(_not_a_file(name)) from error
        raise CheckpointError(f"{name} cannot be read: {_reason(error)}.") from error
    return content


def replace_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None]) -> None:
    """Write a file completely or not at all, and remove the parts of killed writers.

    A link is followed and kept, and so are the permissions of an old file. ``write`` is called
    once with a binary file that can seek. CheckpointError leaves the old file as it was.
    """
    name = name_of(path)
    try:
        target = os.path.realpath(name)
        old = _status(target)
        _check_target(name, target, old)
        _remove_orphans(target)
        _write_and_rename(target, old, write)
        _sync_folder(os.path.dirname(target))
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be written: {_reason(error)}. What was there is as it was."
        ) from error


def _not_a_file(name: str) -> str:
    return (
        f"{name} is no file, but a folder, pipe, socket or device. Name the file that was saved."
    )


def _status(target: str) -> os.stat_result | None:
    try:
        return os.stat(target)
    except FileNotFoundError:
        return None


def _check_target(name: str, target: str, old: os.stat_result | None) -> None:
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise CheckpointError(f"The folder {folder} does not exist. Create it before saving.")
    if old is None:
        return
    if not stat.S_ISREG(old.st_mode):
        raise CheckpointError(
            f"{name} is no regular file, but a folder, pipe, socket or device. Choose another "
            "name."
        )
    if not os.access(target, os.W_OK):
        raise CheckpointError(
            f"{name} is write-protected. Choose another name, or permit writing to it."
        )


def _write_and_rename(
    target: str, old: os.stat_result | None, write: Callable[[IO[bytes]], None]
) -> None:
    part, descriptor = _open_part(target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            if old is not None:
                _take_over(part, old)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            # The lock is held until the name is gone, so that nobody takes the part for an orphan.
            os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def _open_part(target: str) -> tuple[str, int]:
    """Open a new part of a file, locked, and return its name and descriptor."""
    while True:
        part = f"{target}.{secrets.token_hex(4)}.part"
        try:
            descriptor = os.open(part, _CREATE, 0o666)
        except FileExistsError:
            continue
        if fcntl is None:
            return part, descriptor
        # Not every file system has locks. Without them no orphan is recognised either.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before it was locked, another writer may have taken it for an orphan.
        status = _status(part)
        if status is not None and os.path.samestat(status, os.fstat(descriptor)):
            return part, descriptor
        os.close(descriptor)


def _remove_orphans(target: str) -> None:
    folder, name = os.path.split(target)
    pattern = re.compile(re.escape(name) + r"\.[0-9a-f]{8}\.part")
    for entry in os.listdir(folder):
        if pattern.fullmatch(entry):
            with suppress(OSError):
                _remove_if_orphan(os.path.join(folder, entry))


def _remove_if_orphan(part: str) -> None:
    """Remove a part, or raise OSError if its writer lives."""
    if fcntl is None:
        os.unlink(part)
        return
    descriptor = os.open(part, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(part)
    finally:
        os.close(descriptor)


def _take_over(part: str, old: os.stat_result) -> None:
    if hasattr(os, "chown"):
        with suppress(PermissionError):
            os.chown(part, old.st_uid, old.st_gid)
    os.chmod(part, stat.S_IMODE(old.st_mode))


def _sync_folder(folder: str) -> None:
    """Make the new name last through a power failure, where folders can be opened at all."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
