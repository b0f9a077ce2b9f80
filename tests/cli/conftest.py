"""A tiny model that chats, and adapters of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genlora_lightning import inject_adapters, remove_adapters, save_adapter
from tests.conftest import perturb, small_config
from tests.models import tiny_llama

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def word_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A tokenizer of 64 tokens: words `w6` to `w63`."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>", *(f"w{number}" for number in range(6, 64))]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `base`, a model with a tokenizer, and `first` and `second`, adapters of it with other answers."""
    root = tmp_path_factory.mktemp("talking")
    model = tiny_llama(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    with torch.no_grad():  # so that what is most probable depends on what was said
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(15)
    model.save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    loaded = type(model).from_pretrained(root / "base")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        inject_adapters(loaded, small_config(rank=2 + seed, exclude_modules=["lm_head"]))
        perturb(loaded, 1.0)
        save_adapter(loaded, root / name)
        remove_adapters(loaded)
    return root
