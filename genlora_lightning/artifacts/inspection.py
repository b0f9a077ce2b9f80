"""Describe and verify an adapter folder or a checkpoint by its files alone, without its base."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.artifacts.adapter_folder import StoredAdapter, StoredLayers, adapter_place, read_adapter
from genlora_lightning.artifacts.adapter_io import adapter_bytes
from genlora_lightning.artifacts.checkpoint import describe, stored_configs
from genlora_lightning.artifacts.loading import read_checkpoint
from genlora_lightning.artifacts.model_card import counted_values
from genlora_lightning.backbone.identity import describe_base
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.fields import shown
from genlora_lightning.injection.peft_adapters import KIND as PEFT_KIND
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.text import text_table


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """What :func:`verify_adapter` proved; ``print`` it for a sentence.

    Args:
        folder: Where the adapter lies.
        num_tensors: Tensors in the verified file.
        num_bytes: Size of the folder's files.
        base: The base it was trained on, in words.
        versions: Of Python and the libraries that wrote it.
        created: When it was written; ISO 8601, UTC.
    """

    folder: str
    num_tensors: int
    num_bytes: int
    base: str
    versions: dict[str, str]
    created: str

    def __str__(self) -> str:
        return (
            f"{self.folder} is complete and unchanged: {self.num_tensors} tensors, {self.num_bytes:,} bytes, written "
            f"{self.created} by genlora-lightning {self.versions.get('genlora_lightning', 'unknown')}, for "
            f"{self.base}."
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """One adapted linear of an :class:`AdapterDescription`.

    Args:
        module: Its name.
        out_features: Of the linear.
        in_features: Of the linear.
        rank: Highest rank that its update can have.
        effective_rank: Entropy effective rank of its update; see :meth:`AdaptedLayer.effective_rank`.
        parameters: Trained values of its adapter, as the plan and the summary of a run count them.
        fixed: Values of its adapter that are stored and were not trained.
        num_matrices: How many matrices of these sizes it is, of a mixture's experts; the effective rank is their mean.
    """

    module: str
    out_features: int
    in_features: int
    rank: int
    effective_rank: float
    parameters: int
    fixed: int
    num_matrices: int = 1


@dataclass(frozen=True, kw_only=True)
class AdapterDescription:
    """What :func:`describe_adapter` found; ``print`` it for a table, :meth:`to_dict` for JSON.

    Args:
        folder: Where the adapter lies.
        base: The base it was trained on, in words.
        config: The kind and the fields of its configuration.
        training: Facts of its training.
        versions: Of Python and the libraries that wrote it.
        created: When it was written; ISO 8601, UTC.
        num_bytes: Size of the folder's files.
        layers: The adapted linears.
        trained_modules: Modules trained in full, with their number of values.
        other_tensors: What else a checkpoint holds, such as a parameter that was trained beside the adapters, with its
            number of values.
    """

    folder: str
    base: str
    config: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]
    created: str
    num_bytes: int
    layers: tuple[LayerDescription, ...]
    trained_modules: dict[str, int]
    other_tensors: dict[str, int]

    @property
    def parameters(self) -> int:
        """All values that were trained, modules trained in full and other tensors included."""
        others = (*self.trained_modules.values(), *self.other_tensors.values())
        return sum(layer.parameters for layer in self.layers) + sum(others)

    @property
    def fixed(self) -> int:
        """Values of the adapters that are stored beside them: fixed centres and widths."""
        return sum(layer.fixed for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The description as JSON values."""
        return {**asdict(self), "parameters": self.parameters, "fixed": self.fixed}

    def __str__(self) -> str:
        header = ("module", "shape (out, in)", "rank", "effective rank", "parameters")
        rows = [
            (
                layer.module,
                f"({f'{layer.num_matrices}, ' * (layer.num_matrices > 1)}{layer.out_features}, {layer.in_features})",
                str(layer.rank),
                f"{layer.effective_rank:.2f}",
                f"{layer.parameters:,}",
            )
            for layer in self.layers
        ]
        rows += [(name, "trained in full", "-", "-", f"{count:,}") for name, count in self.trained_modules.items()]
        rows += [(name, "other tensor", "-", "-", f"{count:,}") for name, count in self.other_tensors.items()]
        mean = sum(layer.effective_rank for layer in self.layers) / max(len(self.layers), 1)
        return "\n".join(
            [
                text_table(header, rows, left=2),
                f"{read_config(self.config).title} adapter for {self.base}, written {self.created}: "
                f"{counted_values(self.parameters, self.fixed)} in {self.num_bytes:,} bytes; {len(self.layers)} "
                f"layers, mean effective rank {mean:.2f} of {max((layer.rank for layer in self.layers), default=0)}.",
            ]
        )


