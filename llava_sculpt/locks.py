"""One process at a time works in a folder or makes an output; what a killed one has left there is removed."""

from __future__ import annotations

import glob
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llava_sculpt.errors import UserError
from llava_sculpt.records import WRITING

_LOCK = ".lock"


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete what `written_aside` left in a folder when it was killed: of files called `name` (a pattern), or of all.

    Only for who holds the lock: a file that is being written looks the same.
    """
    for file in folder.glob(f".{name}.*{WRITING}"):
        file.unlink(missing_ok=True)


def is_leftover(file: Path) -> bool:
    """Whether a file in a folder is a lock or a half written file of ours: nothing of the user's."""
    return file.name == _LOCK or (file.name.startswith(".") and file.name.endswith(WRITING))


@contextmanager
def folder_lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that works in a folder, which is made if need be; leftovers in it are removed.

    The lock goes with its process, however that ends. With `wait` another process is waited for.

    Raises:
        UserError: another process is at work there, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from error
    with _held(folder / _LOCK, folder, wait):
        remove_leftovers(folder)
        yield


@contextmanager
def output_lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that makes this file or folder; leftovers of it are removed.

    With `wait` another process is waited for.

    Raises:
        UserError: another process is making it, or nothing can be written beside it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {error.strerror}") from error
    with _held(path.parent / f".{path.name}{_LOCK}", path, wait):
        remove_leftovers(path.parent, glob.escape(path.name))
        yield


def tidy(path: Path) -> None:
    """Remove what a killed process has left beside a file or folder that it had made, unless one is at work there."""
    with suppress(UserError), output_lock(path):
        pass


@contextmanager
def _held(lock_file: Path, what: Path, wait: bool) -> Iterator[None]:
    try:
        lock = FileLock(lock_file).acquire(blocking=wait).lock
    except Timeout as error:
        with suppress(OSError):
            owner = lock_file.read_text(encoding="utf-8").strip()
            raise UserError(f"{what}: another process is at work there ({owner or 'just started'})") from error
        raise UserError(f"{what}: another process is at work there") from error
    except OSError as error:
        raise UserError(f"{what}: cannot be written: {error.strerror or error}") from error
    try:
        with suppress(OSError):  # for the message of the other process only
            lock_file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        # While it is held: who waits for this very file finds that it is gone, and makes a new one.
        lock_file.unlink(missing_ok=True)
        lock.release()
