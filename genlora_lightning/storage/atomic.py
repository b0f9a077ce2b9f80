"""Replace files and folders atomically: the old one or the new one, complete, whenever the writer is killed.

What is new is written beside its destination, flushed to the disk, and put in place by one rename. A file's rename
replaces the old file. A folder that is not empty cannot be replaced by a rename; there the two folders are *exchanged*,
one system call too (Linux's ``renameat2``), and the old one is removed when the exchange is on the disk. Where the file
system or the system has no exchange, the old folder is renamed to ``.NAME.genlora-old-…`` and then the new one to
``NAME``. A writer killed between these two renames leaves the complete old folder under the other name:
:func:`find_folder` finds it for readers, and the next writer puts it back before it does anything else.

A killed writer leaves its unfinished ``.NAME.genlora-new-…`` behind; the next writer to the same destination removes
it. A living writer holds a lock (``flock``) on what it writes, which the system drops when it dies.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# No lock can be had on some network file systems; what has not changed for so long has no writer any more.
_ABANDONED_AFTER_SECONDS = 24 * 3600.0
_WAIT_FOR_WRITERS_SECONDS = 10.0
# What file systems answer that cannot flush, lock or exchange, as opposed to failing to.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ENOLCK}


@contextmanager
def atomic_folder(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill in the ``with`` block, which then replaces the destination as a whole.

    After an error in the block, or in the replacing, the destination is as it was and nothing is left behind.

    Args:
        destination: The folder's final path; its parents are made. A symbolic link is followed, not replaced.

    Yields:
        An empty folder beside the destination.

    Raises:
        OSError: Writing, flushing or renaming failed.
    """
    destination = Path(os.path.realpath(destination))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _one_writer_at_a_time(destination.parent):
        _recover(destination)
        staging = _sibling(destination, "new")
        staging.mkdir()
        lock = _lock(staging)
    try:
        yield staging
        _flush_tree(staging)
        with _one_writer_at_a_time(destination.parent):
            _put_folder(staging, destination)
    finally:
        # The unfinished new one, or, once that is in place, the old one.
        shutil.rmtree(staging, ignore_errors=True)
        _unlock(lock)


@contextmanager
def atomic_file(destination: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write in the ``with`` block, which then replaces the destination; see :func:`atomic_folder`.

    Args:
        destination: The file's final path; its parents are made. A symbolic link is followed, not replaced.

    Yields:
        The file, open for writing and reading bytes.

    Raises:
        OSError: Writing, flushing or renaming failed.
    """
    destination = Path(os.path.realpath(destination))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _one_writer_at_a_time(destination.parent):
        _recover(destination)
        staging = _sibling(destination, "new")
        file = open(staging, "x+b")  # noqa: SIM115 - closed below, after the rename that its lock protects
        _lock_open(file.fileno())
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":
            file.close()  # an open file cannot be renamed there
        os.replace(staging, destination)
        _flush_folder(destination.parent)
    finally:
        with suppress(OSError):  # a full disk once more; the error that matters is on its way
            file.close()
        staging.unlink(missing_ok=True)


def find_folder(folder: str | os.PathLike[str]) -> Path:
    """Where a reader finds a folder that :func:`atomic_folder` writes.

    That is the folder itself, but for the moment between the two renames of a writer without an exchange (which lasts
    if the writer was killed there): then the complete old one under its other name.
    """
    folder = Path(folder)
    if not folder.exists():
        destination = Path(os.path.realpath(folder))
        set_aside = _siblings(destination, "old")
        if set_aside and not destination.exists():
            return set_aside[-1]
    return folder


def remove_leftovers(destination: str | os.PathLike[str]) -> None:
    """Remove what killed writers to a destination left beside it, as the next writer would."""
    destination = Path(os.path.realpath(destination))
    if destination.parent.is_dir():
        with _one_writer_at_a_time(destination.parent):
            _recover(destination)


def _put_folder(staging: Path, destination: Path) -> None:
    if not destination.exists():
        _rename_or_undo(staging, destination)
        return
    if _exchange(staging, destination):
        try:
            _flush_folder(destination.parent)
        except OSError:
            _exchange(staging, destination)
            raise
        return
    aside = _sibling(destination, "old")
    lock = _lock(destination)  # goes with the folder, so that nobody puts it back meanwhile
    try:
        os.rename(destination, aside)
        try:
            _rename_or_undo(staging, destination)
        except BaseException:
            os.rename(aside, destination)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        _unlock(lock)


def _rename_or_undo(staging: Path, destination: Path) -> None:
    os.rename(staging, destination)
    try:
        _flush_folder(destination.parent)
    except OSError:
        os.rename(destination, staging)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; ``False`` if the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _recover(destination: Path) -> None:
    """Put back an old folder that a killed writer had set aside, and remove what killed writers left."""
    for aside in reversed(_siblings(destination, "old")):
        if _in_use(aside):
            continue
        if destination.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, destination)
    for leftover in _siblings(destination, "new"):
        if _in_use(leftover):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _sibling(destination: Path, kind: str) -> Path:
    return destination.with_name(f".{destination.name}.genlora-{kind}-{secrets.token_hex(8)}")


def _siblings(destination: Path, kind: str) -> list[Path]:
    """The siblings of one kind that writers to a destination made, the newest last."""
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.genlora-{kind}-[0-9a-f]{{16}}")
    try:
        names = [name for name in os.listdir(destination.parent) if pattern.fullmatch(name)]
    except OSError:
        return []
    return sorted((destination.with_name(name) for name in names), key=_modified)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone by now
        return 0.0


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            _flush_folder(path)
        elif not path.is_symlink():
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's entries; systems that have no such thing need none."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _one_writer_at_a_time(parent: Path) -> Iterator[None]:
    """Keep other writers in this folder waiting for the few system calls of cleaning up, or of the renames.

    It protects living writers from each other, and no reader from any; a lock that is not to be had is done without.
    """
    descriptor = _open_folder(parent)
    if descriptor is None:
        yield
        return
    try:
        deadline = time.monotonic() + _WAIT_FOR_WRITERS_SECONDS
        while _lock_open(descriptor) is False and time.monotonic() < deadline:
            time.sleep(0.002)
        yield
    finally:
        _unlock(descriptor)


def _in_use(path: Path) -> bool:
    """Whether a living writer holds a path; an unlockable one counts as in use until it is a day old."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        descriptor = None
    locked = None if descriptor is None else _lock_open(descriptor)
    _unlock(descriptor)
    if locked is None:
        return time.time() - _modified(path) < _ABANDONED_AFTER_SECONDS
    return not locked


def _open_folder(folder: Path) -> int | None:
    return None if sys.platform == "win32" else os.open(folder, os.O_RDONLY)


def _lock(folder: Path) -> int | None:
    """Hold a folder; returns what :func:`_unlock` needs."""
    descriptor = _open_folder(folder)
    if descriptor is not None:
        _lock_open(descriptor)
    return descriptor


def _lock_open(descriptor: int) -> bool | None:
    """Lock an open file or folder: whether another holds it, or ``None`` where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _unlock(descriptor: int | None) -> None:
    if descriptor is None:
        return
    if sys.platform != "win32":
        # Said, and not left to the closing: a process forked meanwhile has the descriptor, too.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
