"""The benchmark's reader of ONNX weights, on a file written field by field."""

from __future__ import annotations

import struct

import torch

from benchmarks.quality.onnx_weights import read_weights


def integer(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return integer(number << 3 | 2) + integer(len(content)) + content


def tensor(name: str, values: list[float], shape: list[int]) -> bytes:
    dims = b"".join(integer(1 << 3) + integer(size) for size in shape)
    raw = struct.pack(f"<{len(values)}f", *values)
    return dims + integer(2 << 3) + integer(1) + field(8, name.encode()) + field(9, raw)


def test_weights_come_with_their_shapes_and_the_module_that_uses_them():
    values = [float(i) for i in range(200)]
    node = (
        field(1, b"x") + field(1, b"onnx::MatMul_7") + field(2, b"/layer.0/query/MatMul_output_0") + field(4, b"MatMul")
    )
    graph = field(1, node) + field(5, tensor("onnx::MatMul_7", values, [2, 100])) + field(5, tensor("bias", [1.0], [1]))
    model = integer(1 << 3) + integer(8) + field(2, b"pytorch") + field(7, graph)
    tensors, used_by = read_weights(model)
    assert torch.equal(tensors["onnx::MatMul_7"], torch.tensor(values).view(2, 100))
    assert torch.equal(tensors["bias"], torch.tensor([1.0]))
    assert used_by == {"onnx::MatMul_7": "/layer.0/query/MatMul_output_0"}
