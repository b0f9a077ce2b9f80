"""Tasks for SmolLM2-135M: choose among answers by their likelihood, write a number, learn a kind of text.

The loss of a question is that of the right answer's tokens alone, and logits are computed there alone: the vocabulary
is large. That of a text is of all its tokens.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import data, questions, texts
from .batches import bucketed, on_device
from .questions import Encoded
from .repeats import repeated

ATTENTION = "eager"
AnswerBatch = tuple[Sequence[Encoded], dict[str, Tensor], Tensor]  # questions, batch, `1000 · question + answer`
MODEL_VARIABLE = "GENLORA_BENCHMARK_LLM"


def model_folder() -> Path:
    """SmolLM2-135M as `examples/quickstart/prepare.py` makes it, or the folder that the environment names.

    Raises:
        FileNotFoundError: It is not there; the message says how to make it.
    """
    folder = Path(os.environ.get(MODEL_VARIABLE, data.ROOT / "data" / "quickstart" / "model"))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"No model in {folder}. Run `python examples/quickstart/prepare.py`, or set {MODEL_VARIABLE} to its folder."
        )
    return folder


class LanguageModel(nn.Module):
    """The decoder's blocks, and log-probabilities at the places that are asked for."""

    head = None  # the output layer is the embedding, which stays frozen

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, input_ids: Tensor, places: Tensor, **arguments: Any) -> Tensor:
        """Logits ``(places, vocabulary)`` at the flat indices `places` into ``(batch · tokens)``."""
        hidden = self.base(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state
        return F.linear(hidden.flatten(0, 1)[places], self.base.embed_tokens.weight).float()


class LanguageTask:
    """What the tasks of the language model have in common: the model, and how much of its English it forgets."""

    num_seeds = 3
    num_tuning_seeds = 1
    head_lr = 0.0
    lr_factor = 1.0
    base_dtype = torch.float32  # faster than bfloat16 on most CPUs

    def build(self, seed: int, *, full: bool = False) -> LanguageModel:
        """The model with a frozen base (float32 where all is trained)."""
        from transformers import AutoModel

        dtype = torch.float32 if full else self.base_dtype
        base = AutoModel.from_pretrained(model_folder(), attn_implementation=ATTENTION, dtype=dtype)
        base.eval().requires_grad_(False)
        return LanguageModel(base)

    def skeleton(self) -> nn.Module:
        """What the adapters are put on, without values."""
        from transformers import AutoConfig, AutoModel

        with torch.device("meta"):
            return AutoModel.from_config(AutoConfig.from_pretrained(model_folder()))

    @functools.cached_property
    def _general(self) -> list[list[int]]:
        found = texts.stored(texts.GENERAL) or texts.windows(texts.GENERAL, tokenizer())
        return found["test"]

    def general_loss(self, model: nn.Module) -> float:
        """Mean loss per token of English news, which no task trains."""
        return _windows_loss(model, self._general)["loss"]


class TextTask(LanguageTask):
    """Text of one kind, in windows: the loss of all tokens, and how often the next token was the most likely one."""

    batch_size = 4
    steps = 300

    def __init__(self, name: str) -> None:
        self.name = name
        self.splits = texts.stored(name) or texts.windows(name, tokenizer())

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a seed: the same for every method."""
        train = self.splits["train"]
        for chosen in bucketed([texts.WINDOW] * len(train), self.batch_size, seed, steps):
            yield {"input_ids": torch.tensor([train[index] for index in chosen])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy, the mean over all tokens but the first."""
        logits, targets = _next_tokens(model, batch["input_ids"])
        return F.cross_entropy(logits, targets)

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Mean loss per token, also of windows that training repeats and of the others, and the share predicted."""
        return _windows_loss(model, self.splits[split], self._repeated[split])

    @functools.cached_property
    def _repeated(self) -> dict[str, list[bool]]:
        return repeated(self.splits)


def _next_tokens(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    rows, length = ids.shape
    places = (torch.arange(rows).unsqueeze(1) * length + torch.arange(length - 1)).flatten().to(ids.device)
    return model(ids, places), ids[:, 1:].flatten()


@torch.no_grad()
def _windows_loss(
    model: nn.Module, found: Sequence[Sequence[int]], again: Sequence[bool] | None = None
) -> dict[str, float]:
    parts = []
    for start in range(0, len(found), 8):
        ids = torch.tensor(found[start : start + 8], device=model.base.device)
        logits, targets = _next_tokens(model, ids)
        parts.append(token_scores(logits, targets).unflatten(1, (len(ids), -1)))
    return window_scores(torch.cat(parts, 1), again)


def token_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token, and whether it was the most likely one: ``(2, tokens)``."""
    return torch.stack([F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(1) == targets).float()])


def window_scores(of_tokens: Tensor, again: Sequence[bool] | None) -> dict[str, float]:
    """Means over all tokens of `of_tokens` ``(2, windows, tokens)``; the loss also by :func:`repeated`."""
    losses, right = of_tokens.double().cpu()
    scores = {"loss": losses.mean().item(), "accuracy": right.mean().item()}
    if again is not None:
        known = torch.tensor(again)
        for name, windows in (("fresh_loss", losses[~known]), ("repeated_loss", losses[known])):
            if len(windows):
                scores[name] = windows.mean().item()
    return scores


