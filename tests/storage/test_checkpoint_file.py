from __future__ import annotations

import errno
import os
import random
import traceback

import pytest
import torch

from genlora_lightning.errors import DamagedFileError
from genlora_lightning.storage import atomic
from genlora_lightning.storage.checkpoint_file import read_checkpoint, verify_checkpoint, write_checkpoint
from tests.artifacts.test_adapter_io import flip
from tests.killing import kill_after, kill_before_step


def checkpoint(number: int = 1) -> dict[str, object]:
    return {"step": number, "state_dict": {f"w{i}": torch.full((100 + i,), float(number)) for i in range(4)}}


def number_in(path) -> int:
    """The checkpoint's number, after it was verified and all its tensors agree on it."""
    assert verify_checkpoint(path) == "sha256"
    loaded = read_checkpoint(path)
    assert {float(loaded["step"])} == {value for t in loaded["state_dict"].values() for value in t.unique().tolist()}
    return loaded["step"]


def test_checkpoint_comes_back_and_plain_torch_loads_it_too(tmp_path):
    path = tmp_path / "deep" / "x.ckpt"
    write_checkpoint(checkpoint(3), path)
    assert number_in(path) == 3
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert loaded["step"] == 3
        assert torch.equal(loaded["state_dict"]["w2"], torch.full((102,), 3.0))
    assert os.listdir(path.parent) == ["x.ckpt"]


def test_torch_itself_does_not_see_a_flipped_bit_in_a_weight(tmp_path):
    # Why the digest is there. If this fails, torch compares its checksums, and the digest may go.
    path = tmp_path / "x.ckpt"
    torch.save(checkpoint(), path)
    place = path.read_bytes().find(torch.full((100,), 1.0).numpy().tobytes())
    flip(path, 8 * (place + 42))
    torch.load(path, weights_only=True)
    with pytest.raises(DamagedFileError, match=r"x.ckpt .* has another CRC-32 than was written"):
        read_checkpoint(path)


def check_flips(tmp_path, count):
    path = tmp_path / "x.ckpt"
    write_checkpoint(checkpoint(), path)
    size, generator = path.stat().st_size, random.Random(0)
    places = [(0, size), (size - 101, size), (size - 300, size), (0, 200)]
    for start, end in places:
        for bit in [8 * start, 8 * end - 1, *(generator.randrange(8 * start, 8 * end) for _ in range(count))]:
            flip(path, bit)
            with pytest.raises(DamagedFileError, match=r"x\.ckpt.*It was damaged after it was written"):
                read_checkpoint(path)
            flip(path, bit)
    assert number_in(path) == 1


def test_every_flipped_bit_is_found(tmp_path):
    check_flips(tmp_path, 50)


@pytest.mark.slow
def test_every_flipped_bit_is_found_in_many_places(tmp_path):
    check_flips(tmp_path, 3000)


@pytest.mark.parametrize("save", [write_checkpoint, torch.save])
@pytest.mark.parametrize("length", [0, 1, 100, 2000, -100, -20, -1])
def test_truncated_checkpoint_is_a_clear_error(tmp_path, save, length):
    path = tmp_path / "x.ckpt"
    save(checkpoint(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFileError, match=r"x\.ckpt.*(is empty|truncated|cannot be loaded)"):
        read_checkpoint(path)


def test_files_of_torch_load_and_are_verified_by_what_they_have(tmp_path):
    torch.save(checkpoint(), tmp_path / "zip.ckpt")
    torch.save(checkpoint(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert verify_checkpoint(tmp_path / "zip.ckpt") == "crc32"
    assert verify_checkpoint(tmp_path / "old.ckpt") == "none"
    for name in ("zip.ckpt", "old.ckpt"):
        assert read_checkpoint(tmp_path / name)["step"] == 1
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(DamagedFileError, match=r"text.ckpt \(16 bytes\) cannot be loaded .*damaged, or no checkpoint"):
        read_checkpoint(tmp_path / "text.ckpt")


def test_objects_load_only_when_they_are_asked_for(tmp_path):
    write_checkpoint({"callable": os.path.join}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt", weights_only=False) == {"callable": os.path.join}


def test_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*x\.ckpt"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    write_checkpoint(checkpoint(1), path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be saved to .*x.ckpt: No space left on device.*as it was") as raised:
        write_checkpoint(checkpoint(2), path)
    assert raised.value.errno == errno.ENOSPC
    assert number_in(path) == 1
    assert os.listdir(tmp_path) == ["x.ckpt"]
    frames = {frame.f_code.co_name: frame for frame, _ in traceback.walk_tb(raised.tb)}
    frames["write_checkpoint"].f_locals["buffer"].close()  # an error while its bytes are still held by somebody


def check_random_kills(tmp_path, trials):
    path, generator, last = tmp_path / "x.ckpt", random.Random(0), 0
    for _ in range(trials):
        last = kill_after(generator.uniform(0, 0.02), lambda i: write_checkpoint(checkpoint(i), path), last + 1)
        found = number_in(path)
        assert found in (last, last + 1)
        last = found
    write_checkpoint(checkpoint(0), path)
    assert number_in(path) == 0
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_checkpoint_of_a_writer_killed_at_random_is_the_old_or_the_new_one(tmp_path):
    check_random_kills(tmp_path, 8)


@pytest.mark.slow
def test_checkpoint_of_a_writer_killed_at_random_is_the_old_or_the_new_one_in_60_trials(tmp_path):
    check_random_kills(tmp_path, 60)


def test_checkpoint_of_a_writer_killed_before_every_step_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "x.ckpt"
    write_checkpoint(checkpoint(1), path)
    step, seen = 0, []
    while kill_before_step(step, lambda: write_checkpoint(checkpoint(2), path)):
        seen.append(number_in(path))
        write_checkpoint(checkpoint(1), path)
        assert os.listdir(tmp_path) == ["x.ckpt"]
        step += 1
    assert set(seen) == {1, 2}
    assert number_in(path) == 2
