"""Keep folders that can be made again, up to a size, for several processes at once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from genlora_lightning.storage.atomic import atomic_folder

if sys.platform != "win32":
    import fcntl

_LOCK_FILE = ".lock"


class FolderCache:
    """Folders by key, each made once; of those that no living process uses, the least recently used are removed.

    A process uses what it has got until it ends: it may hand the path on to others, who read it much later. It holds a
    shared lock (``flock``) on it, which the system drops with the process. Without such locks (on Windows) nothing is
    removed.

    Args:
        root: Where the folders lie; made when the first is.
        limit: Bytes that all together may take; exceeded only by what is in use.
    """

    def __init__(self, root: str | os.PathLike[str], limit: int) -> None:
        self.root = Path(root)
        self.limit = limit
        self._held: dict[str, int] = {}

    def get(self, key: str, write: Callable[[Path], None]) -> Path:
        """The folder of a key; made if it is not there.

        Args:
            key: A file name that says what is in it, such as a digest.
            write: Called with an empty folder to fill; one process at a time does this.

        Raises:
            OSError: It cannot be written; then nothing is left behind.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / key
        with self._one_at_a_time():
            if not folder.is_dir():
                with atomic_folder(folder) as staging:
                    write(staging)
            if sys.platform != "win32":
                if key not in self._held:
                    self._held[key] = os.open(folder, os.O_RDONLY)
                    fcntl.flock(self._held[key], fcntl.LOCK_SH)
                os.utime(folder)
                self._remove_unused(folder)
        return folder

    def release(self) -> None:
        """Use nothing any more, as when the process ends."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    def _remove_unused(self, kept: Path) -> None:
        folders = [path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders}
        total = sum(sizes.values())
        for path in sorted(folders, key=lambda path: path.stat().st_mtime_ns):
            if total <= self.limit:
                return
            if path != kept and _is_free(path):
                shutil.rmtree(path, ignore_errors=True)
                total -= sizes[path]

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        with open(self.root / _LOCK_FILE, "ab") as file:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _is_free(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
