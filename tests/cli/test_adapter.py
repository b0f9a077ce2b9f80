"""The adapter's options of the command line."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from genlora_lightning.adapters.compacter import CompacterConfig
from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.adapters.polar import PoLARConfig
from genlora_lightning.cli.adapter import AdapterOptions, config_of
from genlora_lightning.injection.peft_adapters import PeftAdapter


def parsed(*arguments: str) -> object:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--adapter", type=AdapterOptions | None)
    return config_of(parser.parse_args(list(arguments)).adapter)


def test_kind_peft_takes_peft_s_own_fields():
    config = parsed("--adapter.kind=peft", '--adapter.peft={"peft_type": "vera", "r": 8, "target_modules": ["q_proj"]}')
    assert isinstance(config, PeftAdapter)
    assert config.title == "PEFT's VERA"
    assert config.values["r"] == 8
    assert config.values["target_modules"] == ["q_proj"]
    assert parsed("--adapter.kind=lora", "--adapter.rank=4") == LoRAConfig(rank=4)


def test_each_kind_has_its_fields():
    assert parsed("--adapter.kind=polar", "--adapter.landing=1") == PoLARConfig(landing=1.0)
    given = parsed("--adapter.kind=lora", "--adapter.rank=4", "--adapter.elastic=[2, 4]")
    assert given == LoRAConfig(rank=4, elastic=[2, 4])
    given = parsed("--adapter.kind=compacter", "--adapter.num_products=2", "--adapter.shared=false")
    assert given == CompacterConfig(num_products=2, shared=False)
    with pytest.raises(ValueError, match=r"Unknown LoRAConfig fields \['landing'\]"):
        parsed("--adapter.kind=lora", "--adapter.landing=1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter.kind=peft", "--adapter.rank=4"], "rank are fields of this library's kinds"),
        (["--adapter.kind=peft"], "both of them"),
        (['--adapter.peft={"peft_type": "LORA"}'], "both of them"),
        (["--adapter.kind=peft", '--adapter.peft={"peft_type": "LRA"}'], "`peft_type` must be one of PEFT's .*'LRA'"),
        (["--adapter.kind=peft", '--adapter.peft={"peft_type": "LORA", "rank": 4}'], "unexpected keyword .*'rank'"),
    ],
)
def test_what_is_not_peft_s_is_refused_by_name(arguments, words):
    with pytest.raises(ValueError, match=words):
        parsed(*arguments)
