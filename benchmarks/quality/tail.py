"""The texts and questions for the last three blocks of SmolLM2-135M: the same data at a tenth of a step's products.

The blocks before them stay as they are, so that what they give is computed once, and kept in a file that all processes
map. Logits are those of the tokens that the data have. What is learned is less than by adapters in all blocks, and
the size of an adapter counts for more.
"""

from __future__ import annotations

import functools
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import data, texts
from .batches import bucketed
from .language import (
    ATTENTION,
    AnswerBatch,
    LanguageTask,
    QuestionTask,
    decoder_arguments,
    model_folder,
    right_answers,
    token_scores,
    tokenizer,
    window_scores,
)
from .repeats import repeated

SUFFIX = "-tail"
BLOCKS = 3
_MOST_WINDOWS = 900  # for training
_MOST_QUESTIONS = 2400
_GENERAL = "general"


class TailModel(nn.Module):
    """The last blocks of a decoder, and the logits of some tokens.

    Args:
        base: The decoder; of its blocks the last `BLOCKS` are kept.
        vocabulary: The tokens.
    """

    head = None  # the output layer is the embedding, which stays frozen

    def __init__(self, base: Any, vocabulary: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", base.embed_tokens.weight.detach()[vocabulary])
        base.layers = base.layers[-BLOCKS:]
        self.base = base

    def forward(self, hidden: Tensor, places: Tensor | None = None, **arguments: Any) -> Tensor:
        """Logits of the vocabulary, from what the blocks before give.

        Args:
            hidden: ``(windows, tokens, features)``.
            places: Flat indices into ``(windows · tokens)``; each window's tokens but the last if ``None``.
            arguments: The decoder's, as its mask.

        Returns:
            ``(places, vocabulary)``, or ``(windows, tokens − 1, vocabulary)``.
        """
        out = self.base(inputs_embeds=hidden, use_cache=False, **arguments).last_hidden_state
        out = out[:, :-1] if places is None else out.flatten(0, 1)[places]
        return F.linear(out, self.rows)  # type: ignore[arg-type]


class _TailTask(LanguageTask, ABC):
    """What the tasks of the last blocks have in common: the model, and a file of what the blocks before give."""

    name: str
    steps = 200
    num_seeds = 9
    shares = (0.5, 0.75)  # of a trained update that are tried beside the whole

    @functools.cached_property
    def _kept(self) -> dict[str, Any]:
        """The vocabulary, the general text's inputs and next tokens, and what the task needs."""
        file = data.DATA_DIR / f"{self.name}.pt"
        if not file.is_file():
            _write(self._keep(), file)
        kept: dict[str, Any] = torch.load(file, mmap=True, weights_only=True)
        return kept

    @abstractmethod
    def _keep(self) -> dict[str, Any]:
        """Compute what :attr:`_kept` gives."""

    def build(self, seed: int, *, full: bool = False) -> TailModel:  # type: ignore[override]
        """The last blocks, frozen, in float32."""
        return TailModel(_decoder(), self._kept["vocabulary"])

    def skeleton(self) -> nn.Module:
        """What the adapters are put on, without values."""
        base = super().skeleton()
        base.layers = base.layers[-BLOCKS:]  # type: ignore[index]
        return base

    def general_loss(self, model: nn.Module) -> float:
        """Mean loss per token of English news, which no task trains."""
        return self._windows_loss(model, _GENERAL)["loss"]

    @torch.no_grad()
    def _windows_loss(self, model: nn.Module, split: str, again: Sequence[bool] | None = None) -> dict[str, float]:
        inputs, targets = self._kept["inputs"][split], self._kept["targets"][split]
        parts = []
        for start in range(0, len(inputs), 8):
            expected = targets[start : start + 8].long().to(model.rows.device)
            logits = model(inputs[start : start + 8].float().to(model.rows.device))
            parts.append(token_scores(logits.flatten(0, 1), expected.flatten()).unflatten(1, expected.shape))
        return window_scores(torch.cat(parts, 1), again)


class TailTextTask(_TailTask):
    """Text of one kind, in windows: the loss of all tokens, and how often the next token was the most likely one."""

    batch_size = 4

    def __init__(self, name: str) -> None:
        self.name = name

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a seed: the same for every method."""
        inputs, targets = self._kept["inputs"]["train"], self._kept["targets"]["train"]
        for chosen in bucketed([texts.WINDOW] * len(inputs), self.batch_size, seed, steps):
            yield {"hidden": inputs[chosen].float(), "targets": targets[chosen].long()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy, the mean over all tokens but the first."""
        return F.cross_entropy(model(batch["hidden"]).flatten(0, 1), batch["targets"].flatten())

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Mean loss per token, also of windows that training repeats and of the others, and the share predicted."""
        return self._windows_loss(model, split, self._repeated[split])

    @functools.cached_property
    def _repeated(self) -> dict[str, list[bool]]:
        return repeated({split: self._kept["targets"][split].tolist() for split in ("train", "val", "test")})

    def _keep(self) -> dict[str, Any]:
        text = self.name.removesuffix(SUFFIX)
        windows = {**(texts.stored(text) or texts.windows(text, tokenizer()))}
        windows["train"] = _spread(windows["train"], _MOST_WINDOWS)
        windows[_GENERAL] = self._general
        ids = {split: torch.tensor(found) for split, found in windows.items()}
        vocabulary = torch.cat([one.flatten() for one in ids.values()]).unique()
        return {"vocabulary": vocabulary, **_windows(_first_blocks(), ids, vocabulary)}


class TailQuestionTask(_TailTask, QuestionTask):
    """Questions; the loss of the right answer per token among the data's tokens, and the share answered right."""

    batch_size = 16
    num_tuning_seeds = 1
    base_dtype = torch.float32

    def __init__(self, name: str) -> None:
        super().__init__(name.removesuffix(SUFFIX))
        self.name = name
        self.lr_factor = 1.0 if name == "messages" + SUFFIX else 0.5  # most of a choice's tokens are not trained
        self.splits = {**self.splits, "train": _spread(self.splits["train"], _MOST_QUESTIONS)}

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a seed: the same for every method."""
        train = self.splits["train"]
        for chosen in bucketed([question.length for question in train], self.batch_size, seed, steps):
            batch = right_answers([train[index] for index in chosen])
            rows = [self._kept["inputs"]["train"][index].float() for index in chosen]
            yield self._from_blocks(batch, nn.utils.rnn.pad_sequence(rows, batch_first=True))

    def _answer_batches(self, split: str, dtype: torch.dtype) -> Iterator[AnswerBatch]:
        """The answers of a split, in parts."""
        found = super()._answer_batches(split, dtype)
        for (part, batch, owners), hidden in zip(found, self._kept["inputs"][split], strict=True):
            yield part, self._from_blocks(batch, hidden.float()), owners

    def _from_blocks(self, batch: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        targets = torch.searchsorted(self._kept["vocabulary"], batch["targets"])
        return {**batch, "inputs": hidden, "targets": targets}

    def _keep(self) -> dict[str, Any]:
        base = _first_blocks()
        general = torch.tensor(self._general)
        answers = [token for part in self.splits.values() for one in part for tokens in one.answers for token in tokens]
        vocabulary = torch.cat([general.flatten(), torch.tensor(answers)]).unique()
        kept = _windows(base, {_GENERAL: general}, vocabulary)
        train = self.splits["train"]
        kept["inputs"]["train"] = [None] * len(train)
        order = sorted(range(len(train)), key=lambda index: train[index].length)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            hidden = _outputs(base, right_answers([train[index] for index in chosen]))
            for index, row in zip(chosen, hidden, strict=True):
                kept["inputs"]["train"][index] = row[: train[index].length].clone()
        for split in ("val", "test"):
            found = super()._answer_batches(split, torch.float32)
            kept["inputs"][split] = [_outputs(base, batch) for _, batch, _ in found]
        return {"vocabulary": vocabulary, **kept}


def _spread(found: list[Any], most: int) -> list[Any]:
    """At most so many of a list, from all over it."""
    return found[:: -(-len(found) // most)]


def _decoder() -> Any:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(model_folder(), attn_implementation=ATTENTION, dtype=torch.float32)
    return base.eval().requires_grad_(False)


def _first_blocks() -> Any:
    base = _decoder()
    base.layers = base.layers[:-BLOCKS]
    base.norm = nn.Identity()
    return base


def _windows(base: nn.Module, ids: dict[str, Tensor], vocabulary: Tensor) -> dict[str, Any]:
    """Of each split the inputs ``(windows, tokens, features)``, and the next tokens as indices into the vocabulary."""
    inputs = {
        split: torch.cat([_outputs(base, {"inputs": one[at : at + 8]}) for at in range(0, len(one), 8)])
        for split, one in ids.items()
    }
    targets = {split: torch.searchsorted(vocabulary, one[:, 1:].contiguous()).int() for split, one in ids.items()}
    return {"inputs": inputs, "targets": targets}


@torch.no_grad()
def _outputs(base: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the first blocks give, in float16."""
    out = base(input_ids=batch["inputs"], use_cache=False, **decoder_arguments(batch)).last_hidden_state
    return out.half()


def _write(kept: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as partial:
        torch.save(kept, partial)
    os.replace(partial.name, file)
