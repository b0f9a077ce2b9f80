"""Digests: SHA-256 of tensors and of texts that carry their own, and the error for files that do not have theirs."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import torch
from torch import Tensor

_OWN = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"\n}\n\Z')
_BLANK = b"0" * 64


class DamagedFileError(ValueError):
    """A file is not what was written: truncated, changed, or bits of it have flipped."""


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes | memoryview:
    """A tensor's values in row-major order; of a contiguous one on the CPU without a copy."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor, data: bytes | memoryview | None = None) -> str:
    """SHA-256 of a line with dtype and shape, ``float32 4,2``, and the values' bytes in row-major order."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {','.join(map(str, tensor.shape))}\n".encode())
    digest.update(tensor_bytes(tensor) if data is None else data)
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def seal_json(values: dict[str, Any]) -> bytes:
    """Readable JSON whose last entry, ``manifest_sha256``, is the SHA-256 of the text with zeros in its place."""
    text = json.dumps({**values, "manifest_sha256": _BLANK.decode()}, indent=1, ensure_ascii=False, allow_nan=False)
    data = f"{text}\n".encode()
    head, tail = data.rsplit(_BLANK, 1)
    return head + sha256(data).encode() + tail


def is_sealed(data: bytes) -> bool:
    """Whether a text of :func:`seal_json` is unchanged."""
    found = _OWN.search(data)
    return found is not None and sha256(data[: found.start(1)] + _BLANK + data[found.end(1) :]) == found[1].decode()
