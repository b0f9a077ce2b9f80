"""Compare data with the tables of a model: token numbers, positions and token types that it has no row for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from genlora_lightning.backbone.pretrained import load_tokenizer
from genlora_lightning.data import InstructionDataModule, TextClassificationDataModule
from genlora_lightning.training.lightning_internals import trainer_or_none


@dataclass(frozen=True)
class TableLimits:
    """How many rows the tables have that a transformers model looks its inputs up in; ``None`` where that is unknown.

    Attributes:
        tokens: Of the input embedding.
        positions: Of the table of positions, less those it keeps for padding; ``None`` for rotary and relative ones.
        types: Of the table of token types.
    """

    tokens: int | None = None
    positions: int | None = None
    types: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> TableLimits:
        """Find the limits of a model."""
        config: Any = getattr(model, "config", None)
        try:
            embedding = model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return cls()
        if config is None or not isinstance(rows := getattr(_inner(embedding), "num_embeddings", None), int):
            return cls()
        # A table of positions stands beside that of tokens; those elsewhere are of relative positions.
        parent = next((m for m in model.modules() if any(child is embedding for child in m.children())), model)
        beside = [_inner(child) for child in parent.children() if child is not embedding]
        most = getattr(config, "max_position_embeddings", None)
        positions = None
        for table in beside:
            if isinstance(table, nn.Embedding) and most is not None and table.num_embeddings in (most, most + 2):
                kept = 0 if table.padding_idx is None else table.padding_idx + 1
                positions = min(most, table.num_embeddings - kept)
        return cls(rows, positions, getattr(config, "type_vocab_size", None) or None)

    def check_tokens(self, smallest: int, largest: int, of: str) -> None:
        """Check token numbers.

        Raises:
            ValueError: The model has no row for one; the message has both numbers.
        """
        if self.tokens is not None and not 0 <= smallest <= largest < self.tokens:
            number = largest if largest >= self.tokens else smallest
            raise ValueError(
                f"{of} hold the token number {number}, but the model's embedding has {self.tokens} rows (0 to "
                f"{self.tokens - 1}). Use the model's own tokenizer; or, if tokens were added to it, call the model's "
                "`resize_token_embeddings(len(tokenizer))`, save it, and train from what was saved."
            )

    def check_length(self, length: int, of: str) -> None:
        """Check the length of sequences.

        Raises:
            ValueError: The model has no position for all tokens; the message has both numbers.
        """
        if self.positions is not None and length > self.positions:
            raise ValueError(
                f"{of} are {length} tokens long, padding included, but the model has {self.positions} positions. Set "
                f"the data's `max_length` to {self.positions} or less."
            )

    def check_batch(self, batch: Mapping[str, Any], token_fields: tuple[str, ...]) -> None:
        """Check a batch that is on the CPU.

        Args:
            batch: ``input_ids`` (examples, tokens), perhaps ``token_type_ids``, and what ``token_fields`` names.
            token_fields: Fields of token numbers; -100 in others than ``input_ids`` stands for none.

        Raises:
            ValueError: See the methods above.
        """
        for name in (*token_fields, "token_type_ids"):
            ids = batch.get(name)
            if not isinstance(ids, Tensor) or ids.device.type != "cpu" or not ids.numel():
                continue
            if name == "input_ids" and ids.ndim == 2:
                self.check_length(ids.shape[1], "The batch's sequences")
            smallest, largest = map(int, ids.aminmax())
            if name == "token_type_ids":
                if self.types is not None and not 0 <= smallest <= largest < self.types:
                    raise ValueError(
                        f"The batch's `token_type_ids` are from {smallest} to {largest}, but the model has "
                        f"{self.types} token types (0 to {self.types - 1}). Leave `token_type_ids` out, or use the "
                        "model's own tokenizer."
                    )
            elif name == "input_ids" or largest >= 0:
                self.check_tokens(smallest if name == "input_ids" else 0, largest, f"The batch's `{name}`")


class InputCheck:
    """Checks what a module is given: its data, as far as all of them are known, and each batch."""

    def __init__(self) -> None:
        self._limits: TableLimits | None = None
        self._compared: int | None = None  # the data module whose tokenizer was compared

    def __call__(self, module: Any, batch: Any) -> None:
        """Check a batch of a :class:`~genlora_lightning.modules.GenLoRAModule` before it is moved.

        Raises:
            ValueError: The model's tables lack rows for it, or the data's tokenizer is another model's.
        """
        if module.model is None:
            return
        if self._limits is None:
            self._limits = TableLimits.of(module.adapter_root())
        data = getattr(trainer_or_none(module), "datamodule", None)
        if isinstance(data, (InstructionDataModule, TextClassificationDataModule)):
            if self._compared != id(data):
                self._compare_tokenizers(module, data)
                self._compared = id(data)
            self._limits.check_tokens(0, data.largest_token, "The data")
            self._limits.check_length(data.longest, "The data's longest sequences")
        if isinstance(batch, Mapping):
            self._limits.check_batch(batch, module.token_fields)

    def _compare_tokenizers(self, module: Any, data: Any) -> None:
        try:
            own = load_tokenizer(module.source, local_files_only=True, **module.tokenizer_options)
        except (OSError, ValueError):
            return  # no tokenizer beside the model, so there is nothing to compare
        check_tokenizers(data.tokenizer, own)


def check_tokenizers(of_data: Any, of_model: Any) -> None:
    """Check that the data's tokenizer numbers tokens as the model's own does; it may have more tokens.

    Raises:
        ValueError: It gives a token another number, or most of its tokens are none of the model's.
    """
    theirs, ours = of_data.get_vocab(), of_model.get_vocab()
    other = next((token for token, number in theirs.items() if ours.get(token, number) != number), None)
    if other is not None:
        found = f"it gives {other!r} the number {theirs[other]}, the model's own gives it {ours[other]}"
    elif 2 * len(theirs.keys() & ours.keys()) < len(theirs):
        found = f"of its {len(theirs)} tokens the model's own has {len(theirs.keys() & ours.keys())}"
    else:
        return
    raise ValueError(
        f"The data's tokenizer is another model's: {found}. Give the data module the model's folder or name as "
        "`tokenizer`; or save the tokenizer that you mean beside the model."
    )


def _inner(module: nn.Module) -> nn.Module:
    """A layer without the adapter around it."""
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module
