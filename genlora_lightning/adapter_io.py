"""Adapter folders: safetensors and JSON, written all or nothing, loaded with every tensor accounted for."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genlora_lightning import __version__
from genlora_lightning.config import GenLoRAConfig
from genlora_lightning.coverage import CoverageReport
from genlora_lightning.injection import adapter_config, adapter_layers, inject_adapters, remove_adapters
from genlora_lightning.state import adapter_state_dict, load_adapter_state

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "genlora"
FORMAT_VERSION = 1


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None
) -> Path:
    """Save a model's adapters, and the modules trained in full, to a folder; the base is not saved.

    The folder holds ``adapter_model.safetensors`` and ``adapter_config.json``. It is written beside its destination
    and then renamed, so that it is there whole or not at all, and an older adapter of the name stays until the new one
    is complete.

    Args:
        model: A model with adapters, merged or not.
        folder: Where to save; replaced if it is an adapter folder already.
        training: Facts to keep with the adapter, such as steps and metrics; JSON values.

    Returns:
        The folder's path.

    Raises:
        ValueError: The model has no adapters, or a tensor to save is not finite.
        FileExistsError: ``folder`` exists and is no adapter folder; nothing of yours is overwritten.
        OSError: It cannot be written, for example because the disk is full; then nothing is left behind.
    """
    folder = Path(folder)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in adapter_state_dict(model).items()}
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(state)} tensors hold NaN or infinite values ({broken[0]} among them); such an "
            f"adapter is of no use and was not saved to {folder}. The training diverged: lower the learning rate."
        )
    if folder.exists() and not is_adapter_folder(folder):
        raise FileExistsError(
            f"{folder} exists and is not an adapter folder (it holds no {CONFIG_FILE} of ours); it is left as it is. "
            "Give another folder, or remove this one."
        )
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": adapter_config(model).to_dict(),
        "base_model": base_model_name(model),
        "versions": {"genlora_lightning": __version__, "torch": torch.__version__},
        "training": dict(training or {}),
    }
    text = json.dumps(description, indent=2) + "\n"

    staging: str | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the destination's parent: a rename is atomic only within one file system.
        staging = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
        os.chmod(staging, 0o777 & ~_umask())  # mkdtemp makes it private; an adapter is as readable as other files
        save_file(state, os.path.join(staging, WEIGHTS_FILE), metadata={"format": "pt"})
        Path(staging, CONFIG_FILE).write_text(text, encoding="utf-8")
        _replace_folder(Path(staging), folder)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        raise OSError(
            f"The adapter ({size:,} bytes) could not be saved to {folder}: {error}. Nothing was left behind; check "
            "that there is space and that the folder is writable."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> CoverageReport:
    """Load an adapter folder into its base model, in place; adapters are injected if the model has none yet.

    Every tensor's name and shape is compared, in both directions. If anything is wrong, the model is as it was.

    Args:
        model: The base model the adapter was trained on, with or without adapters of the same configuration.
        folder: A folder that :func:`save_adapter` wrote.

    Returns:
        What is adapted.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        ValueError: A file is damaged or of another format, or the adapter does not fit the model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    state = _read_weights(folder / WEIGHTS_FILE)
    had_adapters = bool(adapter_layers(model))
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        report = inject_adapters(model, config)
    except ValueError as error:
        raise ValueError(f"The adapter in {folder} does not fit this {type(model).__name__}: {error}") from error
    try:
        load_adapter_state(model, state, str(folder))
    except ValueError:
        if not had_adapters:
            remove_adapters(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(requires_grad[name])
        raise
    return report


def read_adapter_config(folder: str | os.PathLike[str]) -> GenLoRAConfig:
    """The configuration of the adapter in a folder.

    Raises:
        FileNotFoundError: There is no such folder or no configuration in it.
        ValueError: The configuration cannot be read, is another library's, or comes from a newer release.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {path.parent}.")
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in path.parent.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"{path.parent} is no adapter folder: it has no {CONFIG_FILE} (it holds {held}).")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        peft_type = description.get("peft_type") if isinstance(description, dict) else None
        hint = f" It is a PEFT adapter of type {peft_type}." if peft_type else ""
        raise ValueError(f"{path} does not describe a GenLoRA adapter.{hint}")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}; this release ({__version__}) reads version {FORMAT_VERSION}. "
            "It was probably written by a newer release: update genlora-lightning."
        )
    try:
        return GenLoRAConfig.from_dict(description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no valid configuration: {error}") from error


def adapter_bytes(folder: str | os.PathLike[str]) -> int:
    """Size of an adapter folder on disk, in bytes."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def base_model_name(model: nn.Module) -> str | None:
    """The name a transformers model was loaded by (Hub id or folder), of the model itself or of its only such part."""
    names = {
        name for module in model.modules() if isinstance(name := getattr(module, "name_or_path", None), str) and name
    }
    return names.pop() if len(names) == 1 else None


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter of ours, or nothing at all, so that it may be replaced by one."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["format"] == FORMAT  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no complete adapter folder: it has no {path.name}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged or incomplete: {error}. Copy it again, or use another "
            "checkpoint."
        ) from error


def _replace_folder(staging: Path, folder: Path) -> None:
    """Put a finished folder in its place; an older one is moved aside first and comes back if that fails."""
    if not folder.exists():
        os.rename(staging, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, aside / "old")
    try:
        os.rename(staging, folder)
    except OSError:
        os.rename(aside / "old", folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    # The umask can be read only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
