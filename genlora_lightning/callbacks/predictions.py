"""Write predictions as JSON lines, in the order of the data, whatever the number of processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from typing_extensions import override

from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.storage.paths import local_path

_log = rank_zero_logger(__name__)


class PredictionWriter(BasePredictionWriter):
    """Write one JSON object a line and example: ``index`` (the example's place in the data), then the prediction.

    A ``predict_step`` may return a list with one entry an example, or a mapping of lists or tensors with one entry an
    example each. An entry that is a mapping becomes the object's keys; any other is written as ``prediction``. Lists
    of strings in the batch (such as ``prompt`` and ``completion``) are copied beside it.

    The file appears when all is written: until then each process writes to a file of its own beside it, and the first
    one then puts these together. That needs a file system that all processes see.

    Args:
        path: The local file to write; one that exists is replaced. ``<log dir>/predictions.jsonl`` if ``None``.

    Raises:
        ValueError: While predicting: what ``predict_step`` returned does not have one entry an example.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__("batch")
        self.path = None if path is None else str(local_path(path, "file of the predictions"))
        self._target: Path | None = None
        self._part: TextIO | None = None
        self._written: dict[int, int] = {}

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The trainer's log directory is agreed between the processes, so each of them must ask here.
        log_dir = trainer.log_dir or trainer.default_root_dir
        file = self.path if self.path is not None else os.path.join(log_dir, "predictions.jsonl")
        self._target = local_path(file, "file of the predictions")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._written = {}
        self._part = self._part_path(trainer.global_rank).open("w", encoding="utf-8")

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self._part is not None
        rows = list(_rows(prediction))
        texts = {} if not isinstance(batch, Mapping) else {k: v for k, v in batch.items() if _is_texts(v, len(rows))}
        indices = list(batch_indices or ())
        if indices and len(indices) != len(rows):
            raise ValueError(
                f"`predict_step` of {type(pl_module).__name__} returned {len(rows)} predictions for a batch of "
                f"{len(indices)} examples (batch {batch_idx}). Return a list, or a mapping of lists, with one entry an "
                "example."
            )
        for place, row in enumerate(rows):
            written = self._written.get(dataloader_idx, 0)
            self._written[dataloader_idx] = written + 1
            # Without indices: the order in which a distributed sampler deals examples out.
            index = indices[place] if indices else written * trainer.world_size + trainer.global_rank
            found = {key: value[place] for key, value in texts.items()}
            where = {"index": index} if dataloader_idx == 0 else {"dataloader": dataloader_idx, "index": index}
            line = json.dumps({**where, **found, **row}, ensure_ascii=False, default=_plain)
            self._part.write(f"{dataloader_idx} {index} {line}\n")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._part is not None
        assert self._target is not None
        self._close()
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self._part_path(rank) for rank in range(trainer.world_size)]
        lines: dict[tuple[int, int], str] = {}
        for part in parts:
            with part.open(encoding="utf-8") as file:
                for entry in file:
                    dataloader_idx, index, line = entry.split(" ", 2)
                    lines.setdefault((int(dataloader_idx), int(index)), line)  # padded samplers repeat examples
        whole = self._target.with_name(f"{self._target.name}.whole")
        with whole.open("w", encoding="utf-8") as file:
            file.writelines(lines[key] for key in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self._target)
        for part in parts:
            part.unlink()
        _log.info(f"{len(lines)} predictions are in {self._target}.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._part is not None:
            self._close()
            self._part_path(trainer.global_rank).unlink(missing_ok=True)

    def _close(self) -> None:
        assert self._part is not None
        self._part.close()
        self._part = None

    def _part_path(self, rank: int) -> Path:
        assert self._target is not None
        return self._target.with_name(f"{self._target.name}.part{rank}")


def _rows(prediction: Any) -> Iterator[dict[str, Any]]:
    """One dictionary an example."""
    if prediction is None:
        raise ValueError(
            "`predict_step` returned None. Return a list, or a mapping of lists, with one entry an example."
        )
    if isinstance(prediction, Mapping):
        columns = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in prediction.items()}
        lengths = {name: len(value) for name, value in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The values returned by `predict_step` differ in length: {lengths}.")
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
        return
    for entry in prediction.tolist() if isinstance(prediction, Tensor) else prediction:
        yield dict(entry) if isinstance(entry, Mapping) else {"prediction": entry}


def _is_texts(value: Any, length: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == length
        and all(isinstance(v, (str, type(None))) for v in value)
    )


def _plain(value: Any) -> Any:
    """What JSON does not know by itself: tensors and other array-likes as lists or numbers, the rest as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