@functools.cache
def tokenizer() -> Any:
    """SmolLM2's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


class QuestionTask(LanguageTask):
    """Questions; the loss of the right answer per token, and the share of questions answered right.

    With several answers, the one with the highest mean log-likelihood per token counts as given. With one, it counts as
    right if each of its tokens is the most likely one after those before: then greedy generation writes just that.
    """

    batch_size = 8
    steps = 100
    num_tuning_seeds = 2  # the few questions for validation leave the rate to chance
    lr_factor = 2.0  # on the rates that experiments try
    base_dtype = torch.bfloat16

    def __init__(self, name: str) -> None:
        self.name = name
        self.splits = questions.stored(name) or questions.splits(name, tokenizer())

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a seed: the same for every method."""
        train = self.splits["train"]
        for chosen in bucketed([question.length for question in train], self.batch_size, seed, steps):
            yield right_answers([train[index] for index in chosen])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy, the mean over the right answers' tokens."""
        return F.cross_entropy(model(batch["inputs"], batch["places"]), batch["targets"])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Mean loss per token of the right answers, and the share of questions answered right."""
        total, tokens, right = 0.0, 0, 0
        for part, batch, owners in self._answer_batches(split, model.base.dtype):
            batch = on_device(batch, model.base.device)
            logits = model(batch["inputs"], batch["places"], **decoder_arguments(batch))
            losses = F.cross_entropy(logits, batch["targets"], reduction="none").cpu()
            hits = (logits.argmax(1) == batch["targets"]).cpu()
            for index, question in enumerate(part):
                mine = [owners == 1000 * index + answer for answer in range(len(question.answers))]
                total += losses[mine[question.right]].sum().item()
                tokens += int(mine[question.right].sum())
                if len(mine) == 1:
                    right += bool(hits[mine[0]].all())
                else:
                    right += int(torch.stack([losses[m].mean() for m in mine]).argmin()) == question.right
        return {"loss": total / tokens, "accuracy": right / len(self.splits[split])}

    def _answer_batches(self, split: str, dtype: torch.dtype) -> Iterator[AnswerBatch]:
        """The questions of a split with all their answers, sixteen of similar length at a time."""
        found = sorted(self.splits[split], key=lambda question: question.length)
        for start in range(0, len(found), 16):
            part = found[start : start + 16]
            yield part, *all_answers(part, dtype)


class LongQuestionTask(QuestionTask):
    """The tasks of many questions: longer runs, in float32."""

    steps = 300
    num_tuning_seeds = 1
    lr_factor = 1.0
    base_dtype = torch.float32


def decoder_arguments(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder takes of a batch, besides its inputs."""
    return {key: batch[key] for key in ("attention_mask", "position_ids") if key in batch}


def right_answers(found: Sequence[Encoded]) -> dict[str, Tensor]:
    """Questions with their right answers, padded on the right: with causal attention no mask is needed."""
    longest = max(question.length for question in found)
    rows, places, targets = [], [], []
    for number, question in enumerate(found):
        answer = question.answers[question.right]
        rows.append([*question.prompt, *answer, *[0] * (longest - question.length)])
        first = number * longest + len(question.prompt) - 1
        places += range(first, first + len(answer))
        targets += answer
    return {"inputs": torch.tensor(rows), "places": torch.tensor(places), "targets": torch.tensor(targets)}


def all_answers(found: Sequence[Encoded], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Each question once, followed by all its answers, each of which sees the question and itself alone.

    Returns:
        The batch, and for each place ``1000 · question + answer``.
    """
    lengths = [len(question.prompt) + sum(map(len, question.answers)) for question in found]
    longest = max(lengths)
    ids = torch.zeros(len(found), longest, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segment = torch.full_like(ids, -1)  # 0 for the question, 1 and up for the answers
    places, targets, owners = [], [], []
    for number, question in enumerate(found):
        start = n_prompt = len(question.prompt)
        ids[number, :n_prompt] = torch.tensor(question.prompt)
        positions[number, :n_prompt] = torch.arange(n_prompt)
        segment[number, :n_prompt] = 0
        for index, answer in enumerate(question.answers):
            end = start + len(answer)
            ids[number, start:end] = torch.tensor(answer)
            positions[number, start:end] = torch.arange(n_prompt, n_prompt + len(answer))
            segment[number, start:end] = index + 1
            places += [number * longest + place for place in (n_prompt - 1, *range(start, end - 1))]
            targets += answer
            owners += [1000 * number + index] * len(answer)
            start = end
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    sees_question = (segment == 0).unsqueeze(1) & (segment >= 0).unsqueeze(2)
    allowed = (same | sees_question) & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)
    batch = {
        "inputs": ids,
        "position_ids": positions,
        "attention_mask": mask,
        "places": torch.tensor(places),
        "targets": torch.tensor(targets),
    }
    return batch, torch.tensor(owners)
