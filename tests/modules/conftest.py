"""Tiny saved models with tokenizers, and a trainer that only trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.plain import Overwrite

PAD, EOS = 0, 1
VOCABULARY = 64


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "</s>": EOS, "<unk>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _widened(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights of order 1/√width: those of a new model are so small that a frozen head gives no choice."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(15)
    return model


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of saved models: a Llama (tied), a GPT-2, a BERT body without pooler, a Llama body without head."""
    from transformers import BertModel, LlamaModel

    root = tmp_path_factory.mktemp("models")
    llama, bert = _widened(tiny_llama()), tiny_bert()
    gpt2 = _widened(tiny_gpt2())
    gpt2.config.bos_token_id = gpt2.config.eos_token_id = gpt2.generation_config.eos_token_id = EOS
    untied = copy.deepcopy(llama.config)
    untied.tie_word_embeddings = False
    saved = {
        "llama": llama,
        "gpt2": gpt2,
        "bert": _widened(BertModel(bert.config, add_pooling_layer=False)),
        "llama_body": LlamaModel(untied),
    }
    for name, model in saved.items():
        model.save_pretrained(root / name)
        _save_tokenizer(root / name)
    return {name: str(root / name) for name in saved}


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Make a trainer for the CPU that writes nothing by itself; its runs replace each other's adapters."""

    def make(**changes: Any) -> Trainer:
        changes["callbacks"] = [*(changes.get("callbacks") or []), Overwrite()]
        return Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": tmp_path,
                "num_sanity_val_steps": 0,
                **changes,
            }
        )

    return make


def text_batch(rows: list[tuple[list[int], list[int]]], length: int | None = None) -> dict[str, torch.Tensor]:
    """A right-padded batch of (prompt, answer) token lists with labels on the answers."""
    length = length or max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for index, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[index, :end] = torch.tensor([*prompt, *answer])
        mask[index, :end] = 1
        labels[index, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(batches: list[dict[str, Any]]) -> DataLoader[Any]:
    """A loader of ready batches."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
