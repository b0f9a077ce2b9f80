from __future__ import annotations

import errno
import os
import random
import threading
import time
from contextlib import contextmanager

import pytest

from genlora_lightning.storage import atomic
from genlora_lightning.storage.atomic import atomic_file, atomic_folder, find_folder
from tests.killing import kill_after, kill_before_step


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways to replace a folder: the system's exchange, and what is done where there is none."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


def write(folder, value: str) -> None:
    with atomic_folder(folder) as staging:
        (staging / "a").write_text(value)
        (staging / "sub").mkdir()
        (staging / "sub" / "b").write_text(value)


def content(folder) -> str:
    """The folder's value, which all its files must agree on."""
    place = find_folder(folder)
    values = {(place / "a").read_text(), (place / "sub" / "b").read_text()}
    assert len(values) == 1
    return values.pop()


def write_file(path, value: str) -> None:
    with atomic_file(path) as file:
        file.write(value.encode())


def test_folder_is_made_with_its_parents_and_replaced_as_a_whole(tmp_path, way):
    folder = tmp_path / "deep" / "folder"
    write(folder, "one")
    (folder / "left over from the first").write_text("")
    write(folder, "two")
    assert content(folder) == "two"
    assert sorted(os.listdir(folder)) == ["a", "sub"]
    assert os.listdir(folder.parent) == ["folder"]


def test_file_is_made_with_its_parents_and_replaced(tmp_path):
    path = tmp_path / "deep" / "file"
    write_file(path, "one")
    write_file(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file"]


def test_this_systems_exchange_is_used(tmp_path):
    if os.uname().sysname != "Linux":
        pytest.skip("the exchange of folders is Linux's")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert atomic._exchange(tmp_path / "first", tmp_path / "second")
    assert os.listdir(tmp_path / "first") == ["second"]
    with pytest.raises(FileNotFoundError):
        atomic._exchange(tmp_path / "first", tmp_path / "nothing")


def test_symbolic_link_is_followed_and_stays(tmp_path, way):
    write(tmp_path / "target", "one")
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "target") == "two"
    (tmp_path / "file_link").symlink_to("file")
    write_file(tmp_path / "file_link", "three")
    assert (tmp_path / "file_link").is_symlink()
    assert (tmp_path / "file").read_text() == "three"
    assert sorted(os.listdir(tmp_path)) == ["file", "file_link", "link", "target"]


def test_error_in_the_block_leaves_the_old_one_and_nothing_else(tmp_path, way):
    write(tmp_path / "folder", "one")
    write_file(tmp_path / "file", "one")
    for replace in (atomic_folder, atomic_file):
        name = replace.__name__.removeprefix("atomic_")
        with pytest.raises(KeyboardInterrupt), replace(tmp_path / name):
            raise KeyboardInterrupt
    assert content(tmp_path / "folder") == (tmp_path / "file").read_text() == "one"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5])
def test_failing_flush_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, way, failing):
    # Two files, two folders, and the parent, which is flushed when the new folder is in its place already.
    write(tmp_path / "folder", "one")
    calls, fsync = [], os.fsync

    def fails(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", fails)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "folder", "two")
    calls.clear()
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "first", "one")
    assert content(tmp_path / "folder") == "one"
    assert os.listdir(tmp_path) == ["folder"]


def test_failing_second_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "folder", "one")
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    rename, calls = os.rename, []

    def second_fails(source: object, target: object) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(atomic.os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "folder", "two")
    assert content(tmp_path / "folder") == "one"
    assert os.listdir(tmp_path) == ["folder"]


def test_folder_killed_before_every_single_step_is_the_old_or_the_new_one(tmp_path, way):
    folder = tmp_path / "folder"
    write(folder, "old")
    step, seen = 0, []
    while kill_before_step(step, lambda: write(folder, "new")):
        seen.append(content(folder))
        write(folder, "old")  # the next writer removes what the killed one left
        assert os.listdir(tmp_path) == ["folder"], step
        step += 1
    assert content(folder) == "new"
    assert seen == sorted(seen, reverse=True)  # first the old one, from one step on the new one
    assert {"old", "new"} == set(seen)
    assert len(seen) > 12


def test_reader_finds_the_old_folder_between_the_two_renames_and_the_next_writer_puts_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    folder = tmp_path / "folder"
    write(folder, "old")
    step = 0
    while folder.exists():
        assert kill_before_step(step, lambda: write(folder, "new"))
        step += 1
    assert find_folder(folder) != folder
    assert content(folder) == "old"
    # Even a writer that fails at once has put it back before.
    with pytest.raises(KeyError), atomic_folder(folder):
        raise KeyError
    assert find_folder(folder) == folder
    assert content(folder) == "old"
    assert os.listdir(tmp_path) == ["folder"]


def test_file_killed_before_every_single_step_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    write_file(path, "old")
    step, seen = 0, []
    while kill_before_step(step, lambda: write_file(path, "new")):
        seen.append(path.read_text())
        write_file(path, "old")
        assert os.listdir(tmp_path) == ["file"], step
        step += 1
    assert {"old", "new"} == set(seen)
    assert path.read_text() == "new"


def test_folder_killed_at_random_moments_is_the_last_one_or_the_next(tmp_path, way):
    generator = random.Random(0)
    last = 0
    for _ in range(8):
        last = kill_after(generator.uniform(0, 0.02), lambda i: write(tmp_path / "folder", str(i)), last + 1)
        assert int(content(tmp_path / "folder")) in (last, last + 1)
    write(tmp_path / "folder", "end")
    assert os.listdir(tmp_path) == ["folder"]


def test_leftovers_of_living_writers_and_foreign_names_are_left_alone(tmp_path):
    foreign = [".folder.genlora-new-mine", ".folder2.genlora-new-0123456789abcdef", ".folder.tmp"]
    for name in foreign:
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "folder") as first:
        (first / "a").write_text("first")
        with atomic_folder(tmp_path / "folder") as second:
            (second / "a").write_text("second")
        assert (first / "a").read_text() == "first"
        assert (tmp_path / "folder" / "a").read_text() == "second"
    assert (tmp_path / "folder" / "a").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, "folder"])


def test_without_locks_leftovers_are_removed_when_they_are_a_day_old(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_lock_open", lambda descriptor: None)
    leftover = tmp_path / ".folder.genlora-new-0123456789abcdef"
    leftover.mkdir()
    write(tmp_path / "folder", "one")
    assert leftover.is_dir()
    os.utime(leftover, (time.time() - 90_000,) * 2)
    write(tmp_path / "folder", "two")
    assert os.listdir(tmp_path) == ["folder"]


def test_many_writers_and_a_reader_see_whole_folders_only(tmp_path, way):
    folder, errors = tmp_path / "folder", []
    write(folder, "start")

    @contextmanager
    def reported():
        try:
            yield
        except Exception as error:
            errors.append(error)

    def work(name: str) -> None:
        with reported():
            for i in range(20):
                write(folder, f"{name}{i}")

    writers = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        assert find_folder(folder).is_dir() or find_folder(folder).is_dir()
    for thread in writers:
        thread.join()
    assert not errors
    assert content(folder)[1:] == "19"
    assert os.listdir(tmp_path) == ["folder"]
