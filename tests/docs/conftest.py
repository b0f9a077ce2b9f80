"""A folder as a reader of the documentation has it: a small model that chats, its data, a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from genlora_lightning import export_lora, inject_adapters, remove_adapters, save_adapter
from genlora_lightning.cli.main import main
from tests.cli.conftest import word_tokenizer
from tests.conftest import perturb, small_config
from tests.hub import Hub
from tests.models import tiny_llama
from tests.pictures import SIDE, save_folders, save_vit

MODEL = "data/quickstart/model"
PICTURES = "facebook/dinov2-small"  # on the same Hub
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # on a Hub that the tests serve
# Added to each training.
SHORT = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.limit_train_batches=2"]


def write_json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pages start from."""
    root = tmp_path_factory.mktemp("reader")
    model = tiny_llama(vocab_size=49152, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model.save_pretrained(root / MODEL)
    word_tokenizer().save_pretrained(root / MODEL)
    for name in ("train", "val", "test"):
        rows = [{"prompt": f"w{n} w{n + 1}", "completion": "w6 w7" if n % 2 else "w8"} for n in range(6, 22)]
        write_json_lines(root / f"data/quickstart/{name}.jsonl", rows)
    shutil.copy(root / "data/quickstart/test.jsonl", root / "test.jsonl")
    write_json_lines(root / "questions.jsonl", [{"prompt": "w6 w7"}])
    chats = [
        {"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w6 w7"}]}
        for n in range(6, 26)
    ]
    write_json_lines(root / "chats.jsonl", chats)
    own = {
        "model": {"class_path": "CausalLMModule", "init_args": {"model": MODEL, "gradient_checkpointing": False}},
        "data": {
            "class_path": "InstructionDataModule",
            "init_args": {
                "train_file": "data/quickstart/train.jsonl",
                "val_file": None,
                "test_file": None,
                "batch_size": 2,
                "num_workers": 0,
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": "32-true", "strategy": "auto"},
    }
    (root / "my_task.yaml").write_text(yaml.safe_dump(own))
    # What the pages take for granted: a run of the quickstart, an adapter, a LoRA.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fit = ["fit", "--config", "genlora:quickstart", *SHORT, "--data.batch_size=2", "--data.num_workers=0"]
        main([*fit, "--trainer.callbacks.save_last=true"])
    shutil.copy(next(root.glob("runs/quickstart/logs/version_0/checkpoints/*.ckpt")), root / "last.ckpt")
    model.config._name_or_path = model.name_or_path = NAME
    inject_adapters(model, small_config(exclude_modules=["lm_head"]))
    perturb(model, 1.0)
    for name in ("reviews", "other", "support", "legal"):
        save_adapter(model, root / f"runs/{name}/adapter")
    export_lora(model, root / "lora")
    remove_adapters(model)
    return root


@pytest.fixture
def folder(prepared: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path / "reader")
    hub.repos[NAME] = {"main": {file.name: file.read_bytes() for file in (prepared / MODEL).iterdir()}}
    monkeypatch.chdir(tmp_path / "reader")
    return tmp_path / "reader"


@pytest.fixture
def pictures(folder: Path, hub: Hub, tmp_path: Path) -> None:
    """Pictures in folders, and a model of pictures on the Hub."""
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    save_vit(tmp_path / "dinov2", Dinov2Model(Dinov2Config(**sizes)))
    hub.repos[PICTURES] = {"main": {file.name: file.read_bytes() for file in (tmp_path / "dinov2").iterdir()}}
    for name in ("pictures", "new_pictures"):
        save_folders(folder / name, each=6, colours=("blue", "red"))
