from __future__ import annotations

import os

import pytest
import torch

from genlora_lightning.storage import checkpoint_file
from genlora_lightning.storage.checkpoint_file import write_checkpoint
from genlora_lightning.training.last_checkpoint import last_good_checkpoint


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint that is so many seconds old."""

    def write(name: str, age: int, **changes: object):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        content = {"state_dict": {"a": torch.ones(300)}, "optimizer_states": [], "loops": {}, **changes}
        write_checkpoint({key: value for key, value in content.items() if value is not None}, file)
        os.utime(file, (1_700_000_000 - age,) * 2)
        return file

    return write


def test_newest_of_all_folders_is_taken(write, tmp_path):
    write("first/step=9.ckpt", 30)
    newest = write("second/step=2.ckpt", 10)
    write("second/last.ckpt", 20)
    folders = [tmp_path / name for name in ("first", "second", "none")]
    assert last_good_checkpoint(folders) == (newest, [])
    assert last_good_checkpoint([tmp_path / "none"]) == (None, [])


def test_damaged_partial_and_empty_files_are_skipped_with_a_line_each(write, tmp_path):
    good = write("c/1.ckpt", 40)
    flipped, cut, empty = (write(f"c/{n}.ckpt", 30 - n) for n in (2, 3, 4))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-200])
    empty.write_bytes(b"")
    (tmp_path / "c" / "x.ckpt.partial").write_bytes(b"half")
    found, skipped = last_good_checkpoint([tmp_path / "c"])
    assert found == good
    assert len(skipped) == 3
    for file, words in ((flipped, "another SHA-256"), (cut, "truncated"), (empty, "is empty")):
        assert any(str(file) in line and words in line for line in skipped)


def test_each_file_is_verified_once(write, tmp_path, monkeypatch):
    good, cut = write("c/1.ckpt", 40), write("c/2.ckpt", 10)
    cut.write_bytes(cut.read_bytes()[:-200])
    verified = []
    verify = checkpoint_file._verify

    def count(file, path):
        verified.append(path)
        return verify(file, path)

    monkeypatch.setattr(checkpoint_file, "_verify", count)
    assert last_good_checkpoint([tmp_path / "c"])[0] == good
    assert verified == [cut, good]


def test_file_with_weights_only_is_skipped(write, tmp_path):
    good = write("c/1.ckpt", 40)
    write("c/2.ckpt", 10, optimizer_states=None)
    found, skipped = last_good_checkpoint([tmp_path / "c"])
    assert found == good
    assert "it holds no optimizer_states (`save_weights_only`)" in skipped[0]


def test_links_to_one_file_are_one_file(write, tmp_path):
    good = write("c/step=1.ckpt", 40)
    (tmp_path / "c" / "last.ckpt").symlink_to(good.name)
    assert last_good_checkpoint([tmp_path / "c"]) == (good, [])
    good.unlink()
    assert last_good_checkpoint([tmp_path / "c"]) == (None, [])


def test_file_with_objects_of_the_users_is_left_to_the_run(write, tmp_path):
    unsafe = write("c/1.ckpt", 10, extra=os.path.join)
    assert last_good_checkpoint([tmp_path / "c"]) == (unsafe, [])
