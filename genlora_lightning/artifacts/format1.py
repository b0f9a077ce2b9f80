"""Read what releases before 0.2 wrote: format 1 of adapter folders and checkpoints, in which all was GenLoRA.

Format 2 names the kind of adapter, and calls an update's factors ``update.A`` and ``update.B`` where format 1 had
``generator_A`` and ``generator_B``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

VERSION = 1
_KIND = "genlora"
_RENAMED = {"generator_A": "update.A", "generator_B": "update.B"}

T = TypeVar("T")


def upgraded_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration with its kind, which format 1 did not name."""
    return {"kind": _KIND, **config}


def upgraded_names(values: Mapping[str, T]) -> dict[str, T]:
    """What has tensors' names for keys, by the names of format 2."""
    return {_upgraded_name(name): value for name, value in values.items()}


def upgrade_checkpoint(checkpoint: dict[str, Any], key: str, version: int) -> None:
    """Turn a checkpoint of format 1 into one of a later version, in place.

    Args:
        checkpoint: The checkpoint.
        key: Where it describes its adapters.
        version: What the description then says.
    """
    state_dict = checkpoint["state_dict"] = upgraded_names(checkpoint["state_dict"])
    ending = ".update.A.latent"
    layers = [name.removesuffix(ending) for name in state_dict if name.endswith(ending)]
    checkpoint[key] = {
        "layers": {name: [state_dict[f"{name}.update.{factor}.latent"].shape[0] for factor in "BA"] for name in layers},
        "trained_modules": {},
        **checkpoint[key],
        "config": upgraded_config(checkpoint[key]["config"]),
        "format_version": version,
    }
    for state in checkpoint.get("optimizer_states", []):
        if "names" in state:
            state["names"] = [_upgraded_name(name) for name in state["names"]]
            state["state"] = upgraded_names(state["state"])
            for group in state["param_groups"]:
                group["params"] = [_upgraded_name(name) for name in group["params"]]


def _upgraded_name(name: str) -> str:
    layer, _, own = name.rpartition(".")
    layer, _, factor = layer.rpartition(".")
    return f"{layer}.{_RENAMED[factor]}.{own}".lstrip(".") if factor in _RENAMED else name
