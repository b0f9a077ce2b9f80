"""Import: fit generators to a LoRA adapter that PEFT wrote, as a smaller adapter or a start for training.

Shapes: L linears of one shape, R rank of the generators, r rank of the LoRA, G groups, K centres, n entries
(I in_features for A, O out_features for B).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from genlora_lightning.config import GenLoRAConfig
from genlora_lightning.coverage import CoverageReport
from genlora_lightning.injection import adapter_layers, inject_adapters, remove_adapters
from genlora_lightning.lora_export import truncate_factors
from genlora_lightning.lora_files import LoRAFiles, read_lora
from genlora_lightning.lora_fit import GeneratorFit
from genlora_lightning.state import load_adapter_state
from genlora_lightning.tables import text_table


@dataclass(frozen=True, kw_only=True)
class CompressionRow:
    """How one linear of a LoRA adapter was compressed.

    Args:
        module: Its name.
        lora_rank: Rank of its LoRA.
        relative_error: ‖ΔW_generated − ΔW_LoRA‖ / ‖ΔW_LoRA‖ (Frobenius norms); 0 for an update that is zero.
        update_norm: ‖ΔW_LoRA‖.
        lora_bytes: Bytes of the LoRA's A and B.
        bytes: Bytes of the generators' parameters, fixed ones included.
        cut_error: Relative error of the LoRA cut to the highest rank that needs no more bytes than the generators
            (1 if that is no rank at all): what a lower rank would do instead.
    """

    module: str
    lora_rank: int
    relative_error: float
    update_norm: float
    lora_bytes: int
    bytes: int
    cut_error: float


@dataclass(frozen=True, kw_only=True)
class CompressedLoRA:
    """What :func:`compress_lora` made; ``print`` it for a table.

    Args:
        config: The adapter's configuration, with the linears and the modules trained in full that the LoRA had.
        rows: Error and bytes of each linear.
        base_model: Name or folder of the base model, as the LoRA's files give it.
        state: The adapter's tensors, by the names they have in the base model.
    """

    config: GenLoRAConfig
    rows: tuple[CompressionRow, ...]
    base_model: str | None
    state: Mapping[str, Tensor] = field(repr=False)

    @property
    def relative_error(self) -> float:
        """Error of all updates together: √(Σ ‖error‖² / Σ ‖ΔW_LoRA‖²)."""
        return self._together([row.relative_error for row in self.rows])

    @property
    def cut_error(self) -> float:
        """Error of all updates together if each LoRA were cut to the highest rank of no more bytes."""
        return self._together([row.cut_error for row in self.rows])

    def _together(self, errors: list[float]) -> float:
        total = sum(row.update_norm**2 for row in self.rows)
        lost = sum((error * row.update_norm) ** 2 for error, row in zip(errors, self.rows, strict=True))
        return (lost / total) ** 0.5 if total > 0 else 0.0

    def apply(self, model: nn.Module) -> CoverageReport:
        """Put the adapter into its base model, in place: to train on from it, or to save it with ``save_adapter``.

        Args:
            model: The base model the LoRA was trained on, without adapters.

        Returns:
            What is adapted.

        Raises:
            ValueError: The model has adapters already, or is not the LoRA's base; then it is as it was.
        """
        if adapter_layers(model):
            raise ValueError("The model already has adapters. Call `remove_adapters(model)` first.")
        requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        report = inject_adapters(model, self.config)
        try:
            load_adapter_state(model, self.state, "the compressed LoRA")
        except ValueError:
            remove_adapters(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(requires_grad[name])
            raise
        return report

    def __str__(self) -> str:
        rows = [
            (
                row.module,
                str(row.lora_rank),
                f"{row.relative_error:.4f}",
                f"{row.cut_error:.4f}",
                f"{row.lora_bytes:,}",
                f"{row.bytes:,}",
                f"{1 - row.bytes / row.lora_bytes:.0%}",
            )
            for row in self.rows
        ]
        before, after = sum(row.lora_bytes for row in self.rows), sum(row.bytes for row in self.rows)
        return "\n".join(
            [
                text_table(
                    ("module", "LoRA rank", "relative error", "lower rank's", "LoRA bytes", "bytes", "saved"), rows
                ),
                f"{len(rows)} linears: {before:,} bytes of LoRA in {after:,} ({1 - after / before:.0%} saved); "
                f"relative error of all updates together {self.relative_error:.4f} (a LoRA cut to the ranks of no more "
                f"bytes: {self.cut_error:.4f}).",
            ]
        )


def compress_lora(
    folder: str | os.PathLike[str],
    config: GenLoRAConfig,
    *,
    steps: int = 500,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> CompressedLoRA:
    """Fit generators to a LoRA adapter in PEFT's format, each update as near as the configuration allows.

    ``‖s·B·A − ΔW_LoRA‖²`` is minimised over the generators' parameters. It is computed from the factors; no ΔW is ever
    formed, and linears of one shape are fitted together. The fit is as good as the configuration's capacity, no better:
    a LoRA of rank 1 is met almost exactly, one of high rank with about equal singular values is not. As compression of
    finished updates, expect no more of it than of cutting the LoRA to a lower rank (the report gives both errors;
    ``benchmarks/compress.py`` measures a task). What it gives beyond that is a start from which generators of a higher
    rank can be trained. Read the errors, and evaluate the result on your task.

    Args:
        folder: The LoRA adapter's folder. Scalings (``lora_alpha``, rank-stabilised, per-module patterns) are heeded;
            modules that it saves in full are kept as they are.
        config: The generators. ``target_modules``, ``exclude_modules`` and ``modules_to_train`` are replaced by what
            the LoRA has. ``entry_signs`` must be false.
        steps: Optimizer steps after the initial guess from the singular vectors; 0 for the guess alone.
        seed: Of the random parts of the initial guess.
        device: Where to compute.
        progress: Show a bar (on a terminal only).

    Returns:
        The adapter, with each linear's relative error and bytes; call its ``apply(model)``.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It is damaged, no LoRA, or a kind of LoRA that is more than ``ΔW = s·B·A`` (DoRA, trained biases,
            adapted embeddings or convolutions); or ``config`` has more groups than a linear has features, or signs.
    """
    if config.entry_signs:
        raise ValueError(
            "`entry_signs` is true, but with a random sign for every entry generators cannot be fitted to given "
            "matrices. Set `entry_signs=False`, with groups for A and B alike."
        )
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, got {steps}.")
    files = read_lora(folder)
    config = dataclasses.replace(
        config, target_modules=list(files.layers), exclude_modules=[], modules_to_train=list(files.modules_to_save)
    )
    by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, (A, B) in files.layers.items():
        for option, groups, entries, what in (
            ("num_groups_a", config.num_groups_a, A.shape[1], "inputs"),
            ("num_groups_b", config.num_groups_b, B.shape[0], "outputs"),
        ):
            if groups > entries:
                raise ValueError(f"`{option}` is {groups}, but {name} has only {entries} {what} to divide into groups.")
        by_shape.setdefault((A.shape, B.shape), []).append(name)
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, float]] = {}
    with tqdm(total=len(by_shape) * steps, desc="compress", disable=None if progress else True) as bar:
        for names in by_shape.values():
            A = torch.stack([files.layers[name][0] for name in names]).to(device)
            B = torch.stack([files.layers[name][1] for name in names]).to(device)
            fit = GeneratorFit(A, B, config, random)
            fit.run(steps, bar)
            relative, norms = fit.errors()
            for i, name in enumerate(names):
                errors[name] = (float(relative[i]), float(norms[i]))
                state |= {f"{name}.{key}": value[i].cpu().clone() for key, value in fit.parameters().items()}
    rows = tuple(_row(name, files, errors[name], state) for name in files.layers)
    return CompressedLoRA(config=config, rows=rows, base_model=files.base_model, state=state | files.saved)


def _row(name: str, files: LoRAFiles, error: tuple[float, float], state: Mapping[str, Tensor]) -> CompressionRow:
    A, B = files.layers[name]
    own = [t for key, t in state.items() if key.startswith((f"{name}.generator_A.", f"{name}.generator_B."))]
    num_values = sum(t.numel() for t in own)
    cut_rank = min(A.shape[0], num_values // (A.shape[1] + B.shape[0]))
    kept = truncate_factors(A, B, cut_rank)[2] if cut_rank else 0.0
    return CompressionRow(
        module=name,
        lora_rank=A.shape[0],
        relative_error=error[0],
        update_norm=error[1],
        lora_bytes=4 * (A.numel() + B.numel()),
        bytes=4 * num_values,
        cut_error=max(0.0, 1 - kept) ** 0.5,
    )
