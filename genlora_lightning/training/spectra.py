"""Record the singular values of the adapters' updates while they are trained, at next to no cost.

Shapes: N layers that are looked at together, R rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from genlora_lightning.adapters.base import Factor
from genlora_lightning.adapters.low_rank import entropy_rank, singular_values_of_many
from genlora_lightning.artifacts.checkpoint import adapter_root
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.distributed.shards import plain_name
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.named import named_updates
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.reports.record import SPECTRA_FILE
from genlora_lightning.reports.spectra import SpectrumPoint, header_line, kept_places, point_line
from genlora_lightning.training.run_folder import recorded_folder

_POINTS = 64  # of a whole run, beside those of its first steps
_SHARE = 0.005  # of a run's time
_AT_ONCE = 1 << 24  # entries of matrices

_log = rank_zero_logger(__name__)


class UpdateSpectra(Callback):
    """Record the effective rank and the singular values of each update ΔW, from its factors.

    At the start and the end of training, after steps 1, 2, 4, …, and 64 times at equal distances, as long as all of it,
    with what the end will take, is at most 0.5 % of the time: ``spectra.jsonl`` in the run's folder. It is done by the
    first rank, and looks at the parameters as they are, without the forwards of the model. What cannot be looked at is
    said once: sharded adapters, PEFT's, stacks of matrices, and kinds that have no factors.

    Args:
        share: The most that it may take of the time since training has started; 1: as much as it takes.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
    """

    def __init__(self, share: float = _SHARE) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be above 0 and at most 1, got {share!r}.")
        self._share = share
        self._file: Path | None = None
        self._layers: dict[str, AdaptedLayer] = {}
        self._started = self._spent = 0.0
        self._cheapest = 0.0
        self._seen = -1
        self._every = 1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = recorded_folder(trainer) if stage == "fit" else None
        self._file = None if folder is None else folder / SPECTRA_FILE

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers, self._seen = {}, -1
        if self._file is None:
            return
        named = {name: part.layer for name, part in named_updates(pl_module).items()}
        layers = {plain_name(name): layer for name, layer in (named or adapter_layers(adapter_root(pl_module))).items()}
        self._layers = {name: layer for name, layer in layers.items() if _is_readable(layer)}
        if len(self._layers) < len(layers) or not layers:
            of = f"{len(layers) - len(self._layers)} of {len(layers)}" if layers else "PEFT's"
            _log.info(
                f"Effective ranks of {of} adapters are not recorded: they are sharded, are stacks, or have no factors."
            )
        if not self._layers:
            return
        steps = trainer.estimated_stepping_batches
        self._every = 1 if math.isinf(steps) else max(1, math.ceil(steps / _POINTS))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(header_line(list(self._layers), [layer.update.rank for layer in self._layers.values()]))
        self._started, self._spent, self._cheapest = time.perf_counter(), 0.0, 0.0
        self._record(trainer)

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        if not self._layers or step == self._seen or not (step % self._every == 0 or step & (step - 1) == 0):
            return
        if self._share == 1 or self._spent + 2 * self._cheapest <= self._share * (time.perf_counter() - self._started):
            self._record(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._layers and trainer.global_step != self._seen:
            self._record(trainer)
        self._layers = {}

    def _record(self, trainer: Trainer) -> None:
        assert self._file is not None
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the steps before are not to be counted
        begun = time.perf_counter()
        self._seen = trainer.global_step
        with self._file.open("a", encoding="utf-8") as file:
            file.write(point_line(measure(self._layers, self._seen)))
        took = time.perf_counter() - begun
        self._spent += took
        self._cheapest = min(took, self._cheapest or took)


@torch.no_grad()
def measure(layers: dict[str, AdaptedLayer], step: int) -> SpectrumPoint:
    """Measure the updates of layers that have whole factors, those of one shape at once.

    Args:
        layers: The layers by name.
        step: The point's.
    """
    found: dict[str, tuple[float, list[float]]] = {}
    for group in _groups(layers):
        pairs = [(name, layers[name].pair) for name in group]
        A = _made([pair[0] for _, pair in pairs if pair is not None])
        B = _made([pair[1] for _, pair in pairs if pair is not None])
        scaling = torch.tensor([layers[name].scaling for name in group], dtype=torch.float64)
        values = singular_values_of_many(A, B) * scaling.abs()[:, None]
        for name, effective, row in zip(group, entropy_rank(values).tolist(), values.tolist(), strict=True):
            found[name] = (effective, row)
    return SpectrumPoint(
        step=step,
        effective=tuple(found[name][0] for name in layers),
        largest=tuple(found[name][1][0] for name in layers),
        ratios=tuple(_ratios(found[name][1]) for name in layers),
    )


def _is_readable(layer: AdaptedLayer) -> bool:
    pair = layer.pair
    return pair is not None and layer.shape.num_matrices == 1 and all(factor.is_whole for factor in pair)


def _groups(layers: dict[str, AdaptedLayer]) -> Iterator[list[str]]:
    """Names of layers whose factors can be made at once, and fit into memory."""
    groups: dict[Hashable, list[str]] = {}
    for name, layer in layers.items():
        pair = layer.pair
        assert pair is not None
        key = tuple((type(f), f.batch_key(), f.rank, f.num_entries, f.own_dtype, f.device) for f in pair)
        groups.setdefault(key, []).append(name)
    for names in groups.values():
        update = layers[names[0]].update
        size = max(1, _AT_ONCE // max(1, update.rank * sum(update.shape)))
        yield from (names[start : start + size] for start in range(0, len(names), size))


def _made(factors: list[Factor]) -> Tensor:
    """The matrices ``(N, R, entries)`` of factors of one key."""
    kind: Any = type(factors[0])
    return torch.stack(list(kind.make_many(factors, dtype=None)))


def _ratios(values: list[float]) -> tuple[float, ...]:
    largest = values[0]
    return tuple(values[place] / largest if largest > 0 else 0.0 for place in kept_places(len(values)))
