"""The texts for the last three blocks of SmolLM2-135M: the same model and data at a tenth of a step's products.

The blocks before them stay as they are, so that what they give is computed once, and kept in a file that all processes
map. Logits are those of the tokens that the texts have. What is learned is less than by adapters in all blocks, and
the size of an adapter counts for more.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import data, texts
from .batches import bucketed
from .language import ATTENTION, LanguageTask, model_folder, tokenizer

SUFFIX = "-tail"
BLOCKS = 3
_MOST_WINDOWS = 900  # for training
_SPLITS = ("train", "val", "test", "general")


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

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``(windows, tokens − 1, vocabulary)``, from what the blocks before give."""
        out = self.base(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return F.linear(out[:, :-1], self.rows)  # type: ignore[arg-type]


class TailTask(LanguageTask):
    """Text of one kind, in windows: the loss of all tokens, and how often the next token was the most likely one."""

    batch_size = 4
    steps = 200
    num_seeds = 4

    def __init__(self, name: str) -> None:
        self.name = name

    @functools.cached_property
    def _kept(self) -> dict[str, Any]:
        """The vocabulary, and of each split the inputs ``(windows, tokens, features)`` and the next tokens."""
        file = data.DATA_DIR / f"{self.name}.pt"
        if not file.is_file():
            _keep(self.name.removesuffix(SUFFIX), file)
        kept: dict[str, Any] = torch.load(file, mmap=True, weights_only=True)
        return kept

    def build(self, seed: int, *, full: bool = False) -> TailModel:
        """The last blocks, frozen, in float32."""
        return TailModel(_decoder(), self._kept["vocabulary"])

    def skeleton(self) -> nn.Module:
        """What the adapters are put on, without values."""
        base = super().skeleton()
        base.layers = base.layers[-BLOCKS:]  # type: ignore[index]
        return base

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """Batches of a seed: the same for every method."""
        inputs, targets = self._kept["inputs"]["train"], self._kept["targets"]["train"]
        for chosen in bucketed([texts.WINDOW] * len(inputs), self.batch_size, seed, steps):
            yield {"hidden": inputs[chosen].float(), "targets": targets[chosen].long()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy, the mean over all tokens but the first."""
        return F.cross_entropy(model(batch["hidden"]).flatten(0, 1), batch["targets"].flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Mean loss per token, and the share of tokens predicted."""
        inputs, targets = self._kept["inputs"][split], self._kept["targets"][split]
        total, right = 0.0, 0
        for start in range(0, len(inputs), 8):
            expected = targets[start : start + 8].long().flatten().to(model.rows.device)
            logits = model(inputs[start : start + 8].float().to(model.rows.device)).flatten(0, 1)
            total += F.cross_entropy(logits, expected, reduction="sum").item()
            right += int((logits.argmax(1) == expected).sum())
        return {"loss": total / targets.numel(), "accuracy": right / targets.numel()}

    def general_loss(self, model: nn.Module) -> float:
        """Mean loss per token of English news, which no task trains."""
        return self.evaluate(model, "general")["loss"]


def _decoder() -> Any:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(model_folder(), attn_implementation=ATTENTION, dtype=torch.float32)
    return base.eval().requires_grad_(False)


@torch.no_grad()
def _keep(text: str, file: Path) -> None:
    """Compute what the blocks before the last ones give, in float16, and write it."""
    windows = {**(texts.stored(text) or texts.windows(text, tokenizer()))}
    windows["train"] = windows["train"][:: -(-len(windows["train"]) // _MOST_WINDOWS)]
    windows["general"] = (texts.stored(texts.GENERAL) or texts.windows(texts.GENERAL, tokenizer()))["test"]
    ids = {split: torch.tensor(windows[split]) for split in _SPLITS}
    vocabulary = torch.cat([one.flatten() for one in ids.values()]).unique()
    base = _decoder()
    base.layers = base.layers[:-BLOCKS]
    base.norm = nn.Identity()
    inputs = {split: _outputs(base, windows[split]) for split in _SPLITS}
    targets = {split: torch.searchsorted(vocabulary, one[:, 1:].contiguous()).int() for split, one in ids.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as partial:
        torch.save({"vocabulary": vocabulary, "inputs": inputs, "targets": targets}, partial)
    os.replace(partial.name, file)


def _outputs(base: nn.Module, windows: Sequence[Sequence[int]]) -> Tensor:
    parts = [torch.tensor(windows[at : at + 8]) for at in range(0, len(windows), 8)]
    return torch.cat([base(input_ids=part, use_cache=False).last_hidden_state.half() for part in parts])
