from __future__ import annotations

import pytest
from torch import nn

from genlora_lightning import AdapterSet
from genlora_lightning.injection.named import check_no_set, check_one_active, end_set, set_of
from tests.conftest import small_config


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def test_set_is_found_from_the_model_and_what_is_around_it_until_it_ends():
    model = module()
    around = nn.Sequential(model)
    assert set_of(around) is None
    adapters = AdapterSet(model)
    assert set_of(model) is adapters
    assert set_of(around) is adapters
    for number in range(5):
        adapters.add(f"a{number}", small_config(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"has an AdapterSet \(a0, a1, a2 and 2 more\)"):
        check_no_set(around)
    end_set(around)
    check_no_set(around)
    with pytest.raises(ValueError, match="is closed"):
        adapters.activate("a0")


def test_one_active_adapter_or_none_is_one():
    model = module()
    check_one_active(model)
    adapters = AdapterSet(model)
    for name in "ab":
        adapters.add(name, small_config(target_modules=["0"]))
    for which in (None, "a", {"b": 1.0}):
        adapters.activate(which)
        check_one_active(model)
    for arguments in ({"which": {"a": 2.0}}, {"which": ["a", "b"]}, {"rows": ["a", None]}):
        adapters.activate(**arguments)
        with pytest.raises(ValueError, match=r"\(a, b\) are active at once"):
            check_one_active(model)
