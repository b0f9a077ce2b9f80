"""The plug-in beside a copy of vLLM's interface (0.11 to 0.20: `vllm/lora/resolver.py`, `vllm/lora/request.py`).

vLLM itself is gigabytes with the torch that it needs, and is not run here: that it loads the folders that it is given
is not shown, only that they are what PEFT loads.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from genlora_lightning import save_adapter
from genlora_lightning.interop.vllm_resolver import register
from tests.interop.test_lora_export import adapted, load_with_peft, logits
from tests.models import tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture
def vllm(monkeypatch):
    """Modules with vLLM's names; returns the resolvers that were registered."""
    registered = {}

    class LoRAResolver(ABC):
        @abstractmethod
        async def resolve_lora(self, base_model_name, lora_name): ...

    class Registry:
        def register_resolver(self, resolver_name, resolver):
            registered[resolver_name] = resolver

    @dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str = ""
        base_model_name: str | None = None

        def __post_init__(self):
            assert self.lora_int_id > 0
            assert self.lora_path

    members = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": Registry()},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
    }
    for name, values in members.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("ADAPTERS", "CACHE", "CACHE_GIB", "BASE_CHECK"):
        monkeypatch.delenv(f"GENLORA_VLLM_{name}", raising=False)
    return registered


def test_without_a_folder_nothing_is_registered_nor_imported(vllm, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", None)  # importing it fails
    register()
    assert vllm == {}


def test_requested_adapter_is_expanded_for_vllm(vllm, monkeypatch, tmp_path, caplog):
    model = adapted("llama")
    save_adapter(model, tmp_path / "adapters" / "reviews")
    tiny_llama().save_pretrained(tmp_path / "base")
    monkeypatch.setenv("GENLORA_VLLM_ADAPTERS", str(tmp_path / "adapters"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    register()
    register()  # vLLM may do so again in one process
    (resolver,) = vllm.values()
    with caplog.at_level(logging.WARNING):
        found = asyncio.run(resolver.resolve_lora(str(tmp_path / "base"), "reviews"))
        assert asyncio.run(resolver.resolve_lora(str(tmp_path / "base"), "../base")) is None
    assert caplog.text == ""
    assert found.lora_name == "reviews"
    assert Path(found.lora_path).parent == tmp_path / "home" / "genlora-lightning" / "vllm"
    assert (logits(load_with_peft(tiny_llama().eval(), found.lora_path)) - logits(model)).abs().max() <= 1e-5


def test_adapter_that_cannot_be_served_is_one_line_in_the_log_and_none(vllm, monkeypatch, tmp_path, caplog):
    save_adapter(adapted("llama"), tmp_path / "adapters" / "reviews")
    tiny_llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    monkeypatch.setenv("GENLORA_VLLM_ADAPTERS", str(tmp_path / "adapters"))
    monkeypatch.setenv("GENLORA_VLLM_CACHE", str(tmp_path / "cache"))
    register()
    (tmp_path / "adapters" / "other").mkdir()
    (tmp_path / "adapters" / "other" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with caplog.at_level(logging.WARNING):
        for name in ("reviews", "other"):
            assert asyncio.run(vllm["GenLoRA"].resolve_lora(str(tmp_path / "wide"), name)) is None
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("LoRA 'reviews' is not served: The adapter 'reviews' was trained on ")
    assert "PEFT adapter of type LORA" in second
    assert "\n" not in first + second


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ADAPTERS", "/no/such/folder", "does not exist"),
        ("CACHE_GIB", "much", "could not convert"),
        ("BASE_CHECK", "perhaps", "must be one of 'error', 'off'"),
    ],
)
def test_variables_that_cannot_be_used_stop_the_start(vllm, monkeypatch, tmp_path, variable, value, reason):
    monkeypatch.setenv("GENLORA_VLLM_ADAPTERS", str(tmp_path))
    monkeypatch.setenv(f"GENLORA_VLLM_{variable}", value)
    with pytest.raises(ValueError, match=rf"The variables GENLORA_VLLM_… for vLLM cannot be used: .*{reason}"):
        register()


def test_entry_point_names_the_function():
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^\[project.entry-points."vllm.general_plugins"\]\ngenlora = "(.+):(.+)"$', text, re.MULTILINE)
    assert found
    assert getattr(import_module(found[1]), found[2]) is register
