"""Compute SHA-256 digests, and name dtypes as files do."""

from __future__ import annotations

import hashlib

import torch


def sha256(data: bytes | memoryview) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
