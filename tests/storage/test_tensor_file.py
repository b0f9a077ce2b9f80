from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from genlora_lightning.storage.digests import sha256, tensor_digest
from genlora_lightning.storage.tensor_file import _DTYPES, write_tensors


def test_safetensors_reads_what_was_written_in_every_dtype_and_shape(tmp_path):
    tensors = {f"ü.{name}": (torch.randn(3, 2) * 5).to(dtype) for dtype, name in _DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "transposed": torch.randn(4, 5).T}
    written = write_tensors(tmp_path / "x", tensors)
    loaded = load_file(tmp_path / "x")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].double(), tensor.double())
        assert written.digests[name] == tensor_digest(tensor) == tensor_digest(loaded[name])
    data = (tmp_path / "x").read_bytes()
    assert written.num_bytes == len(data)
    assert written.header_sha256 == sha256(data[: 8 + int.from_bytes(data[:8], "little")])


def test_digest_tells_values_shapes_and_dtypes_apart():
    tensor = torch.arange(6, dtype=torch.int32)
    others = [tensor + 1, tensor.view(2, 3), tensor.view(3, 2), tensor.view(torch.float32), tensor.long(), tensor[:5]]
    assert len({tensor_digest(t) for t in [tensor, *others]}) == 7


def test_dtype_without_a_name_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"w is torch.complex128, which safetensors files do not hold"):
        write_tensors(tmp_path / "x", {"w": torch.zeros(1, dtype=torch.complex128)})
