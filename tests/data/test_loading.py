from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genlora_lightning.data import InstructionDataModule
from genlora_lightning.data._loading import (
    LengthGroupedSampler,
    PadCollator,
    import_datasets,
    load_tokenizer,
    map_examples,
    padding_id,
)


def test_code_of_a_tokenizer_is_run_if_asked_and_nobody_is_asked_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    backend = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(tmp_path)
    code = "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (tmp_path / "own_code.py").write_text(code)
    file = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own_code.Own"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    with pytest.raises(ValueError, match=r"contains custom code .* Set trust_remote_code to run it"):
        _ = InstructionDataModule(str(tmp_path), "x.jsonl").tokenizer
    trusting = InstructionDataModule(str(tmp_path), "x.jsonl", trust_remote_code=True)
    assert type(trusting.tokenizer).__name__ == "Own"


def test_missing_datasets_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'genlora-lightning\[data\]'"):
        import_datasets()


def test_tokenizer_comes_from_a_folder_or_is_taken_as_it_is(tokenizer: Any, tokenizer_folder: str) -> None:
    assert load_tokenizer(tokenizer) is tokenizer
    loaded = load_tokenizer(tokenizer_folder)
    assert loaded("The sky is blue.")["input_ids"] == tokenizer("The sky is blue.")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template


def test_tokenizer_that_cannot_be_loaded_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="tokenizer must be an id, a folder or a tokenizer, got int"):
        load_tokenizer(3)
    with pytest.raises(ValueError, match=r"tokenizer: there is no folder '\./nowhere'"):
        load_tokenizer("./nowhere")
    with pytest.raises(ValueError, match="is neither a folder with a tokenizer nor an id that can be fetched"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_id_without_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"tokenizer 'some-org/some-model' is neither .* \(no network, no such id"):
        load_tokenizer("some-org/some-model")


@pytest.mark.parametrize(("pad", "eos", "expected"), [(0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_padding_needs_no_pad_token(pad: int | None, eos: int | None, expected: int) -> None:
    assert padding_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == expected


def test_batches_are_padded_to_a_multiple_on_the_side_that_is_asked_for() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5], "name": "x", "kind": 1, "other": 0},
        {"input_ids": [6, 7], "labels": [-100, 7], "name": "y", "kind": 0, "other": 0},
    ]
    right = PadCollator(keys=("input_ids", "labels", "name", "kind"), pad_token_id=9, multiple=4)(rows)
    assert right["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [6, 7, 9, 9, 9, 9, 9, 9]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert right["labels"].tolist() == [[-100, -100, 3, 4, 5, -100, -100, -100], [-100, 7, *[-100] * 6]]
    assert right["kind"].tolist() == [1, 0]
    assert right["name"] == ["x", "y"]
    assert set(right) == {"input_ids", "attention_mask", "labels", "name", "kind"}
    assert all(tensor.dtype == torch.int64 for tensor in right.values() if isinstance(tensor, torch.Tensor))

    left = PadCollator(keys=("input_ids",), pad_token_id=9, multiple=1, side="left")(rows)
    assert left["input_ids"].tolist() == [[1, 2, 3, 4, 5], [9, 9, 9, 6, 7]]
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_length_groups_are_a_shuffled_order_that_saves_padding() -> None:
    lengths = torch.randint(1, 100, (403,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, batch_size=8, generator=torch.Generator().manual_seed(1))
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(403))
    assert len(sampler) == 403
    assert first != second
    assert first == list(LengthGroupedSampler(lengths, 8, torch.Generator().manual_seed(1)))

    def padded(order: list[int]) -> int:
        batches = [order[i : i + 8] for i in range(0, len(order), 8)]
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    assert padded(first) < 0.7 * padded(list(range(403)))
    longest = [max(lengths[i] for i in first[start : start + 8]) for start in range(0, 400, 8)]
    assert longest != sorted(longest), "batches must not come in the order of their lengths"


def _count(path: Path) -> int:
    return len(list(path.glob("*.arrow")))


def test_cache_is_reused_for_equal_examples_and_never_for_others(tmp_path: Path) -> None:
    from datasets import Value

    calls: list[str] = []

    def upper(example: dict[str, Any]) -> list[dict[str, Any]]:
        calls.append(example["text"])
        return [{"result": example["text"].upper()}]

    def run(texts: list[str], settings: str = "a", cache: bool = True) -> list[str]:
        calls.clear()
        rows = map_examples(
            [{"text": text} for text in texts],
            upper,
            {"text": Value("string")},
            {"result": Value("string")},
            description="test",
            cache_dir=str(tmp_path / "cache") if cache else None,
            identity=lambda: settings,
        )
        return list(rows["result"])

    assert run(["x", "y"], cache=False) == ["X", "Y"]
    assert run(["x", "y"], cache=False) == ["X", "Y"]
    assert calls == ["x", "y"], "without a cache folder every run encodes anew"
    assert not (tmp_path / "cache").exists()

    assert run(["x", "y"]) == ["X", "Y"]
    assert calls == ["x", "y"]
    assert run(["x", "y"]) == ["X", "Y"]
    assert calls == []
    assert run(["x", "z"]) == ["X", "Z"]
    assert run(["x", "y"], settings="b") == ["X", "Y"]
    assert calls == ["x", "y"]
    assert _count(tmp_path / "cache") == 3


def test_no_progress_bar_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    import datasets

    options: dict[str, Any] = {"description": "visible", "cache_dir": None, "identity": str}
    number = {"x": datasets.Value("int64")}
    assert not datasets.are_progress_bars_disabled()
    map_examples([{"x": 1}], lambda row: [{"x": 2}], number, number, **options)
    assert "visible" not in capfd.readouterr().err
    assert not datasets.are_progress_bars_disabled(), "the user's setting is restored"


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    number = {"x": datasets.Value("int64")}
    map_examples([{"x": 1}], lambda row: [row], number, number, description="visible", cache_dir=None, identity=str)
    assert "visible" in capsys.readouterr().err
