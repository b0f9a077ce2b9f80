"""Answer a few prompts of the validation data before, during and after the training, and keep the answers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.reports.record import SAMPLES_FILE, Sample
from genlora_lightning.training.named_adapters import adapter_names
from genlora_lightning.training.run_folder import recorded_folder
from genlora_lightning.training.strategies import shards_base

DEFAULT_COUNT = 3
_MAX_NEW_TOKENS = 32
_LONGEST_PROMPT = 512  # tokens; longer ones would make it dear
_LOOKED_AT = 200  # rows of the validation data
_SECONDS = 2.0  # of all answers at a time
_SHARE = 0.005  # of a run's time, between its start and its end
_IGNORED = -100

_log = rank_zero_logger(__name__)


@dataclass(frozen=True)
class _Prompt:
    tokens: list[int]
    reference: list[int]


class AnswerSamples(Callback):
    """Answer the same prompts before and after the training, and at validations, in ``samples.jsonl``.

    Answers are greedy and short: three of 32 tokens in one batch by default, and where that takes more than two seconds
    they end there, before and after the training. At validations they are made as long as all of them, with those at
    the end, take at most 0.5 % of the time since training has started. The first rank answers; where the base is
    sharded nobody does.

    It needs a module with ``answer_prompts(prompts, max_new_tokens, max_seconds)``, as
    :class:`~genlora_lightning.CausalLMModule` has, and a data module whose ``rows("val")`` have ``input_ids`` and
    ``labels``, -100 where nothing is learned; with others it does nothing, and says so. Prompts are the first ones of
    the validation data with at most 512 tokens; of a text without a prompt it is the first half.

    Args:
        count: How many prompts.
        max_new_tokens: The most tokens of an answer.

    Raises:
        ValueError: One of them is less than 1.
    """

    def __init__(self, count: int = DEFAULT_COUNT, max_new_tokens: int = _MAX_NEW_TOKENS) -> None:
        for name, value in (("count", count), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value!r}.")
        self._count, self._max_new_tokens = count, max_new_tokens
        self._file: Path | None = None
        self._prompts: list[_Prompt] = []
        self._started = self._spent = 0.0
        self._seen, self._answered = -1, 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = recorded_folder(trainer) if stage == "fit" else None
        self._file = None if folder is None else folder / SAMPLES_FILE

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prompts, self._seen, self._spent, self._answered = [], -1, 0.0, 0
        if self._file is None:
            return
        obstacle = self._obstacle(trainer, pl_module)
        if obstacle is None:
            self._prompts = prompts_of(trainer.datamodule.rows("val"), self._count)  # type: ignore[attr-defined]
            if not self._prompts:
                obstacle = f"no prompt of the validation data has {_LONGEST_PROMPT} tokens or less"
        if obstacle is not None:
            _log.info(f"No answers are kept of this run: {obstacle}.")
            return
        self._started = time.perf_counter()
        self._answer(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._prompts or trainer.sanity_checking or trainer.global_step == self._seen:
            return
        if self._spent + 2 * self._spent / self._answered <= _SHARE * (time.perf_counter() - self._started):
            self._answer(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._prompts and trainer.global_step != self._seen:
            self._answer(trainer, pl_module)
        self._prompts = []

    def _obstacle(self, trainer: Trainer, module: LightningModule) -> str | None:
        if not callable(getattr(module, "answer_prompts", None)):
            return f"{type(module).__name__} answers no prompts"
        if adapter_names(module) != [""]:
            return "it trains several adapters, and a prompt does not say by which it is to be answered"
        if shards_base(trainer.strategy):
            return "the base is sharded, and the first rank has a piece of it only"
        data: Any = getattr(trainer, "datamodule", None)
        try:
            columns = set(data.rows("val").column_names)
        except (AttributeError, ValueError, RuntimeError):
            return "there are no validation data of tokens"
        return None if {"input_ids", "labels"} <= columns else "the validation data have no answers"

    def _answer(self, trainer: Trainer, module: Any) -> None:
        assert self._file is not None
        begun = time.perf_counter()
        self._seen = trainer.global_step
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            with trainer.precision_plugin.forward_context():
                tokens = [prompt.tokens for prompt in self._prompts]
                answers = module.answer_prompts(tokens, self._max_new_tokens, _SECONDS)
        except (RuntimeError, ValueError, TypeError, torch.cuda.OutOfMemoryError) as error:
            # A model that trains may not be able to generate; the run does not fail by that.
            _log.info(f"No answers are kept of this run: {' '.join(str(error).split())[:300]}")
            self._prompts = []
            return
        finally:
            for part, mode in modes.items():
                part.training = mode
        texts_of = partial(module.tokenizer.batch_decode, skip_special_tokens=True)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            for index, (prompt, answer) in enumerate(zip(self._prompts, answers, strict=True)):
                asked, expected = (text.strip() for text in texts_of([prompt.tokens, prompt.reference]))
                sample = Sample(self._seen, index, asked, expected, answer.strip())
                file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
        self._spent += time.perf_counter() - begun
        self._answered += 1


def prompts_of(rows: Any, count: int) -> list[_Prompt]:
    """Take the first prompts of tokenized rows, and what is expected after them: the last answer of each."""
    found: list[_Prompt] = []
    for number in range(min(len(rows), _LOOKED_AT)):
        row = rows[number]
        prompt = _split(row["input_ids"], row["labels"])
        if prompt is not None and len(prompt.tokens) <= _LONGEST_PROMPT:
            found.append(prompt)
        if len(found) == count:
            break
    return found


def _split(tokens: Sequence[int], labels: Sequence[int]) -> _Prompt | None:
    end = len(labels)
    while end and labels[end - 1] == _IGNORED:
        end -= 1
    start = end
    while start and labels[start - 1] != _IGNORED:
        start -= 1
    if start == 0:  # a text that is learned from its first token on
        start = end // 2
    return _Prompt(list(tokens[:start]), list(tokens[start:end])) if 0 < start < end else None
