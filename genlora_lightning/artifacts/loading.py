"""Load modules from checkpoints and adapter folders, and convert checkpoints to folders; no trainer is needed."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from genlora_lightning.artifacts.adapter_folder import adapter_place, read_adapter
from genlora_lightning.artifacts.adapter_io import adapter_record, load_adapter, write_adapter
from genlora_lightning.artifacts.adapter_set import AdapterSet
from genlora_lightning.artifacts.checkpoint import (
    adapter_root,
    check_base,
    check_checkpoint,
    checkpoint_state,
    describe,
    load_beside,
    prefix_of,
    stored_configs,
    upgrade,
)
from genlora_lightning.artifacts.other_state import note_start
from genlora_lightning.artifacts.peft_folder import is_peft_folder
from genlora_lightning.backbone.identity import BaseCheck, base_identity
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.injection.inject import count_linears, inject_layers
from genlora_lightning.injection.names import plain_modules, plain_name
from genlora_lightning.injection.peft_adapters import PeftAdapter, put_adapters, read_any_config
from genlora_lightning.injection.places import has_adapters
from genlora_lightning.injection.restoring import restored_after_error
from genlora_lightning.injection.state import check_adapter_state, load_adapter_state, widen_to_stored
from genlora_lightning.storage import checkpoint_file
from genlora_lightning.storage.paths import local_path

M = TypeVar("M", bound=nn.Module)


def load_module(
    module: type[M] | M,
    path: str | os.PathLike[str],
    *,
    base_check: BaseCheck = "error",
    **arguments: Any,
) -> M:
    """A module with trained adapters, from a checkpoint or an adapter folder.

    This is what ``load_from_checkpoint`` cannot do: our checkpoints do not hold the base, and a module that was just
    made has no adapters yet. Here the module is made, its model is built (``configure_model``), the adapters are
    injected with the stored configuration, and every tensor is loaded, or an error is raised.

    Args:
        module: The LightningModule's class, which is called with the hyperparameters that the checkpoint holds; or a
            module (any ``nn.Module``), which is changed in place; adapters that it has lose their values.
        path: A checkpoint file, or an adapter folder, or the name of one on the Hugging Face Hub.
        base_check: What to do if the base is not the one that was trained on: ``"error"``, ``"warn"``, or ``"off"``: do
            not look.
        arguments: For the class: they replace those of the checkpoint. An adapter folder holds none but a classifier's
            ``label_names``, so all others are needed.

    Returns:
        The module, in evaluation mode.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        TypeError: An argument of the class is missing.
        WrongBaseError: The base is not the one that was trained on.
        ValueError: What is there is damaged or holds no adapters, or they do not fit the module. A module that was
            given has the model that its ``configure_model`` builds then, and is as it was otherwise.
    """
    path = adapter_place(path, "checkpoint or adapter folder")
    checkpoint = None if path.is_dir() else read_checkpoint(path)
    if isinstance(module, type):
        if checkpoint is not None:
            describe(checkpoint, str(path))
            arguments = _accepted(module, checkpoint.get("hyper_parameters", {})) | arguments
        else:
            arguments = _labels_of(module, path, arguments) | arguments
        try:
            made = module(**arguments)
        except TypeError as error:
            raise TypeError(
                f"{module.__name__} could not be made with {sorted(arguments) or 'no arguments'}: {error}. {path} does "
                "not hold the arguments that are missing; give them to `load_module`."
            ) from error
    else:
        if arguments:
            raise TypeError(f"Arguments ({', '.join(arguments)}) are for a class; here the module is made already.")
        made = module
    configure: Callable[[], None] | None = getattr(made, "configure_model", None)
    if configure is not None:
        configure()
    if checkpoint is None:
        _check_built(made, str(path))
        load_adapter(adapter_root(made), path, base_check=base_check, replace=True)
    else:
        load_checkpoint(made, checkpoint, str(path), base_check=base_check)
    return made.eval()


def load_checkpoint(
    module: nn.Module, checkpoint: dict[str, Any], source: str, *, base_check: BaseCheck = "error"
) -> None:
    """Load the content of a checkpoint into a module whose model is built; adapters are injected if it has none.

    Args:
        module: The module.
        checkpoint: As :func:`read_checkpoint` gives it.
        source: What it is, for messages.
        base_check: As in :func:`load_module`.

    Raises:
        WrongBaseError: The base is not the one that was trained on.
        ValueError: It holds no adapters, or they do not fit, or the module has no parameters yet; it is as it was then.
    """
    config = read_any_config(describe(checkpoint, source)["config"])
    _check_built(module, source)
    _check_base(checkpoint, adapter_root(module, config), source, base_check)
    _load_state(module, checkpoint, source)


def _check_built(module: nn.Module, source: str) -> None:
    if next(module.parameters(), None) is None:
        raise ValueError(
            f"This {type(module).__name__} has no parameters yet, and {source} cannot be loaded into it. Its layers "
            'are probably built in `setup`, which the trainer calls: call `module.setup("fit")` first (or what else '
            "builds them, such as `module.configure_model()`), then `load_module(module, path)`."
        )


def _check_base(
    checkpoint: dict[str, Any], model: nn.Module, source: str, base_check: BaseCheck, prefix: str | None = None
) -> None:
    described = describe(checkpoint, source)
    if base_check == "off" or "base" not in described:
        return
    here = described["prefix"] if prefix is None else prefix
    trained = [name.removeprefix(here) for name in described["trained_modules"]]  # theirs are the state dict's names
    what = source if source.startswith("The checkpoint") else f"The checkpoint {source}"
    check_base(checkpoint, base_identity(model, without=trained), what, base_check, prefix)


@torch.no_grad()
def _load_state(module: nn.Module, checkpoint: dict[str, Any], source: str) -> None:
    with restored_after_error(module), ExitStack() as undo:
        if has_adapters(module):
            check_checkpoint(module, checkpoint, source)
        elif (described := describe(checkpoint, source)).get("adapters"):
            undo.callback(_add_described(module, described, checkpoint["state_dict"], source))
        else:
            root = adapter_root(module, read_any_config(describe(checkpoint, source)["config"]))
            described = describe(checkpoint, source)
            _inject_described(root, described, checkpoint["state_dict"], prefix_of(root, module), source)
        stored: dict[str, Tensor] = checkpoint["state_dict"]
        widen_to_stored(module, stored)
        expected = checkpoint_state(module)
        # Parameters beside the adapters that the run trained; `requires_grad` of a new module does not tell which.
        own = {plain_name(name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}
        extra = {name: own[name] for name in stored if name in own and name not in expected}
        check_adapter_state(expected | extra, stored, source)
        note_start(module)
        load_beside(module, checkpoint, source)
        undo.pop_all()
    for name, tensor in (expected | extra).items():
        tensor.copy_(stored[name])


def _inject_described(
    model: nn.Module, described: dict[str, Any], stored: Iterable[str], prefix: str, source: str
) -> None:
    """Put adapters where a checkpoint says that they were, or, in a model of other linears, where its rule says."""
    config = read_any_config(described["config"])
    names = [name.removeprefix(prefix) for name in described.get("layers", {}) if name.startswith(prefix)]
    is_listed = (
        names and described.get("num_linears") == count_linears(model) and len(names) == len(described["layers"])
    )
    try:
        if is_listed and not isinstance(config, PeftAdapter):
            trained = [name.removeprefix(prefix) for name in described["trained_modules"]]
            configs = stored_configs(described)
            own = {name.removeprefix(prefix) for name in stored}
            inject_layers(model, {name: configs[prefix + name] for name in names}, trained, own)
        elif described.get("other_configs"):
            raise ValueError("It has other linears, and the checkpoint lists configurations linear by linear.")
        else:
            put_adapters(model, config)
    except (ValueError, RuntimeError) as error:  # the latter: no memory for the sizes that it claims
        raise ValueError(f"The adapters in {source} do not fit this {type(model).__name__}: {error}") from error


def _add_described(
    module: nn.Module, described: dict[str, Any], stored: Iterable[str], source: str
) -> Callable[[], None]:
    """Give a module the set of named adapters that a checkpoint describes, to be trained; what takes it back."""
    prefixes: dict[str, str] = described["adapters"]
    place, _, _ = next(iter(prefixes.values())).rstrip(".").rpartition(".")
    holder, _, attribute = place.rpartition(".")
    configs = stored_configs(described)
    adapters = AdapterSet(adapter_root(module))

    def take_back() -> None:
        adapters.close()
        module.get_submodule(holder)._modules.pop(attribute, None)

    try:
        for name, prefix in prefixes.items():
            of_name = {layer.removeprefix(prefix): c for layer, c in configs.items() if layer.startswith(prefix)}
            adapters.add_layers(name, of_name, {own.removeprefix(prefix) for own in stored if own.startswith(prefix)})
        module.get_submodule(holder).add_module(attribute, adapters)
    except (ValueError, RuntimeError, AttributeError, KeyError) as error:
        adapters.close()
        raise ValueError(f"The adapters in {source} do not fit this {type(module).__name__}: {error}") from error
    return take_back


def _prefix_in(described: dict[str, Any], model: nn.Module) -> str:
    """What the names of a checkpoint's linears begin with before those that they have in a model."""
    parts = next(iter(described.get("layers", {})), "").split(".")
    places = {name for name, _ in plain_modules(model)}
    return next((".".join([*parts[:i], ""]) for i in range(len(parts)) if ".".join(parts[i:]) in places), "")


