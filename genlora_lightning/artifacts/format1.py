"""Read format 1 of adapter folders and checkpoints, in which all was GenLoRA: what was written before format 2 came.

Format 2 names the kind of adapter, and calls an update's factors ``update.A`` and ``update.B`` where format 1 had
``generator_A`` and ``generator_B``. Format 1 had a SHA-256 for each tensor of an adapter folder, and a manifest with
that of its own text; its checkpoints had the optimizer state of all parameters in one tensor for each quantity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from genlora_lightning.storage.digests import dtype_name, sha256

VERSION = 1
_KIND = "genlora"
_RENAMED = {"generator_A": "update.A", "generator_B": "update.B"}
_OWN_SHA256 = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"\n}\n\Z')

T = TypeVar("T")


def is_unchanged(manifest: bytes) -> bool:
    """Whether a manifest is what was written: its last entry is the SHA-256 of it with zeros in the place of that."""
    found = _OWN_SHA256.search(manifest)
    if found is None:
        return False
    blank = manifest[: found.start(1)] + b"0" * 64 + manifest[found.end(1) :]
    return sha256(blank) == found[1].decode()


def is_same_file(data: bytes, header_sha256: str | None, digests: Mapping[str, str] | None) -> bool:
    """Whether a safetensors file has the header and the tensors that were written."""
    if sha256(data[: 8 + int.from_bytes(data[:8], "little")]) != header_sha256:
        return False
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError):  # cut off
        return False
    found = {}
    for name, tensor in tensors.items():
        start = f"{dtype_name(tensor.dtype)} {','.join(map(str, tensor.shape))}\n".encode()
        found[name] = sha256(start + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found == digests


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
            state["state"] = _state_by_name(state, state_dict)
            for group in state["param_groups"]:
                group["params"] = [_upgraded_name(name) for name in group["params"]]


def _state_by_name(stored: dict[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The state of each parameter, out of one flat tensor for each quantity, such as Adam's ``exp_avg``, of all."""
    names = [_upgraded_name(name) for name in stored.pop("names")]
    rest = upgraded_names(stored["state"])
    state = {name: dict(rest.get(name, {})) for name in names}
    for key, column in stored.pop("columns").items():
        shapes = [torch.Size() if column["scalar"] else state_dict[name].shape for name in names]
        parts = torch.split(column["values"], [shape.numel() for shape in shapes])
        for name, shape, part in zip(names, shapes, parts, strict=True):
            state[name][key] = part.view(shape)
    return state


def _upgraded_name(name: str) -> str:
    layer, _, own = name.rpartition(".")
    layer, _, factor = layer.rpartition(".")
    return f"{layer}.{_RENAMED[factor]}.{own}".lstrip(".") if factor in _RENAMED else name
