"""Reduce a checkpoint to what is trained, with optimizer state by name and plain values; check one that is loaded."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.artifacts import format1
from genlora_lightning.artifacts.adapter_folder import config_entries, other_configs
from genlora_lightning.artifacts.other_state import load_other_state, other_state
from genlora_lightning.backbone.identity import (
    IDENTITY_SHAPE,
    BaseCheck,
    base_identity,
    base_model_name,
    identity_of_part,
    require_same_base,
    without_samples,
)
from genlora_lightning.distributed.shards import (
    own_state_names,
    plain_name,
    plain_parameters,
    state_names,
    tensors_trained_in_full,
    trained_tensors,
    whole_like,
)
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.fields import shown
from genlora_lightning.injection.held import held_root
from genlora_lightning.injection.inject import adapter_layers, count_linears, require_adapters
from genlora_lightning.injection.named import named_updates
from genlora_lightning.injection.names import with_own_names
from genlora_lightning.injection.peft_adapters import (
    AnyConfig,
    PeftAdapter,
    peft_root,
    present_config,
    read_any_config,
)
from genlora_lightning.injection.places import adapter_places, base_name, has_adapters
from genlora_lightning.injection.state import check_adapter_state
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.overrides import note, noted
from genlora_lightning.storage.documents import check_document, is_matrix_shape

CHECKPOINT_KEY = "genlora"
CHECKPOINT_VERSION = 2
OTHER_STATE_KEY = "other_state"
_BASE = "base identity"
# Layers and trained modules were not written before the first release.
_DESCRIPTION_SHAPE: dict[Any, Any] = {
    "config": dict,
    "other_configs?": [{"config": dict, "layers": [str]}],
    "base_model?": (str, type(None)),
    "base?": IDENTITY_SHAPE,
    "prefix?": str,
    "layers?": {str: is_matrix_shape},
    "num_linears?": int,
    "adapters?": {str: str},
    "trained_modules?": {str: [str]},
    "run?": (str, type(None)),
    f"{OTHER_STATE_KEY}?": {str: lambda value: True},
}
_HYPERPARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")


def adapter_root(module: nn.Module, config: AnyConfig | None = None) -> nn.Module:
    """The part of a module that adapters are injected into: what its ``adapter_root()`` says, else all of it.

    PEFT's go into the only transformers model in it, to which the names in PEFT's files are relative.

    Args:
        module: The module.
        config: Of the adapters that are to be injected; ``None`` for those that are there.
    """
    find: Callable[[], nn.Module] | None = getattr(module, "adapter_root", None)
    root = find() if find is not None else module
    is_peft = held_root(root) is not None if config is None else isinstance(config, PeftAdapter)
    return peft_root(root) if is_peft else root


def prefix_of(root: nn.Module, module: nn.Module) -> str:
    """What the names of a module's part begin with in the module, such as ``"model."``."""
    return next(f"{plain_name(name)}." if name else "" for name, part in module.named_modules() if part is root)


