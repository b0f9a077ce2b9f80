"""Describe adapter folders in PEFT's format by their files alone, and say what is wrong with them.

LoRA's factors are measured; of other kinds the tensors are counted. Whether the tensors would act in a base is decided
by names and shapes, as PEFT decides it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlora_lightning.adapters.low_rank import effective_rank
from genlora_lightning.artifacts.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from genlora_lightning.artifacts.peft_folder import StoredPeft, read_peft_folder
from genlora_lightning.backbone.identity import describe_base
from genlora_lightning.injection.names import plain_modules
from genlora_lightning.interop.lora_files import check_lora_settings, lora_scaling, unsupported_settings
from genlora_lightning.interop.lora_sites import stack_from_peft
from genlora_lightning.layers.sites import matrix_shape
from genlora_lightning.text import natural_key, text_table

_PREFIX = "base_model.model."
# A and B of a linear, an embedding (whose names are those of parameters) or a convolution, and DoRA's magnitudes.
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?")
_SHOWN = 3
# What a plain LoRA may have, and a reader wants to know.
_TOLD = (
    "use_rslora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)


@dataclass(frozen=True, kw_only=True)
class PeftRow:
    """One adapted module of a :class:`PeftDescription`.

    Args:
        module: Its name in the base; of a parameter the name of PEFT's wrapper.
        shape: ``(out_features, in_features)`` as far as the tensors tell it, with the number of matrices before it if
            they are for a stack.
        rank: Of A and B; ``None`` for another kind than LoRA, and where the files do not tell it.
        effective_rank: Entropy effective rank of ``B @ A``; ``None`` where there is none, or it is not finite.
        scaling: The factor on ``B @ A``.
        parameters: Values that are stored for it.
    """

    module: str
    shape: tuple[int, ...] | None
    rank: int | None
    effective_rank: float | None
    scaling: float | None
    parameters: int


@dataclass(frozen=True, kw_only=True)
class PeftDescription:
    """What :func:`describe_peft` found; ``print`` it for a table, :meth:`to_dict` for JSON.

    Args:
        folder: Where the adapter lies.
        peft_type: PEFT's name of the kind.
        settings: Those of PEFT's settings that change what the adapter computes.
        base: The base it was trained on, in words.
        num_bytes: Size of the weights' file.
        digests: SHA-256 of both files.
        verified: Whether the digests are those in a manifest of ours.
        training: Facts of the training, from the manifest.
        rows: The adapted modules.
        saved: Modules that are saved in full, and other tensors, with their number of values.
        problems: What is wrong with it, in sentences.
    """

    folder: str
    peft_type: str
    settings: dict[str, Any]
    base: str
    num_bytes: int
    digests: dict[str, str]
    verified: bool
    training: dict[str, Any]
    rows: tuple[PeftRow, ...]
    saved: dict[str, int]
    problems: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All values that are stored."""
        return sum(row.parameters for row in self.rows) + sum(self.saved.values())

    def to_dict(self) -> dict[str, Any]:
        """The description as JSON values."""
        return {**vars(self), "rows": [asdict(row) for row in self.rows], "parameters": self.parameters}

    def proof(self) -> str:
        """What is proved, in a sentence."""
        digests = ", ".join(f"{name} {digest[:16]}…" for name, digest in self.digests.items())
        how = "their digests are those in its manifest" if self.verified else "no manifest of ours says what they were"
        return f"{self.folder}: both files are complete, and {how} (SHA-256: {digests})."

    def __str__(self) -> str:
        rows = [
            (
                row.module,
                "-" if row.shape is None else str(row.shape),
                "-" if row.rank is None else str(row.rank),
                "-" if row.effective_rank is None else f"{row.effective_rank:.2f}",
                "-" if row.scaling is None else f"{row.scaling:.4g}",
                f"{row.parameters:,}",
            )
            for row in self.rows
        ]
        rows += [(name, "saved in full", "-", "-", "-", f"{count:,}") for name, count in self.saved.items()]
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        header = ("module", "shape (out, in)", "rank", "effective rank", "scaling", "parameters")
        lines = [
            text_table(header, rows, left=2),
            f"PEFT adapter of type {self.peft_type}{f' ({settings})' if settings else ''} for {self.base}: "
            f"{self.parameters:,} values in {self.num_bytes:,} bytes, {len(self.rows)} modules.",
            self.proof(),
        ]
        return "\n".join([*lines, *(f"Problem: {problem}" for problem in self.problems)])


