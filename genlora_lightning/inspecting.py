"""Inspection: what an adapter folder or a checkpoint holds, without its base model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from genlora_lightning.adapter_io import WEIGHTS_FILE, adapter_bytes, read_adapter_config
from genlora_lightning.analysis import effective_rank
from genlora_lightning.config import GenLoRAConfig
from genlora_lightning.generator import generate
from genlora_lightning.tables import natural_key, text_table

_CHECKPOINT_KEY = "genlora"
_PARAMETERS = ("latent", "weight", "centers", "log_widths")


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One adapted linear: its shape, the parameters of its adapter, entropy effective rank and norm of its update."""

    module: str
    in_features: int
    out_features: int
    parameters: int
    effective_rank: float
    update_norm: float


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """What is in an adapter folder or a checkpoint; ``print`` it for a table, ``to_dict()`` for JSON.

    Args:
        path: What was read.
        kind: ``"adapter folder"`` or ``"checkpoint"``.
        bytes: Its size.
        config: The adapter's configuration.
        layers: The adapted linears.
        other_tensors: Tensors of modules trained in full, by name, with their numbers of values.
        progress: Steps and epochs, if it is a checkpoint.
    """

    path: str
    kind: str
    bytes: int
    config: GenLoRAConfig
    layers: tuple[LayerSummary, ...]
    other_tensors: dict[str, int]
    progress: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {**asdict(self), "config": self.config.to_dict(), "layers": [asdict(row) for row in self.layers]}

    def __str__(self) -> str:
        rows = [
            (
                row.module,
                f"({row.out_features}, {row.in_features})",
                f"{row.parameters:,}",
                f"{row.effective_rank:.2f}",
                f"{row.update_norm:.4g}",
            )
            for row in self.layers
        ]
        header = ("module", "shape (out, in)", "parameters", "effective rank", "norm of ΔW")
        facts = [f"rank {self.config.rank}", f"{self.config.num_groups} groups", f"{self.bytes:,} bytes"]
        facts += [f"{name} {value}" for name, value in self.progress.items()]
        lines = [f"{self.path}: {self.kind}, {', '.join(facts)}", text_table(header, rows)]
        if self.other_tensors:
            shown = ", ".join(f"{name} ({count:,})" for name, count in self.other_tensors.items())
            lines.append(f"Trained in full: {shown}.")
        lines.append(f"{len(rows)} linears, {sum(row.parameters for row in self.layers):,} parameters.")
        return "\n".join(lines)


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterSummary:
    """Read an adapter folder or a Lightning checkpoint with adapters, and say what is in it.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It is damaged, or holds no adapters of ours.
    """
    path = Path(path)
    if path.is_file():
        config, state, progress = _read_checkpoint(path)
        return _summary(path, "checkpoint", path.stat().st_size, config, state, progress)
    config = read_adapter_config(path)
    try:
        state = load_file(path / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_FILE} is damaged or incomplete: {error}.") from error
    return _summary(path, "adapter folder", adapter_bytes(path), config, state, {})


def _read_checkpoint(path: Path) -> tuple[GenLoRAConfig, dict[str, Tensor], dict[str, int]]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no checkpoint that can be read safely: {str(error).splitlines()[0]}") from error
    described = checkpoint.get(_CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(described, dict) or "config" not in described:
        raise ValueError(f"{path} holds no GenLoRA adapters: it was written by a run without GenLoRAFinetuning.")
    progress = {name: checkpoint[name] for name in ("epoch", "global_step") if name in checkpoint}
    return GenLoRAConfig.from_dict(described["config"]), checkpoint["state_dict"], progress


def _generated(parameters: list[Tensor], config: GenLoRAConfig) -> Tensor:
    latent, weight, centers, log_widths = parameters
    return generate(latent, weight, centers, log_widths, config.kernel)


@torch.no_grad()
def _summary(
    path: Path, kind: str, size: int, config: GenLoRAConfig, state: Mapping[str, Tensor], progress: dict[str, int]
) -> AdapterSummary:
    ending = ".generator_A.latent"
    layers, own = [], set()
    for module in sorted((n.removesuffix(ending) for n in state if n.endswith(ending)), key=natural_key):
        names = {side: [f"{module}.generator_{side}.{name}" for name in _PARAMETERS] for side in "AB"}
        own |= {*names["A"], *names["B"]}
        try:
            A, Bt = (_generated([state[name] for name in names[side]], config) for side in "AB")
        except (KeyError, RuntimeError, IndexError) as error:
            raise ValueError(f"The tensors of {module} in {path} are incomplete or do not fit together.") from error
        s = config.scaling_factor
        squared = ((A @ A.T).double() * (Bt @ Bt.T).double()).sum()
        layers.append(
            LayerSummary(
                module=module,
                in_features=A.shape[1],
                out_features=Bt.shape[1],
                parameters=sum(state[name].numel() for side in "AB" for name in names[side]),
                effective_rank=effective_rank(A, Bt.T),
                update_norm=abs(s) * float(squared.clamp_min(0).sqrt()),
            )
        )
    if not layers:
        raise ValueError(f"{path} holds no tensors of generators.")
    return AdapterSummary(
        path=str(path),
        kind=kind,
        bytes=size,
        config=config,
        layers=tuple(layers),
        other_tensors={name: tensor.numel() for name, tensor in state.items() if name not in own},
        progress=progress,
    )
