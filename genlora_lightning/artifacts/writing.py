"""Write an adapter folder of whatever format: checked before, whole or not at all, files of the user's kept."""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genlora_lightning._version import __version__
from genlora_lightning.artifacts.adapter_folder import (
    ADAPTER_FILES,
    CONFIG_FILE,
    is_adapter_folder,
)
from genlora_lightning.fields import shown
from genlora_lightning.storage.atomic import atomic_folder


def checked_tensors(state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Copy the tensors that a folder is to hold to the CPU, once it is known that they and the folder will do.

    Raises:
        ValueError: One is not finite.
        FileExistsError: The folder exists and is no adapter folder.
    """
    # Copies: the file's format refuses tensors that share memory, such as tied weights that are trained in full.
    copied = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
    broken = _not_finite(copied)
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(copied)} tensors hold NaN or infinite values ({broken[0]} among them); such an "
            f"adapter is of no use and was not saved to {folder}. The training diverged: lower the learning rate."
        )
    if folder.exists() and not is_adapter_folder(folder):
        raise FileExistsError(
            f"{folder} exists and is not an adapter folder (it holds no {CONFIG_FILE} of ours); it is left as it is. "
            "Give another folder, or remove this one."
        )
    return copied


@contextmanager
def new_folder(
    folder: Path, state: Mapping[str, Tensor], training: Mapping[str, Any] | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Context manager that gives a place to write the files to, and puts it in the folder's place in one step.

    Args:
        folder: Where they are to be; other files that lie there are kept.
        state: The tensors, whose size an error tells.
        training: Facts to keep with them.

    Yields:
        The place, and the facts as they will be read back.

    Raises:
        ValueError: ``training`` is no JSON.
        OSError: It cannot be written; nothing is left behind.
    """
    try:
        text = json.dumps(dict(training or {}), allow_nan=False, ensure_ascii=False)
        facts = json.loads(text.encode())
    except (TypeError, ValueError) as error:
        raise ValueError(f"`training` must hold JSON values, got {shown(training)}: {error}.") from error
    try:
        with atomic_folder(folder) as staging:
            yield staging, facts
            _keep_other_files(folder, staging)
    except OSError as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        raise OSError(
            f"The adapter ({size:,} bytes) could not be saved to {folder}: {error}. Nothing was left behind; check "
            "that there is space and that the folder is writable."
        ) from error


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that an adapter's weights depend on, of those that are imported."""
    versions = {"genlora_lightning": __version__, "python": platform.python_version()}
    for name in ("torch", "safetensors", "transformers", "lightning", "peft"):
        if name in sys.modules:
            versions[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return versions


def _not_finite(state: Mapping[str, Tensor]) -> list[str]:
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    largest = torch._foreach_norm(list(floating.values()), float("inf")) if floating else ()
    return [name for name, value in zip(floating, largest, strict=True) if not math.isfinite(value)]


def _keep_other_files(folder: Path, staging: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in ADAPTER_FILES:
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, staging / path.name, symlinks=True)
            else:
                shutil.copy2(path, staging / path.name, follow_symlinks=False)
