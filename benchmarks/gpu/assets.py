"""What the language tasks need, in one folder: a model and tokens, real ones, or tiny ones to try."""

from __future__ import annotations

import os
import random
from pathlib import Path

from benchmarks.quality import questions, texts
from benchmarks.quality.language import MODEL_VARIABLE, model_folder

from .good import TASKS

MOST_WINDOWS = 3200  # of a text for training: twice what a run sees


def use(folder: Path) -> None:
    """Let this process and those that it starts take model and questions from a folder, where it has them."""
    for variable, name in ((MODEL_VARIABLE, "model"), (questions.TOKENS_VARIABLE, "tokens")):
        if (folder / name).is_dir():
            os.environ[variable] = str((folder / name).resolve())


def store_tokens(folder: Path) -> None:
    """Write the questions and texts of all tasks as token ids."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    for task in TASKS:
        if task in questions.FILES:
            questions.store(task, questions.splits(task, tokenizer), folder)
    for text in (*(task for task in TASKS if task in texts.TRAINED), texts.GENERAL):
        parts = texts.windows(text, tokenizer)
        texts.store(text, {**parts, "train": parts["train"][:MOST_WINDOWS]}, folder)


def make_tiny(folder: Path) -> None:
    """Make a model of random weights, and questions and texts of random tokens."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).save_pretrained(folder / "model")
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)

    def question() -> questions.Encoded:
        answers = [[draw.randrange(3, 64) for _ in range(2)] for _ in range(3)]
        return questions.Encoded([draw.randrange(3, 64) for _ in range(6)], answers, draw.randrange(3))

    parts = {name: [question() for _ in range(16)] for name in ("train", "val", "test")}
    for task in questions.FILES:
        questions.store(task, parts, folder / "tokens")
    windows = {name: [[draw.randrange(3, 64) for _ in range(16)] for _ in range(8)] for name in parts}
    for text in (*texts.TRAINED, texts.GENERAL):
        texts.store(text, windows, folder / "tokens")
