"""Write and verify checkpoint files: torch's own format, with a SHA-256 of the file at its end.

``torch.load`` reads the zip archives that ``torch.save`` writes without comparing their checksums: a flipped bit in a
weight loads silently. The digest stands in the archive's comment, which every reader of the format skips, so that other
programs load the files as before. A file without one (written by somebody else) is verified by the archive's CRC-32,
which cover the tensors.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from genlora_lightning.errors import DamagedFileError
from genlora_lightning.storage.atomic import atomic_file
from genlora_lightning.storage.digests import sha256

_MARK = b"genlora-sha256:"
_COMMENT_LENGTH = len(_MARK) + 64
# The end-of-archive record is 22 bytes; its last two are the comment's length, zero when torch has written it.
_TAIL = re.compile(
    rb"PK\x05\x06.{16}" + re.escape(_COMMENT_LENGTH.to_bytes(2, "little")) + _MARK + rb"([0-9a-f]{64})\Z", re.DOTALL
)
_TAIL_LENGTH = 22 + _COMMENT_LENGTH
_CHUNK = 1 << 22
_AGAIN = "It was damaged after it was written. Copy it again, or use an older checkpoint."

Proof = Literal["sha256", "crc32", "none"]


def write_checkpoint(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Save a checkpoint with :func:`torch.save`: the older file of that name, or this one, complete.

    Raises:
        OSError: It cannot be written, for example because the disk is full; then nothing is left behind.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with buffer.getbuffer() as content:  # released here, not with the traceback of an error
        digest = sha256(content).encode()
        try:
            with atomic_file(path) as file:
                file.write(content[:-2])
                file.write(_COMMENT_LENGTH.to_bytes(2, "little") + _MARK + digest)
        except OSError as error:
            raise OSError(
                error.errno,
                f"The checkpoint ({len(content):,} bytes) could not be saved to {path}: {error.strerror or error}. "
                "Nothing was left behind, and an older file of that name is as it was. Check that there is space and "
                "that the folder is writable",
            ) from error


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
    """Verify a checkpoint, then load it with :func:`torch.load`.

    Args:
        path: A file that :func:`write_checkpoint`, Lightning or torch wrote.
        map_location: Where the tensors go.
        weights_only: Whether to load nothing but tensors and plain values; ``None``: torch's default, which is so.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: It is truncated or was changed.
        pickle.UnpicklingError: It is as it was written, but holds more than plain values and tensors.
    """
    with _open(path) as file:
        proof = _verify(file, Path(path))
        file.seek(0)
        try:
            return torch.load(file, map_location=map_location, weights_only=weights_only)
        except Exception as error:
            if proof == "none":  # nothing says that it is a checkpoint at all
                raise DamagedFileError(
                    f"{path} ({os.path.getsize(path):,} bytes) cannot be loaded ({type(error).__name__}): it is "
                    "damaged, or no checkpoint at all."
                ) from error
            raise


def verify_checkpoint(path: str | os.PathLike[str]) -> Proof:
    """Prove that a checkpoint is what was written; returns by what: ``"sha256"`` for files of ours, ``"crc32"`` else.

    ``"none"`` stands for torch's oldest format, which has no checksums.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: It is truncated or was changed.
    """
    with _open(path) as file:
        return _verify(file, Path(path))


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"Checkpoint file not found: {path}") from None


def _verify(file: BinaryIO, path: Path) -> Proof:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_LENGTH))
    tail = file.read()
    found = _TAIL.search(tail)
    if found is not None:
        digest = hashlib.sha256()
        left = size - _COMMENT_LENGTH - 2
        file.seek(0)
        while left:
            chunk = file.read(min(left, _CHUNK))
            digest.update(chunk)
            left -= len(chunk)
        digest.update(b"\0\0")
        if digest.hexdigest() != found[1].decode():
            raise DamagedFileError(f"{path} ({size:,} bytes) has another SHA-256 than when it was written. {_AGAIN}")
        return "sha256"
    file.seek(0)
    if file.read(4) != b"PK\x03\x04" and _MARK[:-1] not in tail:
        if not size:
            raise DamagedFileError(f"{path} is empty. {_AGAIN}")
        return "none"
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise DamagedFileError(f"{path} ({size:,} bytes) has no end as its format has one: it is truncated. {_AGAIN}")
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DamagedFileError(f"{path} ({size:,} bytes) is no readable archive: {error}. {_AGAIN}") from error
    if broken is not None:
        raise DamagedFileError(f"{path} ({size:,} bytes): {broken} has another CRC-32 than was written. {_AGAIN}")
    return "crc32"