@torch.no_grad()
def describe_peft(folder: str, base: nn.Module | None = None) -> PeftDescription:
    """Describe a folder in PEFT's format, and find what is wrong with it.

    Args:
        folder: The folder.
        base: A model, also without weights, that the adapter should fit: the one whose names PEFT would look for.

    Returns:
        The description. Its ``problems`` are values that are not finite, halves of pairs, an adapter that does nothing,
        and names or shapes that are not the base's.

    Raises:
        FileNotFoundError: A file is missing.
        DamagedFileError: A file cannot be read, or is not the one that our manifest is of.
    """
    stored = read_peft_folder(folder)
    check_lora_settings(stored.folder / CONFIG_FILE, stored.config)
    parts, saved, problems = _sorted_tensors(stored)
    rows = tuple(_row(name, parts[name], stored.config) for name in sorted(parts, key=natural_key))
    problems += _faults(stored, parts)
    if base is not None:
        problems += _misfits(parts, saved, base)
    told = {name: stored.config[name] for name in _TOLD if stored.config.get(name)}
    base_name = stored.config.get("base_model_name_or_path")
    return PeftDescription(
        folder=str(stored.folder),
        peft_type=str(stored.config["peft_type"]),
        settings=unsupported_settings(stored.config) | told,
        base=describe_base(stored.manifest["base"]) if stored.manifest else str(base_name or "an unnamed base"),
        num_bytes=(Path(stored.folder) / WEIGHTS_FILE).stat().st_size,
        digests=stored.digests,
        verified=stored.manifest is not None,
        training=stored.manifest["training"] if stored.manifest else {},
        rows=rows,
        saved={name: sum(t.numel() for t in tensors.values()) for name, tensors in saved.items()},
        problems=tuple(problems),
    )


