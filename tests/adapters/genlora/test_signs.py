from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genlora_lightning.adapters.genlora import signs
from genlora_lightning.adapters.genlora.signs import entry_signs

CPU = torch.device("cpu")
FIRST_ROWS = ["-++--++-++-+-++--+++--+-", "+-+-----+-+--++-+++++-++", "---+++++-+++-++---+----+"]
CHECKSUM = -43252156


def test_signs_are_those_of_the_file_format():
    # What adapters on disk were trained with: another formula would turn them into noise, silently.
    rows = ["".join("+-"[int(s < 0)] for s in row) for row in entry_signs(0, 3, 1, 24, CPU)[:, 0]]
    assert rows == FIRST_ROWS
    whole = entry_signs(1, 64, 2, 1000, CPU).long()
    assert int((whole * torch.arange(1, whole.numel() + 1).view_as(whole)).sum()) == CHECKSUM


def test_half_of_the_signs_are_negative_and_the_rows_of_all_tables_are_nearly_orthogonal():
    n = 4096
    rows = torch.cat([entry_signs(table, 64, 2, n, CPU).flatten(0, 1) for table in (0, 1)]).double()
    assert set(rows.unique().tolist()) == {-1.0, 1.0}
    assert rows.mean().abs() < 0.01
    products = rows @ rows.T / n - torch.eye(256)
    assert products.abs().max() < 6 / n**0.5  # 32,640 pairs of random rows reach 4.2 / √n
    assert products.square().mean() == pytest.approx(1 / n, rel=0.05)
    columns = rows[:64].T @ rows[:64]  # a column is an entry's direction
    assert (columns - columns.diagonal().diag()).square().mean() == pytest.approx(64, rel=0.05)


def test_larger_table_begins_with_the_smaller_one():
    large = entry_signs(0, 9, 3, 50, CPU)
    assert torch.equal(large[:4, :2, :20], entry_signs(0, 4, 2, 20, CPU))
    assert not torch.equal(large[:4, :2, :20], entry_signs(1, 4, 2, 20, CPU))


def test_table_is_made_once_and_what_has_no_values_is_not_kept(monkeypatch):
    monkeypatch.setattr(signs, "_tables", {})
    with FakeTensorMode():
        entry_signs(0, 2, 1, 8, CPU)
    with torch.inference_mode():
        first = entry_signs(0, 2, 1, 8, CPU)
    assert not first.is_inference()
    assert type(first) is torch.Tensor
    assert entry_signs(0, 2, 1, 8, CPU) is first
    with FakeTensorMode():
        assert type(entry_signs(0, 2, 1, 8, CPU)) is not torch.Tensor


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_signs_are_the_same(backend):
    torch._dynamo.reset()

    @torch.compile(backend=backend, fullgraph=True)
    def negated(x):
        return -x * entry_signs(1, 5, 2, 33, x.device)

    x = torch.rand(5, 2, 33)
    assert torch.equal(negated(x), -x * entry_signs(1, 5, 2, 33, CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_signs_on_a_gpu_are_the_same():
    device = torch.device("cuda")
    assert torch.equal(entry_signs(1, 64, 2, 5000, device).cpu(), entry_signs(1, 64, 2, 5000, CPU))
