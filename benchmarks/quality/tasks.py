"""Tasks: a frozen model, the batches it sees, and what is measured on sentences it has never seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import data, questions, texts
from .batches import bucketed, on_device
from .classifier import Classifier
from .language import LongQuestionTask, QuestionTask, TextTask
from .tail import SUFFIX, TailQuestionTask, TailTextTask
from .vision import FashionTask

_SIZES = {"movies": (2000, 1000), "tweets": (1000, 600)}


class SentimentTask:
    """Fine-grained sentiment with all-MiniLM-L6-v2; the base in bfloat16, adapters and head in float32."""

    batch_size = 16
    steps = 300
    num_seeds = 5
    num_tuning_seeds = 1
    head_lr = 2e-3
    lr_factor = 1.0  # on the rates that experiments try

    def __init__(self, domain: str) -> None:
        self.name = domain
        self.splits = data.sentiment(domain, _SIZES[domain])

    def build(self, seed: int, *, full: bool = False) -> Classifier:
        """The model with a frozen bfloat16 base (float32 where all is trained) and a head made from the seed."""
        from transformers import AutoModel

        base = AutoModel.from_pretrained(data.minilm_folder(), attn_implementation="eager", dtype=torch.float32)
        base.pooler = None
        base.eval()  # no dropout: batches and seeds decide everything, for every method alike
        if not full:
            base.to(torch.bfloat16).requires_grad_(False)
        return Classifier(base, base.config.hidden_size, data.NUM_CLASSES, seed)

    def skeleton(self) -> nn.Module:
        """What the adapters are put on, without values."""
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(data.minilm_folder())
        with torch.device("meta"):
            base = AutoModel.from_config(config)
        base.pooler = None
        return base

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a seed: the same for every method."""
        train = self.splits["train"]
        lengths = [len(tokens) for tokens in train.tokens]
        for chosen in bucketed(lengths, self.batch_size, seed, steps):
            yield _pad(train, chosen)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy, the mean over the batch."""
        return F.cross_entropy(_logits(model, batch), batch["labels"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Mean cross-entropy and accuracy."""
        examples = self.splits[split]
        order = sorted(range(len(examples)), key=lambda index: len(examples.tokens[index]))
        total, right = 0.0, 0
        for start in range(0, len(order), 64):
            batch = on_device(_pad(examples, order[start : start + 64]), model.base.device)
            logits = _logits(model, batch)
            total += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
            right += int((logits.argmax(1) == batch["labels"]).sum())
        return {"loss": total / len(order), "accuracy": right / len(order)}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def _pad(split: data.Split, chosen: list[int]) -> dict[str, Tensor]:
    tokens = nn.utils.rnn.pad_sequence([split.tokens[index] for index in chosen], batch_first=True)
    lengths = torch.tensor([len(split.tokens[index]) for index in chosen])
    mask = (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": split.labels[chosen]}


def make_task(name: str) -> Any:
    """The task of a name."""
    if name in _SIZES:
        return SentimentTask(name)
    if name in questions.FILES:
        return (LongQuestionTask if name in ("subjects", "messages") else QuestionTask)(name)
    if name in texts.TRAINED:
        return TextTask(name)
    if name.removesuffix(SUFFIX) in texts.TRAINED:
        return TailTextTask(name)
    if name.removesuffix(SUFFIX) in questions.FILES:
        return TailQuestionTask(name)
    if name == FashionTask.name:
        return FashionTask()
    tails = [whole + SUFFIX for whole in (*texts.TRAINED, *questions.FILES)]
    known = [*_SIZES, *questions.FILES, *texts.TRAINED, *tails, FashionTask.name]
    raise ValueError(f"Unknown task {name!r}; the tasks are {known}.")
