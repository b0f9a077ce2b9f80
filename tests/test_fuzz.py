"""A small sample of what ``python -m tests.fuzz`` runs, and what it has found."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.artifacts.adapter_folder import manifest_bytes
from genlora_lightning.artifacts.adapter_io import load_adapter, save_adapter
from genlora_lightning.artifacts.checkpoint import keep_adapters_only
from genlora_lightning.artifacts.inspection import verify_adapter
from genlora_lightning.artifacts.loading import convert_checkpoint, load_module, read_checkpoint
from genlora_lightning.data._files import read_records
from genlora_lightning.errors import DamagedFileError, DataFileError
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.storage.digests import sha256
from genlora_lightning.training.optim import OptimizerConfig
from tests.conftest import small_config
from tests.fuzz import HOSTILE, SHARES, TARGETS, fault_of

SAMPLE = 8
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
QUICK = settings(max_examples=40, deadline=None, database=None, derandomize=True)
IN_FOLDER = settings(QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONFIGS: tuple[Any, ...] = (small_config, LoRAConfig, OptimizerConfig)
FIELDS = [(cls, name) for cls in CONFIGS for name in cls().to_dict() if name != "kind"]


def attempt(call: Callable[[], Any], *errors: type[Exception]) -> tuple[Any, str | None]:
    """What is returned, or the message of one of these errors."""
    try:
        return call(), None
    except errors as error:
        return None, str(error)


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_input_is_read_or_refused_in_words_of_ours(target: str) -> None:
    faults = [fault_of(target, seed) for seed in range(SAMPLE * SHARES[target])]
    assert [fault for fault in faults if fault is not None] == []


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: object, rng: object) -> object:
        yield lambda: {}["x"]

    monkeypatch.setitem(TARGETS, "broken", broken)
    assert "KeyError: 'x'" in str(fault_of("broken", 0))


def test_every_field_of_a_configuration_takes_its_values_or_says_why_not() -> None:
    for field in FIELDS:
        for value in HOSTILE:
            check_field(*field, value)


@QUICK
@given(field=st.sampled_from(FIELDS), value=JSON)
def test_any_value_of_a_field_is_taken_or_refused_by_name(field: tuple[Any, str], value: Any) -> None:
    check_field(*field, value)


def check_field(cls: Any, name: str, value: Any) -> None:
    read: Any = OptimizerConfig.from_dict if cls is OptimizerConfig else read_config
    config, complaint = attempt(lambda: read({**cls().to_dict(), name: value}), TypeError, ValueError)
    if complaint is not None:
        assert name in complaint
        assert len(complaint) < 2000
        return
    assert read(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


@IN_FOLDER
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_any_bytes_are_records_or_a_complaint_with_file_and_line(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    records, complaint = attempt(lambda: read_records(str(path), "train_file"), DataFileError)
    if complaint is not None:
        assert complaint.startswith(str(path))
        return
    assert all(record.where.startswith(f"{path}:") for record in records)


@IN_FOLDER
@given(fields=st.dictionaries(st.text(min_size=1, max_size=9), JSON.filter(lambda v: v == v), max_size=4))
def test_records_come_back_from_jsonl_as_they_were_written(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(fields) + "\r\n\n", encoding="utf-8-sig")
    (record,) = read_records(str(path), "train_file")
    assert json.dumps(record.fields) == json.dumps(fields)


# What it has found


def adapter(folder: Path) -> Path:
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    inject_adapters(net, small_config(rank=2))
    return save_adapter(net, folder / "adapter")


def resealed(folder: Path, change: Any = None) -> None:
    """Change the manifest, and make all digests fit."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["sha256"]
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data)}
    if change is not None:
        change(manifest)
    path.write_bytes(manifest_bytes(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("layers"), r"manifest\.json is damaged, .* it has no layers"),
        (
            lambda m: m["layers"].update({"0": [8, "6"]}),
            r"manifest\.json is damaged, .* layers\.0 cannot be \[8, '6'\]",
        ),
        (lambda m: m["layers"].update({"x": [8, 6]}), r"The tensors of x in .* are incomplete"),
        (lambda m: m["trained_modules"].update({"0": ["x"]}), "it has no tensor 'x'"),
        (lambda m: m["base"].pop("name"), r"it has no base\.name"),
        (
            lambda m: m["base"]["fingerprint"].update(samples={"0.weight": [1, [], "="]}),
            r"samples\.0\.weight cannot be",
        ),
        (lambda m: m.update(format_version=2.0), r"manifest\.json has format version 2\.0"),
        (lambda m: m.update(versions=[]), r"versions must be a dictionary .*, got \[\]"),
    ],
)
def test_manifest_of_another_form_is_refused_with_its_place(tmp_path: Path, change: Any, message: str) -> None:
    folder = adapter(tmp_path)
    verify_adapter(folder)
    resealed(folder, change)
    with pytest.raises(ValueError, match=message):
        verify_adapter(folder)


def test_damaged_header_and_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    folder = adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    first = next(iter(tensors))
    path.write_bytes(safetensors.torch.save({**tensors, first: torch.full_like(tensors[first], torch.nan)}))
    resealed(folder)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    with pytest.raises(
        DamagedFileError, match=r"adapter_model\.safetensors is damaged: .* holds NaN or infinite values"
    ):
        load_adapter(net, folder)
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    resealed(folder)
    with pytest.raises(DamagedFileError, match=r"adapter_model\.safetensors is no readable safetensors file"):
        load_adapter(net, folder)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ([], r"c\.ckpt have format version None"),
        ({"format_version": "2"}, r"c\.ckpt have format version '2'"),
        ({"format_version": 2}, r"c\.ckpt is damaged, .* it has no genlora\.config"),
        ({"format_version": 2, "config": {"rank": "x"}}, r"c\.ckpt holds no valid configuration .* `rank` must be"),
        ({"format_version": 2, "config": {}, "layers": [1]}, r"c\.ckpt is damaged, .* genlora\.layers must be a dict"),
        (
            {"format_version": 2, "config": {"kind": []}},
            r"c\.ckpt holds no valid configuration .* kind of adapter \[\]",
        ),
        (
            {"format_version": 2, "config": {"num_centers": 2**40}},
            r"`num_centers` must be at most 2147483647, got 10995",
        ),
        ({"format_version": 2, "config": {}}, r"c\.ckpt is damaged, .* state_dict\.x must be Tensor, got None"),
    ],
)
def test_checkpoint_of_another_form_is_refused_with_its_name(tmp_path: Path, described: Any, message: str) -> None:
    path = tmp_path / "c.ckpt"
    torch.save({"state_dict": {"x": None}, "genlora": described}, path)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path, torch.nn.Linear(2, 2), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_checkpoint_that_says_nothing_of_trained_modules_has_none(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    inject_adapters(net, small_config(rank=2))
    content: dict[str, Any] = {"state_dict": net.state_dict()}
    keep_adapters_only(net, content, [])
    del content["genlora"]["trained_modules"], content["genlora"]["prefix"]
    torch.save(content, tmp_path / "c.ckpt")
    plain = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    plain.load_state_dict({name: net.state_dict()[f"{name[:1]}.base_layer{name[1:]}"] for name in plain.state_dict()})
    load_module(plain, tmp_path / "c.ckpt")
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_damaged_checkpoint_of_format_1_is_refused_with_its_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "genlora": {"format_version": 1}}, tmp_path / "c.ckpt")
    with pytest.raises(DamagedFileError, match=r"c\.ckpt is damaged: its format 1 is incomplete"):
        read_checkpoint(tmp_path / "c.ckpt")
