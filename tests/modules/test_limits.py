from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from genlora_lightning.data import InstructionDataModule, TextClassificationDataModule
from genlora_lightning.modules import CausalLMModule, SequenceClassificationModule
from genlora_lightning.modules.limits import TableLimits
from genlora_lightning.training.optim import OptimizerConfig
from tests.conftest import small_config
from tests.models import tiny_bert, tiny_gpt2, tiny_llama
from tests.modules.conftest import VOCABULARY, loader, text_batch

MakeTrainer = Callable[..., Trainer]
PLAIN = {"adapter": small_config(), "optimizer": OptimizerConfig(schedule="constant")}


def records(path: Path, *fields: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in fields))
    return str(path)


def tokenizer_of(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_limits_are_those_of_the_tables() -> None:
    from transformers import OPTConfig, OPTForCausalLM, RobertaConfig, RobertaModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=32))
    roberta = RobertaModel(RobertaConfig(**small, intermediate_size=16, max_position_embeddings=34, type_vocab_size=1))
    assert TableLimits.of(tiny_llama()) == TableLimits(64, None, None), "rotary positions have no table"
    assert TableLimits.of(tiny_gpt2()) == TableLimits(64, 64, None)
    assert TableLimits.of(tiny_bert()) == TableLimits(64, 64, 2)
    assert TableLimits.of(opt) == TableLimits(40, 32, None)
    assert TableLimits.of(roberta) == TableLimits(40, 32, 1), "two of its rows are for padding"
    assert TableLimits.of(torch.nn.Linear(2, 2)) == TableLimits()


def test_token_that_the_embedding_has_no_row_for_stops_before_the_first_step(
    make_trainer: MakeTrainer, model_folders: dict[str, str], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(model_folders["llama"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    path = records(tmp_path / "t.jsonl", *[{"prompt": f"w{i}", "completion": " w5"} for i in range(3, 40)])
    late = records(tmp_path / "v.jsonl", {"prompt": "<new> w4", "completion": " w5"})
    module = CausalLMModule(model_folders["llama"], **PLAIN)
    data = InstructionDataModule(tokenizer, path, val_file=late, chat_template="none", batch_size=2)
    with pytest.raises(
        ValueError, match=rf"The data hold the token number {VOCABULARY}, but .* has {VOCABULARY} rows .*"
    ):
        make_trainer(max_steps=2, limit_val_batches=0).fit(module, data)
    assert module.trainer.global_step == 0
    fine = InstructionDataModule(tokenizer, path, chat_template="none", batch_size=2)
    make_trainer(max_steps=2, limit_val_batches=0).fit(CausalLMModule(model_folders["llama"], **PLAIN), fine)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"input_ids": 64}, r"The batch's `input_ids` hold the token number 64, but .* has 64 rows"),
        ("llama", {"input_ids": -1}, "The batch's `input_ids` hold the token number -1"),
        ("llama", {"labels": 64}, "The batch's `labels` hold the token number 64"),
        ("bert", {"token_type_ids": 2}, r"`token_type_ids` are from 0 to 2, but the model has 2 token types"),
    ],
)
def test_batch_of_any_loader_is_checked(
    make_trainer: MakeTrainer, model_folders: dict[str, str], name: str, change: dict[str, int], message: str
) -> None:
    batch = text_batch([([5, 6], [7, 8])])
    if name == "bert":
        batch = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"]), "labels": torch.tensor([1])}
        module: Any = SequenceClassificationModule(model_folders[name], num_labels=2, **PLAIN)
    else:
        module = CausalLMModule(model_folders[name], **PLAIN)
    for field, number in change.items():
        batch[field][0, -1] = number
    for stage in ("fit", "validate"):
        with pytest.raises(ValueError, match=message):
            getattr(make_trainer(max_steps=1), stage)(module, loader([batch]))


def test_sequences_longer_than_the_table_of_positions_stop_before_the_first_step(
    make_trainer: MakeTrainer, model_folders: dict[str, str], tmp_path: Path
) -> None:
    rows = [{"text": "w4 " * length, "label": str(length % 2)} for length in (3, 4, 62)]
    path = records(tmp_path / "t.jsonl", *rows)

    def fit(**options: Any) -> None:
        data = TextClassificationDataModule(model_folders["bert"], path, batch_size=1, **options)
        module = SequenceClassificationModule(model_folders["bert"], label_names=data.label_names, **PLAIN)
        make_trainer(max_steps=1, limit_val_batches=0).fit(module, data)

    fit()
    with pytest.raises(
        ValueError, match=r"longest sequences are 72 tokens long, padding included, but .* 64 positions"
    ):
        fit(pad_to_multiple_of=24)
    rows[-1]["text"] += "w4 " * 3
    records(tmp_path / "t.jsonl", *rows)
    with pytest.raises(ValueError, match=r"72 tokens long, .* Set the data's `max_length` to 64 or less"):
        fit()


def test_tokenizer_of_another_model_is_refused(
    make_trainer: MakeTrainer, model_folders: dict[str, str], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer(words: list[str]) -> Any:
        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")

    path = records(tmp_path / "t.jsonl", {"prompt": "w4", "completion": " w5"})
    own = ["<pad>", "</s>", "<unk>"]
    moved, foreign = ["</s>", "<pad>", "<unk>"], [*own, *(f"other{i}" for i in range(20))]
    for words, message in (
        (moved, r"it gives '.*' the number \d, the model's own gives it \d"),
        (foreign, "of its 23 tokens the model's own has 3"),
    ):
        data = InstructionDataModule(tokenizer(words), path, chat_template="none")
        module = CausalLMModule(model_folders["llama"], **PLAIN)
        with pytest.raises(ValueError, match=f"The data's tokenizer is another model's: {message}"):
            make_trainer(max_steps=1, limit_val_batches=0).fit(module, data)
