"""`genlora evaluate` scores models on the same examples, as validation does, and says how sure the differences are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from genlora_lightning import (
    CausalLMModule,
    ImageClassificationDataModule,
    ImageClassificationModule,
    InstructionDataModule,
    export_lora,
    inject_adapters,
    load_adapter,
    remove_adapters,
    save_adapter,
    save_merged,
)
from genlora_lightning.artifacts.adapter_folder import read_adapter_config
from genlora_lightning.cli.main import main
from tests.cli.test_generate import expected
from tests.conftest import perturb, small_config
from tests.models import tiny_bert
from tests.pictures import COLOURS, save_folders, save_vit

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
FAST = ("--resamples", "50", "--device", "cpu")


def scores(tmp_path: Path, *arguments: object) -> dict:
    assert main(["evaluate", *map(str, arguments), *FAST, "--json", str(tmp_path / "scores.json")]) == 0
    return json.loads((tmp_path / "scores.json").read_text())


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), *FAST]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def chats(talking: Path, tmp_path: Path) -> Path:
    """Examples of which the adapter `first` answers the first one as the data do."""
    rows = [{"prompt": f"w{7 + n} w8", "completion": f"w{20 + n} w9"} for n in range(5)]
    rows[0]["completion"] = expected(talking, "first", rows[0]["prompt"])
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def validated(talking: Path, adapter: str | None, chats: Path) -> dict[str, float]:
    config = read_adapter_config(talking / adapter) if adapter else None
    module = CausalLMModule(str(talking / "base"), adapter=config)
    module.configure_model()
    if adapter:
        load_adapter(module.model, talking / adapter)
    data = InstructionDataModule(str(talking / "base"), str(chats), val_file=str(chats), batch_size=2)
    trainer = Trainer(**QUIET, default_root_dir=talking)
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    return {name.removeprefix("val_"): value for name, value in found.items()}


@pytest.mark.filterwarnings("ignore:The adapters of this .* are new and untrained")
def test_language_models_have_the_numbers_of_validation(talking, chats, tmp_path, capsys):
    names = [str(talking / name) for name in ("first", "second")]
    report = scores(tmp_path, *names, "--data", chats, "--batch-size", 2, "--generate", "--max-new-tokens", 4)
    shown = capsys.readouterr().out
    base = str(talking / "base")
    assert report["reference"] == base
    assert list(report["models"]) == [base, *names]
    for name, entry in report["models"].items():
        wanted = validated(talking, None if name == base else Path(name).name, chats)
        assert entry["examples"] == 5
        for metric, value in wanted.items():
            found = entry["metrics"][metric]
            assert found["value"] == pytest.approx(value, rel=1e-4)
            assert found["low"] <= found["high"]
        assert name in shown
    first = report["models"][names[0]]
    assert first["metrics"]["exact_match"]["value"] == pytest.approx(0.2)
    apart = first["metrics"]["loss"]["value"] - report["models"][base]["metrics"]["loss"]["value"]
    assert first["minus_reference"]["loss"]["value"] == pytest.approx(apart)
    assert "minus_reference" in first
    assert report["models"][base]["minus_reference"] == {}


def test_a_base_is_loaded_once_for_all_its_adapters(talking, chats, tmp_path, monkeypatch):
    loaded = []
    original = CausalLMModule.load_backbone
    monkeypatch.setattr(CausalLMModule, "load_backbone", lambda self: loaded.append(self.source) or original(self))
    scores(tmp_path, talking / "first", talking / "second", "--data", chats)
    assert loaded == [str(talking / "base")]


def test_merged_folders_and_loras_score_as_the_adapter(talking, chats, tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.cli.conftest import word_tokenizer

    model = AutoModelForCausalLM.from_pretrained(talking / "base").eval()
    load_adapter(model, talking / "first")
    export_lora(model, tmp_path / "lora")
    save_merged(model, tmp_path / "merged")
    word_tokenizer().save_pretrained(tmp_path / "merged")
    three = [talking / "first", tmp_path / "lora", tmp_path / "merged"]
    report = scores(tmp_path, *three, "--data", chats, "--no-base")
    assert list(report["models"]) == list(map(str, three))
    assert report["reference"] == str(talking / "first")
    losses = [entry["metrics"]["loss"]["value"] for entry in report["models"].values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_text_classifiers_are_compared_without_a_base_that_has_no_head(tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, BertModel

    from tests.cli.conftest import word_tokenizer

    BertModel(tiny_bert().config, add_pooling_layer=False).save_pretrained(tmp_path / "body")
    word_tokenizer().save_pretrained(tmp_path / "body")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "body", id2label={0: "bad", 1: "fair", 2: "good"}
    )
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        inject_adapters(model, small_config(rank=2, modules_to_train=["classifier", "pooler"]))
        perturb(model, 1.0)
        save_adapter(model, tmp_path / name)
        remove_adapters(model)
    rows = [{"text": f"w{7 + n} w9", "label": ("bad", "fair", "good")[n % 3]} for n in range(7)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = [str(tmp_path / name) for name in ("one", "two")]
    report = scores(tmp_path, *both, "--data", data)
    assert report["task"] == "sequence-classification"
    assert list(report["models"]) == both
    alone = scores(tmp_path, both[1], "--data", data)
    assert alone["models"][both[1]]["metrics"] == report["models"][both[1]]["metrics"]
    assert report["models"][both[0]]["metrics"]["loss"] != report["models"][both[1]]["metrics"]["loss"]
    assert "--generate is for language models" in failure(capsys, both[0], "--data", data, "--generate")


@pytest.mark.filterwarnings("ignore:The adapters of this .* are new and untrained")
def test_image_classifiers_have_the_numbers_of_validation(tmp_path):
    vit, pictures = save_vit(tmp_path / "vit"), save_folders(tmp_path / "pictures", 3)
    config = small_config(rank=2, modules_to_train=["classifier"])
    module = ImageClassificationModule(vit, label_names=list(COLOURS), adapter=config)
    module.configure_model()
    inject_adapters(module.model, config)
    perturb(module.model, 1.0)
    save_adapter(module.model, tmp_path / "adapter")
    data = ImageClassificationDataModule(vit, pictures, val_file=pictures, num_workers=0, label_names=list(COLOURS))
    (wanted,) = Trainer(**QUIET, default_root_dir=tmp_path).validate(module, datamodule=data, verbose=False)
    report = scores(tmp_path, tmp_path / "adapter", "--data", pictures)
    assert report["task"] == "image-classification"
    found = report["models"][str(tmp_path / "adapter")]["metrics"]
    for name in ("loss", "accuracy", "f1"):
        assert found[name]["value"] == pytest.approx(wanted[f"val_{name}"], rel=1e-4)


def test_what_cannot_be_compared_is_one_line(talking, chats, tmp_path, capsys):
    first = talking / "first"
    vit = save_vit(tmp_path / "vit")
    assert "Models for one task are compared with each other;" in failure(capsys, first, vit, "--data", chats)
    assert "A model is named twice" in failure(capsys, first, first, "--data", chats)
    assert "`--confidence` must be finite and greater than 0 and less than 1, got 2.0" in failure(
        capsys, first, "--data", chats, "--confidence", 2
    )
    assert "there is no file 'none.jsonl'" in failure(capsys, first, "--data", "none.jsonl")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "w7 w8"}\n')  # which has no answer
    assert "texts.jsonl:1: needs a field 'messages'" in failure(capsys, first, "--data", texts, "--generate")
