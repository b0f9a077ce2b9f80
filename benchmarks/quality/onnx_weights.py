"""Reads the weights out of an ONNX file, without the onnx package: a few fields of the protobuf format are enough."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT = 1, 2
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_RAW = 1, 8, 9


def read_weights(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The float32 initialisers of a model.

    Returns:
        Tensors by name, and for each tensor the name of the output of the first node that takes it: exporters rename
        the matrices of linears, but keep the module's path there.
    """
    graph = next(value for number, value in _fields(memoryview(content)) if number == _MODEL_GRAPH)
    assert isinstance(graph, memoryview)
    tensors: dict[str, Tensor] = {}
    used_by: dict[str, str] = {}
    for number, value in _fields(graph):
        if number == _GRAPH_INITIALIZER:
            name, tensor = _tensor(value)
            tensors[name] = tensor
        elif number == _GRAPH_NODE:
            parts = [(part, bytes(text).decode()) for part, text in _fields(value) if part in (1, 2)]
            output = next((text for part, text in parts if part == _NODE_OUTPUT), "")
            for part, text in parts:
                if part == _NODE_INPUT:
                    used_by.setdefault(text, output)
    return tensors, {name: used_by[name] for name in tensors if name in used_by}


def _tensor(content: memoryview) -> tuple[str, Tensor]:
    shape: list[int] = []
    name, raw = "", b""
    for number, value in _fields(content):
        if number == _TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else list(value)
        elif number == _TENSOR_NAME:
            name = bytes(value).decode()
        elif number == _TENSOR_RAW:
            raw = bytes(value)
    return name, torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(shape)


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers and values of a protobuf message."""
    place = 0

    def integer() -> int:
        nonlocal place
        result = shift = 0
        while True:
            byte = content[place]
            place += 1
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return result

    while place < len(content):
        key = integer()
        if key & 7 == 0:
            yield key >> 3, integer()
            continue
        length = {1: 8, 5: 4}.get(key & 7) or integer()
        yield key >> 3, content[place : place + length]
        place += length