def layers_in_state(module: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of a module by their plain names in its state dict; those of named adapters: in their set."""
    named = {name: part.layer for name, part in named_updates(module).items()}
    return {plain_name(name): layer for name, layer in (named or adapter_layers(module)).items()}


def named_prefixes(module: nn.Module) -> dict[str, str]:
    """What the names of each named adapter's layers begin with in the state dict, such as ``"adapters.legal."``."""
    found: dict[str, str] = {}
    for name, part in named_updates(module).items():
        before, _, _ = plain_name(name).partition(f".{part.adapter}.")
        found.setdefault(part.adapter, f"{before}.{part.adapter}.")
    return found


def checkpoint_state(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint must hold: the adapter's state, and whatever else is trained; pieces of it if it is sharded."""
    if not has_adapters(module):
        require_adapters(module)
    return trained_tensors(module)


def remember_base(module: nn.Module, *, anew: bool) -> None:
    """Note the identity of a module's base, as long as it is whole and as it was loaded, for checkpoints and checks.

    Args:
        module: A module with adapters.
        anew: Whether it may have another base than what is noted is of.
    """
    if anew or noted(module, _BASE) is None:
        note(module, _BASE, base_identity(adapter_root(module)))


def base_of(module: nn.Module) -> dict[str, Any]:
    """The identity of a module's base: what was remembered, or what it is now."""
    found: dict[str, Any] | None = noted(module, _BASE)
    return base_identity(adapter_root(module)) if found is None else found


# -- writing ----------------------------------------------------------------------------------------------------------


def keep_adapters_only(
    module: nn.Module, checkpoint: dict[str, Any], optimizers: list[Optimizer], *, look_at_frozen: bool = True
) -> None:
    """Turn what Lightning wants to save into what we save, in place.

    The state dict keeps what was trained, and beside it is what else has changed (:func:`other_state`). Optimizer state
    is keyed by parameter names; tensors are copies that lie in one block per dtype (a file has a few hundred bytes of
    bookkeeping per block, more than many adapter tensors); what torch's safe loading refuses is turned into plain
    values where that is possible.

    Raises:
        RuntimeError: The state dict lacks a trained tensor; nothing should be written then.
    """
    kept = checkpoint_state(module)
    state = {plain_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    others = other_state(module, state, look_at_frozen=look_at_frozen)
    # Interned, because a file holds a string once for each object, and there are as many bytes in names as in tensors.
    checkpoint["state_dict"] = {sys.intern(name): tensor for name, tensor in state.items() if name in kept}
    missing = [name for name in kept if name not in checkpoint["state_dict"]]
    if missing:
        raise RuntimeError(
            f"{len(missing)} trained tensors, {missing[0]} among them, are missing in the state dict to be saved: "
            f"{type(module).__name__} changes its `state_dict` or `on_save_checkpoint`. No checkpoint was "
            "written that could not be resumed from."
        )
    root = adapter_root(module)
    prefix = prefix_of(root, module)
    layers = {sys.intern(name): layer for name, layer in layers_in_state(module).items()}
    configs = {name: layer.config for name, layer in layers.items()}
    checkpoint[CHECKPOINT_KEY] = {
        "format_version": CHECKPOINT_VERSION,
        **(config_entries(configs) if configs else {"config": present_config(root).to_dict()}),
        "base_model": base_model_name(root),
        # What is trained beside the adapters has other values in each checkpoint, and is in its state dict.
        "base": without_samples(base_of(module), _base_names(root, prefix, kept)),
        "prefix": prefix,
        # As in an adapter folder, but by the names in this state dict.
        "layers": {name: layer.shape.sizes for name, layer in layers.items()},
        "num_linears": count_linears(root),
        **({"adapters": named} if (named := named_prefixes(module)) else {}),
        "trained_modules": {
            name: [sys.intern(own) for own in tensors] for name, tensors in tensors_trained_in_full(module).items()
        },
        OTHER_STATE_KEY: pack({name: value for name, value in others.items() if name not in kept}),
    }
    if "optimizer_states" in checkpoint:
        states = zip(checkpoint["optimizer_states"], optimizers, strict=True)
        checkpoint["optimizer_states"] = [_named_state(module, state, optimizer) for state, optimizer in states]
    for name in _HYPERPARAMETERS:
        if name in checkpoint:
            checkpoint[name] = _plain_hyperparameters(checkpoint[name], name)
    refused: list[str] = []
    for name, value in list(checkpoint.items()):
        checkpoint[name] = _plain(value, name, refused)
    if refused:
        warnings.warn(
            f"The checkpoint holds objects that torch's safe loading refuses ({', '.join(refused[:4])}), so it can be "
            "loaded with `weights_only=False` only. Store plain values there: numbers, strings, lists, tensors.",
            stacklevel=2,
        )
    packed = ["state_dict", "optimizer_states"]
    blocks = pack({name: checkpoint[name] for name in packed if name in checkpoint})
    checkpoint.update(blocks)


def _base_names(root: nn.Module, prefix: str, names: Iterable[str]) -> Iterable[str]:
    """The names that tensors of a state dict have in the base without adapters."""
    places = {plain_name(name): place for name, place in adapter_places(root).items()}
    for name in names:
        yield base_name(plain_name(name).removeprefix(prefix), places)


def pack(tree: Any) -> Any:
    """A copy of nested dictionaries and lists whose tensors are views into one new block on the CPU per dtype."""
    found: list[Tensor] = []
    _collect(tree, found)
    tensors = {id(tensor): tensor for tensor in found}.values()
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    views: dict[int, Tensor] = {}
    for group in by_kind.values():
        block = torch.cat([tensor.detach().reshape(-1) for tensor in group]).cpu()
        parts = torch.split(block, [tensor.numel() for tensor in group])
        views |= {id(tensor): part.view(tensor.shape) for tensor, part in zip(group, parts, strict=True)}
    return _replaced(tree, views)


def _collect(tree: Any, tensors: list[Tensor]) -> None:
    if type(tree) in (Tensor, nn.Parameter):
        tensors.append(tree)
    elif isinstance(tree, dict):
        for value in tree.values():
            _collect(value, tensors)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            _collect(value, tensors)


def _replaced(tree: Any, views: dict[int, Tensor]) -> Any:
    if type(tree) in (Tensor, nn.Parameter):
        return views[id(tree)]
    if isinstance(tree, dict):
        return {name: _replaced(value, views) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_replaced(value, views) for value in tree)
    return tree


def _plain_hyperparameters(values: Any, place: str) -> Any:
    """Hyperparameters without what cannot be stored safely: nothing that a run goes on with depends on them."""
    if not isinstance(values, Mapping):
        return values
    kept = {}
    for name, value in values.items():
        refused: list[str] = []
        plain = _plain(value, f"{place}.{name}", refused)
        if refused:
            warnings.warn(
                f"The hyperparameter {name!r} is a {type(value).__name__} and was left out of the checkpoint: torch's "
                "safe loading refuses it. Save plain values only, for example with "
                f"`self.save_hyperparameters(ignore=[{name!r}])`.",
                stacklevel=4,
            )
        else:
            kept[name] = plain
    return kept


def _plain(value: Any, place: str, refused: list[str]) -> Any:
    """A value as torch loads it safely; the places of those that it would not are added to a list."""
    if value is None or isinstance(value, (Tensor, torch.dtype, torch.device, torch.Size)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, place, refused)
    if isinstance(value, (int, float, str)):  # a subclass
        return int(value) if isinstance(value, int) else float(value) if isinstance(value, float) else str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        items = value.items()
        return {_plain(key, place, refused): _plain(item, f"{place}.{key}", refused) for key, item in items}
    if isinstance(value, (list, tuple, set)):
        plain = [_plain(item, f"{place}[{index}]", refused) for index, item in enumerate(value)]
        return tuple(plain) if isinstance(value, tuple) else set(plain) if isinstance(value, set) else plain
    refused.append(f"{place}: {type(value).__name__}")
    return value


# -- optimizer state by name ------------------------------------------------------------------------------------------


def _names(module: nn.Module) -> dict[int, str]:
    return {id(parameter): sys.intern(name) for name, parameter in plain_parameters(module).items()}


def _named_state(module: nn.Module, state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with parameter names in place of numbers."""
    names = _names(module)
    by_number: dict[Any, str] = {}
    for stored, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(stored["params"], group["params"], strict=True):
            by_number[number] = names[id(parameter)]
    return {
        **state,
        "state": {by_number[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [by_number[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def numbered_state(module: nn.Module, stored: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A stored state with names as the state dict, with numbers, that an optimizer loads; groups may be in any order.

    Raises:
        ValueError: The optimizer has other parameters than the stored one, or groups them in another way.
    """
    if not all(isinstance(name, str) for group in stored["param_groups"] for name in group["params"]):
        return stored  # Lightning's own, written by a run without the callback's hooks
    names = _names(module)
    present = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    group_of = {name: index for index, group in enumerate(stored["param_groups"]) for name in group["params"]}
    here = {name for group in present for name in group}
    missing, unexpected = sorted(here - set(group_of)), sorted(set(group_of) - here)
    if missing or unexpected:
        parts = [f"{len(missing)} parameters have no state ({_some(missing)})"] if missing else []
        parts += [f"the state of {len(unexpected)} has no parameter here ({_some(unexpected)})"] if unexpected else []
        raise ValueError(
            f"The checkpoint's {type(optimizer).__name__} state does not fit this run's: {'; '.join(parts)}. Train the "
            "same parameters, or start a new run from the adapter folder."
        )
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for members, group in zip(present, optimizer.param_groups, strict=True):
        sources = [stored["param_groups"][index] for index in sorted({group_of[name] for name in members})]
        options = [{key: value for key, value in source.items() if key != "params"} for source in sources]
        if any(other != options[0] for other in options[1:]):
            raise ValueError(
                f"The optimizer has {members[0]} and {members[-1]} in one parameter group, the checkpoint in groups "
                "with different settings. Use the same parameter groups to resume."
            )
        chosen = dict(options[0]) if options else {key: value for key, value in group.items() if key != "params"}
        if "param_names" in group:
            chosen["param_names"] = group["param_names"]
        groups.append({**chosen, "params": list(range(number, number + len(members)))})
        for name in members:
            if name in stored["state"]:
                # Copies, because all tensors of the file are views into one block.
                state[number] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in stored["state"][name].items()}
            number += 1
    return {**stored, "state": state, "param_groups": groups}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


# -- reading ----------------------------------------------------------------------------------------------------------


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Turn a checkpoint of an older format into one of today's, in place."""
    described = checkpoint.get(CHECKPOINT_KEY)
    version = described.get("format_version") if isinstance(described, dict) else None
    if type(version) is int and version == format1.VERSION:
        format1.upgrade_checkpoint(checkpoint, CHECKPOINT_KEY, CHECKPOINT_VERSION)


def describe(checkpoint: Mapping[str, Any], source: str = "The checkpoint") -> dict[str, Any]:
    """What a checkpoint says of its adapters: configuration, base model, prefix, adapted linears, trained modules.

    Args:
        checkpoint: The checkpoint.
        source: The file, for messages.

    Raises:
        ValueError: It holds no adapters, comes from a newer release, or what it says is damaged.
    """
    described: dict[str, Any] | None = checkpoint.get(CHECKPOINT_KEY)
    if described is None:
        raise ValueError(
            f"{source} holds no adapters: it was written by a run without GenLoRAFinetuning. To start "
            "from its weights load them into the model yourself, and give no `ckpt_path`."
        )
    version = described.get("format_version") if isinstance(described, dict) else None
    if type(version) is not int or version != CHECKPOINT_VERSION:
        raise ValueError(
            f"The adapters in {_inside(source)} have format version {shown(version)}; this release reads version "
            f"{CHECKPOINT_VERSION}. It was probably written by a newer release: update genlora-lightning."
        )
    check_document(source, described, _DESCRIPTION_SHAPE, CHECKPOINT_KEY)
    try:
        read_any_config(described["config"])
        other_configs(described)
    except (TypeError, ValueError) as error:
        raise DamagedFileError(f"{source} holds no valid configuration of adapters: {error}") from error
    check_document(source, checkpoint, {"state_dict": {str: Tensor}, "global_step?": int, "epoch?": int})
    return {"prefix": "", "trained_modules": {}, **described}


def stored_configs(described: Mapping[str, Any]) -> dict[str, AdapterConfig]:
    """The configuration of each linear that a checkpoint lists, by its name there; for adapters of this library.

    Args:
        described: What :func:`describe` gives.
    """
    config = read_config(described["config"])
    others = other_configs(described)
    return {name: others.get(name, config) for name in described.get("layers", {})}


def check_names(described: Mapping[str, Any], names: Iterable[str], source: str) -> None:
    """Check that a checkpoint holds the adapters of some names; one adapter without a name is one of none.

    Args:
        described: What :func:`describe` gives.
        names: What is to go on from it.
        source: The file, for messages.

    Raises:
        ValueError: It holds others.
    """
    there, here = sorted(described.get("adapters", {})), sorted(names)
    if there != here:
        held, wanted = (
            f"the adapters {', '.join(some)}" if some else "one adapter, without a name," for some in (there, here)
        )
        raise ValueError(
            f"{source} holds {held}, and here it is for {wanted.rstrip(',')}. Give GenLoRAFinetuning the `adapters` of "
            "the run that wrote it."
        )


def _inside(source: str) -> str:
    """A file's description as it stands inside of a sentence."""
    return source[:1].lower() + source[1:] if source.startswith("The ") else source


def check_base(
    checkpoint: Mapping[str, Any],
    present: dict[str, Any],
    source: str,
    base_check: BaseCheck = "error",
    prefix: str | None = None,
) -> None:
    """Refuse a checkpoint of another base; one that was written before checkpoints said which is taken on trust.

    Args:
        checkpoint: What was loaded.
        present: Identity of the base at hand.
        source: What the checkpoint is, for the message.
        base_check: What to do if it is another one.
        prefix: What the names of ``present`` have before them in the checkpoint's state dict; that of its adapters'
            root if ``None``.

    Raises:
        WrongBaseError: The base is another one.
    """
    described = describe(checkpoint)
    stored = described.get("base")
    if stored is None:
        return
    root = described["prefix"]
    prefix = root if prefix is None else prefix
    if prefix.startswith(root):
        stored = identity_of_part(stored, prefix.removeprefix(root))
    else:
        present = identity_of_part(present, root.removeprefix(prefix))
    require_same_base(stored, present, source, base_check)


def load_beside(module: nn.Module, checkpoint: dict[str, Any], source: str = "The checkpoint") -> None:
    """Load what a checkpoint holds beside what was trained; a full one, or one of an older release, holds nothing.

    What was trained gets the names that it has in this module beside the plain ones, for whoever loads it next.

    Args:
        module: The module with the adapters.
        checkpoint: The checkpoint.
        source: The file, for messages.

    Raises:
        ValueError: It does not fit the module's buffers, or a part of the module does not take it.
    """
    names = own_state_names(module)
    checkpoint["state_dict"] = with_own_names(checkpoint["state_dict"], names)
    others = describe(checkpoint, source).get(OTHER_STATE_KEY, {})
    load_other_state(module, with_own_names(others, names), source)


def check_checkpoint(module: nn.Module, checkpoint: Mapping[str, Any], source: str = "The checkpoint") -> None:
    """Compare a checkpoint with a module that has adapters: configuration, names and shapes.

    Args:
        module: The module with the adapters.
        checkpoint: The checkpoint.
        source: The file, for messages.

    Raises:
        ValueError: They do not fit; the message says where.
    """
    if not has_adapters(module):
        raise RuntimeError("The adapters were not injected before the checkpoint was loaded.")
    described = describe(checkpoint, source)
    check_names(described, named_prefixes(module), source)
    pairs = [(present_config(module), read_any_config(described["config"]))]
    if isinstance(pairs[0][1], AdapterConfig):  # ranks of several linears may be several
        stored = stored_configs(described)
        present = {name: layer.config for name, layer in layers_in_state(module).items()}
        pairs += [(config, stored[name]) for name, config in present.items() if name in stored]
    differences = [
        f"{name}: {there!r} in the checkpoint, {here!r} here"
        for here_config, there_config in pairs
        for name, (here, there) in here_config.differences(there_config).items()
    ]
    if differences:
        differences = list(dict.fromkeys(differences))
        raise ValueError(
            f"The adapters in {_inside(source)} were made with another configuration ({'; '.join(differences)}). Use "
            "the configuration of the run that wrote it."
        )
    # Base weights may be there (a full checkpoint); they are the base's matter, not the adapters'.
    expected = whole_like(module)
    base = state_names(module) - set(expected)
    state = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in base}
    check_adapter_state(expected, state, _inside(source))
