"""Safetensors files, written with the digest of each tensor in one pass over its bytes.

``safetensors.torch.save_file`` takes some 25 µs a tensor, and hashing as much again; an adapter has hundreds of small
ones. The format is a header (its length in 8 bytes, then JSON, padded to 8) and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genlora_lightning.storage.digests import sha256, tensor_bytes, tensor_digest

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class WrittenTensors:
    """What was written: the file's size, the SHA-256 of its header, and that of each tensor."""

    num_bytes: int
    header_sha256: str
    digests: dict[str, str]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> WrittenTensors:
    """Write a safetensors file.

    Raises:
        ValueError: A dtype that the format has no name for.
        OSError: The file cannot be written.
    """
    # The widest first, so that every tensor lies at a multiple of its item's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files do not hold.")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digests = {}
    with open(path, "wb") as file:
        file.write(head)
        for name in names:
            data = tensor_bytes(tensors[name])
            file.write(data)
            digests[name] = tensor_digest(tensors[name], data)
    return WrittenTensors(len(head) + end, sha256(head), digests)