def _sorted_tensors(stored: StoredPeft) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each adapted module, of each module saved in full, and names that PEFT does not write."""
    wanted = [str(name) for name in stored.config.get("modules_to_save") or []]
    adapted: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, tensor in stored.tensors.items():
        name = key.removeprefix(_PREFIX)
        found = _PART.fullmatch(name)
        place = _saved_module(name, wanted)
        if name == key:
            saved.setdefault(key, {})[key] = tensor  # such as VeRA's projections, which all modules share
            if not key.startswith("base_model."):
                strange.append(key)
        elif found:
            adapted.setdefault(found["module"], {})[found["part"]] = tensor
        elif place is not None:
            saved.setdefault(place, {})[name] = tensor
        elif stored.config["peft_type"] == "LORA":
            saved.setdefault(name, {})[name] = tensor
        else:
            adapted.setdefault(name.rpartition(".")[0] or name, {})[name.rpartition(".")[2]] = tensor
    problems = []
    if strange:
        problems.append(
            f"{len(strange)} tensors do not begin with {_PREFIX!r} ({_some(strange)}): PEFT would load none of them."
        )
    return adapted, saved, problems


def _saved_module(name: str, wanted: Iterable[str]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((p for p in prefixes if p.endswith(tuple(wanted))), None)  # as PEFT matches them


def _pair(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """A and B as matrices, if both are there and belong together."""
    for a, b, is_transposed in (("A", "B", False), ("embedding_A", "embedding_B", True)):
        A, B = tensors.get(a), tensors.get(b)
        if A is None or B is None or min(A.ndim, B.ndim) < 2:
            continue
        A, B = A.float().flatten(1), B.float().flatten(1)
        if A.shape[0] != B.shape[1]:
            continue
        return (B.T, A.T) if is_transposed else (A, B)  # ΔW of an embedding is stored (num_embeddings, dim)
    return None


def _row(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> PeftRow:
    pair = _pair(tensors)
    count = sum(tensor.numel() for tensor in tensors.values())
    if pair is None:
        return PeftRow(module=name, shape=None, rank=None, effective_rank=None, scaling=None, parameters=count)
    A, B = pair
    shape: tuple[int, ...] = (B.shape[0], A.shape[1])
    scaling = None
    number = _num_matrices(name, len(A), config)
    if number is None:
        return PeftRow(module=name, shape=shape, rank=None, effective_rank=None, scaling=None, parameters=count)
    if number > 1:
        shape = (number, *shape)
        A, B = stack_from_peft(A, B, number)
    rank = A.shape[-2]
    if rank:
        scaling = lora_scaling(config, name, rank)
    has_rank = bool(A.numel() and B.numel() and A.isfinite().all() and B.isfinite().all())
    return PeftRow(
        module=name,
        shape=shape,
        rank=rank,
        effective_rank=effective_rank(A, B) if has_rank else None,
        scaling=scaling,
        parameters=count,
    )


def _num_matrices(name: str, num_rows: int, config: Mapping[str, Any]) -> int | None:
    """For how many matrices a LoRA with so many rows of A is; ``None`` where the files do not say it.

    A wrapper around a module with adapted parameters says neither which of them it is for, nor how many matrices that
    has. The rank says it, unless there are several.
    """
    module = name.replace(".base_layer", "")
    ends = [str(target).rpartition(".")[0] for target in config.get("target_parameters") or ()]
    if not any(f".{module}".endswith(f".{end}" if end else "") for end in ends):
        return 1
    rank = config.get("r")
    if config.get("rank_pattern") or config.get("alpha_pattern") or type(rank) is not int or rank < 1:
        return None
    return num_rows // rank if num_rows % rank == 0 else None


def _faults(stored: StoredPeft, parts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    problems = []
    broken = [key for key, tensor in stored.tensors.items() if not tensor.isfinite().all()]
    if broken:
        problems.append(f"{len(broken)} tensors hold NaN or infinite values ({_some(broken)}).")
    if stored.config["peft_type"] != "LORA":
        return problems
    if not parts:
        return [*problems, "It holds no LoRA at all."]
    alone = [name for name, tensors in parts.items() if _pair(tensors) is None]
    if alone:
        problems.append(f"{len(alone)} modules have no A and B that belong together ({_some(alone)}).")
    pairs = {name: pair for name, tensors in parts.items() if (pair := _pair(tensors)) is not None}
    idle = [name for name, (A, B) in pairs.items() if not (A.any() and B.any())]
    is_dora = bool(stored.config.get("use_dora"))  # its magnitudes act by themselves
    if idle and len(idle) == len(pairs) and not is_dora:
        problems.append(f"It does nothing: B or A is zero in all {len(pairs)} modules, so it was never trained.")
    elif idle and not is_dora:
        problems.append(f"In {len(idle)} of {len(pairs)} modules B or A is zero, and it does nothing ({_some(idle)}).")
    return problems


def _misfits(
    parts: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Mapping[str, Tensor]], base: nn.Module
) -> list[str]:
    """How the names and shapes differ from those of a base."""
    modules = dict(plain_modules(base))
    names = [*parts, *(name for name, tensors in saved.items() if name not in tensors)]
    absent = [
        name
        for name in names
        if name.replace(".base_layer", "") not in modules and name.rpartition(".")[0] not in modules
    ]
    problems = []
    if absent:
        what = "All" if len(absent) == len(names) else f"{len(absent)} of {len(names)}"
        problems.append(
            f"{what} adapted modules are not there in this {type(base).__name__} ({_some(absent)}), and would be left "
            f"out in silence{_other_prefix(absent[0], modules)}."
        )
    shapes = []
    for name, tensors in parts.items():
        pair, module = _pair(tensors), modules.get(name)
        weight = getattr(module, "weight", None)
        if pair is None or module is None or not isinstance(weight, Tensor):
            continue
        # A convolution stores (out, in, *kernel), an embedding (num_embeddings, dim).
        there = matrix_shape(module) or (weight.shape[0], math.prod(weight.shape[1:]))
        given = (pair[1].shape[0], pair[0].shape[1])
        if given != tuple(there):
            shapes.append(f"{name} is {tuple(there)} there, and the adapter is for {given}")
    if shapes:
        problems.append(f"{len(shapes)} modules have another shape: {'; '.join(shapes[:_SHOWN])}.")
    return problems


def _other_prefix(name: str, modules: Mapping[str, nn.Module]) -> str:
    """A hint, if the names differ from the base's by what they begin with."""
    inner = next((known for known in modules if known and name.endswith(f".{known}") and known.count(".") > 1), None)
    if inner is not None:
        return f"; its own begin without {name.removesuffix(inner)!r}"
    outer = next((known for known in modules if known.endswith(f".{name}")), None)
    return f"; its own begin with {outer.removesuffix(name)!r}" if outer is not None else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