def _accepted(cls: type, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Those hyperparameters that the class takes as arguments."""
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(hyperparameters)
    return {name: value for name, value in hyperparameters.items() if name in parameters}


def _labels_of(cls: type, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The names of the classes that an adapter folder brings along, where the class takes them and nobody gives any."""
    if "label_names" not in inspect.signature(cls).parameters or given.keys() & {"label_names", "num_labels"}:
        return {}
    if is_peft_folder(folder):
        return {}
    names = read_adapter(folder).label_names
    return {"label_names": names} if names else {}


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file under torch's safe loading, onto the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, is no checkpoint with adapters, or holds objects that are not loaded safely.
    """
    path = local_path(path, "checkpoint")
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        checkpoint = checkpoint_file.read_checkpoint(path, weights_only=True)
    except DamagedFileError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is no checkpoint that can be loaded safely, or it is damaged: "
            f"{error}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is no Lightning checkpoint: it has no state dict.")
    try:
        upgrade(checkpoint)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: its format 1 is incomplete ({error!r}).") from error
    return checkpoint


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_check: BaseCheck = "error",
) -> Path:
    """Make an adapter folder from a Lightning checkpoint. After an error the model is as it was.

    Args:
        checkpoint: A checkpoint that a run with GenLoRAFinetuning wrote.
        base_model: The model that was trained: what the adapters were injected into, or the part of it that holds all
            of them. It has the checkpoint's adapters afterwards.
        folder: Where to save, as in :func:`~genlora_lightning.save_adapter`.
        base_check: What to do if the base is not the one that was trained on: ``"error"``, ``"warn"``, or ``"off"``: do
            not look.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        WrongBaseError: The base is not the one that was trained on.
        ValueError: It is damaged, holds no adapters, or does not fit the model.
        OSError: The folder cannot be written, or is no adapter folder (``FileExistsError``).
    """
    content = read_checkpoint(checkpoint)
    described = describe(content, str(checkpoint))
    if isinstance(read_any_config(described["config"]), PeftAdapter):
        raise ValueError(
            f"{checkpoint} holds adapters of PEFT ({described['config'].get('peft_type')}). Make the folder in Python: "
            "`save_adapter(load_module(module, checkpoint), folder)`."
        )
    if described.get("adapters"):
        raise ValueError(
            f"{checkpoint} holds several adapters ({', '.join(described['adapters'])}), and this makes a folder of "
            "one. In Python: `load_module(module, checkpoint).adapters.save(name, folder)`."
        )
    stored: dict[str, Tensor] = content["state_dict"]
    with restored_after_error(base_model):
        _inject_described(base_model, described, stored, _prefix_in(described, base_model), str(checkpoint))
        adapter = adapter_record(base_model)
        expected = adapter.state
        first = next(iter(expected))
        prefixes = [name[: -len(first)] for name in stored if name.endswith(first)]
        default = described["prefix"]
        prefix = next((p for p in prefixes if all(p + name in stored for name in expected)), default)
        _check_base(content, base_model, str(checkpoint), base_check, prefix)
        state = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
        # What else was trained, or a base in a full checkpoint, has no place in an adapter folder.
        base = {plain_name(name) for name in base_model.state_dict()} - set(expected)
        state = {name: tensor for name, tensor in state.items() if name not in base}
        check_adapter_state(expected, state, str(checkpoint))
        # Written before the model is changed for good: a full disk is an error, too.
        values = {name: state[name].to(tensor.dtype) for name, tensor in expected.items()}
        training: dict[str, Any] = {name: content[name] for name in ("global_step", "epoch") if name in content}
        written = write_adapter(dataclasses.replace(adapter, state=values), folder, training=training)
    load_adapter_state(base_model, state, str(checkpoint))
    return written