def verify_adapter(folder: str | os.PathLike[str]) -> VerificationReport:
    """Prove that an adapter folder is complete and unchanged; no model is needed.

    The model card, which may be edited, is not looked at.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        DamagedFileError: A file is not what was written, or they disagree; the message says which and what.
        ValueError: The folder is of another library, or of a newer release.
    """
    stored = read_adapter(folder)
    for _ in stored.adapted():
        pass
    _full_sizes(stored)
    return VerificationReport(
        folder=str(folder),
        num_tensors=len(stored.tensors),
        num_bytes=adapter_bytes(stored.folder),
        base=describe_base(stored.base),
        versions=stored.versions,
        created=stored.created,
    )


def describe_adapter(path: str | os.PathLike[str]) -> AdapterDescription:
    """Describe a verified adapter folder, or a checkpoint: per layer its shape, values, and effective rank.

    The matrices are generated from the stored tensors; no model is needed.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It is damaged, or holds no adapters of ours; as :func:`verify_adapter` says.
    """
    folder = adapter_place(path, "checkpoint or adapter folder")
    if folder.is_file():
        return _describe_checkpoint(folder)
    stored = read_adapter(folder)
    layers: list[LayerDescription] = []
    rows: dict[str, int] = {}
    for name, layer, own in stored.adapted():
        if layer.config.is_derived:
            rows |= _row_sizes(name, layer, own)
        else:
            layers.append(_describe_layer(name, layer, own, stored.folder))
    return AdapterDescription(
        folder=str(path),
        base=describe_base(stored.base),
        config=stored.config.to_dict(),
        training=stored.training,
        versions=stored.versions,
        created=stored.created,
        num_bytes=adapter_bytes(Path(stored.folder)),
        layers=tuple(layers),
        trained_modules=_full_sizes(stored) | rows,
        other_tensors={},
    )


def _full_sizes(stored: StoredAdapter) -> dict[str, int]:
    """The number of values of each module trained in full."""
    missing = [own for names in stored.trained_modules.values() for own in names if own not in stored.tensors]
    if missing:
        raise DamagedFileError(f"{stored.folder} is damaged: it has no tensor {shown(missing[0])}.")
    return {name: sum(stored.tensors[own].numel() for own in names) for name, names in stored.trained_modules.items()}


@torch.no_grad()
def _describe_checkpoint(path: Path) -> AdapterDescription:
    content = read_checkpoint(path)
    described = describe(content, str(path))
    if described["config"].get("kind") == PEFT_KIND:
        raise ValueError(
            f"{path} holds adapters of PEFT ({described['config'].get('peft_type')}). Inspect the adapter folder of "
            "its run, or make one: `save_adapter(load_module(module, checkpoint), folder)`."
        )
    config, configs = read_config(described["config"]), stored_configs(described)
    tensors: dict[str, Tensor] = dict(content["state_dict"])
    layers = []
    trained: dict[str, int] = {}
    name = ""
    try:
        stored = StoredLayers(configs, dict(tensors))
        for name, shape in described["layers"].items():
            layer, own = stored.make(name, MatrixShape.of(shape))
            if layer.config.is_derived:
                trained |= _row_sizes(name, layer, own)
            else:
                layers.append(_describe_layer(name, layer, own, path))
            for own_name in own:
                del tensors[f"{name}.{own_name}"]
        for name, names in described["trained_modules"].items():
            trained[name] = sum(tensors.pop(own).numel() for own in names)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        what = (
            f"The tensors of {name} in {path} are incomplete or do not fit together"
            if name
            else (f"{path} does not say which linears it adapts: it was written before the first release")
        )
        raise ValueError(f"{what} ({error!r}).") from error
    return AdapterDescription(
        folder=str(path),
        base=describe_base(described["base"])
        if "base" in described
        else described.get("base_model") or "an unnamed base",
        config=config.to_dict(),
        training={name: content[name] for name in ("global_step", "epoch") if name in content},
        versions={"lightning": str(content.get("pytorch-lightning_version", "unknown"))},
        created=datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds"),
        num_bytes=path.stat().st_size,
        layers=tuple(layers),
        trained_modules=trained,
        other_tensors={name: tensor.numel() for name, tensor in tensors.items()},
    )


def _row_sizes(name: str, layer: AdaptedLayer, own: list[str]) -> dict[str, int]:
    """The number of values of rows trained in full; nothing for those that lie with a layer before."""
    parameters = layer.adapter_parameters()
    what = f"{layer.config.rank} of {layer.out_features} rows of {name}"
    return {what: sum(parameters[one].numel() for one in own)} if own else {}


def _describe_layer(name: str, layer: AdaptedLayer, own: list[str], source: Path) -> LayerDescription:
    try:
        rank = layer.effective_rank()
    except RuntimeError as error:  # no singular values of infinite ones
        raise DamagedFileError(f"{source} is damaged: the values of {name} overflow.") from error
    parameters = layer.adapter_parameters()
    stored = sum(parameters[own_name].numel() for own_name in own)
    trained = sum(parameters[own_name].numel() for own_name in own if parameters[own_name].requires_grad)
    return LayerDescription(
        module=name,
        out_features=layer.out_features,
        in_features=layer.in_features,
        rank=layer.config.rank,
        effective_rank=rank,
        parameters=trained,
        fixed=stored - trained,
        num_matrices=layer.shape.num_matrices,
    )
