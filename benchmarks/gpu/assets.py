"""What the language tasks need, in one folder: a model and tokenised questions, real ones, or tiny ones to try."""

from __future__ import annotations

import os
import random
from pathlib import Path

from benchmarks.quality import questions
from benchmarks.quality.language import MODEL_VARIABLE, model_folder

from .good import TASKS, TINY


def use(folder: Path) -> None:
    """Let this process and those that it starts take model and questions from a folder, where it has them."""
    for variable, name in ((MODEL_VARIABLE, "model"), (questions.TOKENS_VARIABLE, "tokens")):
        if (folder / name).is_dir():
            os.environ[variable] = str((folder / name).resolve())


def store_tokens(folder: Path) -> None:
    """Write the questions of all language tasks as token ids."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    for task in TASKS:
        questions.store(task, questions.splits(task, tokenizer), folder)


def make_tiny(folder: Path) -> None:
    """Make a model of random weights and questions of random tokens."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained(folder / "model")
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)

    def question() -> questions.Encoded:
        answers = [[draw.randrange(3, 64) for _ in range(2)] for _ in range(3)]
        return questions.Encoded([draw.randrange(3, 64) for _ in range(6)], answers, draw.randrange(3))

    parts = {name: [question() for _ in range(16)] for name in ("train", "val", "test")}
    for task in TINY.tasks:
        questions.store(task, parts, folder / "tokens")
