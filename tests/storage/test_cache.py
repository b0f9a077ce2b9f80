from __future__ import annotations

import threading
from pathlib import Path

import pytest

from genlora_lightning.storage.cache import FolderCache


def filled(size: int, calls: list[int] | None = None):
    def write(folder: Path) -> None:
        if calls is not None:
            calls.append(size)
        (folder / "data").write_bytes(b"x" * size)

    return write


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_folder_is_made_once_and_whole(tmp_path):
    cache, calls = FolderCache(tmp_path / "cache", 1000), []
    for _ in range(2):
        assert (cache.get("a", filled(10, calls)) / "data").read_bytes() == b"x" * 10
    assert calls == [10]

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.get("b", fail)
    assert names(tmp_path / "cache") == ["a"]


def test_several_at_once_make_it_once(tmp_path):
    calls: list[int] = []
    begun = threading.Event()

    def slow(folder: Path) -> None:
        begun.wait(0.2)
        filled(10, calls)(folder)

    # Each has descriptors, and so locks, of its own, as processes have.
    caches = [FolderCache(tmp_path, 1000) for _ in range(4)]
    threads = [threading.Thread(target=cache.get, args=("a", slow)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [10]


def test_least_recently_used_goes_first_and_what_is_used_stays(tmp_path):
    server, other = FolderCache(tmp_path, 25), FolderCache(tmp_path, 25)
    for key in ("a", "b"):
        other.get(key, filled(10))
    other.get("a", filled(10))
    server.get("c", filled(10))  # over the limit, and all is used
    assert names(tmp_path) == ["a", "b", "c"]
    other.release()
    server.get("d", filled(5))
    assert names(tmp_path) == ["a", "c", "d"]
    assert server.get("c", filled(99)).is_dir()
    server.get("e", filled(20))
    assert names(tmp_path) == ["c", "d", "e"]
