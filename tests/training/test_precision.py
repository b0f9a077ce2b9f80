from __future__ import annotations

import pytest
import torch

from genlora_lightning.training import precision
from genlora_lightning.training.precision import best_precision, cpu_multiplies_bfloat16


def facts(tmp_path, monkeypatch, text: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    monkeypatch.setattr(precision, "_CPU_FACTS", file)
    monkeypatch.setattr(precision.platform, "system", lambda: "Linux")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor : 0\nflags : fpu avx512f avx512_bf16 fma\n", "bf16-mixed"),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", "bf16-mixed"),
        ("Features : fp asimd i8mm bf16\n", "bf16-mixed"),
        ("flags : fpu avx512f avx512_vnni fma\n", "32-true"),
        ("", "32-true"),
    ],
)
def test_cpu_computes_in_what_it_multiplies(tmp_path, monkeypatch, text, name):
    facts(tmp_path, monkeypatch, text)
    assert best_precision("cpu").name == name
    assert cpu_multiplies_bfloat16() == (name == "bf16-mixed")


def test_systems_that_do_not_tell_are_taken_for_slow(monkeypatch):
    monkeypatch.setattr(precision.platform, "system", lambda: "Darwin")
    assert not cpu_multiplies_bfloat16()
    assert best_precision("mps").name == "32-true"


@pytest.mark.parametrize(("capability", "name"), [((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed"), ((7, 5), "32-true")])
def test_gpus_compute_in_bfloat16_where_they_have_cores_for_it(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    for accelerator in ("auto", "gpu", "cuda"):
        found = best_precision(accelerator)
        assert (found.name, found.reason.startswith("Some GPU has")) == (name, True)
